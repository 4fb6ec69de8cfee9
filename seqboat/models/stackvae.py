"""One variational autoencoder for all channels of a series, and a sparse graph of the channels (StackVAE-G: Li et al.
2021, arXiv 2105.08397): what it cannot reconstruct is an anomaly, and `adjacency` says which channels go together.

Two departures from the published code. There the graph's term is |x - A x|^2 with the weight of a channel on itself,
so that A = I makes it zero; here it is without that weight. There a draw with a learned variance stands for the output
under a squared error, where a variance can only shrink; here the output is the mean.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from seqboat.choices import check_choices, given
from seqboat.layers.initializers import deep
from seqboat.layers.router import ActivationStats, no_decisions
from seqboat.layers.terms import term

TINY = 1e-9
# Windows that `scores` reads at once.
WINDOWS = 256
# The published start, of deviation 1, saturates both tanh of the graph, which then learns several times slower.
NODE_DEVIATION = 0.3


@dataclasses.dataclass(frozen=True)
class StackVAEConfig:
    """Windows of `length` W elements of `channels` C. `hidden` are the widths of the encoder's layers, in reverse the
    decoder's; every channel has J `latents`.

    `vae` is one autoencoder for the channels, "shared", or its controls: one of the same widths for every channel,
    "per_channel", or one of the whole window, "joint", with as many latents in all, C J. Theirs are not of the same
    layers for every channel, so that they cannot be mixed: `share` must be 0. The graph is then learned by its term.

    The graph: vectors of `node_size` for every channel, of whose products the `neighbours` largest count, and the
    `gain` in their tanh. `share` of what a channel's latents are made of comes from its neighbours; 0 is a plain VAE.
    Terms of the loss: `kl` and `graph` times their means per number.
    """

    channels: int = given()
    length: int = given()
    hidden: tuple[int, ...] = (200, 200)
    latents: int = 20
    node_size: int = 30
    neighbours: int = 10
    gain: float = 3.0
    share: float = 0.5
    kl: float = 1.0
    graph: float = 1.0
    vae: Literal["shared", "per_channel", "joint"] = "shared"

    def __post_init__(self):
        check_choices(self)
        for field in ("length", "latents", "node_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 1")
        if self.channels < 2:
            raise ValueError(f"channels={self.channels}: must be at least 2, for a graph of them")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden={self.hidden}: must be one or more widths of at least 1")
        if not 1 <= self.neighbours <= self.channels:
            raise ValueError(f"neighbours={self.neighbours}: must be in 1..{self.channels}, the channels")
        if not self.gain > 0:
            raise ValueError(f"gain={self.gain}: must be positive")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share}: must be in 0..1")
        if self.share and self.vae != "shared":
            raise ValueError(f"share={self.share}: must be 0.0 with vae={self.vae!r}, whose latents cannot be mixed")
        for field in ("kl", "graph"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field}={getattr(self, field)}: must not be negative")


class Windows(NamedTuple):
    """`logits` (B, W, C), the reconstructions; the stats of no layers; `adjacency` (B, C, C), the same for all."""

    logits: Array
    layers: ActivationStats
    adjacency: Array


class StackVAE(nn.Module):
    """inputs (B, W, C) -> `Windows`. The channels c of a window are encoded by the same layers, x_c (W,):

        h_c = enc(x_c),    m = (1 - share) h + share A h,    mean and log variance = linear maps of m_c
        z_c ~ N(mean, exp(log variance)),    x^_c = dec(z_c)

    With `vae` = "per_channel" enc, dec and the linear maps are of every channel, parameters (C, ...); with "joint" they
    are of x (C W,), all channels in turn, and the linear maps give C J numbers.
    Without `train`, z is the mean. Terms: "kl", KL(q(z | x) | N(0, 1)) in nats, and "graph", |x - A' x|^2 with A' the
    rows of A without their diagonal, scaled to the sum 1; both summed, over the number of inputs. With the squared
    error as the loss that is the evidence lower bound of a variance of 1/2. Raises ValueError for another W or C.
    """

    config: StackVAEConfig

    @nn.compact
    def __call__(self, inputs: Float[Array, "B W C"], lengths: Int[Array, "B"], train: bool = False) -> Windows:
        config = self.config
        if self.is_initializing():  # by a window of any length: the widths are those of the config
            inputs = jnp.zeros((1, config.length, config.channels))
        if inputs.shape[1:] != (config.length, config.channels):
            raise ValueError(f"inputs are {inputs.shape}; this model takes (B, {config.length}, {config.channels})")
        count, x = jnp.float32(inputs.size), inputs.swapaxes(1, 2)
        a = ChannelGraph(config, name="channel_graph")()
        if config.vae == "joint":
            x = x.reshape(len(x), 1, -1)
        parts = config.channels // x.shape[1]  # channels that are encoded together
        h = self._layers("encoder", x, config.hidden, parts * config.latents)
        mixed = (1 - config.share) * h + config.share * (a @ h) if config.share else h
        mean = self._dense(parts * config.latents, "mean")(mixed)
        log_variance = self._dense(parts * config.latents, "log_variance")(mixed)
        z = mean
        if train and not self.is_initializing():
            z += jnp.exp(log_variance / 2) * jax.random.normal(self.make_rng("dropout"), mean.shape)
        decoded = self._layers("decoder", z, config.hidden[::-1], parts * config.length)
        logits = decoded.reshape(inputs.swapaxes(1, 2).shape).swapaxes(1, 2)
        term(self, "kl", config.kl, kl(mean, log_variance).sum(), count)
        term(self, "graph", config.graph, disagreement(a, inputs).sum(), count)
        stats = no_decisions(lengths.sum(keepdims=True).astype(jnp.float32))
        return Windows(logits, stats, jnp.broadcast_to(a, (len(inputs), *a.shape)))

    def _layers(self, name: str, x: Float[Array, "B C K"], hidden: Sequence[int], out: int) -> Float[Array, "B C M"]:
        kernel, bias = deep("he", "relu")
        for index, width in enumerate(hidden):
            x = nn.relu(self._dense(width, f"{name}_{index}", kernel_init=kernel, bias_init=bias)(x))
        return self._dense(out, f"{name}_out")(x)

    def _dense(self, width: int, name: str, **initializers: Any) -> nn.Module:
        """Of (B, C, K), over the last axis: the same for all channels, or one for each."""
        layer: Any = nn.Dense
        if self.config.vae == "per_channel":
            layer = nn.vmap(layer, in_axes=1, out_axes=1, variable_axes={"params": 0}, split_rngs={"params": True})
        return layer(width, name=name, **initializers)


class ChannelGraph(nn.Module):
    """() -> (C, C), `graph` of its parameters."""

    config: StackVAEConfig

    @nn.compact
    def __call__(self) -> Float[Array, "C C"]:
        config, bound = self.config, self.config.node_size**-0.5
        uniform = lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        nodes = self.param("nodes", nn.initializers.normal(NODE_DEVIATION), (config.channels, config.node_size))
        kernel = self.param("kernel", uniform, (config.node_size, config.node_size))
        return graph(nodes, kernel, self.param("bias", uniform, (config.node_size,)), config.gain, config.neighbours)


def graph(
    nodes: Float[Array, "C N"], kernel: Float[Array, "N N"], bias: Float[Array, " N"], gain: float, neighbours: int
) -> Float[Array, "C C"]:
    """The weights of the channels (columns) in the mean of each channel (rows):

        E = tanh(gain (nodes kernel + bias)),    S = relu(gain tanh(E E^T)),    A = rows of (S + I), scaled to the sum 1

    of S the `neighbours` largest numbers of every row, among which may be that of the channel itself; the first of
    equal ones, by E E^T, which does not saturate.
    """
    e = jnp.tanh(gain * (nodes @ kernel + bias[None]))
    products = e @ e.T
    _, chosen = jax.lax.top_k(products, neighbours)
    kept = jax.nn.one_hot(chosen, len(e)).sum(1)
    a = kept * jax.nn.relu(gain * jnp.tanh(products)) + jnp.eye(len(e))
    return a / a.sum(1, keepdims=True)


def without_self(a: Float[Array, "C C"]) -> Float[Array, "C C"]:
    """Rows without their diagonal, scaled to the sum 1; zero for a channel without neighbours."""
    others = a * (1 - jnp.eye(len(a)))
    total = others.sum(1, keepdims=True)
    return jnp.where(total > 0, others / jnp.maximum(total, TINY), 0)


def disagreement(a: Float[Array, "C C"], x: Float[Array, "*B C"] | Float[np.ndarray, "*B C"]) -> Float[Array, "*B C"]:
    """The squared difference of every number and the mean of its channel's neighbours: (x - A' x)^2, with A' the rows
    of a graph `without_self`. Summed over channels it is an anomaly score of an element by the graph alone."""
    x = jnp.asarray(x)
    return jnp.square(x - x @ without_self(a).T)


def kl(mean: Float[Array, "*B"], log_variance: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """KL(N(mean, exp(log_variance)) | N(0, 1)) of each number, in nats."""
    return (jnp.exp(log_variance) + jnp.square(mean) - 1 - log_variance) / 2


def adjacency(variables: Mapping[str, Any], config: StackVAEConfig) -> Float[Array, "C C"]:
    """The graph of a trained model: row c has the weights of all channels in the mean that c is mixed with."""
    params = variables["params"]["channel_graph"]
    return graph(params["nodes"], params["kernel"], params["bias"], config.gain, config.neighbours)


def scores(
    variables: Mapping[str, Any], config: StackVAEConfig, series: Float[Array, "T C"] | Float[np.ndarray, "T C"]
) -> Float[Array, "T C"]:
    """The squared error of every number of a series, as the last of a window: their sum over channels is the anomaly
    score of an element. The series is in the units of the training data; before its first element there are zeros."""
    padded = jnp.pad(jnp.asarray(series), ((config.length - 1, 0), (0, 0)))
    model: Any = StackVAE(config)
    lengths = jnp.full(1, config.length)

    def last(index: Array) -> Float[Array, " C"]:
        window = jax.lax.dynamic_slice(padded, (index, 0), (config.length, config.channels))
        return jnp.square(window[-1] - model.apply(variables, window[None], lengths).logits[0, -1])

    return jax.jit(lambda: jax.lax.map(last, jnp.arange(len(series)), batch_size=WINDOWS))()


Config, Model = StackVAEConfig, StackVAE
