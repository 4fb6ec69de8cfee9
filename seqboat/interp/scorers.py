"""How right an explanation of a feature is, for any judge (Paulo et al. 2024, arXiv 2410.13928): detection, fuzzing,
simulation, and intervention.

Records are of sequences that the explanation was not made from (`explainers.split`). Every score counts the answers
that failed, and is over the others; a score that nothing determines, as of a feature without a quiet context, is NaN.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

from seqboat.interp.circuits import auc
from seqboat.interp.explainers import Contexts, Explanation, Judge, Record

CERTAIN = 0.5  # a judge says yes from this probability
MARKED = 0.3  # fuzzing marks activations from this part of the largest

Which = tuple[np.ndarray, np.ndarray]  # numbers of sequences and of their windows


class Score(NamedTuple):
    """Of yes-or-no questions: F1 if positives had their natural rate, the mean of the shares right of positives and of
    negatives, and the area under the ROC curve; the number of questions, and of those without an answer."""

    f1: float
    balanced_accuracy: float
    auc: float
    asked: int
    failed: int


class Detection(NamedTuple):
    """Positives against random quiet contexts, and against quiet contexts where the nearest atom fires; the F1 of the
    latter is at equal numbers."""

    random: Score
    near: Score


class Simulation(NamedTuple):
    """Of every element shown: the correlation of probability and activation, 0 for constant probabilities, and F1 and
    balanced accuracy of "it fires"; the number of elements, and of those without an answer."""

    correlation: float
    f1: float
    balanced_accuracy: float
    asked: int
    failed: int


def simulation(judge: Judge, explanation: Explanation, record: Record) -> Simulation:
    """Over all sequences in one, so that the rate of activation is the natural one."""
    shown = record.contexts.shown
    p, a = _answers(judge, explanation, record.contexts)[shown], record.activations[shown]
    known = np.isfinite(p)
    answers, truth = p[known], a[known]
    shares = _shares(answers, truth > 0, float((truth > 0).mean()) if known.any() else 0.0)
    return Simulation(_correlation(answers, truth), *shares, len(p), int((~known).sum()))


def detection(
    judge: Judge,
    explanation: Explanation,
    record: Record,
    near: Float[np.ndarray, "n L"] | None = None,
    *,
    width: int = 16,
    count: int = 50,
    seed: int = 0,
) -> Detection:
    """Whether the feature fires in a window of `width` tokens: where the judge's largest probability there is at least
    CERTAIN. At most `count` windows where it does, and as many where it does not: random ones, and others where the
    nearest atom, with activations `near`, fires."""
    if width < 1 or count < 1:
        raise ValueError(f"width={width}, count={count}: expected at least 1 of each")
    rng = np.random.default_rng(seed)
    there, fires = (_windows(where, width) for where in (record.contexts.shown, record.active))
    quiet = there & ~fires
    close = quiet & _windows(near > 0, width) if near is not None else np.zeros_like(quiet)
    rate = float(fires.sum() / max(there.sum(), 1))
    found = []
    for negative, natural in ((quiet, rate), (close, 0.5)):
        chosen = _balanced(rng, fires, negative, count)
        contexts = [_window(record.contexts, which, width) for which in chosen]
        p = [_largest(_answers(judge, explanation, each), each.shown) for each in contexts]
        found.append(_score(np.concatenate(p), np.arange(2 * len(p[0])) < len(p[0]), natural))
    return Detection(*found)


def fuzzing(
    judge: Judge, explanation: Explanation, record: Record, *, width: int = 16, count: int = 50, seed: int = 0
) -> Score:
    """Whether marks in a window are right: where the mean of the judge's probabilities at them is at least CERTAIN.
    Right marks are activations from MARKED of the feature's largest one; as many windows have wrong ones, as many as
    are right there, on random quiet tokens. The judge does not see the marks. F1 is at equal numbers."""
    if width < 1 or count < 1:
        raise ValueError(f"width={width}, count={count}: expected at least 1 of each")
    rng = np.random.default_rng(seed)
    active = record.active
    marked = active & (record.activations >= MARKED * record.activations.max(initial=0, where=active))
    quiet = record.contexts.shown & (record.activations == 0)
    marks_there, quiet_there = (_counts(where, width) for where in (marked, quiet))
    possible = (marks_there > 0) & (quiet_there >= marks_there)
    right, wrong = _halves(rng, possible, count)
    contexts = [_window(record.contexts, which, width) for which in (right, wrong)]
    marks = [marked[right[0]] & contexts[0].shown, np.zeros(contexts[1].shown.shape, bool)]
    for row, (sequence, shown) in enumerate(zip(wrong[0], contexts[1].shown, strict=True)):
        number = (marked[sequence] & shown).sum()
        marks[1][row, rng.choice(np.flatnonzero(quiet[sequence] & shown), number, replace=False)] = True
    p = [  # rounded, so that equal probabilities have equal means
        np.round(_answers(judge, explanation, each).sum(1, where=where) / where.sum(1), 9)
        for each, where in zip(contexts, marks, strict=True)
    ]
    return _score(np.concatenate(p), np.arange(len(p[0]) + len(p[1])) < len(p[0]), 0.5)


def intervention(effects: Float[np.ndarray, "F 2 V"]) -> Float[np.ndarray, " F"]:
    """`effects` are the changes of the mean log-probability of every symbol where a feature fires, if it is taken away
    (`seqboat.interp.edits.Without`), on two halves of the contexts. What the first half says of a feature is what the
    second shows: their rank correlation, less the mean of that with the second halves of the other features. Raises
    ValueError for fewer than two features."""
    if effects.ndim != 3 or effects.shape[1] != 2 or len(effects) < 2:
        raise ValueError(f"effects: {effects.shape}; expected (F, 2, V), of at least two features")
    ranks = rankdata(effects, axis=2) - (effects.shape[2] + 1) / 2
    ranks /= np.maximum(np.linalg.norm(ranks, axis=2, keepdims=True), 1e-12)
    c = ranks[:, 0] @ ranks[:, 1].T
    own = np.diagonal(c)
    return own - (c.sum(1) - own) / (len(c) - 1)


def nearest(decoder: Float[np.ndarray, "F W"], alive: Bool[np.ndarray, " F"] | None = None) -> Int[np.ndarray, " F"]:
    """The other atom with the largest cosine, among those `alive`. Raises ValueError if that leaves none."""
    alive = np.ones(len(decoder), bool) if alive is None else alive
    if alive.sum() < 2:
        raise ValueError(f"nearest: {int(alive.sum())} atoms are alive; expected at least two")
    rows = decoder / np.maximum(np.linalg.norm(decoder, axis=1, keepdims=True), 1e-12)
    cosine = np.where(alive[None], rows @ rows.T, -np.inf)
    np.fill_diagonal(cosine, -np.inf)
    return cosine.argmax(1)


def _answers(judge: Judge, explanation: Explanation, contexts: Contexts) -> Float[np.ndarray, "n L"]:
    """Raises ValueError for answers of another shape; what is not a probability counts as a missing one."""
    if not len(contexts.tokens):
        return np.zeros(contexts.tokens.shape)
    p = np.asarray(judge.judge(explanation, contexts), float)
    if p.shape != contexts.tokens.shape:
        raise ValueError(f"judge: answers of shape {p.shape}; expected {contexts.tokens.shape}, as the tokens")
    return np.where((p >= 0) & (p <= 1), p, np.nan)


def _score(p: Float[np.ndarray, " m"], truth: Bool[np.ndarray, " m"], rate: float) -> Score:
    """Of the answers that are finite; `rate` is that of positives, for F1."""
    known = np.isfinite(p)
    f1, balanced = _shares(p[known], truth[known], rate)
    area = np.nan if np.isnan(balanced) else auc(p[known], truth[known])
    return Score(f1, balanced, area, len(p), int((~known).sum()))


def _shares(p: Float[np.ndarray, " m"], truth: Bool[np.ndarray, " m"], rate: float) -> tuple[float, float]:
    """F1 at a rate of positives, and balanced accuracy; NaN unless there are positives and negatives."""
    if truth.all() or not truth.any():
        return np.nan, np.nan
    hit, wrong = (float((p[of] >= CERTAIN).mean()) for of in (truth, ~truth))
    return 2 * rate * hit / (rate * hit + (1 - rate) * wrong + rate), (hit + 1 - wrong) / 2


def _correlation(p: np.ndarray, a: np.ndarray) -> float:
    if len(a) < 2 or np.ptp(a) == 0:
        return float("nan")
    return float(np.corrcoef(p, a)[0, 1]) if np.ptp(p) > 0 else 0.0


def _windows(where: Bool[np.ndarray, "n L"], width: int) -> Bool[np.ndarray, "n windows"]:
    """Whether an element of each window is True; the last one may be shorter."""
    return _counts(where, width) > 0


def _counts(where: Bool[np.ndarray, "n L"], width: int) -> Int[np.ndarray, "n windows"]:
    return np.pad(where, ((0, 0), (0, -where.shape[1] % width))).reshape(len(where), -1, width).sum(2)


def _window(contexts: Contexts, which: Which, width: int) -> Contexts:
    sequences, windows = which
    inside = np.arange(contexts.tokens.shape[1]) // width == windows[:, None]
    return Contexts(contexts.tokens[sequences], contexts.symbol, contexts.shown[sequences] & inside)


def _balanced(rng: np.random.Generator, fires: np.ndarray, quiet: np.ndarray, count: int) -> tuple[Which, Which]:
    """As many windows that fire as quiet ones, at most `count` of each."""
    count = min(count, int(fires.sum()), int(quiet.sum()))
    return _draw(rng, fires, count), _draw(rng, quiet, count)


def _halves(rng: np.random.Generator, possible: np.ndarray, count: int) -> tuple[Which, Which]:
    count = min(count, int(possible.sum()) // 2)
    sequences, windows = _draw(rng, possible, 2 * count)
    return (sequences[:count], windows[:count]), (sequences[count:], windows[count:])


def _draw(rng: np.random.Generator, where: np.ndarray, count: int) -> Which:
    chosen = rng.permutation(np.flatnonzero(where))[:count]
    sequences, windows = np.unravel_index(chosen, where.shape)
    return sequences, windows


def _largest(p: Float[np.ndarray, "n L"], shown: Bool[np.ndarray, "n L"]) -> Float[np.ndarray, " n"]:
    """The largest answer of every context, NaN if one is missing."""
    return np.where(shown, p, 0).max(1, initial=0)
