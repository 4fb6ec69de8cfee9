"""Whether two runs learned the same: their units and their routing on the same inputs (`seqboat.interp.matching`).

Channels may have any sign, so they match by the size of their correlation; features of dictionaries are not negative,
and match by the correlation itself. The null is the other run's sequences turned by random offsets.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from experiments.training.restore import Run
from experiments.training.step import apply
from seqboat.interp import matching
from seqboat.layers import taps

SITE = "m"
PERIOD = 2  # of the offsets: symbols of two digits, as states of TokFSM, keep their phase
DRAWS = 20  # of turned masks


class Seen(NamedTuple):
    """What every layer of a run computes on n sequences of L elements: the values `m` (layers, n, L, D), and whether
    attention is `active` (layers, n, L)."""

    m: Float[np.ndarray, "layers n L D"]
    active: Bool[np.ndarray, "layers n L"]


def see(run: Run, batches: Iterable[Mapping[str, Any]]) -> Seen:
    """Batches of any task whose inputs the run's model can read; the run must be plain (`restore.bound`)."""
    found = [jax.device_get(_look(run.model, run.variables, batch)) for batch in batches]
    return Seen(*(np.concatenate(part, axis=1) for part in zip(*found, strict=True)))


@functools.partial(jax.jit, static_argnums=0)  # two seeds of a config share a program
def _look(model: Any, variables: Any, batch: Any) -> tuple[Array, Array]:
    _, found = apply(model, variables, batch, False, ("taps",))
    return taps.read(found["taps"], SITE).astype(jnp.float32), taps.read(found["taps"], "active")[..., 0] > 0


class Matched(NamedTuple):
    """Units of a run and those of another: `c` (P, Q) their correlations, `pairs` one to one, whose values are
    |correlation| if signs mean nothing, and the values of pairs with the turned sequences, `rolled`."""

    c: Float[np.ndarray, "P Q"]
    pairs: matching.Matching
    rolled: Float[np.ndarray, " M"]

    def values(self) -> dict[str, Any]:
        """As plain values: the number of units, means and every pair."""
        return {
            "units": list(self.c.shape),
            "mean": float(self.pairs.values.mean()),
            "rolled": float(self.rolled.mean()),
            "pairs": np.stack(self.pairs[:2], axis=1).tolist(),
            "correlations": self.pairs.values.tolist(),
            "correlations_rolled": self.rolled.tolist(),
        }


def matched(
    a: Float[np.ndarray, "n L P"],
    b: Float[np.ndarray, "n L Q"],
    valid: Bool[np.ndarray, "n L"],
    key: Array,
    signed: bool,
) -> Matched:
    """One-to-one pairs of the units of two runs at `valid` elements, which are the first of their sequences."""
    turned = matching.rolled(b, key, valid.sum(1), PERIOD)
    c, null = (matching.correlation(a[valid], other[valid]) for other in (b, turned))
    pair = lambda c: matching.one_to_one(c if signed else abs(c))
    return Matched(c, pair(c), pair(null).values)


def routing(
    a: Bool[np.ndarray, "n L"], b: Bool[np.ndarray, "n L"], valid: Bool[np.ndarray, "n L"], key: Array
) -> dict[str, Any]:
    """Whether two runs activate attention at the same `valid` elements: Cohen's kappa, the activation rates, the share
    of elements with the same decision, and kappa of DRAWS turned masks: mean, least and most."""
    first, lengths = a[valid], valid.sum(1)
    turned = (matching.rolled(b, each, lengths, PERIOD)[valid] for each in jax.random.split(key, DRAWS))
    null = [matching.kappa(first, other) for other in turned]
    return {
        "kappa": matching.kappa(first, b[valid]),
        "rates": [float(first.mean()), float(b[valid].mean())],
        "same": float((first == b[valid]).mean()),
        "rolled": {"mean": float(np.mean(null)), "least": min(null), "most": max(null)},
    }
