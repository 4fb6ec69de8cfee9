"""Meshes of devices, from strings like "data", "fsdp=4,fsdp_hidden=2" or "data,sequence=8"."""

import math
from collections.abc import Sequence

import jax
import numpy as np

# data: splits examples, replicates parameters. fsdp: splits examples and parameters. fsdp_hidden: splits parameters
# only. sequence: splits every sequence.
AXES = ("data", "fsdp", "fsdp_hidden", "sequence")
ALIASES = {"ddp": "data"}


def mesh_sizes(words: str, devices: int) -> dict[str, int]:
    """The size of every axis; axes not named have size 1, one named without a size takes the remaining devices.

    Raises ValueError if `words` do not match the number of devices.
    """
    sizes: dict[str, int | None] = {}
    for word in words.split(","):
        name, _, size = (part.strip() for part in word.partition("="))
        name = ALIASES.get(name, name)
        if name not in AXES:
            raise ValueError(f"there is no mesh axis {name!r}; there are {', '.join(AXES)}")
        if name in sizes:
            raise ValueError(f"mesh axis {name!r} is named twice")
        if size and (not size.isdecimal() or int(size) < 1):
            raise ValueError(f"mesh axis {name}={size}: its size must be a whole number of devices")
        sizes[name] = int(size) if size else None
    open_axes = [name for name, size in sizes.items() if size is None]
    if len(open_axes) > 1:
        raise ValueError(f"{' and '.join(open_axes)} have no size: only one axis can take the remaining devices")
    named = math.prod(size for size in sizes.values() if size is not None)
    if devices % named or (not open_axes and devices != named):
        wanted = f"a multiple of {named}" if open_axes else str(named)
        hint = "" if open_axes else "; an axis without a size takes the remaining devices"
        raise ValueError(f"{words!r} needs {wanted} devices, there are {devices}{hint}")
    return {name: devices // named if name in open_axes else sizes.get(name) or 1 for name in AXES}


def make_mesh(words: str, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh of all devices, or of those given. Neighbours in the list are neighbours on the last axes, so that the
    axes with the largest collectives stay within a machine."""
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(words, len(devices))
    grid = np.array(devices).reshape([sizes[name] for name in AXES])
    return jax.sharding.Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))
