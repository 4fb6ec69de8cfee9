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
# # The layer from its equations
#
# **What you can do here:** build a SeqBoat layer, see which tokens it activates, check the fast layer against its
# equations in values and gradients, and measure that its cost follows the number of active tokens.
#
#     m = silu(EMA(norm(x)))                              a state space model runs over all tokens
#     u = m W_u + b_u        active = u_1 > u_0           every token decides whether to attend
#     c = max softmax(u / tau)                            the decision has no gradient, its confidence does
#     h = active * c * GAU(m)                             attention among the active tokens
#     y = silu(x + m W_h + b_h + h)
#
# [naive.py](../seqboat/layers/naive.py) has these equations as code, slow and on one page. The layer that models use,
# [SeqBoatLayer](../seqboat/layers/seqboat.py), computes the same function without ever computing an inactive row.

# %%
import dataclasses
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from seqboat.layers.naive import seqboat_layer
from seqboat.layers.seqboat import LayerConfig, SeqBoatLayer

# %% tags=["parameters"]
LONG = 8192  # tokens of the sequence that is timed
REPEATS = 15

# %% [markdown]
# ## Build it
#
# `features` is the width D of a token, `window_size` the number of active tokens that a token sees on each side. This
# layer is causal: previous ones only.

# %%
config = LayerConfig(features=32, key_size=16, value_size=64, window_size=4, causal=True)
layer = SeqBoatLayer(config)
numbers = np.random.default_rng(0)
x = jnp.asarray(numbers.normal(size=(2, 48, 32)), jnp.float32)
valid = jnp.arange(48)[None] < jnp.array([[48], [37]])  # the second sequence ends after 37 tokens
params = jax.jit(layer.init)(jax.random.key(0), x, valid)["params"]
# The initial output projection is nearly zero: larger numbers, so that attention matters below.
params["gau"]["output"]["kernel"] = jnp.asarray(numbers.normal(size=(64, 32), scale=0.1), jnp.float32)
for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    print(f"{jax.tree_util.keystr(path, simple=True, separator='/'):36}{leaf.shape}")

# %% [markdown]
# ## Which tokens are active
#
# Both forms of the layer are called below, each for its output and the gradients of a weighted sum of it. The
# equations also return the decisions. A new router activates some tokens and not others; padding is never active.

# %%
weights = jnp.where(valid[..., None], numbers.normal(size=x.shape), 0)


def equations(params, x):
    y, active = seqboat_layer(params, x, valid, config)
    return (weights * y).sum(), (y, active)


def packed(params, x):
    (y, stats), collections = layer.apply({"params": params}, x, valid, mutable=["taps"])
    return (weights * y).sum(), (y, stats, collections["taps"])


with_gradients = lambda form: jax.jit(jax.value_and_grad(form, argnums=(0, 1), has_aux=True))
(_, (expected, active)), expected_gradients = with_gradients(equations)(params, x)

active = np.asarray(active)
figure, axes = plt.subplots(figsize=(9, 1.6))
axes.imshow(np.where(valid, active, np.nan), cmap="Blues", vmin=-0.2, vmax=1.2, aspect="auto")
axes.set(xlabel="token", yticks=[0, 1], title="dark: active; pale: inactive; white: padding")
figure.tight_layout()
print("active:", active.sum(1), "of", valid.sum(1))

# %% [markdown]
# ## The fast layer is the same function
#
# `SeqBoatLayer` packs the active rows of the whole batch into one array and attends there. Values, and the gradients
# of every parameter and of the input, agree with the equations up to rounding.

# %%
(_, (y, stats, taps)), gradients = with_gradients(packed)(params, x)


def largest_error(got, expected):
    """Over all arrays of a tree: the norm of the difference, relative to that of the array."""
    norm = np.linalg.norm
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return max(norm(np.subtract(a, b)) / max(norm(b), 1e-3) for a, b in pairs)


hide = lambda y: np.where(valid[..., None], y, 0)
errors = largest_error(hide(y), hide(expected)), largest_error(gradients, expected_gradients)
print("relative error of the output {:.1e}, of the gradients {:.1e}".format(*errors))
assert max(errors) < 1e-4
assert stats.active[0] == active.sum()

# %% [markdown]
# ## One decision
#
# Named values inside the layer are called taps ([taps.py](../seqboat/layers/taps.py)); `mutable=["taps"]` above asked
# for them. A token is active where its second logit is the larger one.

# %%
logits = np.asarray(taps["sparse"]["configurator"]["router_logits"])[:, :, 0]  # (B, L, 2), of the only module
for token in range(6):
    print("token {}: u_0 {:6.3f}  u_1 {:6.3f}  active {}".format(token, *logits[0, token], active[0, token]))
assert (active == (logits[..., 1] > logits[..., 0]) & valid).all()

# %% [markdown]
# ## Cost follows activation
#
# The loop over packed rows has a length that depends on the data, so inactive tokens cost nothing in attention. Here
# the router's bias is moved so that a given share of a long sequence is active. The program is compiled once; only
# its parameters change. Medians on one CPU core: expect other numbers on your machine, and the same shape.

# %%
wide = SeqBoatLayer(dataclasses.replace(config, window_size=256))  # the window has no parameters
x, valid = jnp.asarray(numbers.normal(size=(1, LONG, 32)), jnp.float32), jnp.ones((1, LONG), bool)
run = jax.jit(lambda params: wide.apply({"params": params}, x, valid, mutable=["taps"]))
bias = params["sparse"]["configurator"]["logits"]["bias"]


def with_bias(bias):
    """The parameters with another bias of the router."""
    logits = {**params["sparse"]["configurator"]["logits"], "bias": bias}
    return {**params, "sparse": {"configurator": {**params["sparse"]["configurator"], "logits": logits}}}


logits = np.asarray(run(params)[1]["taps"]["sparse"]["configurator"]["router_logits"])[0, :, 0]
margins = logits[:, 1] - logits[:, 0]
rates, milliseconds = [], []
for share in (0, 0.1, 0.25, 0.5, 0.75, 1):
    cut = np.quantile(margins, 1 - share) + {0: 1, 1: -1}.get(share, 0)  # this share of all margins is above
    shifted = with_bias(bias - jnp.array([0, cut]))
    (_, stats), _ = jax.block_until_ready(run(shifted))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run(shifted))
        times.append(1000 * (time.perf_counter() - start))
    rates.append(float(stats.active[0] / stats.elements))
    milliseconds.append(float(np.median(times)))
    print(f"active {rates[-1]:.2f}: {milliseconds[-1]:6.1f} ms")
assert np.allclose(rates, (0, 0.1, 0.25, 0.5, 0.75, 1), atol=0.01)

figure, axes = plt.subplots(figsize=(5, 3))
axes.plot(rates, milliseconds, "o-")
axes.set(xlabel="share of active tokens", ylabel="ms per forward pass", ylim=(0, None))
axes.set(title=f"{LONG:,} tokens, window 256, width 32")
figure.tight_layout()

# %% [markdown]
# Next: [your own module](your_own_module.ipynb) in place of attention, [a look inside a run](look_inside_a_run.ipynb),
# and all variants of [the layer](../docs/layer.md).
