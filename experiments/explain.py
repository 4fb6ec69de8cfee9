"""Show why a trained run attends:  python -m experiments.explain --workdir=runs/x --dictionaries=runs/x_m1,runs/x_m2

The dictionaries are of m of some of its layers, or of gated for what attention reads (configs/interp/dictionary.py).
Writes WORKDIR/why.html, or --out: one self-contained file that opens in any browser; every number to a JSON file of
that name; and a line for every feature shown, with its explanation and scores, to explanations.jsonl. --explainer=URL
--explainer_model=NAME asks a language model for the words, on a server with OpenAI's chat completions; a key is read
from the environment variable SEQBOAT_EXPLAINER_KEY and never written. --against=DIR compares with another seed of the
run, with or without dictionaries of either. --codebook=DIR, a run of the same model with codebooks at m
(docs/insight.md), adds the table of codes by activation.
"""

from absl import flags

from experiments.common import cli, runtime
from experiments.common.errors import UserError
from experiments.common.files import user_path
from experiments.explaining.writer import write_explanation

_WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of the run to explain, or an exported file.")
_DICTIONARIES = flags.DEFINE_list("dictionaries", [], "Work directories of dictionaries of m or gated, one a layer.")
_AGAINST = flags.DEFINE_string("against", None, "Another run of the task, as another seed, to compare with.")
_AGAINST_DICTIONARIES = flags.DEFINE_list("against_dictionaries", [], "Dictionaries of m of that run.")
_CODEBOOK = flags.DEFINE_string("codebook", None, "Work directory of a run of this model with codebooks at m.")
_EXPLAINER = flags.DEFINE_string("explainer", "predicates", "Who explains features: predicates, or a server's URL.")
_EXPLAINER_MODEL = flags.DEFINE_string("explainer_model", None, "The language model that the server is asked for.")
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; by default the best one.", lower_bound=0)
_SPLIT = flags.DEFINE_string("split", "test", "Split of the task to explain decisions on.")
_EXAMPLES = flags.DEFINE_integer("examples", 128, "Number of examples of the split to use.", lower_bound=1)
_ELEMENT = flags.DEFINE_integer("element", None, "Element of the first example whose decision is taken apart.")
_OUT = flags.DEFINE_string("out", None, "Path of the page; by default why.html in the work directory.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Data directory, if it has moved since training.")


def main() -> None:
    if not _WORKDIR.value:
        raise UserError("--workdir=DIR is missing: a directory that experiments.train made")
    runtime.use_compilation_cache()
    page, numbers, lines = write_explanation(
        user_path(_WORKDIR.value, "--workdir"),
        [user_path(name, "--dictionaries") for name in _DICTIONARIES.value or ()],
        _SPLIT.value or "test",
        _STEP.value,
        _EXAMPLES.value or 128,
        _ELEMENT.value,
        _DATA_DIR.value,
        None if _OUT.value is None else user_path(_OUT.value, "--out"),
        None if _AGAINST.value is None else user_path(_AGAINST.value, "--against"),
        [user_path(name, "--against_dictionaries") for name in _AGAINST_DICTIONARIES.value or ()],
        None if _CODEBOOK.value is None else user_path(_CODEBOOK.value, "--codebook"),
        _EXPLAINER.value or "predicates",
        _EXPLAINER_MODEL.value,
    )
    print(f"wrote {page}, {numbers} and {lines}")


if __name__ == "__main__":
    cli.run(main)
