"""InfoMEC: how the latents of a code relate to known sources (Hsu et al. 2023, arXiv 2305.18378).

With  NMI_ij = I(s_i; z_j) / H(s_i)  of S sources and J active latents, entropies in nats:

    InfoM  modularity    the mean over j of  (max_i NMI_ij / sum_i NMI_ij - 1/S) / (1 - 1/S):  a latent is of one source
    InfoC  compactness   the mean over i of  (max_j NMI_ij / sum_j NMI_ij - 1/J) / (1 - 1/J):  a source is in one latent
    InfoE  explicitness  the mean over i of  1 - H_probe(s_i | z) / H(s_i):  a linear probe reads the source

All are in 0..1. What tells nothing scores 0: a latent or a source without information, one source or one active latent
alone, a probe that does worse than the frequencies of the values. Sources should be independent, or modularity and
compactness blame the code for what the sources share.

Noise is not 0: mutual information is never negative, and of chance values one is the largest. Compare with latents
whose rows are permuted.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

BINS = 10  # quantiles that continuous latents are cut at
LEAST_SPAN = 1 / 20  # of the widest latent: narrower continuous ones are not active
RIDGE = 1e-3
MOST_STEPS = 200
SMALL_GRADIENT = 1e-5


class InfoMEC(NamedTuple):
    """The three scores, `nmi` (S, J) of every source and latent, 0 where the latent is not active, and which latents
    are `active` (J,)."""

    m: float
    c: float
    e: float
    nmi: Float[np.ndarray, "S J"]
    active: Bool[np.ndarray, " J"]


def infomec(sources: ArrayLike, latents: ArrayLike, discrete: bool) -> InfoMEC:
    """Scores of n rows: `sources` (n, S), whose values are labels; `latents` (n, J), whose values are labels too in
    mutual information if `discrete`, else cut at 10 quantiles. A latent that never varies is not active, nor a
    continuous one that spans less than 1/20 of the widest.

    The probe reads numbers, of both kinds of latents. It is fitted on a random half of the rows and scored on the
    other, so give every row once: a repeated one may be in both.

    Raises ValueError for arrays that are not (n, S) and (n, J), or have less than 2 rows, no column or NaN, and for a
    source that never varies.
    """
    labels, z = _checked(sources, latents)
    span = np.ptp(z, axis=0)
    active = span > 0 if discrete else span > LEAST_SPAN * span.max()
    codes = [_labels(column) if discrete else quantiles(column) for column in z.T]
    nmi = np.array([[information(s, code) / entropy(s) for code in codes] for s in labels.T]) * active
    e = np.mean([explicitness(z * active, s) for s in labels.T]) if active.any() else 0.0
    told = nmi[:, active]
    return InfoMEC(_concentration(told, axis=0), _concentration(told, axis=1), float(e), nmi, active)


def entropy(labels: Int[np.ndarray, " n"]) -> float:
    """H(s) in nats, of labels 0, 1, ..."""
    p = np.bincount(labels) / len(labels)
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def information(a: Int[np.ndarray, " n"], b: Int[np.ndarray, " n"]) -> float:
    """I(a; b) in nats, of labels 0, 1, ...: H(a) + H(b) - H(a, b)."""
    return max(entropy(a) + entropy(b) - entropy(a * (b.max() + 1) + b), 0.0)


def quantiles(z: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """In which of BINS parts, with as many rows in each as ties allow, a value is."""
    return np.searchsorted(np.quantile(z, np.arange(1, BINS) / BINS), z, side="right")


def explicitness(z: Float[np.ndarray, "n J"], labels: Int[np.ndarray, " n"]) -> float:
    """1 - H_probe(s | z) / H(s), at least 0: the probe of one random half of the rows, scored on the other."""
    order = np.random.default_rng(0).permutation(len(z))
    fit, held_out = np.array_split(order, 2)
    centre, scale = z[fit].mean(0), z[fit].std(0)
    x = ((z - centre) / np.where(scale > 0, scale, 1)).astype(np.float32)
    kernel, bias = probe(x[fit], labels[fit], int(labels.max()) + 1)
    loss = cross_entropy(kernel, bias, x[held_out], labels[held_out])
    return max(1 - float(loss) / entropy(labels), 0.0)


@functools.partial(jax.jit, static_argnums=2)
def probe(
    x: Float[Array | np.ndarray, "n J"], labels: Int[Array | np.ndarray, " n"], classes: int
) -> tuple[Float[Array, "J K"], Float[Array, " K"]]:
    """Multinomial logistic regression: the kernel W and bias b with the least  cross-entropy + RIDGE / 2 |W|^2."""

    # One array: two compile far slower.
    split = lambda weights: (weights[:-1], weights[-1])

    def loss(weights):
        kernel, bias = split(weights)
        return cross_entropy(kernel, bias, x, labels) + RIDGE / 2 * jnp.square(kernel).sum()

    optimizer = optax.lbfgs()
    value_and_gradient = optax.value_and_grad_from_state(loss)

    def unfinished(carry):
        _, state = carry
        count, gradient = (optax.tree.get(state, name) for name in ("count", "grad"))
        return (count == 0) | ((count < MOST_STEPS) & (optax.tree.norm(gradient) > SMALL_GRADIENT))

    def step(carry):
        weights, state = carry
        value, gradient = value_and_gradient(weights, state=state)
        updates, state = optimizer.update(gradient, state, weights, value=value, grad=gradient, value_fn=loss)
        return optax.apply_updates(weights, updates), state

    start = jnp.zeros((x.shape[1] + 1, classes))
    return split(jax.lax.while_loop(unfinished, step, (start, optimizer.init(start)))[0])


def cross_entropy(kernel: Array, bias: Array, x: ArrayLike, labels: ArrayLike) -> Float[Array, ""]:
    """The mean of -ln p(label), in nats."""
    logits = x @ kernel + bias[None]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _concentration(nmi: Float[np.ndarray, "S J"], axis: int) -> float:
    """The mean of  (max / sum - 1/N) / (1 - 1/N)  over an axis of N entries; 0 where they are all 0, or N < 2."""
    count = nmi.shape[axis]
    if count < 2 or not nmi.size:
        return 0.0
    total = nmi.sum(axis)
    share = np.where(total > 0, nmi.max(axis) / np.where(total > 0, total, 1), 1 / count)
    return float(((share - 1 / count) / (1 - 1 / count)).mean())


def _labels(column: np.ndarray) -> Int[np.ndarray, " n"]:
    return np.unique(column, return_inverse=True)[1]


def _checked(sources: ArrayLike, latents: ArrayLike) -> tuple[Int[np.ndarray, "n S"], Float[np.ndarray, "n J"]]:
    """The sources as labels 0, 1, ..., and the latents as numbers."""
    s, z = np.asarray(sources), np.asarray(latents)
    for name, array in (("sources", s), ("latents", z)):
        if array.ndim != 2 or not array.shape[1]:
            raise ValueError(f"{name} {array.shape}: must be (rows, columns), with one column or more")
    if len(s) != len(z):
        raise ValueError(f"sources {s.shape} and latents {z.shape}: must have as many rows")
    if len(s) < 2:
        raise ValueError(f"sources {s.shape}: one row tells nothing; at least 2 are needed")
    z = z.astype(np.float64)
    for name, array in (("sources", s), ("latents", z)):
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{name}: row {np.argwhere(~np.isfinite(array))[0, 0]} is not finite")
    labels = np.stack([_labels(column) for column in s.T], axis=1)
    if constant := np.flatnonzero(labels.max(0) == 0).tolist():
        raise ValueError(f"sources: column {constant[0]} never varies, so that nothing can be told of it; leave it out")
    return labels, z
