"""The dictionaries that explain a run: one for each of some layers, of the m that its router reads, or of `gated`, what
attention has read."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.common.errors import UserError
from experiments.tasks import activations
from experiments.training.activations import made_of
from experiments.training.experiment import read_config, read_task
from experiments.training.restore import Run, load
from seqboat.interp import attribution
from seqboat.interp.attribution import Router
from seqboat.interp.dictionaries import Atoms
from seqboat.layers import taps
from seqboat.models.dictionary import Dictionary, atoms

SITE, READ = "m", "gated"
WHY = {SITE: "a router's margin is a sum over features of m", READ: "features of gated show what attention reads"}


class Given(NamedTuple):
    """A dictionary of a layer, from 1, with that layer's router of attention; `config` says which rows it learned
    from."""

    path: Path
    step: int
    config: activations.Config
    atoms: Atoms
    router: Router

    @property
    def layer(self) -> int:
        return self.config.layer

    @property
    def site(self) -> str:
        return self.config.site


def read(
    run: Run,
    paths: Sequence[Path],
    data_dir: str | None = None,
    flag: str = "--dictionaries",
    sites: Sequence[str] = (SITE,),
) -> tuple[Given, ...]:
    """Dictionaries of a run, by layer; `flag` named them. Raises UserError for a run without a router, for what is not
    a dictionary of one of the `sites` of this very step of the run, and for two of one site and layer."""
    if not paths:
        raise UserError(
            f"{flag}=DIR,DIR is missing: dictionaries of m of this run, which "
            "python -m experiments.train --config=configs/interp/dictionary.py --config.task.run=DIR trains"
        )
    check_router(run)
    if SITE in taps.written(run.variables.get("edits", {})):
        raise UserError(
            f"{run.origin} has codebooks at {SITE}: explain the run that it began from, with --codebook={run.origin}"
        )
    found: dict[tuple[int, str], Given] = {}
    for path in paths:
        given = _read(run, path, data_dir, flag, sites)
        if other := found.get((given.layer, given.site)):
            what = f"{other.path} and {path} are both of layer {given.layer}"
            raise UserError(f"{flag}: {what}" + (f", {given.site}" if len(sites) > 1 else ""))
        found[given.layer, given.site] = given
    return tuple(found[key] for key in sorted(found))


def check_router(run: Run) -> None:
    """Raises UserError for a run without a router."""
    try:
        attribution.router(run.variables, 1)
    except ValueError as error:
        raise UserError(f"the run in {run.origin}: {error}") from error


def _read(run: Run, path: Path, data_dir: str | None, flag: str, sites: Sequence[str]) -> Given:
    dictionary, where = load(path, data_dir=data_dir), f"{flag}: {path}"
    if not isinstance(dictionary.model, Dictionary):
        raise UserError(f"{where} holds a {type(dictionary.model).__name__}, not a dictionary of {' or '.join(sites)}")
    _, config = read_task(read_config(dictionary.values))
    if not isinstance(config, activations.Config) or config.site not in sites or config.target_site is not None:
        site = getattr(config, "target_site", None) or getattr(config, "site", "other data")
        raise UserError(f"{where} is of {site}: {', and '.join(WHY[each] for each in sites)}")
    if not made_of(dictionary.meta, config, run):
        at = f"step {config.step} of {config.run}"
        raise UserError(
            f"{where} is of {at}, not of step {run.step} of the run in {run.origin}, or that has changed since: "
            "take the run and the --step that it was trained on"
        )
    found = attribution.router(run.variables, config.layer)
    return Given(path, dictionary.step, config, atoms(dictionary.variables, dictionary.model.config), found)
