"""Dictionaries of a vector: sparse features f >= 0 and unit atoms d_i with  x = sum_i f_i d_i + offset + error.

What sparse autoencoders (Kissane et al. 2024, arXiv 2406.17759), top-k (Gao et al. 2024, arXiv 2406.04093) and batch
top-k (Bussmann et al. 2024, arXiv 2412.06410) ones, and top-AFA (Lee et al. 2025, arXiv 2503.24277) share.
`seqboat.models.dictionary` trains them.

A selection keeps the features of a row that reach a threshold, found without sorting, which is slow on a CPU: by as
many maxima as are kept if those are few; else by 31 halvings of an integer, as the bits of numbers >= 0 are ordered
like the numbers. Equal features are kept or left out together.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Select = Literal["relu", "top_k", "batch_top_k", "norm"]
SELECTIONS = get_args(Select)

Features = Float[Array, "*B F"]
Rows = Float[Array, "*B"]


# Up to which k maxima are faster than halvings.
FEW = 8


def top_k(f: Features, k: int) -> Features:
    """The features of a row, given as numbers >= 0, that reach its k-th largest."""
    if k > FEW:
        search = lambda f: _keep(f, _largest_bits(f, lambda kept: kept.sum(-1) >= k))
        return jax.lax.cond(((f > 0).sum(-1) > k).any(), search, lambda f: f, f)  # rows of k or fewer keep all
    least = jnp.full((*f.shape[:-1], 1), jnp.inf)
    number = jnp.zeros(least.shape, jnp.int32)  # how many reach the least, as equal ones may be several
    for _ in range(k):
        below = jnp.where(f < least, f, 0).max(-1, keepdims=True)
        least = jnp.where(number < k, below, least)
        number = (f >= least).sum(-1, keepdims=True)
    return jnp.where(f >= least, f, 0)


def batch_top_k(f: Features, k: int) -> tuple[Features, Float[Array, ""]]:
    """The features that reach the (k rows)-th largest of the whole batch, and the least of them."""
    count = k * (f.size // f.shape[-1])
    bits = _largest_bits(f.reshape(-1), lambda kept: kept.sum() >= count)
    kept = _keep(f.reshape(-1), bits).reshape(f.shape)
    least = jnp.where(kept > 0, kept, jnp.inf).min()
    return kept, jnp.where(jnp.isfinite(least), least, 0.0)


def by_norm(f: Features, norm: Rows) -> Features:
    """top-AFA: the largest features of a row, at least one, so that |f| is as near as possible to its `norm`.

    With atoms of unit length that are nearly orthogonal, |f| is about the norm of what the features stand for.
    """
    squares = jnp.square(f)
    total = lambda kept: jnp.where(kept, squares, 0).sum(-1)
    wanted = jnp.maximum(jnp.square(norm), jnp.finfo(jnp.float32).tiny)  # no row wants nothing
    bits = _largest_bits(f, lambda kept: total(kept) >= wanted)  # the fewest that reach the norm
    above = lambda bits: jnp.sqrt(total(_bits(f) >= bits[..., None]))
    more, fewer = above(bits), above(bits + 1)
    nearer = (norm - fewer < more - norm) & (fewer > 0)
    return _keep(f, jnp.where(nearer, bits + 1, bits))


def _bits(f: Float[Array, "*B"]) -> Int[Array, "*B"]:
    return jax.lax.bitcast_convert_type(f.astype(jnp.float32), jnp.int32)


def _largest_bits(f: Features, enough: Callable[[Array], Array]) -> Int[Array, "*B"]:
    """The largest threshold, as bits, at which what reaches it is enough; 0 where nothing is."""
    bits = _bits(f)
    shape = jax.eval_shape(enough, jax.ShapeDtypeStruct(f.shape, bool)).shape

    def halve(step: Array, low: Array) -> Array:
        threshold = low | (1 << (30 - step))
        return jnp.where(enough(bits >= threshold[..., None]), threshold, low)

    return jax.lax.fori_loop(0, 31, halve, jnp.zeros(shape, jnp.int32))


def _keep(f: Features, bits: Int[Array, "*B"]) -> Features:
    return jnp.where(_bits(f) >= bits[..., None], f, 0)


@flax.struct.dataclass
class Atoms:
    """A trained dictionary of F atoms: x (W,) -> features (F,) -> a reconstruction (W',), in the units of x.

        f = S(relu((x - centre) E + bias))        x^ = f D + offset,   the rows of D of length 1

    S is `select`, with k features a row, or for "batch_top_k" those above the `threshold`, as no row may depend on
    others here. In an edit for all layers (`seqboat.interp.edits.at`) the arrays have a leading axis of layers.
    """

    # Not checked, as jax also makes trees of None and of shapes from it.
    encoder: Any  # (W, F)
    bias: Any  # (F,)
    decoder: Any  # (F, W')
    centre: Any  # (W,)
    offset: Any  # (W',)
    threshold: Any  # ()
    select: Select = flax.struct.field(pytree_node=False, default="top_k")
    k: int = flax.struct.field(pytree_node=False, default=8)

    def encode(self, x: Float[Array, "*B W"]) -> Features:
        """The features of every row."""
        z = x - jnp.broadcast_to(self.centre, x.shape)
        f = z @ self.encoder
        f = jax.nn.relu(f + jnp.broadcast_to(self.bias, f.shape))
        if self.select == "top_k":
            return top_k(f, self.k)
        if self.select == "batch_top_k":
            return jnp.where(f >= self.threshold, f, 0)
        return by_norm(f, jnp.linalg.norm(z, axis=-1)) if self.select == "norm" else f

    def decode(self, f: Features) -> Float[Array, "*B Y"]:
        """The reconstruction of every row."""
        x = f @ self.decoder
        return x + jnp.broadcast_to(self.offset, x.shape)


class Health(NamedTuple):
    """How good a dictionary is on N rows.

    `nmse` |x - x^|^2 over that of their mean; `l0` features a row; `dead`, the share of features that no row has;
    `coherence`, the largest |<d_i, d_j>| of two atoms; `norms` (N, 2) of x - centre and of f, which agree if the atoms
    in use are nearly orthogonal; `deviation`, the mean of  | |x|^2 - |f|^2 | / ((F - 1) |f|^2),  a lower bound on the
    mean |<d_i, d_j>| of those (Lee et al. 2025), 0 for rows without features.
    """

    nmse: Array
    l0: Array
    dead: Array
    coherence: Array
    norms: Float[Array, "N 2"]
    deviation: Array


def health(atoms: Atoms, x: Float[Array, "N W"], targets: Float[Array, "N Y"] | None = None) -> Health:
    """`targets` are what is reconstructed, by default x itself."""
    targets = x if targets is None else targets
    f = atoms.encode(x)
    error = jnp.square(targets - atoms.decode(f)).sum()
    products = jnp.abs(atoms.decoder @ atoms.decoder.T)
    norms = jnp.stack([jnp.linalg.norm(x - atoms.centre[None], axis=1), jnp.linalg.norm(f, axis=1)], axis=1)
    squares = jnp.square(norms)
    bound = jnp.abs(squares[:, 0] - squares[:, 1]) / (max(f.shape[1] - 1, 1) * squares[:, 1])
    return Health(
        nmse=error / jnp.square(targets - targets.mean(0, keepdims=True)).sum(),
        l0=(f > 0).sum(1).mean(),
        dead=1 - (f > 0).any(0).mean(),
        coherence=jnp.fill_diagonal(products, 0.0, inplace=False).max(),
        norms=norms,
        deviation=jnp.where(squares[:, 1] > 0, bound, 0.0).mean(),
    )
