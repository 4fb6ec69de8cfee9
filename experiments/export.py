"""Write a trained model as one file:  python -m experiments.export --workdir=runs/x --out=model.safetensors [--step=N]

The file holds parameters, config and versions; `experiments.load("model.safetensors")`, and the flag --workdir of
experiments.evaluate, generate and report, take it in place of a work directory. Beside it goes model.md, a model card.
--names=published writes a state dict for the published PyTorch implementation instead; the card shows how to load it.
"""

from typing import get_args

from absl import flags

from experiments.common import cli
from experiments.common.errors import UserError
from experiments.common.files import user_path
from experiments.reports.export import export
from experiments.training.exports import Names

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Work directory of the run, or an exported file; its data is not needed."
)
_OUT = flags.DEFINE_string("out", None, "Path of the file to write, NAME.safetensors.")
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; by default the best one.", lower_bound=0)
_NAMES = flags.DEFINE_enum("names", "seqboat", get_args(Names), "Whose names and layout the arrays have.")


def main() -> None:
    if not _WORKDIR.value:
        raise UserError("--workdir=DIR is missing: a directory that experiments.train made")
    if not _OUT.value:
        raise UserError("--out=FILE is missing: for instance --out=model.safetensors")
    workdir, out = user_path(_WORKDIR.value, "--workdir"), user_path(_OUT.value, "--out")
    for path in export(workdir, out, _STEP.value, published=_NAMES.value == "published"):
        print(f"wrote {path}")


if __name__ == "__main__":
    cli.run(main)
