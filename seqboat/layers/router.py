"""The router of sparse modular activation: which elements each module is computed for, and with what confidence."""

import dataclasses
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqboat.layers.initializers import truncated_normal
from seqboat.layers.taps import tap


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """Training of the configurator. The defaults are the published router, which gets no gradient from inactive
    elements.

    `centered` subtracts a running mean over training steps from its input. `straight_through` adds, in training, a
    credit-assignment gradient for what inactive elements would have contributed, at a random `credit_share` of them.
    `key_credit` adds one for computed elements being attended as keys, from which `eviction_cost` subtracts what the
    key was worth that an active element pushes out of a finite window (docs/router.md). `initial_bias` is added to the
    activation logit. `temperature_scale` times sqrt(D) is the initial tau. Raises ValueError for numbers out of range,
    and for `eviction_cost` without `key_credit`.
    """

    centered: bool = False
    straight_through: bool = False
    key_credit: bool = False
    eviction_cost: bool = False
    credit_share: float = 1.0
    initial_bias: float = 0.0
    temperature_scale: float = 1.0

    def __post_init__(self):
        if not 0 < self.credit_share <= 1:
            raise ValueError(f"credit_share={self.credit_share}: must be above 0 and at most 1")
        if not self.temperature_scale > 0:
            raise ValueError(f"temperature_scale={self.temperature_scale}: must be positive")
        if self.eviction_cost and not self.key_credit:
            raise ValueError("eviction_cost=True needs key_credit=True, from which it is subtracted")

    @property
    def has_credit(self) -> bool:
        return self.straight_through or self.key_credit


class Decision(NamedTuple):
    """For M modules: `active` (B, L, M) bool, `probability` of activation and `confidence` in the decision (B, L, M),
    `temperature` (M,)."""

    active: Array
    probability: Array
    confidence: Array
    temperature: Array


class ActivationStats(NamedTuple):
    """Sums over a batch's valid elements, so that means are exact: `active`, `confidence` (of active elements),
    `probability`, each (M,); `elements` (); and the `temperature` (M,)."""

    active: Array
    confidence: Array
    probability: Array
    elements: Array
    temperature: Array


class LatentConfigurator(nn.Module):
    """m (B, L, D) -> for each of M modules the decision  a = u_1 > u_0,  p = softmax(u / tau)_1,  in float32.

    `axes` names the mesh axes over which the elements are split.
    """

    modules: int
    router: RouterConfig
    axes: tuple[str, ...] = ()

    # The weight of the newest batch in the running mean, once there are enough batches.
    MOMENTUM = 0.01

    @nn.compact
    def __call__(self, m: Float[Array, "B L D"], valid: Bool[Array, "B L"], train: bool) -> Decision:
        width = m.shape[-1]
        if self.router.centered:
            m = m - self._running_mean(m, valid, train).astype(m.dtype)[None, None]
        bias = lambda key, shape, dtype: jnp.zeros(shape, dtype).at[1::2].set(self.router.initial_bias)
        u = nn.Dense(2 * self.modules, kernel_init=truncated_normal(), bias_init=bias, dtype=m.dtype, name="logits")(m)
        u = u.reshape(*m.shape[:2], self.modules, 2).astype(jnp.float32)
        start = math.log(self.router.temperature_scale * math.sqrt(width))
        temperature = jnp.exp(self.param("log_temperature", nn.initializers.constant(start), (self.modules,)))
        margin = u[..., 1] - u[..., 0]
        active = (margin > 0) & valid[..., None]
        probability = jax.nn.sigmoid(margin / temperature[None, None])
        tap(self, "router_logits", u)
        return Decision(active, probability, jnp.maximum(probability, 1 - probability), temperature)

    def _running_mean(self, m: Array, valid: Array, train: bool) -> Array:
        """The running mean of previous training batches: causal, and independent of the other sequences of the
        batch."""
        mean = self.variable("batch_stats", "mean", jnp.zeros, m.shape[-1:], jnp.float32)
        batches = self.variable("batch_stats", "batches", jnp.zeros, (), jnp.float32)
        before = mean.value
        if train and not self.is_initializing():
            total = jax.lax.stop_gradient(jnp.where(valid[..., None], m.astype(jnp.float32), 0).sum((0, 1)))
            count = valid.sum()
            total, count = jax.lax.psum((total, count), self.axes) if self.axes else (total, count)
            batch = total / jnp.maximum(count, 1)
            batches.value += 1
            mean.value += jnp.maximum(self.MOMENTUM, 1 / batches.value) * (batch - before)
        return before


def everywhere(valid: Bool[Array, "B L"], modules: int) -> Decision:
    """The decision to activate every module at every valid element, with confidence 1."""
    one = jnp.ones((*valid.shape, modules), jnp.float32)
    return Decision(one * valid[..., None] > 0, one, one, jnp.ones(modules))


def count(decision: Decision, valid: Bool[Array, "B L"]) -> ActivationStats:
    """The stats of a decision."""
    active = decision.active.astype(jnp.float32)
    sums = {"active": active, "confidence": active * decision.confidence, "probability": decision.probability}
    return ActivationStats(
        **{name: (value * valid[..., None]).sum((0, 1)) for name, value in sums.items()},
        elements=valid.sum().astype(jnp.float32),
        temperature=decision.temperature,
    )
