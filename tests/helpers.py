"""What the tests share: how far trees of arrays are apart, the tolerances of the house, the fast cases of a grid."""

import functools
import importlib
import sys
import zlib
from collections.abc import Iterable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

F32 = 1e-5
BF16 = 1e-2

# A SeqBoat of two layers that compiles in seconds, as differences from a config. What runs around a model does not
# depend on the form: the dense one, which test_battery.py compares with the packed, compiles in half the time;
# golden/test_loss_curve.py trains the packed.
SMALL_MODEL = {
    "model.form": "dense",
    "model.layers": 2,
    "model.features": 8,
    "model.key_size": 4,
    "model.value_size": 16,
    "model.mixer.state_size": 2,
    "model.window_size": 4,
    "model.block_size": 16,
}


def rms(x) -> float:
    x = np.asarray(x, np.complex128)
    return float(np.sqrt(np.square(np.abs(x)).sum() / max(x.size, 1)))


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


def vanishing(tree) -> float:
    """A `floor` for gradients, some of which vanish: with it F32 allows an error of 4 units of float32's resolution at
    the tree's RMS. The terms of a sum are rounded to about that, whatever their sum is."""
    return 4 * float(np.finfo(np.float32).eps) / F32 * tree_rms(tree)


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


def random_like(shapes):
    """Numbers for a tree of shapes, without compiling an initialiser: ~ N(0, 1/4), scales and variances around 1."""

    def fill(path, shape):
        seed = zlib.crc32(jax.tree_util.keystr(path).encode())
        x = np.random.default_rng(seed).standard_normal(shape.shape) / 2
        if path[-1].key in ("scale", "variance"):
            x = 1 + np.tanh(x) / 2
        return jnp.asarray(x, shape.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def normal(seed: int, *shape: int) -> jax.Array:
    """Standard normal float32 numbers."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def plant(monkeypatch, folder, package, name: str, source: str) -> None:
    """Makes a module of a package from its source, as if its file lay in the package's folder."""
    (folder / f"{name}.py").write_text(source)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}", raising=False)


def grid(cases: Iterable[Any], *fast: Any) -> list:
    """Cases for `parametrize`: `fast` ones, which cover each path once, and the others, marked `breadth`.

    A mapping gives values the names of its keys, and `fast` are names. A tuple is one argument each.
    """
    named = cases.items() if isinstance(cases, Mapping) else ((case, case) for case in cases)
    named = list(named)
    assert not [name for name in fast if name not in [key for key, _ in named]], "a fast case that is none of the grid"
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            id=name if isinstance(cases, Mapping) else None,
            marks=() if name in fast else pytest.mark.breadth,
        )
        for name, case in named
    ]


def load_program(name: str) -> ModuleType:
    """The program experiments.NAME, or a module by its whole name, its flags as they are by default. They are not left
    with absl, as programs have flags of the same names."""
    before = set(flags.FLAGS)
    module = importlib.import_module(name if "." in name else f"experiments.{name}")
    own = {flag: flags.FLAGS[flag] for flag in set(flags.FLAGS) - before}
    for attribute, holder in list(vars(module).items()):
        if isinstance(holder, flags.FlagHolder):
            setattr(module, attribute, SimpleNamespace(value=own[holder.name].value))
    flags.FLAGS.remove_flag_values(own)
    return module
