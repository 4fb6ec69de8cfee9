"""HyperLSTM (Ha et al. 2017, arXiv 1609.09106): a small LSTM scales the rows of a larger one's weights at every step.

A baseline beside `seqboat.hyper`: its generator runs inside the time loop, where a hypernetwork of `seqboat.hyper`
generates once and before it.

    python -m examples.hyper_lstm [--seeds=5] [--out=FILE]

Both learn to remember the first number of a sequence, in half a minute on a CPU: the mean squared error of the last 20
steps, where a guess of 0 has 1, of the HyperLSTM and of the LSTM with layer norms that it scales.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from examples import _fit

GATES = ("i", "f", "g", "o")
Carry = tuple[Float[Array, "*B H"], Float[Array, "*B H"]]  # cell, hidden


class LayerNormLSTMCell(nn.RNNCellBase):
    """y = LN(W_h h + W_x x + b) of each gate y = i, f, g, o;  c <- sig(f) c + sig(i) tanh(g),  h <- sig(o) tanh(LN(c)).

    The norm of f starts with an offset of 1.
    """

    features: int

    @nn.compact
    def __call__(self, carry: Carry, inputs: Float[Array, "*B D"]) -> tuple[Carry, Float[Array, "*B H"]]:
        hidden = dense(4 * self.features, "hidden", False)(carry[1])
        rows = hidden + dense(4 * self.features, "input", True)(inputs)
        return update(carry[0], jnp.split(rows, 4, -1))

    @nn.nowrap
    def initialize_carry(self, rng: Array, input_shape: tuple[int, ...]) -> Carry:
        return _zeros(self.features, input_shape)

    @property
    def num_feature_axes(self) -> int:
        return 1


class HyperLSTMCell(nn.RNNCellBase):
    """A `LayerNormLSTMCell` of H `features`, with rows scaled by one of `hyper_features`, through N `embedding`
    numbers:

        hh = LN-LSTM([h; x])    z_h = A_h hh + 1    z_x = A_x hh + 1    z_b = A_b hh            for each gate
        y = LN(d_h * (W_h h) + d_x * (W_x x) + b)    d_h = D_h z_h    d_x = D_x z_x    b = D_b z_b + b_0

    A_h = A_x = 0, D_h = D_x = 0.1 / N and D_b = 0 at initialisation: every scale is exactly 0.1.
    """

    features: int
    hyper_features: int = 16
    embedding: int = 4

    @nn.compact
    def __call__(self, carry: Any, inputs: Float[Array, "*B D"]) -> tuple[Any, Float[Array, "*B H"]]:
        main, small = carry
        small, hyper = LayerNormLSTMCell(self.hyper_features, name="hyper")(
            small, jnp.concatenate([main[1], inputs], -1)
        )
        scale_h, scale_x = (self._scale(hyper, name) for name in ("hidden", "input"))
        rows = scale_h * dense(4 * self.features, "hidden", False)(main[1])
        rows += scale_x * dense(4 * self.features, "input", False)(inputs)
        rows += self._project(hyper, "bias", nn.initializers.normal(0.01), nn.initializers.zeros)
        rows += _broadcast(self.param("bias", nn.initializers.zeros, (4 * self.features,)), rows)
        main, out = update(main[0], jnp.split(rows, 4, -1))
        return (main, small), out

    def _scale(self, hyper: Array, name: str) -> Array:
        constant = nn.initializers.constant(0.1 / self.embedding)
        return self._project(hyper, name, nn.initializers.zeros, constant, offset=1.0)

    def _project(self, hyper: Array, name: str, small: Any, large: Any, offset: float = 0.0) -> Array:
        """D (A hh + offset) for all four gates: (*B, 4H)."""
        narrow = self.param(f"{name}_narrow", small, (4, self.hyper_features, self.embedding))
        wide = self.param(f"{name}_wide", large, (4, self.embedding, self.features))
        z = jnp.einsum("...h,ghn->...gn", hyper, narrow)
        if offset:
            z += _broadcast(self.param(f"{name}_offset", nn.initializers.constant(offset), (4, self.embedding)), z)
        return jnp.einsum("...gn,gnf->...gf", z, wide).reshape(*hyper.shape[:-1], -1)

    @nn.nowrap
    def initialize_carry(self, rng: Array, input_shape: tuple[int, ...]) -> Any:
        return _zeros(self.features, input_shape), _zeros(self.hyper_features, input_shape)

    @property
    def num_feature_axes(self) -> int:
        return 1


def dense(features: int, name: str, use_bias: bool) -> nn.Module:
    return nn.Dense(features, use_bias=use_bias, name=name)


def update(cell: Array, gates: list[Array]) -> tuple[Carry, Array]:
    """The new cell and hidden state from the gates' sums. Called inside a cell, in which it creates the norms."""
    norm = {
        name: nn.LayerNorm(bias_init=nn.initializers.constant(float(name == "f")), name=f"norm_{name}")
        for name in GATES
    }
    i, f, g, o = (norm[name](rows) for name, rows in zip(GATES, gates, strict=True))
    cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    hidden = jax.nn.sigmoid(o) * jnp.tanh(nn.LayerNorm(name="norm_cell")(cell))
    return (cell, hidden), hidden


def _broadcast(a: Array, like: Array) -> Array:
    return a.reshape((1,) * (like.ndim - a.ndim) + a.shape)


def _zeros(features: int, input_shape: tuple[int, ...]) -> Carry:
    zeros = jnp.zeros((*input_shape[:-1], features))
    return zeros, zeros


def train(cell: nn.RNNCellBase, key: Array, steps: int, length: int = 12, batch: int = 64) -> Float[Array, "S"]:
    """Mean squared errors of the first number of a sequence, read off the last hidden state, step by step."""
    model = nn.Sequential([nn.RNN(cell), lambda hidden: hidden[:, -1], nn.Dense(1)])
    start, draws = jax.random.split(key)

    def loss(params, key):
        x = jax.random.normal(key, (batch, length, 1))
        return jnp.mean((model.apply(params, x) - x[:, 0]) ** 2)

    params = model.init(start, jnp.zeros((batch, length, 1)))
    return _fit.fit(loss, params, functools.partial(jax.random.fold_in, draws), optax.adam(1e-2), steps)[1]


def run(seeds: range, steps: int) -> dict[str, Any]:
    cells = {"hyper_lstm": HyperLSTMCell(16), "layer_norm_lstm": LayerNormLSTMCell(16)}
    of_seed = lambda cell: lambda seed: train(cell, jax.random.key(seed), steps)[-20:].mean()
    return {name: {"error": jax.jit(jax.vmap(of_seed(cell)))(jnp.asarray(seeds))} for name, cell in cells.items()}


if __name__ == "__main__":
    _fit.main(run, steps=300)
