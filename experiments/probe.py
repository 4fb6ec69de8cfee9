"""How far gradients reach back, and how signals grow through layers, at the start of a run or of a trained one:

    python -m experiments.probe --config=configs/quickstart.py --what=reach,depth
    python -m experiments.probe --workdir=runs/x --what=reach [--step=N]

Prints a table and writes OUT.json and OUT.png; by default `probe` in the work directory, or in the current one.
"""

from pathlib import Path

from absl import flags

from experiments.common import cli, runtime
from experiments.common.errors import UserError
from experiments.common.files import refuse_unwritable, user_path, write_json
from experiments.common.provenance import command, hardware, versions
from experiments.training.restore import beside

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of a trained run, or an exported file.")
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; by default the best one.", lower_bound=0)
_WHAT = flags.DEFINE_list("what", ["reach", "depth"], "What to measure: reach, depth, or both.")
_EXAMPLES = flags.DEFINE_integer("examples", 8, "Number of examples of the first training batch.", lower_bound=1)
_DRAWS = flags.DEFINE_integer("draws", 8, "Number of random directions of the output, for reach.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of directions and differences.", lower_bound=0)
_OUT = flags.DEFINE_string("out", None, "Path of the JSON file and the picture, without suffix.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Data directory, if it has moved since training.")


def main() -> None:
    from experiments.reports import probe

    kinds, workdir = tuple(_WHAT.value or ()), _WORKDIR.value
    if not kinds or set(kinds) - set(probe.KINDS):
        raise UserError(f"--what={','.join(kinds)}: expected {' or '.join(probe.KINDS)}, or both")
    if (workdir is None) == (_CONFIG.value is None):
        raise UserError("--config=FILE or --workdir=DIR: one of them is needed, and not both")
    runtime.use_compilation_cache()
    place = None if workdir is None else user_path(workdir, "--workdir")
    out = Path("probe") if place is None else beside(place, "probe")
    out = out if _OUT.value is None else user_path(_OUT.value, "--out")
    examples = _EXAMPLES.value or 1
    if place is None:
        subject = probe.at_start(cli.read_config(_CONFIG), examples)
    else:
        subject = probe.trained(place, _STEP.value, _DATA_DIR.value, examples)
    out.parent.mkdir(parents=True, exist_ok=True)
    refuse_unwritable(out.parent)
    found = probe.measure(subject, kinds, _DRAWS.value or 1, _SEED.value or 0)
    probe.show(found)
    made = {"command": command(), "versions": versions(), "hardware": hardware()}
    write_json(Path(f"{out}.json"), {**made, **found})
    probe.draw(found, Path(f"{out}.png"))
    print(f"wrote {out}.json and {out}.png")


if __name__ == "__main__":
    cli.run(main)
