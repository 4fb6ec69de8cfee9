# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Your own module, activated token by token
#
# **What you can do here:** put a Flax module of your own behind a router, check that inactive tokens are not computed,
# and train both so that the module runs only on the tokens that need it.
#
# [The short guide](../docs/how_to/own_module.md) has the same without training.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from seqboat.layers.router import RouterConfig
from seqboat.layers.sparse_activation import SparseModularActivation

# %% tags=["parameters"]
STEPS = 1500

# %% [markdown]
# ## Wrap it
#
# A module maps rows (T, D) to rows (T, D). It is not told which tokens the rows come from, and gets the active ones
# only. `SparseModularActivation` takes a tuple of modules; here there is one.


# %%
class Expert(nn.Module):
    hidden: int = 64

    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(self.hidden)(x)))


# This router also gets a gradient from inactive tokens; the default is the published one.
router = RouterConfig(centered=True, straight_through=True)
layer = SparseModularActivation((Expert(name="expert"),), router)

# %% [markdown]
# ## A task where few tokens need it
#
# Every token is 8 numbers. About a quarter of them are hard: their last number is 1 and the answer is the sine of the
# other numbers. For easy tokens the answer is 0. The expert is needed for hard tokens only.


# %%
def draw(numbers, batch=16, length=32):
    x = numbers.uniform(-2, 2, size=(batch, length, 8))
    hard = numbers.random((batch, length)) < 0.25
    x[..., -1] = np.where(hard, 1, -1)
    return jnp.asarray(x, jnp.float32), hard


def answers(x):
    return jnp.where(x[..., -1:] > 0, jnp.sin(2 * x), 0)


numbers = np.random.default_rng(0)
x, hard = draw(numbers)
valid = jnp.ones(hard.shape, bool)
variables = jax.jit(layer.init)(jax.random.key(0), x, valid)

# %% [markdown]
# ## Inactive tokens are not computed
#
# Where the router says no, the output is exactly zero; where it says yes, it is the expert's result times the
# confidence of the decision.


# %%
@jax.jit
def evaluate(variables, x):
    (y, stats), collections = layer.apply(variables, x, valid, mutable=["taps"])
    taps = collections["taps"]
    everywhere = Expert().apply({"params": variables["params"]["expert"]}, x)
    return y, stats, taps["active"][..., 0], taps["confidence"][..., 0], everywhere


y, stats, active, confidence, everywhere = evaluate(variables, x)
expected = np.where(active, confidence, 0)[..., None] * everywhere
print(f"active: {stats.active[0]:.0f} of {stats.elements:.0f} tokens")
print(f"outputs differ from those of the expert everywhere, masked, by at most {np.abs(y - expected).max():.1e}")
assert np.allclose(y, expected, atol=1e-5)

# %% [markdown]
# ## Train it
#
# The loss is the squared error plus a small penalty on the mean probability of activation, which makes the expert cost
# something. `train=True` gives the router its credit for inactive tokens, at random ones if
# `credit_share` is below 1, for which the key is.

# %%
PENALTY = 0.05
optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, STEPS))


@jax.jit
def step(variables, state, x, key):
    def loss(params):
        (y, stats), changed = layer.apply(
            {**variables, "params": params}, x, valid, True, mutable=["batch_stats"], rngs={"dropout": key}
        )
        error, probability = ((y - answers(x)) ** 2).mean(), stats.probability[0] / stats.elements
        return error + PENALTY * probability, (error, stats.active[0] / stats.elements, changed)

    gradient, (error, rate, changed) = jax.grad(loss, has_aux=True)(variables["params"])
    updates, state = optimizer.update(gradient, state)
    return {"params": optax.apply_updates(variables["params"], updates), **changed}, state, error, rate


state, errors, rates = jax.jit(optimizer.init)(variables["params"]), [], []
for key in jax.random.split(jax.random.key(1), STEPS):
    variables, state, error, rate = step(variables, state, draw(numbers)[0], key)
    errors.append(float(error))
    rates.append(float(rate))
x, hard = draw(numbers)
_, _, active, _, _ = evaluate(variables, x)
active = np.asarray(active)
print(f"squared error {np.mean(errors[:50]):.3f} in the first 50 steps, {np.mean(errors[-50:]):.4f} in the last")
print(f"active: {active[hard].mean():.2f} of the hard tokens, {active[~hard].mean():.2f} of the easy ones")

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8))
left.plot(errors, linewidth=0.8)
left.set(xlabel="step", ylabel="squared error", yscale="log")
right.plot(rates, linewidth=0.8)
right.axhline(0.25, color="0.6", linestyle="--", label="share of hard tokens")
right.set(xlabel="step", ylabel="share of active tokens", ylim=(0, 1))
right.legend()
figure.tight_layout()

# %% [markdown]
# ## In a SeqBoat layer
#
# `SeqBoatLayer(config, modules=(Expert(name="expert"),))` puts your modules behind the state space model, in place of
# attention. A module whose rows must see their neighbours is a `WindowedModule`: [extending](../docs/extending.md) has
# a complete one.
#
# Next: [a hypernetwork](a_hypernetwork_in_ten_lines.ipynb), and [how the router learns](../docs/router.md).
