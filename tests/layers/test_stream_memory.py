"""The memory of a stream, beside a list of everything; and modules of a user's own, in pieces."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, normal, random_like
from hypothesis import given, settings
from hypothesis import strategies as st

from seqboat.layers.feed_forward import FeedForward
from seqboat.layers.gau import GatedAttentionUnit
from seqboat.layers.sparse_activation import SparseModularActivation
from seqboat.layers.streaming import MAX_DISTANCE, MAX_IN_PLACE_LENGTH, WorkingMemory
from seqboat.layers.windowed import WindowedModule
from seqboat.ops.window import Window

D, BATCH, LENGTH = 8, 2, 38
WINDOW = 3
SLOTS = WINDOW + MAX_IN_PLACE_LENGTH
PUSH = jax.jit(WorkingMemory.push)
READ = jax.jit(lambda memory: (memory.known(), memory.ordered()))


def empty(batch):
    nothing = jnp.zeros(batch, jnp.int32)
    return WorkingMemory({"k": jnp.zeros((batch, SLOTS, 1))}, jnp.zeros((batch, SLOTS), jnp.int32), nothing, nothing)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.lists(st.lists(st.booleans(), min_size=16, max_size=16), min_size=1, max_size=12))
def test_a_memory_is_the_end_of_a_list(pieces):
    """Two streams, the second of which activates what the first does not."""
    memory, seen = empty(2), ([], [])
    for number, piece in enumerate(pieces):
        active = np.array([piece, [not on for on in piece]])
        position = np.broadcast_to(np.arange(16 * number, 16 * number + 16, dtype=np.int32), (2, 16))
        memory = PUSH(memory, {"k": position[..., None].astype(np.float32)}, position, active)
        for stream in range(2):
            seen[stream].extend(position[stream][active[stream]].tolist())
    memory, (age, there), (last, present) = jax.tree.map(np.asarray, (memory, *READ(memory)))
    rows, position = last.rows["k"][..., 0], last.position
    for stream, past in enumerate(seen):
        assert there[stream].sum() == min(len(past), SLOTS)
        for slot in np.flatnonzero(there[stream]):
            assert past[-1 - age[stream, slot]] == memory.position[stream, slot] == memory.rows["k"][stream, slot]
        kept = past[-WINDOW:]
        assert present[stream].tolist() == [False] * (WINDOW - len(kept)) + [True] * len(kept)
        assert position[stream][present[stream]].tolist() == rows[stream][present[stream]].tolist() == kept


def test_a_row_is_never_further_away_than_the_farthest():
    """However long nothing follows it: its distance would wrap around."""
    one, zero = {"k": jnp.ones((1, 1, 1))}, {"k": jnp.zeros((1, 1, 1))}
    memory = PUSH(empty(1), one, jnp.array([[5]]), jnp.array([[True]]))
    for _ in range(6):
        memory = memory._replace(now=memory.now + (2**30 - 7))
        memory = PUSH(memory, zero, jnp.array([[0]]), jnp.array([[False]]))
        assert 0 < int(memory.now[0] - memory.position[0, 0]) <= MAX_DISTANCE
    assert memory.now[0] - memory.position[0, 0] == MAX_DISTANCE
    assert memory.rows["k"][0, 0, 0] == memory.pushed[0] == 1


class Difference(WindowedModule):
    """A user's windowed module: a row minus the mean of the two activated rows before it, projected."""

    def setup(self):
        self.dense = nn.Dense(D, name="dense")

    def halo(self, length):
        return 2, 0

    def context(self, x, rows):
        return self.dense(x)

    def mix(self, x, halo, rows, halo_rows):
        steps = rows.rank[:, None] - halo_rows.rank[None]
        see = (rows.segment[:, None] == halo_rows.segment[None]) & halo_rows.active[None] & (steps > 0) & (steps <= 2)
        return x - jnp.where(see, 0.5, 0) @ halo


def make(modules, **fields):
    return SparseModularActivation(modules, block_size=4, **fields)


@pytest.mark.breadth  # test_own_modules.py: streams arrive
@pytest.mark.parametrize(("form", "size"), [("packed", 5), ("packed", 19), ("dense", 19)])
def test_modules_of_a_users_own_are_streamed(form, size):
    modules = (FeedForward(5, dtype=jnp.dtype(jnp.float32), name="feed_forward"), Difference(name="difference"))
    layer = make(modules, form=form)
    m, valid = normal(0, BATCH, LENGTH, D), jnp.ones((BATCH, LENGTH), bool)
    variables = random_like(jax.eval_shape(layer.init, jax.random.key(0), m, valid))
    y, stats = jax.jit(layer.apply)(variables, m, valid)
    assert all(10 < int(count) < 66 for count in stats.active)
    step = jax.jit(lambda m, valid, state: layer.apply(variables, m, valid, False, state, method="advance"))
    state = layer.initial_state(BATCH, jax.ShapeDtypeStruct((1, D), jnp.float32))
    assert [memory and memory.window for memory in state] == [None, 2]
    whole = -(-LENGTH // size) * size
    padded = jnp.pad(m, ((0, 0), (0, whole - LENGTH), (0, 0)))
    for first in range(0, whole, size):
        real = min(size, LENGTH - first)
        valid = jnp.broadcast_to(jnp.arange(size) < real, (BATCH, size))
        out, _, state = step(padded[:, first : first + size], valid, state)
        assert_close(out[:, :real], y[:, first : first + real])


class Ahead(WindowedModule):
    def halo(self, length):
        return 0, 2


def test_modules_that_read_ahead_or_without_limit_are_refused():
    row = jax.ShapeDtypeStruct((1, D), jnp.float32)
    with pytest.raises(ValueError, match="ahead reads 2 rows ahead"):
        make((Ahead(name="ahead"),)).initial_state(1, row)
    full = GatedAttentionUnit(D, 4, 6, Window(None, True, "softmax", "none"), 8, name="gau")
    with pytest.raises(ValueError, match="gau reads all earlier rows"):
        make((full,)).initial_state(1, row)


def test_a_short_piece_reads_the_largest_matrix_of_attention_once():
    """Exposing rows and mixing them are two branches, of which only one multiplies by the projection."""
    gau = GatedAttentionUnit(D, 4, 6, Window(WINDOW, True, "softmax", "rotary"), 8, name="gau")
    layer, width = make((gau,)), 4 + 2 * 6
    m, valid = normal(0, BATCH, 1, D), jnp.ones((BATCH, 1), bool)
    state = layer.initial_state(BATCH, jax.ShapeDtypeStruct((1, D), jnp.float32))
    variables = jax.eval_shape(layer.init, jax.random.key(0), m, valid)
    step = functools.partial(layer.apply, train=False, memories=state, method="advance")
    conditions = [eqn for eqn in jax.make_jaxpr(step)(variables, m, valid).eqns if eqn.primitive.name == "cond"]
    projecting = [f",{width}] = dot_general[" in str(eqn) for eqn in conditions]
    assert projecting == [True, False]
