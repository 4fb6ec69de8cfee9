"""Norms over the model width, and batch norm over everything else. All compute in float32 with eps 1e-5.

They work on rows (B L, D): sums of products of (1, L, D) arrays are up to 60 times slower in XLA's CPU backend.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

NormKind = Literal["layer", "scale", "rms", "batch"]

EPSILON = 1e-5
# The weight of the newest batch in batch norm's running statistics.
BATCH_MOMENTUM = 0.1


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps), then scale and offset if `affine`."""

    affine: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], valid: Bool[Array, "B L"], train: bool) -> Float[Array, "B L D"]:
        y = _rows(x)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + EPSILON)
        return _affine(self, y).reshape(x.shape).astype(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), times one scale per channel if `affine`."""

    affine: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], valid: Bool[Array, "B L"], train: bool) -> Float[Array, "B L D"]:
        y = _rows(x)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + EPSILON)
        if self.affine:
            y = y * self.param("scale", nn.initializers.ones, y.shape[-1:]).astype(jnp.float32)[None]
        return y.reshape(x.shape).astype(x.dtype)


class ScaleNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) times ONE learned scalar if `affine`."""

    affine: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], valid: Bool[Array, "B L"], train: bool) -> Float[Array, "B L D"]:
        y = _rows(x)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + EPSILON)
        if self.affine:
            y = y * self.param("scale", nn.initializers.ones, ()).astype(jnp.float32)
        return y.reshape(x.shape).astype(x.dtype)


class BatchNorm(nn.Module):
    """Normalises each channel over batch and length, over valid elements only.

    Training uses the batch's statistics and moves the running mean and (unbiased) variance towards them by 0.1;
    evaluation uses the running statistics. `axes` names the mesh axes over which the batch is split. `count_padding`
    includes padding in the statistics, as the published code does.
    """

    affine: bool = True
    axes: tuple[str, ...] = ()
    count_padding: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], valid: Bool[Array, "B L"], train: bool) -> Float[Array, "B L D"]:
        y = _rows(x)
        mean = self.variable("batch_stats", "mean", jnp.zeros, y.shape[-1:], jnp.float32)
        variance = self.variable("batch_stats", "variance", jnp.ones, y.shape[-1:], jnp.float32)
        if train:
            weight = jnp.ones_like(y[:, :1]) if self.count_padding else valid.reshape(-1, 1).astype(jnp.float32)
            count = jnp.maximum(self._sum(weight)[0], 1)
            batch_mean = self._sum(y * weight) / count
            batch_variance = self._sum(jnp.square(y - batch_mean[None]) * weight) / count
            if not self.is_initializing():
                unbiased = batch_variance * count / jnp.maximum(count - 1, 1)
                mean.value += BATCH_MOMENTUM * (jax.lax.stop_gradient(batch_mean) - mean.value)
                variance.value += BATCH_MOMENTUM * (jax.lax.stop_gradient(unbiased) - variance.value)
        else:
            batch_mean, batch_variance = mean.value, variance.value
        y = (y - batch_mean[None]) * jax.lax.rsqrt(batch_variance + EPSILON)[None]
        return _affine(self, y).reshape(x.shape).astype(x.dtype)

    def _sum(self, y: Float[Array, "T D"]) -> Float[Array, "D"]:
        total = y.sum(0)
        return jax.lax.psum(total, self.axes) if self.axes else total


def _rows(x: Float[Array, "B L D"]) -> Float[Array, "T D"]:
    return x.astype(jnp.float32).reshape(-1, x.shape[-1])


def _affine(module: nn.Module, y: Float[Array, "T D"]) -> Float[Array, "T D"]:
    if not module.affine:
        return y
    scale = module.param("scale", nn.initializers.ones, y.shape[-1:])
    offset = module.param("offset", nn.initializers.zeros, y.shape[-1:])
    return y * scale.astype(jnp.float32)[None] + offset.astype(jnp.float32)[None]


NORMS: dict[str, type[nn.Module]] = {"layer": LayerNorm, "scale": ScaleNorm, "rms": RMSNorm, "batch": BatchNorm}
