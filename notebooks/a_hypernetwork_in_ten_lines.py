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
# # A hypernetwork in ten lines
#
# **What you can do here:** let a small network generate the parameters of another one from an input of its own, train
# both together for every value of that input, and take out a plain network for one value.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from seqboat import hyper

# %% tags=["parameters"]
STEPS = 2000

# %% [markdown]
# ## The task
#
# A family of curves, one for each z in [0, 1]: y = sin((2 + 6 z) x). A plain network learns one of them. A
# hypernetwork learns all of them: z goes into the hypernetwork, x into the target that it generates.

# %%
curve = lambda z, x: jnp.sin((2 + 6 * z) * x)
x = jnp.linspace(-1, 1, 64)[:, None]

# %% [markdown]
# ## Ten lines
#
# The target is any Flax module, without changes. `hyper.spec` says which of its parameters are generated (here all of
# them) and reads their shapes only. `hyper.mip` encodes z with constant norm and adds what it generates to parameters
# that do not depend on z (magnitude-invariant parametrizations).

# %%
target = nn.Sequential([nn.Dense(32), jnp.tanh, nn.Dense(32), jnp.tanh, nn.Dense(1)])
model = hyper.Hyper(target, hyper.mip(hyper.spec(target, x), inputs=1))
variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros(1), x)
optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))


@jax.jit
def step(variables, state, z):
    loss = lambda variables: jnp.mean((model.apply(variables, z, x) - curve(z[0], x)) ** 2)
    value, gradient = jax.value_and_grad(loss)(variables)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(variables, updates), state, value


state, losses = optimizer.init(variables), []
for z in np.random.default_rng(0).random((STEPS, 1), np.float32):
    variables, state, value = step(variables, state, z)
    losses.append(float(value))
print(f"squared error {np.mean(losses[:50]):.3f} in the first 50 steps, {np.mean(losses[-50:]):.5f} in the last")
assert np.mean(losses[-50:]) < np.mean(losses[:50])

# %% [markdown]
# ## All curves from one model
#
# The values of z below were never drawn exactly in training.

# %%
apply = jax.jit(model.apply)
figure, all_axes = plt.subplots(1, 3, figsize=(9, 2.4), sharey=True)
for axes, z in zip(all_axes, (0.1, 0.5, 0.9), strict=True):
    axes.plot(x, curve(z, x), color="0.75", linewidth=4, label="the curve")
    axes.plot(x, apply(variables, jnp.array([z]), x), color="tab:blue", label="generated network")
    axes.set(title=f"z = {z}", xlabel="x")
all_axes[0].legend(loc="lower right", fontsize=8)
figure.tight_layout()

# %% [markdown]
# ## Take one network out
#
# `hyper.bind` generates once and returns the variables of the plain target, which no longer needs the hypernetwork.

# %%
plain = hyper.bind(model, variables, jnp.array([0.5]))
same = jnp.abs(jax.jit(target.apply)(plain, x) - apply(variables, jnp.array([0.5]), x)).max()
print(f"parameters: {sum(leaf.size for leaf in jax.tree.leaves(variables)):,} with the hypernetwork,")
print(f"            {sum(leaf.size for leaf in jax.tree.leaves(plain)):,} of the network for z = 0.5")
print(f"outputs differ by at most {same:.1e}")
assert same < 1e-5

# %% [markdown]
# ## Is it well scaled?
#
# With a default hypernetwork the scale of the generated weights follows the scale of z. `hyper.diagnose` measures
# that: a `slope` of 0 means that the scale of what is generated does not depend on z, 1 that it is proportional to it.

# %%
conditions = jnp.linspace(0.05, 1, 12)[:, None]
loss = lambda variables, z: jnp.mean((model.apply(variables, z, x) - curve(z[0], x)) ** 2)
diagnosis = hyper.diagnose(model, variables, conditions, loss)
print(f"slope {diagnosis.slope:.2f}")

# %% [markdown]
# Next: generate only some parameters, other kinds of heads, and hypernetworks of whole recipes:
# [add a hypernetwork](../docs/how_to/add_a_hypernetwork.md); results: [hypernetworks](../docs/hypernetworks.md).
