"""Links from weights: their sums, on numbers set by hand, and readers pulled back through attention that is frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, normal, random_like

from seqboat.interp.dictionaries import Atoms
from seqboat.interp.paths import paths, pre_activations, pull_back
from seqboat.layers.gau import GatedAttentionUnit
from seqboat.ops.packing import row_info
from seqboat.ops.window import Window
from seqboat.ops.window_attention import attend

# Two features write (1, 0, 0) and (0, 0.6, 0.8); one of two readers reads the first channel, the other the last two.
UP = Atoms(
    jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]),
    jnp.array([0.0, -1.0]),
    jnp.array([[1.0, 0.0, 0.0], [0.0, 0.6, 0.8]]),
    jnp.zeros(3),
    jnp.array([0.5, 0.0, 0.0]),
    jnp.zeros(()),
    "relu",
)
DOWN = Atoms(
    jnp.array([[2.0, 0.0], [0.0, 1.0], [0.0, -1.0]]),
    jnp.array([0.25, 0.5]),
    jnp.eye(2),
    jnp.array([0.0, 0.0, 1.0]),
    jnp.zeros(2),
    jnp.zeros(()),
    "relu",
)


def test_links_constant_and_error_by_hand():
    x = jnp.array([[3.0, 2.0, 1.0], [-1.0, 0.0, 0.0]])
    np.testing.assert_allclose(paths(UP, DOWN), [[2, 0], [0, 0.6 - 0.8]], atol=1e-7)
    terms = jax.jit(pre_activations)(UP, DOWN, x)
    np.testing.assert_allclose(terms.features, [[3, 1], [0, 0]])
    np.testing.assert_allclose(terms.constant, [2 * 0.5 + 0.25, 1 + 0.5])
    # The reconstructions are (3.5, 0.6, 0.8) and (0.5, 0, 0).
    np.testing.assert_allclose(terms.error, [[-1, 1.4 - 0.2], [-3, 0]], atol=1e-6)
    np.testing.assert_allclose(terms.pre_activation, [[6.25, 2 - 1 + 1.5], [-1.75, 1.5]], atol=1e-6)
    np.testing.assert_allclose(terms.active(1), [[0, -0.2], [0, 0]], atol=1e-6)
    with pytest.raises(ValueError, match=r"feature=-1: must be in 0\.\.1"):
        terms.active(-1)


def test_the_terms_sum_to_the_pre_activation_of_every_row():
    x = normal(0, 2, 7, 3)
    expected = (x - DOWN.centre[None, None]) @ DOWN.encoder + DOWN.bias[None, None]
    np.testing.assert_allclose(jax.jit(pre_activations)(UP, DOWN, x).pre_activation, expected, atol=1e-4)


def test_features_of_another_width_are_refused():
    with pytest.raises(ValueError, match="paths: features that write 2 channels, and others that read 3"):
        paths(DOWN, UP)


LENGTH, D, Z, E = 7, 5, 4, 6


def test_a_reader_is_pulled_back_as_by_the_gradient_of_frozen_attention():
    gau = GatedAttentionUnit(D, Z, E, Window(3, True, "softmax", "none"), 8)
    m, rows, reader = normal(1, LENGTH, D), row_info(jnp.ones((1, LENGTH), bool)), normal(2, D)
    whole = lambda gau, m: gau.mix(m, gau.context(m, rows), rows, rows)
    variables = random_like(jax.eval_shape(lambda: gau.init(jax.random.key(0), m, method=whole)))

    @jax.jit
    def run(m):
        """Every element's readers, the gradient, both sides of the sum, and the result."""
        y, found = gau.apply(variables, m, method=whole, mutable=["taps"])
        params, taps = variables["params"], found["taps"]
        columns = slice(Z + E, None)  # after those of keys and gates
        kernel, bias = params["projection"]["kernel"][:, columns], params["projection"]["bias"][columns]
        weights = attend(gau.window, None, taps["q"], taps["k"], jnp.eye(LENGTH), rows, rows)
        slope, output = jax.nn.sigmoid(m @ kernel + bias[None]), params["output"]

        def frozen(m):
            attended = weights @ ((m @ kernel + bias[None]) * slope)
            return (attended * taps["gate"]) @ output["kernel"] + output["bias"][None]

        _, transpose = jax.vjp(frozen, m)
        gradient = jax.vmap(lambda t: transpose(jnp.zeros((LENGTH, D)).at[t].set(reader))[0])(jnp.arange(LENGTH))
        back = lambda gate, weights: pull_back(reader, output["kernel"], gate, weights, slope, kernel)
        readers = jax.vmap(back)(taps["gate"], weights)
        constant = ((weights @ (slope * bias[None])) * taps["gate"]) @ (output["kernel"] @ reader)
        constant += output["bias"] @ reader
        return readers, gradient, jnp.einsum("tsd,sd->t", readers, m) + constant, y @ reader

    readers, gradient, summed, read = run(m)
    assert_close(readers, gradient)
    assert_close(summed, read)
    assert not np.triu(np.abs(readers).sum(-1), 1).any(), "nothing is read ahead"
    assert np.abs(readers).max() > 1e-2
