"""AdamW and RAdam as the recipes use them, SGD, any of optax; groups of parameters by path; learning-rate schedules."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.common.errors import UserError
from seqboat.paths import path_name

# Keeps the clipping factor finite, as in fairseq's clip_grad_norm_.
CLIP_EPSILON = 1e-6
# RAdam rectifies its steps where the variance of the adaptive rate has at least this many degrees (Liu et al. 2020).
RECTIFIABLE = 5.0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """`name`: adamw, radam and sgd are those of the recipes (`OWN`); any other is a function of optax with a learning
    rate ("lion", "adafactor"), given b1, b2 and epsilon where it takes them, and decoupled decay.

    `learning_rate` is the peak; warm-up takes `warmup_steps` from `warmup_start` with power `warmup_power`.

    `weight_decays` and `learning_rate_scales` are ((regex, value), ...) on parameter paths like
    "encoder/layers/ssm/delta"; the last that matches holds, and one that matches nothing is an error. `clip_norm` is
    the greatest norm of all gradients together; None does not clip.

    Reference only, no recipe sets them: `weight_decays`, `learning_rate_scales`.
    """

    name: str = "adamw"
    learning_rate: float = 4e-3
    schedule: Literal["linear", "cosine"] = "linear"
    warmup_steps: int = 100
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
        if self.name not in OWN:
            of_optax(self, learning_rate(self, steps=1))


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
    """p <- p - rate(t) scale (direction(g) + decay p), gradients clipped by their global norm before, if there is a
    limit.

    `params`, or their shapes, tell which paths the groups select.
    """
    scales = by_path(params, config.learning_rate_scales, 1.0, "learning_rate_scales")
    decays = by_path(params, config.weight_decays, config.weight_decay, "weight_decays")
    rate, clip = learning_rate(config, steps), clip_by_global_norm(config.clip_norm)
    if config.name not in OWN:
        return optax.chain(clip, of_optax(config, rate), decay_beside(rate, scales, decays))
    chain = optax.chain(clip, OWN[config.name](config), decay(decays), scale_by_rate(rate, scales))
    return _with_one_state(chain)


def clip_by_global_norm(limit: float | None) -> optax.GradientTransformation:
    """As optax's, with CLIP_EPSILON beside the norm; None does not clip."""
    if limit is None:
        return optax.identity()

    def clip(gradients, _):
        factor = jnp.minimum(1.0, limit / (optax.tree.norm(gradients) + CLIP_EPSILON))
        return jax.tree.map(lambda g: g * factor, gradients)

    return optax.stateless(clip)


class AdamState(NamedTuple):
    count: Any
    first: Any
    second: Any


class MomentumState(NamedTuple):
    count: Any
    first: Any


def scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam's step without its rate; epsilon is added to the root of the uncorrected second moment, as in fairseq
    (optax's corrects it first).

    With "radam" the step is rectified by the variance of the adaptive rate, and plain momentum while that is too small.
    """
    b1, b2 = config.b1, config.b2

    def init(params):
        return AdamState(jnp.zeros((), jnp.int32), *(jax.tree.map(jnp.zeros_like, params) for _ in range(2)))

    def update(gradients, state, params=None):
        t = (state.count + 1).astype(jnp.float32)
        first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.first, gradients)
        second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.second, gradients)
        size = jnp.sqrt(1 - b2**t) / (1 - b1**t)
        adapted = lambda size: jax.tree.map(lambda m, v: size * m / (jnp.sqrt(v) + config.epsilon), first, second)
        new = AdamState(state.count + 1, first, second)
        if config.name == "adamw":
            return adapted(size), new
        enough, rectified = _rectification(b2, t)
        plain = jax.tree.map(lambda m: m / (1 - b1**t), first)
        return jax.tree.map(lambda a, b: jnp.where(enough, a, b), adapted(size * rectified), plain), new

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _rectification(b2: float, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether the variance of the adaptive rate after t steps has enough degrees, and its factor (Liu et al. 2020)."""
    most = 2 / (1 - b2) - 1
    degrees = most - 2 * t * b2**t / (1 - b2**t)
    safe = jnp.maximum(degrees, RECTIFIABLE)
    return degrees >= RECTIFIABLE, jnp.sqrt((safe - 4) * (safe - 2) * most / ((most - 4) * (most - 2) * safe))


def momentum(config: OptimizerConfig) -> optax.GradientTransformation:
    """m <- b1 m + g."""

    def init(params):
        return MomentumState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(gradients, state, params=None):
        first = jax.tree.map(lambda m, g: config.b1 * m + g, state.first, gradients)
        return first, MomentumState(state.count + 1, first)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


OWN: dict[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = {
    "adamw": scale_by_adam,
    "radam": scale_by_adam,
    "sgd": momentum,
}


def decay(decays: Any) -> optax.GradientTransformation:
    return optax.stateless(lambda u, params: jax.tree.map(lambda u, p, decay: u + decay * p, u, params, decays))


def scale_by_rate(rate: Callable[[Any], Any], scales: Any) -> optax.GradientTransformation:
    """`optax.scale_by_learning_rate`, with a factor for every parameter."""

    def update(updates, state, params=None):
        updates = jax.tree.map(lambda u, scale: -rate(state.count) * scale * u, updates, scales)
        return updates, optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformation(_no_steps, update)  # type: ignore[arg-type]


def _no_steps(params: Any) -> optax.ScaleByScheduleState:
    return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))


def _with_one_state(chain: optax.GradientTransformation) -> optax.GradientTransformation:
    """A chain (clip, direction, decay, rate) whose state is the direction's alone, which counts the steps: so it lies
    in checkpoints."""

    def update(gradients, state, params=None):
        states = (optax.EmptyState(), state, optax.EmptyState(), optax.ScaleByScheduleState(state.count))
        updates, states = chain.update(gradients, states, params)
        return updates, states[1]

    return optax.GradientTransformation(lambda params: chain.init(params)[1], update)  # type: ignore[arg-type]


def of_optax(config: OptimizerConfig, rate: Callable[[Any], Any]) -> optax.GradientTransformation:
    """optax's optimiser of this name at a schedule, without decay, and with b1, b2 and epsilon where it takes them.

    Raises ValueError for a name that is none, and for one that takes more than gradients and parameters.
    """
    make: Any = getattr(optax, config.name, None)
    takes = inspect.signature(make).parameters if inspect.isfunction(make) else {}
    if "learning_rate" not in takes or config.name.startswith("_"):
        raise ValueError(
            f"name={config.name!r}: must be one of {', '.join(OWN)}, or an optimizer of optax, as lion or adafactor"
        )
    given = {"b1": config.b1, "b2": config.b2, "eps": config.epsilon, "weight_decay": 0.0}
    try:
        optimizer = make(learning_rate=rate, **{name: value for name, value in given.items() if name in takes})
        jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), jax.ShapeDtypeStruct((2,), jnp.float32))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"name={config.name!r}: optax.{config.name} does not run on gradients, parameters and a learning-rate "
            "schedule alone; take another"
        ) from error
    return optimizer


def decay_beside(rate: Callable[[Any], Any], scales: Any, decays: Any) -> optax.GradientTransformation:
    """scale (u - rate(t) decay p), of updates u that have their rate."""

    def update(updates, state, params):
        decayed = lambda u, p, scale, decay: scale * (u - rate(state.count) * decay * p)
        new = optax.ScaleByScheduleState(state.count + 1)
        return jax.tree.map(decayed, updates, params, scales, decays), new

    return optax.GradientTransformation(_no_steps, update)  # type: ignore[arg-type]


def by_path(tree: Any, rules: tuple, default: float, where: str) -> Any:
    """One number per leaf: the value of the last rule (regex, value) whose regex is found in the leaf's path."""
    for rule in rules:
        pair = isinstance(rule, tuple | list) and len(rule) == 2
        if not pair or not isinstance(rule[0], str) or not isinstance(rule[1], int | float):
            raise UserError(f"config.optimizer.{where}: {rule!r} is not a pair of a regular expression and a number")
    try:
        patterns = [(re.compile(pattern), float(value)) for pattern, value in rules]
    except re.error as error:
        raise UserError(f"config.optimizer.{where}: {error.pattern!r} is not a regular expression: {error}") from error
    used: set[str] = set()
    paths = []

    def value_of(path, _):
        name = path_name(path)
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
