"""What a feature fires on, in words: explainers, and judges that predict a feature from its words alone.

The protocols of automatic interpretation (Paulo et al. 2024, arXiv 2410.13928); `seqboat.interp.scorers` scores them.
`PredicateExplainer` and `RuleJudge` need no language model.

    contexts = Contexts(tokens, task.symbol)
    explanation = PredicateExplainer().explain(Record(contexts, activations))
    p = RuleJudge().judge(explanation, other_contexts)

Everything that does not fit raises ValueError.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from seqboat.interp.predicates import Predicate, Rule, Symbol, Table, candidates

MOST_ELEMENTS = 2**18  # that a rule is fitted to; of more, evenly spaced sequences


@dataclasses.dataclass(frozen=True, eq=False)
class Contexts:
    """`tokens` (n, L), symbols >= 0 from the start of their sequences, whose text is `symbol(number)`. What is asked
    for are the elements `shown` (n, L), by default all; without padding. The arrays must not change afterwards."""

    # Checked below, in words for a user.
    tokens: np.ndarray  # (n, L)
    symbol: Symbol
    shown: Any = None  # (n, L)

    def __post_init__(self) -> None:
        tokens = np.asarray(self.tokens)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or tokens.min(initial=0) < 0:
            raise ValueError(
                f"tokens: {tokens.dtype} {tokens.shape}; expected symbols (n, L), integers >= 0: inputs that are "
                "numbers cannot be explained in words"
            )
        shown = np.ones(tokens.shape, bool) if self.shown is None else np.asarray(self.shown)
        if shown.shape != tokens.shape or shown.dtype != bool:
            raise ValueError(f"shown: {shown.dtype} {shown.shape}; expected booleans {tokens.shape}, as the tokens")
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "shown", shown)

    @functools.cached_property
    def table(self) -> Table:
        """What predicates are read from."""
        return Table(self.tokens, self.symbol)

    def rows(self, which: np.ndarray) -> "Contexts":
        """Some of the sequences, by number or as booleans (n,)."""
        return Contexts(self.tokens[which], self.symbol, self.shown[which])


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """What one feature does in contexts: `activations` (n, L) >= 0, where 0 is quiet. Features of the same tokens
    should share their contexts, whose table is then made once."""

    contexts: Contexts
    activations: np.ndarray  # (n, L)

    def __post_init__(self) -> None:
        a, shape = np.asarray(self.activations), self.contexts.tokens.shape
        numbers = a.shape == shape and a.dtype.kind in "fiub"
        if not numbers or not np.isfinite(a).all() or a.min(initial=0) < 0:
            raise ValueError(f"activations: {a.dtype} {a.shape}; expected finite numbers >= 0, {shape} as the tokens")
        object.__setattr__(self, "activations", a)

    @property
    def active(self) -> Bool[np.ndarray, "n L"]:
        """The elements shown where the feature fires."""
        return self.contexts.shown & (self.activations > 0)


class Explanation(NamedTuple):
    """Words for people and language models, and a rule for programs. `text` "" means that there is no explanation."""

    text: str
    rule: Rule | None = None


@runtime_checkable
class Explainer(Protocol):
    """Whatever says what a feature fires on."""

    def explain(self, record: Record) -> Explanation: ...


@runtime_checkable
class Judge(Protocol):
    """Whatever predicts a feature from its explanation: for every element shown the probability (n, L) that the feature
    fires there, NaN where there is no answer."""

    def judge(self, explanation: Explanation, contexts: Contexts) -> Float[np.ndarray, "n L"]: ...


def split(sequences: int, seed: int, share: float = 0.5) -> Bool[np.ndarray, " n"]:
    """The sequences that explanations are made from, a random `share`; the others score them. To be drawn before any
    feature is chosen. Both parts have at least one sequence. Raises ValueError for fewer than two."""
    if sequences < 2 or not 0 < share < 1:
        raise ValueError(f"split: {sequences} sequences, share={share}; expected at least 2, and 0 < share < 1")
    count = min(max(round(share * sequences), 1), sequences - 1)
    chosen = np.random.default_rng(seed).permutation(sequences)[:count]
    return np.isin(np.arange(sequences), chosen)


@dataclasses.dataclass(frozen=True)
class PredicateExplainer:
    """A union of at most `rules` conjunctions of one or two predicates, each the one that raises F1 most, none that
    raises it by less than `gain`; of equal ones the shorter, then the first. Deterministic.

    `most` is the number of symbols and pairs of each lag that are tried (`predicates.candidates`).
    """

    rules: int = 3
    gain: float = 0.01
    most: int = 12

    def __post_init__(self) -> None:
        if self.rules < 1 or self.most < 1:
            raise ValueError(f"rules={self.rules}, most={self.most}: expected at least 1 of each")
        if not self.gain >= 0:  # nor NaN, above which nothing is
            raise ValueError(f"gain={self.gain}: expected a number of at least 0")

    def explain(self, record: Record) -> Explanation:
        """Of a feature that never fires the rule holds nowhere."""
        contexts = record.contexts
        stride = max(1, -(-contexts.shown.size // MOST_ELEMENTS))
        thin = np.arange(contexts.shown.shape[0]) % stride == 0
        shown, active = contexts.shown & thin[:, None], record.active & thin[:, None]
        if not active.any():
            return Explanation("it never fires", Rule())
        found = candidates(contexts.table, active, shown, self.most)
        rule = self._fit(found, np.stack([each.holds(contexts.table)[shown] for each in found]), active[shown])
        return Explanation(rule.say(contexts.symbol) or "nothing that the predicates can say", rule)

    def _fit(self, found: list[Predicate], holds: Bool[np.ndarray, "P N"], active: Bool[np.ndarray, " N"]) -> Rule:
        """By how many elements every two predicates share, of all and of active ones that no clause has yet."""
        covered, clauses, best = np.zeros(len(active), bool), [], 0.0
        several = ~np.eye(len(found), dtype=bool)
        for _ in range(self.rules):
            together, right = _shared(holds[:, ~covered]), _shared(holds[:, active & ~covered])
            f1 = 2 * (right + (covered & active).sum()) / (together + covered.sum() + active.sum())
            f1 = np.triu(f1 - 1e-6 * several)
            i, j = (int(n) for n in np.unravel_index(int(f1.argmax()), f1.shape))
            if f1[i, j] < best + self.gain:
                break
            best = float(f1[i, j])
            clauses.append(tuple(found[n] for n in dict.fromkeys((i, j))))
            covered |= holds[i] & holds[j]
        return Rule(tuple(clauses))


def _shared(holds: Bool[np.ndarray, "P N"]) -> Int[np.ndarray, "P P"]:
    """The number of elements where two predicates hold, for all pairs: of bits, for a product of matrices takes ten
    times as long."""
    bits = np.packbits(np.pad(holds, ((0, 0), (0, -holds.shape[1] % 64))), axis=1)
    packed = np.ascontiguousarray(bits).view(np.uint64)
    return np.stack([np.bitwise_count(packed & row).sum(1, dtype=np.int64) for row in packed])


@dataclasses.dataclass(frozen=True)
class RuleJudge:
    """1 where the rule of an explanation holds and 0 elsewhere; no answer without a rule. Unlike a reader of the text
    it sees the tokens before those shown."""

    def judge(self, explanation: Explanation, contexts: Contexts) -> Float[np.ndarray, "n L"]:
        if explanation.rule is None:
            return np.full(contexts.tokens.shape, np.nan)
        return explanation.rule.holds(contexts.table).astype(float)
