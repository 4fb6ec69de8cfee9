"""Per-example evaluation of a split: standard errors, per-class metrics, and paired comparison of two runs."""

import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from experiments.common.errors import UserError
from experiments.training.restore import Run
from experiments.training.step import Sums
from seqboat.models.language_model import LanguageModel
from seqboat.quantization import quantized_products

# The p-value below which a paired test calls two runs different.
SIGNIFICANT = 0.05


@dataclasses.dataclass(frozen=True)
class Scores:
    """Results on a split of n examples, in order; for a language model an example is a window, or a piece of a stream.

    `total` has a pair (sum, weight) for each metric of an evaluation, `examples` a pair of (n,) arrays for each metric
    of the loss. `digests` are hashes of the full examples. `throughput` is in examples, and in non-padding elements,
    per second, including data loading and excluding the first batch, which contains the compilation.
    """

    total: Sums
    examples: Sums
    digests: tuple[bytes, ...]
    throughput: dict[str, float | None]


def score(run: Run, split: str, streams: int | None = None) -> Scores:
    """Runs a trained model over a split; in one pass with carried state if the number of `streams` is given.

    Raises UserError for an unknown or empty split, and for a model or task without streams.
    """

    @functools.partial(jax.jit, donate_argnums=2)
    def examine(variables, batch, state):
        with quantized_products():
            found = run.experiment.functions.evaluate_examples(
                variables, {**batch, "streams": state} if state else batch
            )
        return found.total, found.examples, found.streams

    state = {} if streams is None else initial_state(run, streams)
    batches = run.task.evaluation_batches(split) if streams is None else run.task.streams(split, streams)
    total: Sums | None = None
    parts: list[Sums] = []
    digests: list[bytes] = []
    counts = np.zeros(2)
    began, before = 0.0, counts
    for batch in batches:
        real = is_example(batch)
        sums, each, state = examine(run.variables, batch, state)
        # Overlaps with the device: the next batch is dispatched before this one is fetched.
        digests += [_digest(batch, row) for row in np.flatnonzero(real).tolist()]
        counts = counts + np.array([real.sum(), batch["lengths"][real].sum()])
        parts.append(jax.tree.map(lambda a, real=real: np.asarray(a, np.float64)[real], each))
        if total is None:
            jax.block_until_ready(sums)
            began, before = time.monotonic(), counts
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    if total is None:
        raise UserError("the split is empty: there is nothing to evaluate")
    total = jax.device_get(total)
    seconds = time.monotonic() - began
    rates = [float(count) / seconds if count else None for count in counts - before]
    throughput = dict(zip(("examples_per_second", "elements_per_second"), rates, strict=True))
    examples = jax.tree.map(lambda *a: np.concatenate(a), *parts)
    copies = len(run.task.evaluated()) if run.experiment.config.hypernetwork is not None else 1
    if copies > 1:  # an example evaluated at several hyper-inputs, consecutively, counts once
        examples = jax.tree.map(lambda a: a.reshape(copies, -1).sum(0), examples)
        count = len(digests) // copies
        digests = [hashlib.sha256(b"".join(digests[i::count])).digest() for i in range(count)]
    return Scores(total, examples, tuple(digests), throughput)


def initial_state(run: Run, streams: int) -> Any:
    """The initial state of N streams of a trained model. Raises UserError if it, or its task, has no streams."""
    if not (
        hasattr(run.task, "streams")
        and isinstance(run.experiment.network, LanguageModel)
        and hasattr(run.model, "initial_state")
    ):
        raise UserError(
            f"{run.values['task']['name']} with a {type(run.model).__name__} has no streams: "
            "one-pass evaluation is for language models of a corpus (configs/lm)"
        )
    try:
        # Copied, because layers share zeros and each leaf is donated.
        state = jax.tree.map(jnp.array, run.model.initial_state(streams))
    except ValueError as error:
        raise UserError(f"this model cannot be evaluated in one pass: {error}") from error
    # Committed like a step's result, or the step would be compiled twice.
    return jax.device_put(state, jax.devices()[0])


def is_example(batch: Mapping[str, np.ndarray]) -> Bool[np.ndarray, " B"]:
    """Which rows of a batch are examples: those with a weight; the others pad the last batch."""
    weights = np.asarray(batch["weights"])
    return np.any(weights.reshape(len(weights), -1) != 0, axis=1)


def standard_errors(examples: Sums) -> dict[str, float | None]:
    return {name: standard_error(*pair) for name, pair in examples.items()}


def standard_error(sums: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"]) -> float | None:
    """The standard error of the mean  m = sum_i s_i / sum_i w_i  over n independent examples, None for fewer than two:

        sqrt(n / (n - 1)  sum_i (s_i - m w_i)^2) / sum_i w_i

    With weights of 1 it is the sample standard deviation over sqrt(n); for an accuracy, sqrt(m (1 - m) / (n - 1)).
    Windows of one corpus, and pieces of a stream, are correlated with their neighbours: there it is too small.
    """
    n = len(sums)
    if n < 2:
        return None
    residual = sums - sums.sum() / weights.sum() * weights
    return float(np.sqrt(n / (n - 1) * np.square(residual).sum()) / weights.sum())


def per_class(counts: Float[np.ndarray, "Y Y"]) -> dict[str, list[float | None]]:
    """`precision`, `recall` and `support` per class, from counts of (class, answer). 0 / 0 is None."""
    right, answered, support = np.diag(counts), counts.sum(0), counts.sum(1)
    share = lambda whole: [float(a / b) if b else None for a, b in zip(right, whole, strict=True)]
    return {"precision": share(answered), "recall": share(support), "support": support.astype(float).tolist()}


def sha256(digests: tuple[bytes, ...]) -> str:
    """One hash of all examples in order."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def compare(here: Scores, there: Scores) -> dict[str, dict[str, Any]]:
    """Each metric of two runs on the same examples: `here`, `there`, the `difference`, its `standard_error`, and a
    two-sided `p_value` under the null hypothesis that both runs are equally good.

    For examples that are either right or wrong by McNemar's exact test on the counts `right_here_alone` and
    `right_there_alone`, otherwise by a paired t test of the examples' sums. Raises UserError if the examples differ.
    """
    if here.digests != there.digests:
        pairs = zip(here.digests, there.digests, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(here.digests), len(there.digests)))
        raise UserError(
            f"the examples of the two runs are not the same ({len(here.digests):,} and {len(there.digests):,} of them, "
            f"number {first} is the first that differs): compare runs with the same config.task and data"
        )
    return {
        name: _paired(here.examples[name], there.examples[name]) for name in here.examples if name in there.examples
    }


def _paired(here: tuple[Any, Any], there: tuple[Any, Any]) -> dict[str, Any]:
    from scipy import stats  # takes a second to import

    (ours, weights), (theirs, _) = here, there
    difference, error = float((ours - theirs).sum() / weights.sum()), standard_error(ours - theirs, weights)
    found: dict[str, Any] = {"here": float(ours.sum() / weights.sum()), "there": float(theirs.sum() / weights.sum())}
    found |= {"difference": difference, "standard_error": error}
    if (weights == 1).all() and np.isin([ours, theirs], (0, 1)).all():
        alone = int((ours > theirs).sum()), int((theirs > ours).sum())
        p_value = float(stats.binomtest(alone[0], sum(alone)).pvalue) if sum(alone) else 1.0
        right = {"right_here_alone": alone[0], "right_there_alone": alone[1]}
        return {**found, **right, "test": "McNemar's exact test", "p_value": p_value}
    if error is None or not math.isfinite(difference):
        return {**found, "test": "paired t test", "p_value": None}
    if error == 0:
        return {**found, "test": "paired t test", "p_value": float(difference == 0)}
    p_value = float(2 * stats.t.sf(abs(difference / error), len(ours) - 1))
    return {**found, "test": "paired t test", "p_value": p_value}


def verdict(name: str, found: Mapping[str, Any], higher_is_better: bool, examples: int) -> str:
    """One line: which of two runs is better in a metric of `compare`, and the evidence."""
    p_value, difference = found["p_value"], found["difference"]
    if p_value is None:
        said = f"no test of {name} is possible"
    elif p_value >= SIGNIFICANT:
        said = f"no significant difference in {name}"
    else:
        said = f"this run is {'better' if (difference > 0) == higher_is_better else 'worse'} in {name}"
    parts = [f"{found['here']:.4f} against {found['there']:.4f}"]
    error = found["standard_error"]
    parts.append(f"difference {difference:+.4f}" + (f" ± {error:.4f}" if error is not None else ""))
    if "right_here_alone" in found:
        parts.append(f"{found['right_here_alone']:,} right here alone, {found['right_there_alone']:,} there alone")
    if p_value is not None:
        parts.append(f"{found['test']}, p {f'= {p_value:.2g}' if p_value >= 1e-4 else '< 0.0001'}")
    return f"{said}: {'; '.join(parts)} ({examples:,} examples)"


def _digest(batch: Mapping[str, np.ndarray], row: int) -> bytes:
    """A hash of each example's full row of a batch, padding included."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(batch):
        array = np.ascontiguousarray(batch[name][row])
        digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.digest()
