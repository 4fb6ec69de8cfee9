"""Whether features of a byte language model can be said in words better than its channels.

    python -m experiments.train --config=configs/lm/bytes.py:credit_router,tiny \\
        '--config.task.files=("data/english_text_1e8.xz",)' --workdir=runs/explainers_text/model
    python -m experiments.study --study=explainers_text --workdir=runs/explainers_text

As the study `explainers`, of any model of bytes that the work directory has in `model`: of text nobody knows the truth,
so no bar is fixed, and the share of units whose explanation detects them with an F1 above WELL_SAID is reported, beside
that of an explanation which says "always": a unit that fires in most windows has such an F1 without any words. The
dictionary is of m of the second layer, 512 features of which 8 a token. Units are drawn before anything is scored.
"""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common.errors import require
from experiments.evaluation import agreement, explanations
from experiments.evaluation.agreement import SITE
from experiments.evaluation.explanations import COLUMNS
from experiments.studies import dictionaries
from experiments.studies.dictionaries import SPLIT, Plan
from experiments.studies.explainers import WELL_SAID, Seen, arms, measured
from experiments.training.restore import Run, load
from seqboat.interp.explainers import Contexts, split

FOLDER = "insight"

LAYER, FEATURES, FEATURES_A_TOKEN = 2, 512, 8
BATCHES = 24  # of the test split, of which every other sequence
SHOWN = 10  # explanations in the page


def study(save: Callable[[dict[str, Any]], None], *, workdir: Path) -> None:
    """Raises UserError without a model of symbols."""
    model = load(workdir / "model")
    symbols = model.task.config.vocabulary_size is not None
    require(symbols, f"{workdir / 'model'}: its inputs are numbers, which no words describe")
    plan = Plan((), dictionary={"model.k": FEATURES_A_TOKEN})
    atoms = dictionaries.trained_atoms(plan, model, SITE, LAYER, FEATURES)
    seed, rows = model.values["seed"], []
    found = see(model, seed)
    for name, each in arms(atoms, found).items():
        rows.append({"seed": seed, "arm": name, **measured(model, LAYER, each, found, seed)})
        save({"layer": LAYER, "rows": rows, "config": model.values, "step": model.step})
        print(f"{name}: {rows[-1]['well_said']} of {rows[-1]['units']} units", flush=True)


def see(model: Run, seed: int) -> Seen:
    """Sequences of a text that share no bytes: each has those of half the one before as its context."""
    other = lambda batch: {name: np.asarray(array)[::2] for name, array in batch.items()}
    batches = [other(batch) for batch in itertools.islice(model.task.evaluation_batches(SPLIT), BATCHES)]
    tokens, lengths = (np.concatenate([batch[name] for batch in batches]) for name in ("inputs", "lengths"))
    contexts = Contexts(tokens, model.task.symbol, np.arange(tokens.shape[1]) < lengths[:, None])
    parts = explanations.halves(contexts, split(len(tokens), seed))
    return Seen(jax.tree.map(np.asarray, batches), parts, agreement.see(model, batches).m[LAYER - 1])


def section(result: Mapping[str, Any]) -> str:
    """A row for every arm, and some units of the dictionary."""
    share = f"F1 of detection > {WELL_SAID}"
    head = ["units", "alive", "a token", share, "the same for 'fires in every window'", *COLUMNS.values()]
    lines = [f"| {' | '.join(['', *head])} |", "|---" * (len(head) + 1) + "|"]
    for row in result["rows"]:
        cells = [str(row["units"]), f"{row['alive']} of {row['size']}", f"{row['l0']:.1f}"]
        cells += [f"{row[name]:.2f}" for name in ("well_said", "said_of_all")]
        lines.append(f"| {' | '.join([row['arm'], *cells, *(_number(row['scores'][name]) for name in COLUMNS)])} |")
    lines += ["", f"{SHOWN} features of the dictionary, as they were drawn:", ""]
    lines += ["| feature | in words | detection F1 | F1, natural rate | simulation |", "|---|---|---|---|---|"]
    for each in result["rows"][0]["examples"][:SHOWN]:
        scores = " | ".join(_number(each[name]) for name in ("detection_f1", "f1", "simulation"))
        lines.append(f"| {each['unit']} | {_cell(each['text'])} | {scores} |")
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _cell(text: str) -> str:
    """Inside a table, as it is: bytes may be any characters."""
    return "`" + text.replace("|", "\\|").replace("`", "'") + "`"
