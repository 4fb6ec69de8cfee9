"""The router of sparse modular activation: which elements each module is computed for, and with what confidence."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqboat.choices import check_choices
from seqboat.layers import capacity
from seqboat.layers.initializers import truncated_normal
from seqboat.layers.taps import tap
from seqboat.layers.terms import term

Pattern = Literal["always", "random", "strided"]
Activation = Literal["learned", "always", "random", "strided"]


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How the router, the latent configurator, is trained. The defaults are the published router: its logits get a
    gradient from the confidence of active elements alone (and from `config.train.activation_penalty`, at all elements).

    `centered` subtracts a running mean over training steps from its input. `straight_through` adds, in training, a
    credit-assignment gradient for what inactive elements would have contributed, at a random `credit_share` of them.
    `key_credit` adds one for computed elements being attended as keys, from which `eviction_cost` subtracts what the
    key was worth that an active element pushes out of a finite window (docs/router.md). Credit is computed on a share
    `credit_sequences` of the batch, the first ones. `target_rate` is the mean activation rate of all layers of an
    `Encoder`, which `RateControl` keeps: at most that, with `rate_control` "ceiling", or "exact". `initial_bias` is
    added to the activation logit. `temperature_scale` times sqrt(D) is the initial tau.
    `rule` "margin" activates an element whose margin is positive, "capacity" (`layers.capacity`) in training the share
    `capacity` of every sequence's elements that have the largest margins, with a loss of weight `capacity_loss`.
    Raises ValueError for numbers out of range, `eviction_cost` without `key_credit`, and what the rule does not read.
    """

    centered: bool = False
    straight_through: bool = False
    key_credit: bool = False
    eviction_cost: bool = False
    credit_share: float = 1.0
    credit_sequences: float = 1.0
    target_rate: float | None = None
    rate_control: Literal["ceiling", "exact"] = "ceiling"
    initial_bias: float = 0.0
    temperature_scale: float = 1.0
    rule: Literal["margin", "capacity"] = "margin"
    capacity: float = 0.125
    capacity_loss: float = 0.01

    def __post_init__(self):
        check_choices(self)
        if self.target_rate is not None and not 0 < self.target_rate < 1:
            raise ValueError(f"target_rate={self.target_rate}: must be above 0 and below 1, or None for no target")
        if self.target_rate is None and self.rate_control != "ceiling":
            raise ValueError(f"rate_control={self.rate_control!r} needs a target_rate")
        for field in ("credit_share", "credit_sequences"):
            if not 0 < getattr(self, field) <= 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be above 0 and at most 1")
        if not self.temperature_scale > 0:
            raise ValueError(f"temperature_scale={self.temperature_scale}: must be positive")
        if self.eviction_cost and not self.key_credit:
            raise ValueError("eviction_cost=True needs key_credit=True, from which it is subtracted")

        self._check_rule()

    def _check_rule(self) -> None:
        if not 0 < self.capacity <= 1:
            raise ValueError(f"capacity={self.capacity}: must be above 0 and at most 1")
        if not self.capacity_loss >= 0:
            raise ValueError(f"capacity_loss={self.capacity_loss}: must not be negative")
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        # What the other rule does not read.
        unread = ("capacity", "capacity_loss") if self.rule == "margin" else ("target_rate", "temperature_scale")
        for field in unread:
            if (value := getattr(self, field)) != fields[field]:
                other = "capacity" if self.rule == "margin" else "margin"
                raise ValueError(f"{field}={value}: only rule={other!r} has one, and this is rule={self.rule!r}")

    @property
    def has_credit(self) -> bool:
        return self.straight_through or self.key_credit

    @property
    def controlled(self) -> tuple[float, bool] | None:
        """The activation rate asked for, and whether it is a ceiling; None if none is."""
        return None if self.target_rate is None else (self.target_rate, self.rate_control == "ceiling")


class Decision(NamedTuple):
    """For M modules: `active` (B, L, M) bool, `probability` of activation and `confidence` in the decision (B, L, M),
    `temperature` (M,), and `margin` (B, L, M), the difference of the logits before any threshold or edit."""

    active: Array
    probability: Array
    confidence: Array
    temperature: Array
    margin: Array


class ActivationStats(NamedTuple):
    """Sums over a batch's valid elements, so that means are exact: `active`, `confidence` (of active elements),
    `probability`, each (M,); `elements` (); the `temperature` (M,); and the sum of `squared_margin`s (M,)."""

    active: Array
    confidence: Array
    probability: Array
    elements: Array
    temperature: Array
    squared_margin: Array


class LatentConfigurator(nn.Module):
    """m (B, L, D) -> for each of M modules the decision  a = u_1 > u_0,  p = softmax(u / tau)_1,  in float32; or by the
    rule "capacity" (`layers.capacity`), without tau.

    A `threshold` (`RateControl`) is subtracted from u_1. Decisions do not depend on the position, so `start` is not
    used. `axes` names the mesh axes over which the elements are split. Raises ValueError for a `target_rate` without a
    threshold, as in a layer of its own, where nothing would adapt it.
    """

    modules: int
    router: RouterConfig
    axes: tuple[str, ...] = ()

    # The weight of the newest batch in the running mean, once there are enough batches.
    MOMENTUM = 0.01

    @nn.compact
    def __call__(
        self,
        m: Float[Array, "B L D"],
        valid: Bool[Array, "B L"],
        train: bool,
        threshold: Array | None = None,
        start: Any = 0,
    ) -> Decision:
        width = m.shape[-1]
        if threshold is None and self.router.target_rate is not None:
            raise ValueError(
                f"router.target_rate={self.router.target_rate}: only an Encoder keeps a rate, of its layers"
            )
        if self.router.centered:
            m = m - self._running_mean(m, valid, train).astype(m.dtype)[None, None]
        bias = lambda key, shape, dtype: jnp.zeros(shape, dtype).at[1::2].set(self.router.initial_bias)
        u = nn.Dense(2 * self.modules, kernel_init=truncated_normal(), bias_init=bias, dtype=m.dtype, name="logits")(m)
        u = u.reshape(*m.shape[:2], self.modules, 2).astype(jnp.float32)
        if self.router.rule == "capacity":
            return self._ranked(u, valid, train)
        start = math.log(self.router.temperature_scale * math.sqrt(width))
        temperature = jnp.exp(self.param("log_temperature", nn.initializers.constant(start), (self.modules,)))
        margin = u[..., 1] - u[..., 0]
        if threshold is not None:
            u = u.at[..., 1].add(-threshold)
        u = tap(self, "router_logits", u)
        excess = u[..., 1] - u[..., 0]
        active = (excess > 0) & valid[..., None]
        probability = jax.nn.sigmoid(excess / temperature[None, None])
        return Decision(active, probability, jnp.maximum(probability, 1 - probability), temperature, margin)

    def _ranked(self, u: Array, valid: Array, train: bool) -> Decision:
        """The decision by rule "capacity", with its term in training."""
        u = tap(self, "router_logits", u)
        margin = u[..., 1] - u[..., 0]
        active = (margin > 0) & valid[..., None]
        if train:
            active = capacity.largest(margin, valid, self.router.capacity)
            term(self, "capacity", self.router.capacity_loss, *capacity.disagreement(margin, active, valid))
        confidence = jax.nn.sigmoid(margin)
        return Decision(active, confidence, confidence, jnp.ones(self.modules), margin)

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


class RateControl(nn.Module):
    """One threshold T on the margins u_1 - u_0 of all layers, for a mean activation rate of `target`:

        T <- T + gain S (rate - target)       after every training batch

    with gain RAISE where the rate is above the target, else LOWER: closed slowly, layers keep time to learn which of
    them needs the share; opened fast, what was closed too far comes back within a few batches. S is the root mean
    square of all margins, so that routers cannot outgrow T by growing their logits. T follows the (1 - target) quantile
    of the margins (stochastic approximation, Robbins and Monro 1951; with a constant step it is what balances experts
    without a loss in Wang et al. 2024, arXiv 2408.15664). It depends on previous batches only, so decisions stay causal
    and independent of the other sequences of the batch, and carries no gradient. A "ceiling"
    keeps T >= 0: then a router activates less than the target if it wants to. Both are part of the checkpoint and stay
    as they are in evaluation.
    """

    target: float
    ceiling: bool = True
    axes: tuple[str, ...] = ()

    RAISE, LOWER = 0.05, 0.2
    # The weight of the newest batch in S^2, once there are enough batches.
    MOMENTUM = 0.01

    def setup(self):
        zero = lambda name: self.variable("batch_stats", name, jnp.zeros, (), jnp.float32)
        self.threshold, self.squared_margin, self.batches = map(zero, ("threshold", "squared_margin", "batches"))

    def __call__(self) -> Float[Array, ""]:
        return jax.lax.stop_gradient(self.threshold.value)

    def update(self, stats: ActivationStats) -> None:
        """Adapt T to a training batch's stats, of all layers."""
        sums = (stats.active.sum(), stats.squared_margin.sum(), stats.elements.sum() * stats.active.shape[-1])
        sums = jax.lax.psum(sums, self.axes) if self.axes else sums
        active, square, count = jax.lax.stop_gradient(sums)
        count = jnp.maximum(count, 1)
        self.batches.value += 1
        weight = jnp.maximum(self.MOMENTUM, 1 / self.batches.value)
        self.squared_margin.value += weight * (square / count - self.squared_margin.value)
        excess = active / count - self.target
        gain = jnp.where(excess > 0, self.RAISE, self.LOWER)
        step = gain * jnp.sqrt(self.squared_margin.value) * excess
        least = 0.0 if self.ceiling else -jnp.inf
        self.threshold.value = jnp.maximum(self.threshold.value + step, least)


class FixedPattern(nn.Module):
    """Decisions that do not depend on the elements, with confidence 1: controls for what a router chooses.

    "always" activates all M modules at every element, "strided" all of them at evenly spaced positions, "random" each
    at positions drawn independently, by a hash of the position and of a seed that is drawn at initialisation and
    stored. The positions are the same for every sequence, in training and evaluation, and never end.
    """

    modules: int
    pattern: Pattern
    rate: float | None = None

    @nn.compact
    def __call__(self, m: Any, valid: Bool[Array, "B L"], train: bool, threshold: Any, start: Array | int) -> Decision:
        """`start` (B, 1) or one number: the position of the first elements, modulo 2^32."""
        position = start + jnp.arange(valid.shape[1])[None]
        shape = (*valid.shape, self.modules)
        chosen = jnp.ones((*position.shape, self.modules), bool)
        if self.pattern != "always":
            parts = jnp.uint32(round((self.rate or 0) * 2**16))  # of 2^16
            chosen &= (self._draw(position.astype(jnp.uint32), parts) & 0xFFFF) < parts
        active = jnp.broadcast_to(chosen, shape) & valid[..., None]
        one = jnp.ones(shape, jnp.float32)
        return Decision(active, chosen * one, one, jnp.ones(self.modules), jnp.zeros(shape))

    def _draw(self, position: Array, parts: Array) -> Array:
        """Whole numbers (.., L, M or 1) whose last 16 bits are below `parts` at that share of 2^16 positions."""
        if self.pattern == "strided":  # t k modulo 2^16 is below k once in every 2^16 / k positions
            return (position * parts)[..., None]
        draw = lambda: jax.random.randint(self.make_rng("params"), (), 0, 2**24).astype(jnp.float32)
        key = jax.random.key(self.variable("batch_stats", "seed", draw).value.astype(jnp.uint32))
        bits = lambda at: jax.random.bits(jax.random.fold_in(key, at), (self.modules,))
        return jax.vmap(bits)(position.reshape(-1)).reshape(*position.shape, self.modules)


def make_router(
    modules: int, activation: Activation, rate: float | None, router: RouterConfig, axes: tuple[str, ...]
) -> LatentConfigurator | FixedPattern:
    """What decides for this number of modules; called within the module that owns it."""
    if activation == "learned":
        return LatentConfigurator(modules, router, axes, name="configurator")
    return FixedPattern(modules, activation, rate, name="pattern")


def count(decision: Decision, valid: Bool[Array, "B L"]) -> ActivationStats:
    """The stats of a decision."""
    active = decision.active.astype(jnp.float32)
    sums = {"active": active, "confidence": active * decision.confidence, "probability": decision.probability}
    sums["squared_margin"] = decision.margin**2
    return ActivationStats(
        **{name: (value * valid[..., None]).sum((0, 1)) for name, value in sums.items()},
        elements=valid.sum().astype(jnp.float32),
        temperature=decision.temperature,
    )


def no_decisions(elements: Float[Array, "*layers"]) -> ActivationStats:
    """The stats of layers in which nothing decides, each of this number of elements."""
    none = jnp.zeros((*elements.shape, 0))
    return ActivationStats(none, none, none, elements, none, none)
