"""Counter-current learning (Kao and Hariharan 2024, arXiv 2409.19841): no gradient passes from one layer to the next.

    python -m examples.counter_current [--seeds=5] [--out=FILE]

A forward network a_l = f(a_{l-1} W_l) reads digits; a backward network b_{l-1} = g(b_l V_l) reads the classes, one row
of b for each. Inputs of every layer are detached, so that W_l and V_{l+1} learn from one loss alone:

    loss_l = (128 / d_l) mean over examples and classes of (a_l . b_l - [class is the label])^2     below the top
    loss_L = cross-entropy of a_L

for 0 <= l < L: the input a_0 has a loss too, which trains V_1. As published, f and g are ELU, but linear in the last
layer of either network; there are no biases; SGD has rate 1, and the gradient of each network is clipped to norm 1.
Width, data and batch size are ours, and we test the last step, where the paper's code tests the step with the lowest
validation loss.

Three arms with the same forward network, start, batches and optimizer, on 1,397 digits; accuracy on the other 400:

    counter_current   the losses above
    frozen            loss_L alone: a trained top on random features, what is left without the local losses
    backprop          loss_L, with gradients through all layers
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from examples import _fit
from experiments.tasks import digits
from seqboat.ops.losses import cross_entropy

WIDTHS = (64, 128, 128, 128, 10)
BATCH, EPOCHS, RATE, CLIP, SCALE = 64, 60, 1.0, 1.0, 128.0
HELD_OUT = 400
ARMS = ("counter_current", "frozen", "backprop")

Params = dict[str, list[Array]]
Examples = tuple[Array, Array]  # inputs (N, D), classes (N,)


def initialize(key: Array, widths: tuple[int, ...] = WIDTHS) -> Params:
    """W_l (d_{l-1}, d_l) and V_l (d_l, d_{l-1}), uniform within 1 / sqrt(inputs)."""
    keys = jax.random.split(key, (2, len(widths) - 1))
    draw = lambda key, rows, columns: jax.random.uniform(key, (rows, columns), minval=-1) / rows**0.5
    pairs = list(itertools.pairwise(widths))
    return {
        "forward": [draw(key, *pair) for key, pair in zip(keys[0], pairs, strict=True)],
        "backward": [draw(key, *pair[::-1]) for key, pair in zip(keys[1], pairs, strict=True)],
    }


def forward(params: Params, x: Float[Array, "B D"], detached: bool = True) -> list[Float[Array, "B _"]]:
    """The inputs and the outputs of every layer, a_0 .. a_L."""
    return _through(params["forward"], x, detached)


def backward(params: Params) -> list[Float[Array, "Y _"]]:
    """One row for each class at every layer, b_0 .. b_L; b_L is the identity matrix."""
    classes = params["backward"][-1].shape[0]
    return _through(params["backward"][::-1], jnp.eye(classes), True)[::-1]


def _through(weights: list[Array], x: Array, detached: bool) -> list[Array]:
    outputs = [x]
    for index, weight in enumerate(weights):
        below = jax.lax.stop_gradient(outputs[-1]) if detached else outputs[-1]
        z = below @ weight
        outputs.append(z if index == len(weights) - 1 else jax.nn.elu(z))
    return outputs


def local_loss(a: Float[Array, "B D"], b: Float[Array, "Y D"], target: Int[Array, "B"]) -> Float[Array, ""]:
    """(128 / D) mean over (B, Y) of (a b^T - one-hot of the targets)^2."""
    wanted = jax.nn.one_hot(target, b.shape[0])
    return SCALE / a.shape[-1] * jnp.mean(jnp.square(a @ b.T - wanted))


def losses(a: list[Array], b: list[Array], target: Int[Array, "B"]) -> list[Float[Array, ""]]:
    """The loss of every layer, 0 .. L."""
    local = [local_loss(here, there, target) for here, there in zip(a[:-1], b[:-1], strict=True)]
    return [*local, cross_entropy(a[-1], target).mean()]


def objective(arm: str, params: Params, batch: Examples) -> Float[Array, ""]:
    x, target = batch
    a = forward(params, x, detached=arm != "backprop")
    if arm != "counter_current":
        return cross_entropy(a[-1], target).mean()
    return sum(losses(a, backward(params), target), jnp.zeros(()))


def train(arm: str, params: Params, examples: Examples, rows: Int[Array, "S B"]) -> Params:
    """Trains one arm. `rows` are those of the batch of each step."""
    one = optax.chain(optax.clip_by_global_norm(CLIP), optax.sgd(RATE))
    networks = {name: name for name in params}
    optimizer = optax.multi_transform(dict.fromkeys(networks, one), networks)  # each network has its own norm
    batch = lambda step: jax.tree.map(lambda array: array[rows[step]], examples)
    return _fit.fit(functools.partial(objective, arm), params, batch, optimizer, len(rows))[0]


def order(seed: int, count: int, steps: int) -> Int[np.ndarray, "S B"]:
    """The rows of every batch, each example once per epoch."""
    draw, batches = np.random.default_rng(seed), count // BATCH
    epochs = [draw.permutation(count)[: batches * BATCH] for _ in range(-(-steps // batches))]
    return np.concatenate(epochs)[: steps * BATCH].reshape(steps, BATCH)


def run(seeds: range, steps: int) -> dict[str, Any]:
    pictures, labels = digits.read()
    x, target = jnp.asarray(pictures), jnp.asarray(labels, jnp.int32)

    def accuracy(arm: str, params: Params, rows: Array) -> Array:
        params = train(arm, params, (x[HELD_OUT:], target[HELD_OUT:]), rows)
        return (forward(params, x[:HELD_OUT])[-1].argmax(-1) == target[:HELD_OUT]).mean()

    params = jax.vmap(lambda seed: initialize(jax.random.key(seed)))(jnp.asarray(seeds))
    rows = jnp.asarray(np.stack([order(seed, len(x) - HELD_OUT, steps) for seed in seeds]))
    measure = lambda arm: jax.jit(jax.vmap(functools.partial(accuracy, arm)))(params, rows)
    return {arm: {"accuracy": measure(arm)} for arm in ARMS}


if __name__ == "__main__":
    _fit.main(run, steps=EPOCHS * ((1797 - HELD_OUT) // BATCH))
