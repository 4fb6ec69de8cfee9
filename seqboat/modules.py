"""Validation and calling of user-supplied Flax modules, for sparse activation and hypernetworks."""

import inspect
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# User-supplied modules: `check_module` explains what is wrong, which a type checker could not.
Linen = Any
Modules = Any

# How modules are told that this is training: the argument's name, and its value.
MODES = {"train": lambda train: train, "training": lambda train: train, "deterministic": lambda train: not train}


def check_module(module: Any, where: str) -> None:
    """Raise ValueError, beginning with `where`, for anything but an instance of a Flax linen module."""
    if isinstance(module, nn.Module):
        return
    kind = module if isinstance(module, type) else type(module)
    if any(base.__module__.startswith("flax.nnx") for base in kind.__mro__):
        found = f"{kind.__name__} is an NNX module: write it as a flax.linen.Module"
    elif isinstance(module, type):
        found = f"{kind.__name__} is a class: pass an instance, {kind.__name__}(...)"
    elif callable(module):
        name = getattr(module, "__name__", kind.__name__)
        found = f"{name} is a {kind.__name__}: pass a flax.linen.Module that calls it"
    else:
        found = f"not {'None' if module is None else f'a {kind.__name__}'}"
    raise ValueError(f"{where}: expected a Flax linen module; {found}")


def check_modules(modules: Any) -> None:
    """`check_module` for every module of a sequence."""
    if not isinstance(modules, Sequence):
        raise ValueError(f"modules: expected a tuple of Flax linen modules, not a single {type(modules).__name__}")
    for index, module in enumerate(modules):
        check_module(module, f"modules[{index}]")


def describe_module(module: nn.Module) -> str:
    """The module's class, preceded by its name if it has one."""
    kind = type(module).__name__
    return f"{module.name} ({kind})" if module.name else kind


def modes(module: nn.Module, method: str, count: int, train: bool) -> dict[str, bool]:
    """Which of `MODES` a method takes besides `count` positional arguments, and their values.

    A mode that is set as a field of the module is not passed. Raises ValueError for a module without the method, or if
    the method cannot be called this way.
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
    """Raise ValueError unless a result is an array of floating point numbers (rows, width) or, without a width, a tree
    of arrays (rows, ...)."""
    describe = lambda leaf: f"{leaf.shape} {leaf.dtype}" if hasattr(leaf, "dtype") else f"a {type(leaf).__name__}"
    if width is None:
        fine = all(getattr(leaf, "shape", ())[:1] == (rows,) for leaf in jax.tree.leaves(result))
        wanted, found = f"arrays of T rows, ({rows}, ...)", ", ".join(map(describe, jax.tree.leaves(result)))
    else:
        fine = getattr(result, "shape", None) == (rows, width) and jnp.issubdtype(result.dtype, jnp.floating)
        wanted, found = f"(T, D) = ({rows}, {width}) of floating point numbers", describe(result)
    if not fine:
        raise ValueError(f"{describe_module(module)}: what {method} returns: expected {wanted}, got {found}")
