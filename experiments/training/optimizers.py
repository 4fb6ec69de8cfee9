"""AdamW and RAdam as the recipes use them, and SGD; groups of parameters by path; two learning-rate schedules."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.common.errors import UserError

# Keeps the clipping factor finite, as in fairseq's clip_grad_norm_.
CLIP_EPSILON = 1e-6
# RAdam rectifies its steps where the variance of the adaptive rate has at least this many degrees (Liu et al. 2020).
RECTIFIABLE = 5.0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """`learning_rate` is the peak; warm-up takes `warmup_steps` from `warmup_start` with power `warmup_power`.

    `weight_decays` and `learning_rate_scales` are ((regex, value), ...) on parameter paths like
    "encoder/layers/ssm/delta"; the last that matches holds, and one that matches nothing is an error. `clip_norm` is
    the greatest norm of all gradients together; None does not clip.
    """

    name: Literal["adamw", "radam", "sgd"] = "adamw"
    learning_rate: float = 4e-3
    schedule: Literal["linear", "cosine"] = "linear"
    warmup_steps: int = 1000
    warmup_start: float = 1e-7
    warmup_power: float = 1.0
    final_learning_rate: float = 0.0
    b1: float = 0.9
    b2: float = 0.98
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    weight_decays: tuple = ()
    learning_rate_scales: tuple = ()
    clip_norm: float | None = 1.0

    def __post_init__(self):
        for field in ("learning_rate", "epsilon", "warmup_power"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field}={getattr(self, field)}: must be positive")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm={self.clip_norm}: must be positive, or None for no limit")
        for field in ("b1", "b2"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be in [0, 1)")
        for field in ("warmup_steps", "warmup_start", "final_learning_rate", "weight_decay"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field}={getattr(self, field)}: must not be negative")


def learning_rate(config: OptimizerConfig, steps: int) -> Callable[[Any], Any]:
    """Number of finished updates t -> rate.  With warm-up W, peak r, start s, end e and total T:

    t <= W:  s + t^P (r - s) / W^P.   After it, linear: e + (r - e)(T - t) / (T - W); cosine: half a period from r to e.
    """
    peak, warm, end = config.learning_rate, config.warmup_steps, config.final_learning_rate

    def rate(t):
        t = jnp.asarray(t, jnp.float32)
        rising = config.warmup_start + (t / max(warm, 1)) ** config.warmup_power * (peak - config.warmup_start)
        left = jnp.clip((steps - t) / max(steps - warm, 1), 0, 1)
        if config.schedule == "cosine":
            left = 0.5 * (1 - jnp.cos(jnp.pi * left))
        return jnp.where(t < warm, rising, end + (peak - end) * left)

    return rate


def make_optimizer(config: OptimizerConfig, steps: int, params: Any) -> optax.GradientTransformation:
    """p <- p - rate(t) scale (adam(g) + decay p), gradients clipped by their global norm before, if there is a limit.

    `params`, or their shapes, tell which paths the groups select.
    """
    scales = by_path(params, config.learning_rate_scales, 1.0, "learning_rate_scales")
    decays = by_path(params, config.weight_decays, config.weight_decay, "weight_decays")
    rate = learning_rate(config, steps)

    def init(params):
        return AdamState(jnp.zeros((), jnp.int32), *(jax.tree.map(jnp.zeros_like, params) for _ in range(2)))

    def update(gradients, state, params):
        if config.clip_norm is not None:
            factor = jnp.minimum(1.0, config.clip_norm / (optax.tree.norm(gradients) + CLIP_EPSILON))
            gradients = jax.tree.map(lambda g: g * factor, gradients)
        direction, new = adam_direction(config, gradients, state)
        updates = jax.tree.map(
            lambda u, p, scale, decay: -rate(state.count) * scale * (u + decay * p), direction, params, scales, decays
        )
        return updates, new

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


class AdamState(NamedTuple):
    count: Any
    first: Any
    second: Any


def adam_direction(config: OptimizerConfig, gradients: Any, state: AdamState) -> tuple[Any, AdamState]:
    """Adam's step without its rate; epsilon is added to the root of the uncorrected second moment, as in fairseq.

    With "radam" the step is rectified by the variance of the adaptive rate, and plain momentum while that is too small.
    With "sgd" it is  m <- b1 m + g  alone.
    """
    b1, b2 = config.b1, config.b2
    if config.name == "sgd":
        first = jax.tree.map(lambda m, g: b1 * m + g, state.first, gradients)
        return first, AdamState(state.count + 1, first, state.second)
    t = (state.count + 1).astype(jnp.float32)
    first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.first, gradients)
    second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.second, gradients)
    size = jnp.sqrt(1 - b2**t) / (1 - b1**t)
    adapted = lambda size: jax.tree.map(lambda m, v: size * m / (jnp.sqrt(v) + config.epsilon), first, second)
    new = AdamState(state.count + 1, first, second)
    if config.name == "adamw":
        return adapted(size), new
    most = 2 / (1 - b2) - 1
    degrees = most - 2 * t * b2**t / (1 - b2**t)
    safe = jnp.maximum(degrees, RECTIFIABLE)
    rectified = jnp.sqrt((safe - 4) * (safe - 2) * most / ((most - 4) * (most - 2) * safe))
    plain = jax.tree.map(lambda m: m / (1 - b1**t), first)
    enough = degrees >= RECTIFIABLE
    return jax.tree.map(lambda a, b: jnp.where(enough, a, b), adapted(size * rectified), plain), new


def by_path(tree: Any, rules: tuple, default: float, where: str) -> Any:
    """One number a leaf: the value of the last rule (regex, value) whose regex is found in the leaf's path."""
    for rule in rules:
        pair = isinstance(rule, tuple | list) and len(rule) == 2
        if not pair or not isinstance(rule[0], str) or not isinstance(rule[1], int | float):
            raise UserError(f"config.optimizer.{where}: {rule!r} is not a pair of a regular expression and a number")
    try:
        patterns = [(re.compile(pattern), float(value)) for pattern, value in rules]
    except re.error as error:
        raise UserError(f"config.optimizer.{where}: {error.pattern!r} is no regular expression: {error}") from error
    used: set[str] = set()
    paths = []

    def value_of(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        paths.append(name)
        value = default
        for pattern, candidate in patterns:
            if pattern.search(name):
                used.add(pattern.pattern)
                value = candidate
        return value

    values = jax.tree_util.tree_map_with_path(value_of, tree)
    for pattern, _ in patterns:
        if pattern.pattern not in used:
            raise UserError(
                f"config.optimizer.{where}: {pattern.pattern!r} matches no parameter; there are {', '.join(paths)}"
            )
    return values
