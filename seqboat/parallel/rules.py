"""Sharding rules: parameter names to logical axes, logical axes to mesh axes; and the collectives of a step.

A step runs on every device's part of the data (`jax.shard_map` or `jax.pmap`), and communicates only as `Layout` says.
Split parameters are gathered one layer at a time where they are used; the transpose scatters the sum of their
gradients.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from seqboat.parallel.mesh import AXES
from seqboat.paths import path_name

Tree = Any
Names = tuple[str | None, ...]

# Suffix of a parameter's path -> the logical axis of each dimension. A stack of layers has one more in front.
PARAMETERS: tuple[tuple[str, Names], ...] = (
    ("embedding/table", (None, "embed")),
    ("embedding/projection/kernel", (None, "embed")),
    (r"embedding/convolution_\d+/kernel", (None, None, None, None)),
    ("(gau/(projection|value)|feed_forward/up|skip_projection|head_hidden)/kernel", ("embed", "hidden")),
    ("(gau/(projection|value)|feed_forward/up|head_hidden)/bias", ("hidden",)),
    ("(gau/output|feed_forward/down)/kernel", ("hidden", "embed")),
    (r"(unit|attention_\d+)/(query|key|value|gate|up)/kernel", ("embed", "hidden")),
    (r"(unit|attention_\d+)/(output|down)/kernel", ("hidden", "embed")),
    ("ssm/(delta|alpha|beta|gamma|log_decay|frequency|c_real|c_imag)", ("embed", None)),
    ("ssm/(omega|skip|log_step)", ("embed",)),
    ("head/kernel", ("embed", None)),
    ("logits/kernel|gau/(gamma|beta|position_vectors)", (None, None)),
    ("bias|offset|mean|variance|position_bias|log_temperature|mask_token", (None,)),
    ("position/scale|batches", ()),
    ("scale", (None,)),
)


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axes: for data `batch` and `length`; for parameters `embed`, the model width, and `hidden`,
    other widths. `parameters` gives every parameter its logical axes."""

    batch: tuple[str, ...] = ("data", "fsdp")
    length: tuple[str, ...] = ("sequence",)
    embed: tuple[str, ...] = ("fsdp",)
    hidden: tuple[str, ...] = ("fsdp_hidden",)
    parameters: tuple[tuple[str, Names], ...] = PARAMETERS

    def __post_init__(self):
        for name in ("batch", "length", "embed", "hidden"):
            for axis in getattr(self, name):
                if axis not in AXES:
                    raise ValueError(f"rule {name}: there is no mesh axis {axis!r}; there are {', '.join(AXES)}")
        if set(self.batch) & set(self.length):
            raise ValueError(f"rules batch={self.batch} and length={self.length} share a mesh axis")

    def names(self, path: str, rank: int) -> Names:
        """The logical axes of a parameter, given its path joined by '/'."""
        plug = re.search("(^|/)(ssm|head)/", path)  # a mixer or a head, whose files name their parameters as they like
        prefix = plug[0].lstrip("/") if plug else ""
        for pattern, names in self.parameters:
            if re.search(rf"(^|/)({pattern})$", path) and pattern.startswith(prefix):
                if rank not in (len(names), len(names) + 1):
                    raise ValueError(f"{path} has {rank} dimensions; the rule {pattern!r} names {names}")
                return (None,) * (rank - len(names)) + names
        if plug:  # no rule: whole on every device
            return (None,) * rank
        raise ValueError(f"{path} of {rank} dimensions: no rule names its axes; add one to Rules.parameters")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Rules on a mesh of these sizes. `axes` are the mesh axes of more than one device."""

    rules: Rules
    sizes: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, mesh: jax.sharding.Mesh, rules: Rules | None = None) -> "Layout":
        return cls(rules or Rules(), tuple((name, mesh.shape[name]) for name in mesh.axis_names))

    @classmethod
    def alone(cls) -> "Layout":
        """The layout of a single device."""
        return cls(Rules(), ())

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(name for name, size in self.sizes if size > 1)

    @property
    def batch(self) -> tuple[str, ...]:
        """The mesh axes over which a batch is split."""
        return self._kept(self.rules.batch)

    @property
    def length(self) -> str | None:
        """The mesh axis over which sequences are split, or None."""
        kept = self._kept(self.rules.length)
        if len(kept) > 1:
            raise ValueError(f"rule length={self.rules.length}: only one mesh axis may split sequences")
        return kept[0] if kept else None

    @property
    def data(self) -> tuple[str, ...]:
        """The mesh axes over which elements are split, in batch or length."""
        return self.batch + ((self.length,) if self.length else ())

    @property
    def pieces(self) -> int:
        """How many devices share a sequence."""
        return self.size((self.length,)) if self.length else 1

    def size(self, axes: tuple[str, ...]) -> int:
        return math.prod(dict(self.sizes)[axis] for axis in axes)

    def copies(self, per_element: bool) -> int:
        """How many devices compute the same result, per element or per sequence."""
        split = self.data if per_element else self.batch
        return self.size(tuple(axis for axis in self.axes if axis not in split))

    @property
    def per_sequence(self) -> PartitionSpec:
        """The spec of arrays (B, ...) split only along the batch."""
        return PartitionSpec(self.batch or None)

    def of_batch(self, batch: Mapping[str, Any]) -> dict[str, PartitionSpec]:
        """The specs of arrays (B, L, ...), and of those with one entry per sequence: `lengths`, anything (B,), and the
        leaves of the tree `streams`."""
        per_element = PartitionSpec(self.batch or None, self.length)
        return {
            name: self.per_sequence if name in ("lengths", "streams") or len(array.shape) == 1 else per_element
            for name, array in batch.items()
        }

    def of_parameter(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        """Raises ValueError for a mesh axis used twice, a dimension that does not divide evenly and, on a mesh that
        splits parameters, a dimension without a rule."""
        split = self._split(path, len(shape))
        used: list[str] = []
        for dimension, (names, size) in enumerate(zip(split, shape, strict=True)):
            if not names:
                continue
            where = f"{path} {shape}, dimension {dimension} ({self.rules.names(path, len(shape))[dimension]})"
            for axis in names:
                if axis in used:
                    raise ValueError(f"{where}: mesh axis {axis!r} already splits another dimension of it")
                used.append(axis)
            if size % self.size(names):
                raise ValueError(
                    f"{where}: {size} does not divide evenly among {' x '.join(names)} = {self.size(names)}"
                )
        return PartitionSpec(*(names or None for names in split))

    def of_parameters(self, params: Tree) -> Tree:
        """The spec of every leaf of a tree of parameters, or of a tree that contains such trees, such as an optimiser
        state.

        Leaves are matched by the suffix of their path; scalars are replicated.
        """
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: self.of_parameter(path_name(path), leaf.shape) if leaf.shape else PartitionSpec(), params
        )

    def gather(self, params: Tree, but: str | None = None) -> Tree:
        """Gathers every parameter from the devices' parts, except those whose path contains `but`."""

        if not self.axes:
            return params

        def whole(path, leaf):
            if but is not None and but in path_name(path):
                return leaf
            for dimension, axes in enumerate(self._split(path_name(path), leaf.ndim) if leaf.ndim else ()):
                if axes:
                    leaf = jax.lax.all_gather(leaf, axes, axis=dimension, tiled=True)
            return leaf

        return jax.tree_util.tree_map_with_path(whole, params)

    def sum_gradients(self, gradients: Tree) -> Tree:
        """Sums gradients over all devices, along the axes that `gather` has not summed."""
        if not self.axes:
            return gradients
        missing: dict[tuple[str, ...], list] = {}
        paths, tree = jax.tree_util.tree_flatten_with_path(gradients)
        for index, (path, leaf) in enumerate(paths):
            done = {axis for axes in (self._split(path_name(path), leaf.ndim) if leaf.ndim else ()) for axis in axes}
            missing.setdefault(tuple(axis for axis in self.axes if axis not in done), []).append(index)
        leaves = [leaf for _, leaf in paths]
        for axes, indices in missing.items():
            if axes:
                for index, summed in zip(indices, jax.lax.psum([leaves[i] for i in indices], axes), strict=True):
                    leaves[index] = summed
        return jax.tree.unflatten(tree, leaves)

    def share(self, tree: Tree, per_element: bool) -> Tree:
        """Divides numbers by the number of devices that compute the same ones, so that `sum` counts them once."""
        count = self.copies(per_element)
        return jax.tree.map(lambda a: a / count, tree) if count > 1 else tree

    def sum(self, tree: Tree) -> Tree:
        """The sum over all devices."""
        return jax.lax.psum(tree, self.axes) if self.axes else tree

    def fold(self, key: Array) -> Array:
        """A key that is unique to this device's elements, and equal on devices that share them."""
        return jax.random.fold_in(key, jax.lax.axis_index(self.data)) if self.data else key

    def start(self, length: int) -> Array | int:
        """The position at which this device's piece of N elements starts in its sequences."""
        return jax.lax.axis_index(self.length) * length if self.length else 0

    def _kept(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(axis for axis in axes if dict(self.sizes).get(axis, 1) > 1)

    def _split(self, path: str, rank: int) -> tuple[tuple[str, ...], ...]:
        """The mesh axes of each dimension of a parameter."""
        if not self._kept(self.rules.embed + self.rules.hidden):
            return ((),) * rank
        names = self.rules.names(path, rank)
        return tuple(self._kept(getattr(self.rules, name)) if name else () for name in names)


SINGLE_DEVICE = Layout.alone()
