"""How similar two representations of the same rows are (Kornblith et al. 2019, arXiv 1905.00414)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def cka(
    x: Float[Array, "N D"], y: Float[Array, "N E"], debiased: bool = True, valid: Bool[Array, "N"] | None = None
) -> Float[Array, ""]:
    """Linear centred kernel alignment of rows x_i and y_i,  HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),  with K = x x^T
    and L = y y^T, in float32. It ignores a rotation, a shift and a scale of x or y.

    Of few rows and many features the biased one is near 1 whatever they are. `debiased` takes HSIC_1 (Song et al. 2012,
    JMLR 13, theorem 2), whose expectation is 0 for independent rows. Only rows that are `valid` count; of fewer than 4,
    where HSIC_1 is not defined, and of rows that are all equal, the result is 0.
    """
    rows = jnp.ones(x.shape[0], bool) if valid is None else valid
    count = rows.sum().astype(jnp.float32)
    kernels = [_kernel(a, rows, count) for a in (x, y)]
    hsic = _unbiased if debiased else lambda k, l, count: (k * l).sum()
    (xx, xy), (_, yy) = ([hsic(k, l, count) for l in kernels] for k in kernels)
    defined = (xx > 0) & (yy > 0) & (count > (3 if debiased else 0))
    # Where it is not defined the gradient must not be NaN either.
    scale = jnp.where(defined, xx, 1) ** 0.5 * jnp.where(defined, yy, 1) ** 0.5
    return jnp.where(defined, xy, 0) / scale


def _kernel(x: Float[Array, "N D"], rows: Bool[Array, "N"], count: Float[Array, ""]) -> Float[Array, "N N"]:
    """Of centred rows, zero for those that do not count. HSIC_1 does not need the centre; rounding does."""
    x = jnp.where(rows[:, None], x.astype(jnp.float32), 0)
    x = jnp.where(rows[:, None], x - x.sum(0, keepdims=True) / jnp.maximum(count, 1), 0)
    return x @ x.T


def _unbiased(k: Float[Array, "N N"], l: Float[Array, "N N"], n: Float[Array, ""]) -> Float[Array, ""]:
    """n (n - 3) HSIC_1 = tr(K L) + sum(K) sum(L) / ((n - 1)(n - 2)) - 2 sum(K L) / (n - 2), with zero diagonals."""
    k, l = (a * (1 - jnp.eye(len(a))) for a in (k, l))
    n = jnp.maximum(n, 4)
    across = (k.sum(1) * l.sum(1)).sum()
    return (k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * across / (n - 2)
