"""From a code to numbers for every leaf, by one of five heads.

    full        delta = A h, A of the leaf's own shape with one axis of the trunk's width in front: a leaf that is split
                over devices is generated where it belongs
    low_rank    delta = U diag(S h) V of every matrix; full for vectors
    scale       theta = theta0 (1 + S h), one factor an output unit (last axis) and layer
    chunked     leaves in pieces of `chunk_size` numbers; delta_i = A trunk([code; c_i]) + a with a learned c_i a piece
                and one A for all (von Oswald et al. 2020, arXiv 1906.00695): one piece's work in memory at a time
    recurrent   the same pieces from one LSTM, delta_i = A h_i + a,  h_i = LSTM([code; c_i], h_{i-1}): a piece depends
                on the previous one (arXiv 2209.07712)

At the start every delta has the variance that `initial_variance` wants, for one reason: the trunk keeps the expected
squared norm of the code (`energy`), so  Var(A h) = Var(A) energy.
"""

import dataclasses
import functools
import math
import operator
import typing
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqboat.choices import check_choices
from seqboat.hyper.encoding import Encoding
from seqboat.hyper.spec import Leaf, Spec
from seqboat.paths import path_keys, unflatten

Kind = Literal["full", "low_rank", "scale", "chunked", "recurrent"]
Init = Literal["fan_out", "hyperfan_in", "hyperfan_out", "hyperfan_harmonic", "matched", "zero"]
Dtype = Literal["float32", "bfloat16", "float16", "float64", "complex64", "complex128"]


@dataclasses.dataclass(frozen=True)
class HyperConfig:
    """A hypernetwork: encoding, trunk, heads, what they add to, how they start.

    `hidden`: widths of the trunk, whose units are max(z, 0) + `negative_slope` min(z, 0). `head` makes every leaf, but
    those that a pattern of `heads`, ((glob, head), ...), matches; the last that matches holds. `residual`: what is
    generated is added to parameters of the target's own (theta0), which start as it does; else it is all there is.
    `dtype` of what is generated; None is each leaf's own.

    `init`: fan_out, variance 2 energy / ((1 + slope^2) size) a leaf of `size` numbers (Gonzalez Ortiz et al. 2024);
    hyperfan_in, _out, _harmonic: what keeps the variance of the target's activations, of its gradients, or between,
    after ReLU if `target_gain` is 2 (Chang et al. 2020); matched: the leaf's own initializer's, measured; zero: none.

    Reference only, no recipe sets them: `rank`, `chunk_size`, `chunk_embedding`, `negative_slope`, `target_gain`,
    `dtype`, `heads`.
    """

    encoding: Encoding = dataclasses.field(default_factory=Encoding)
    hidden: tuple[int, ...] = (16, 64, 128)
    negative_slope: float = 0.01
    head: Kind = "full"
    heads: tuple[tuple[str, str], ...] = ()
    rank: int = 4
    chunk_size: int = 4096
    chunk_embedding: int = 8
    residual: bool = True
    init: Init = "fan_out"
    target_gain: float = 2.0
    dtype: str | None = None

    def __post_init__(self):
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden={self.hidden}: must be one or more widths of at least 1")
        for field in ("rank", "chunk_size", "chunk_embedding"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 1")
        for pair in self.heads:
            if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
                raise ValueError(f"heads={self.heads!r}: must be pairs of a glob and a head")
        if not 0 <= self.negative_slope < math.inf:
            raise ValueError(f"negative_slope={self.negative_slope}: must be 0 or more")
        if not 0 < self.target_gain < math.inf:
            raise ValueError(f"target_gain={self.target_gain}: must be positive")
        if self.dtype is not None and self.dtype not in (names := typing.get_args(Dtype)):
            raise ValueError(f"dtype={self.dtype!r}: must be one of {', '.join(names)}, or None for each leaf's own")
        check_choices(self)
        kinds = typing.get_args(Kind)
        for head in (self.head, *(head for _, head in self.heads)):
            if head not in kinds:
                raise ValueError(f"head={head!r}: must be one of {', '.join(kinds)}")
            if head == "scale" and not self.residual:
                raise ValueError("head='scale' scales the target's own parameters: it needs residual=True")
        if self.init == "zero" and not self.residual:
            raise ValueError("init='zero' without residual is a network of zeros; take residual=True")

    @property
    def gain(self) -> float:
        """What keeps the norm through a layer of the trunk."""
        return 2 / (1 + self.negative_slope**2)


def initial_variance(leaf: Leaf, spec: Spec, config: HyperConfig) -> float:
    """Of what is generated for a leaf at the start, over the hypernetwork's draws and uniform hyper-inputs.

    Raises ValueError where it is the leaf's own initializer's, and that was not measured (`spec(..., draws=64)`).
    """
    if config.init == "zero":
        return 0.0
    if config.init == "fan_out":
        return config.gain * config.encoding.energy / leaf.size
    hyperfan = config.init.removeprefix("hyperfan_")
    kernel = leaf if leaf.role == "kernel" else spec.kernel_of(leaf) if leaf.role == "bias" else None
    if config.init == "matched" or kernel is None or kernel.fan_in is None or kernel.fan_out is None:
        if leaf.variance is None:
            raise ValueError(
                f"init={config.init!r}: {leaf.path} wants the variance of its own initializer; "
                "measure it by spec(..., draws=64)"
            )
        return leaf.variance
    gain = config.target_gain
    if leaf.role == "bias":  # half of what an activation has, or what the gradient's scale leaves it
        forward, backward = gain / 2, max(0.0, gain * (1 - kernel.fan_in / kernel.fan_out))
    else:
        biased = 2 if spec.bias_of(leaf) else 1
        forward, backward = gain / (biased * kernel.fan_in), gain / kernel.fan_out
    if hyperfan == "harmonic":
        return 2 / (1 / forward + 1 / backward) if backward else 0.0
    return forward if hyperfan == "in" else backward


def initial_mean(leaf: Leaf, config: HyperConfig) -> Any:
    """What a leaf without residual starts around: 0, or the mean of its own initializer where that was measured and
    the leaf is to have its variance too."""
    own = config.init == "matched" or (config.init.startswith("hyperfan") and leaf.role == "other")
    return jnp.float32(leaf.mean) if own and leaf.mean is not None else jnp.float32(0)


class Trunk(nn.Module):
    """Layers  x <- leaky_relu(W x + b)  with Var(W) = gain / fan_out and b = 0: the expected squared norm is kept.

    It is kept at any norm, since the unit is homogeneous; selu would pull it to its own, whatever the encoding has.
    """

    config: HyperConfig

    @nn.compact
    def __call__(self, x: Float[Array, "C"]) -> Float[Array, "H"]:
        init = nn.initializers.variance_scaling(self.config.gain, "fan_out", "normal")
        for index, width in enumerate(self.config.hidden):
            x = nn.leaky_relu(nn.Dense(width, kernel_init=init, name=f"hidden_{index}")(x), self.config.negative_slope)
        return x


class FullHead(nn.Module):
    """hidden (H,) -> {path: delta}. The kernel of a leaf of shape S is (H, *S)."""

    leaves: tuple[Leaf, ...]
    deviations: tuple[float, ...]  # of a kernel's numbers

    @nn.compact
    def __call__(self, hidden: Float[Array, "H"]) -> dict[str, Array]:
        def init(key):
            keys = jax.random.split(key, len(self.leaves))
            shapes = [(hidden.shape[0], *leaf.real_shape) for leaf in self.leaves]
            drawn = zip(self.leaves, keys, shapes, self.deviations, strict=True)
            return unflatten({leaf.path: std * jax.random.normal(key, shape) for leaf, key, shape, std in drawn})

        kernels = self.param("kernel", init)
        return {leaf.path: jnp.tensordot(hidden, _at(kernels, leaf.path), 1) for leaf in self.leaves}


class LowRankHead(nn.Module):
    """hidden (H,) -> {path: U diag(S hidden) V}: of the matrices of the last two axes."""

    leaves: tuple[Leaf, ...]
    deviations: tuple[float, ...]  # of the numbers of S
    rank: int

    @nn.compact
    def __call__(self, hidden: Float[Array, "H"]) -> dict[str, Array]:
        def init(key):
            factors = {}
            keys = jax.random.split(key, (len(self.leaves), 3))
            for leaf, (left, right, middle), std in zip(self.leaves, keys, self.deviations, strict=True):
                *stack, rows, columns = leaf.shape
                factors[leaf.path] = {
                    "left": jax.random.normal(left, (*stack, rows, self.rank)),
                    "right": jax.random.normal(right, (*stack, self.rank, columns)) / math.sqrt(self.rank),
                    "kernel": std * jax.random.normal(middle, (hidden.shape[0], *stack, self.rank)),
                }
            return unflatten(factors)

        factors = self.param("factors", init)
        return {leaf.path: _product(_at(factors, leaf.path), hidden) for leaf in self.leaves}


def _product(factors: dict[str, Array], hidden: Array) -> Array:
    return (factors["left"] * jnp.tensordot(hidden, factors["kernel"], 1)[..., None, :]) @ factors["right"]


class ChunkedHead(nn.Module):
    """code (C,) -> {path: delta}, in pieces of the leaves.

    Pieces have variance 1 at the start; a learned scale a leaf, at first its one of `deviations`, makes deltas of them:
    0 starts a leaf at what it adds to, and lets it go. The trunk runs once a piece, or an LSTM over them all.
    """

    leaves: tuple[Leaf, ...]
    deviations: tuple[float, ...]
    config: HyperConfig
    recurrent: bool

    @nn.compact
    def __call__(self, code: Float[Array, "C"]) -> dict[str, Array]:
        config = self.config
        if self.is_initializing():  # what is drawn does not depend on the hyper-input it is first called with
            code = jnp.full_like(code, (config.encoding.energy / config.encoding.width) ** 0.5)
        size, width = config.chunk_size, config.chunk_embedding
        counts = [-(-leaf.size // size) for leaf in self.leaves]
        # Of expected norm 1, as one more input of a code.
        embeddings = self.param("chunks", nn.initializers.normal(width**-0.5), (sum(counts), width))
        features = config.hidden[-1]
        body: Any = nn.OptimizedLSTMCell(features, name="lstm") if self.recurrent else Trunk(config, name="trunk")
        inputs = jnp.concatenate([jnp.broadcast_to(code, (sum(counts), *code.shape)), embeddings], -1)
        if self.recurrent:
            start = (jnp.zeros(features), jnp.zeros(features))
            run = nn.scan(
                lambda cell, carry, x: cell(carry, x), variable_broadcast="params", split_rngs={"params": False}
            )
            _, hidden = run(body, start, inputs)
            energy = jnp.mean(jnp.sum(jnp.square(hidden), -1))  # no closed form: that of these states
            kernel = self.param("kernel", lambda key: jax.random.normal(key, (features, size)) / jnp.sqrt(energy))
            of_piece = lambda hidden, kernel: hidden @ kernel
        else:
            hidden = inputs
            std = (config.encoding.energy + 1) ** -0.5
            kernel = self.param("kernel", nn.initializers.normal(std), (features, size))
            if self.is_initializing():
                body(inputs[0])
            trunk, params = body.clone(parent=None), body.variables
            of_piece = lambda row, kernel: trunk.apply(params, row) @ kernel
        bias = self.param("bias", nn.initializers.zeros, (size,))
        piece = jax.checkpoint(lambda row, scale: scale * (of_piece(row, kernel) + bias), prevent_cse=False)
        scales = self.param("scale", lambda _: jnp.array(self.deviations, jnp.float32))
        deltas, first = {}, 0
        for leaf, count, scale in zip(self.leaves, counts, scales, strict=True):
            pieces = jax.lax.map(lambda row, scale=scale: piece(row, scale), hidden[first : first + count])
            deltas[leaf.path] = pieces.reshape(-1)[: leaf.size].reshape(leaf.real_shape)
            first += count
        return deltas


def _at(tree: Any, path: str) -> Any:
    return functools.reduce(operator.getitem, path_keys(path), tree)
