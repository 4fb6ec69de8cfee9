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
# # Inside a run, in Python
#
# **What you can do here:** load a trained run, read which tokens it activates, stream a sequence through it in pieces,
# and intervene: edit a token or move the router, and see which decisions and answers change.
#
# [The short guide](../docs/how_to/look_inside_a_run.md) makes a page about a run without any code.

# %%
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import experiments
from configs.synthetic import selective_copy
from experiments.training.experiment import build
from experiments.training.loop import train

# %% tags=["parameters"]
WORKDIR = "runs/look_inside"
STEPS = 800

# %% [markdown]
# ## Train one
#
# Selective copying: 4 of 16 positions hold a letter, the others are blank, and 4 queries at the end ask for the letters
# in order. The router has to find the letters and the queries, 8 of 20 tokens, and `target_rate` allows 40 %. Any run
# of the training program will do instead: `python -m experiments.train --config=FILE --workdir=DIR`. A finished run in
# the work directory is not trained again.

# %%
config = selective_copy.get_config("credit_router")
config.task.update(length=16, symbols=4, alphabet=8, test_examples=512)
config.model.update(features=32, key_size=16, value_size=64, window_size=8, max_positions=32)
config.model.router.target_rate = 0.4
config.optimizer.update(learning_rate=1e-2, warmup_steps=20)
config.train.update(steps=STEPS, batch_size=32, log_every=400, evaluate_every=STEPS, checkpoint_every=STEPS)
finished = train(build(config.to_dict()), Path(WORKDIR))

# %% [markdown]
# ## Load it
#
# `experiments.load` takes a work directory or an exported file. It returns the model, its parameters and its task.

# %%
run = experiments.load(WORKDIR)
batch = next(run.task.evaluation_batches("test"))
tokens, lengths = batch["inputs"], batch["lengths"]
print(run.task.config)
print("".join(run.task.symbol(token) for token in tokens[0]))


@jax.jit
def read(variables, tokens, lengths):
    """The answers, and the decisions of every layer (layers, B, L)."""
    output, collections = run.model.apply(variables, tokens, lengths, mutable=["taps"])
    active = collections["taps"]["encoder"]["layers"]["sparse"]["active"][..., 0]
    return output.logits.argmax(-1), active


def accuracy(answers):
    asked = batch["weights"] > 0
    return (np.asarray(answers) == batch["targets"])[asked].mean()


answers, active = map(np.asarray, read(run.variables, tokens, lengths))
print(f"accuracy {accuracy(answers):.3f}, active by layer {active.mean((1, 2)).round(2)}")

# %% [markdown]
# ## Which tokens are active
#
# The same three sequences in both layers. Dark tokens run attention.


# %%
def show(axes, tokens, active, title):
    axes.imshow(active, cmap="Blues", vmin=0, vmax=1.6, aspect="auto")
    for row, sequence in enumerate(tokens):
        for column, token in enumerate(sequence):
            axes.text(column, row, run.task.symbol(token).strip(), ha="center", va="center")
    axes.set(title=title, xticks=[], yticks=[])


figure, rows = plt.subplots(2, 1, figsize=(9, 2.8))
for layer, axes in enumerate(rows):
    show(axes, tokens[:3], active[layer, :3], f"layer {layer + 1}")
figure.tight_layout()

for name, where in (("letters", tokens > 2), ("queries", tokens == 2), ("blanks", tokens == 1)):
    print(f"{name}: active by layer {active[:, where].mean(1).round(2)}")

# %% [markdown]
# ## Stream it
#
# A causal model reads a stream piece by piece, with a state of constant size, and gives the same answers as in one
# piece ([streaming](../docs/streaming.md)). Here the pieces have 5 tokens.

# %%
stream = jax.jit(lambda *inputs: run.model.apply(run.variables, *inputs, method="stream"))
state, pieces = run.model.initial_state(len(tokens)), []
for begin in range(0, tokens.shape[1], 5):
    output, state = stream(tokens[:, begin : begin + 5], jnp.full(len(tokens), 5), state)
    pieces.append(output.logits.argmax(-1))
streamed = np.concatenate(pieces, axis=1)
print(f"{(streamed == answers).mean():.4f} of the answers are those of the whole sequence")
assert (streamed == answers).mean() > 0.999

# %% [markdown]
# ## Edit a token
#
# A blank of the first sequence becomes a letter. The model is causal, so nothing changes before it. After it, the
# second query has to return the new letter, and the later answers move by one. Five letters are one more than the model
# was trained on, so the last answers can be wrong.

# %%
letters = np.flatnonzero(tokens[0] > 2)
blank = next(place for place in range(letters[0] + 1, 16) if tokens[0, place] == 1)
edited = tokens.copy()
edited[0, blank] = next(letter for letter in range(3, 11) if letter not in tokens[0])
new_answers, new_active = map(np.asarray, read(run.variables, edited, lengths))
figure, rows = plt.subplots(2, 1, figsize=(9, 2.2))
show(rows[0], tokens[:1], active[1, :1], "layer 2")
show(rows[1], edited[:1], new_active[1, :1], f"layer 2, token {blank} edited")
figure.tight_layout()
for name, sequence in (("before", answers), ("after", new_answers)):
    print(f"answers {name}: {''.join(run.task.symbol(token) for token in sequence[0, 16:])}")
print("decisions that changed, by layer:", [np.flatnonzero(a).tolist() for a in (active != new_active)[:, 0]])
assert (active == new_active)[:, 0, :blank].all()

# %% [markdown]
# ## Move the router
#
# The parameters are a tree of arrays with stable names, so a router can be moved after training: here a constant is
# added to the logit for activation in both layers. Attention at fewer tokens than the model was trained with loses
# letters; attention at more of them pushes letters out of the window of 8 active tokens.
#
# To force the activation of one token, or to change any other named value, pass an edit: [insight](../docs/insight.md).


# %%
def moved(shift):
    """The variables with `shift` added to u_1 of every router."""

    def add(path, leaf):
        return leaf.at[:, 1].add(shift) if jax.tree_util.keystr(path).endswith("['logits']['bias']") else leaf

    return jax.tree_util.tree_map_with_path(add, run.variables)


points = []
for shift in (-50.0, -4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0, 50.0):
    other, decisions = read(moved(shift), tokens, lengths)
    points.append((float(decisions.mean()), accuracy(other)))
    print(f"shift {shift:5.1f}: active {points[-1][0]:.2f}, accuracy {points[-1][1]:.3f}")
assert [rate for rate, _ in (points[0], points[-1])] == [0, 1]

figure, axes = plt.subplots(figsize=(5, 3))
axes.plot(*zip(*points, strict=True), "o-")
axes.axhline(1 / 8, color="0.6", linestyle="--", label="chance")
axes.set(xlabel="share of active tokens, set after training", ylabel="test accuracy", ylim=(0, 1.02))
axes.legend()
figure.tight_layout()

# %% [markdown]
# The work directory is a run like any other: `python -m experiments.report --workdir=runs/look_inside` writes its page,
# and `python -m experiments.export --workdir=runs/look_inside --out=model.safetensors` takes it away as one file
# ([export](../docs/export.md)).
