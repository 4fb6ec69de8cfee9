"""What the library tests share: how far two trees of arrays are apart, and the tolerances of the house."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

F32 = 1e-5
BF16 = 1e-2


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(np.abs(np.asarray(x, np.complex128))))))


def assert_close(got, expected, tolerance: float = F32, floor: float = 0.0) -> None:
    """Leaf by leaf, rms(got - expected) <= tolerance * max(rms(expected), floor); without floats, equality.

    `floor` is for gradients: one that vanishes by symmetry (a bias of all keys under softmax) is compared on it.
    """
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for actual, (path, wanted) in zip(jax.tree.leaves(got), leaves, strict=True):
        actual, wanted, name = np.asarray(actual), np.asarray(wanted), jax.tree_util.keystr(path)
        assert actual.shape == wanted.shape, f"{name}: {actual.shape} != {wanted.shape}"
        if wanted.dtype.kind in "biu":
            np.testing.assert_array_equal(actual, wanted, err_msg=name)
            continue
        assert np.isfinite(np.asarray(actual, np.complex128)).all(), f"{name} is not finite"
        error = rms(np.asarray(actual, np.complex128) - np.asarray(wanted, np.complex128))
        bound = tolerance * max(rms(wanted), floor)
        assert error <= bound, f"{name}: error {error:.2e} exceeds {bound:.2e}"


def tree_rms(tree) -> float:
    """One RMS over all float entries of a tree."""
    flat = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return rms(np.concatenate(flat)) if flat else 0.0


def value_and_vjp(fn):
    """`(cotangent, *args) -> (fn(*args), gradients of <cotangent, fn(*args)>)`, compiled once for each shape."""

    @jax.jit
    @functools.wraps(fn)
    def run(cotangent, *args):
        value, transpose = jax.vjp(fn, *args)
        return value, transpose(cotangent)

    return run


def normal(seed: int, *shape: int) -> jax.Array:
    """Standard normal float32 numbers."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)
