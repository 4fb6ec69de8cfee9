"""What may be given where a Flax module is wanted, and how a module that somebody else wrote is called.

One place for whoever takes modules in: sparse activation, hypernetworks.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# What users give: `check_module` says what is wrong with it, where a checker of types could only say that it is.
Linen = Any
Modules = Any

# How modules take "this is training": the argument, and what is handed on.
MODES = {"train": lambda train: train, "training": lambda train: train, "deterministic": lambda train: not train}


def check_module(module: Any, where: str) -> None:
    """Raise ValueError, which begins with `where`, for what is not an instance of a Flax linen module."""
    if isinstance(module, nn.Module):
        return
    kind = module if isinstance(module, type) else type(module)
    if any(base.__module__.startswith("flax.nnx") for base in kind.__mro__):
        found = f"{kind.__name__} is an NNX module: write it as a flax.linen.Module"
    elif isinstance(module, type):
        found = f"{kind.__name__} is a class: give an instance, {kind.__name__}(...)"
    elif callable(module):
        name = getattr(module, "__name__", kind.__name__)
        found = f"{name} is a {kind.__name__}: give a flax.linen.Module that calls it"
    else:
        found = f"not {'None' if module is None else f'a {kind.__name__}'}"
    raise ValueError(f"{where}: a Flax linen module is wanted; {found}")


def check_modules(modules: Any) -> None:
    """`check_module` for every one of a sequence."""
    if not isinstance(modules, Sequence):
        raise ValueError(f"modules: a tuple of Flax linen modules is wanted, not one {type(modules).__name__} alone")
    for index, module in enumerate(modules):
        check_module(module, f"modules[{index}]")


def describe_module(module: nn.Module) -> str:
    """Its name, if it has one, and its class."""
    kind = type(module).__name__
    return f"{module.name} ({kind})" if module.name else kind


def modes(module: nn.Module, method: str, count: int, train: bool) -> dict[str, bool]:
    """Which of `MODES` a method takes beside `count` positional arguments, and their values.

    One that the module has as a field, and that is set there, is left to it. Raises ValueError for a module without the
    method, and for a method that cannot be called so.
    """
    function = getattr(module, method, None)
    if function is None:
        raise ValueError(f"{describe_module(module)} has no {method}: define it, from rows (T, D) to rows (T, D)")
    signature = inspect.signature(function)
    given = {
        name: value(train)
        for name, value in MODES.items()
        if name in list(signature.parameters)[count:] and getattr(module, name, None) is None
    }
    try:
        signature.bind(*[None] * count, **given)
    except TypeError as error:
        raise ValueError(
            f"{describe_module(module)}: {method}{signature} is called with {count} positional arguments and, where it "
            f"takes them, {', '.join(MODES)}; {error}"
        ) from error
    return given


def check_rows(module: nn.Module, method: str, result: Any, rows: int, width: int | None = None) -> None:
    """Raise ValueError for a result that is not an array of floating point numbers (rows, width), or, without a width,
    a tree of arrays (rows, ...)."""
    describe = lambda leaf: f"{leaf.shape} {leaf.dtype}" if hasattr(leaf, "dtype") else f"a {type(leaf).__name__}"
    if width is None:
        fine = all(getattr(leaf, "shape", ())[:1] == (rows,) for leaf in jax.tree.leaves(result))
        wanted, found = f"arrays of T rows, ({rows}, ...)", ", ".join(map(describe, jax.tree.leaves(result)))
    else:
        fine = getattr(result, "shape", None) == (rows, width) and jnp.issubdtype(result.dtype, jnp.floating)
        wanted, found = f"(T, D) = ({rows}, {width}) of floating point numbers", describe(result)
    if not fine:
        raise ValueError(f"{describe_module(module)}: what {method} returns: expected {wanted}, got {found}")
