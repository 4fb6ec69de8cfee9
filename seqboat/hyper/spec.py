"""Which parameters of a Flax module are generated, and what is known of each.

Paths have their parts joined by '/', as "encoder/layers/ssm/delta" (`seqboat.paths`). A pattern is a glob over parts
(`*` is one part or a piece of one, `**` any number), a compiled regular expression that is searched in the path, or a
predicate of the path and the leaf's shape and dtype.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from seqboat.modules import Linen, check_module
from seqboat.paths import flatten, path_keys, unflatten

Role = Literal["kernel", "bias", "other"]
Pattern = str | re.Pattern | Callable[[str, jax.ShapeDtypeStruct], bool]
Patterns = Pattern | Sequence[Pattern]

# A mean that varies over a leaf this many times more than the noise of its estimate is structure of the initializer.
STRUCTURED = 4.0


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter to generate. `fan_in` and `fan_out` are of one layer of a stack, and for a bias of its kernel.

    `stacked`: the first axis counts layers. `mean` and `variance` are of its own initializer, if they were measured:
    the mean a number, or an array where the initializer gives every element a place of its own (an SSM's rates, a
    norm's ones); the variance around it.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    role: Role
    fan_in: int | None = None
    fan_out: int | None = None
    stacked: bool = False
    mean: Any = dataclasses.field(default=None, compare=False)
    variance: float | None = None

    @property
    def rank(self) -> int:
        """The number of axes of one layer's."""
        return len(self.shape) - self.stacked

    @property
    def is_complex(self) -> bool:
        return jnp.issubdtype(self.dtype, jnp.complexfloating)

    @property
    def real_shape(self) -> tuple[int, ...]:
        """As real numbers: a complex leaf has a last axis of real and imaginary parts."""
        return (*self.shape, 2) if self.is_complex else self.shape

    @property
    def size(self) -> int:
        return math.prod(self.real_shape)


@dataclasses.dataclass(frozen=True)
class Spec:
    """The leaves to generate, in the order of their paths, and the paths of the parameters that stay as they are."""

    leaves: tuple[Leaf, ...]
    others: tuple[str, ...]
    # Where all of them stand, in the order of their paths in the module's own tree.
    tree: jax.tree_util.PyTreeDef | None = dataclasses.field(default=None, repr=False)
    order: tuple[str, ...] = dataclasses.field(default=(), repr=False)

    def assemble(self, leaves: Mapping[str, Any]) -> Any:
        """Parameters by path as the module's own tree, whatever its containers; as nested dicts if they are others."""
        if self.tree is None or leaves.keys() != set(self.order):
            return unflatten(leaves)
        return jax.tree.unflatten(self.tree, [leaves[path] for path in self.order])

    def __iter__(self) -> Iterator[Leaf]:
        return iter(self.leaves)

    def __getitem__(self, path: str) -> Leaf:
        for leaf in self.leaves:
            if leaf.path == path:
                return leaf
        raise KeyError(f"{path} is not among the leaves to generate: {', '.join(leaf.path for leaf in self.leaves)}")

    @property
    def size(self) -> int:
        return sum(leaf.size for leaf in self.leaves)

    def kernel_of(self, bias: Leaf) -> Leaf | None:
        """The generated kernel beside a generated bias."""
        path = _beside(bias.path, "kernel")
        return next((leaf for leaf in self.leaves if leaf.path == path), None)

    def bias_of(self, kernel: Leaf) -> Leaf | None:
        path = _beside(kernel.path, "bias")
        return next((leaf for leaf in self.leaves if leaf.path == path), None)


def spec(
    module: Linen,
    *args: Any,
    select: Patterns = "**",
    exclude: Patterns = (),
    stacked: Patterns = (),
    draws: int = 0,
    seed: int = 0,
    **kwargs: Any,
) -> Spec:
    """The parameters of `module` that `select` matches and `exclude` does not.

    `args` and `kwargs` are what the module is called with; arrays may be `jax.ShapeDtypeStruct`. Nothing is computed or
    allocated. `stacked` matches leaves whose first axis counts layers (a scan over layers): it is not part of a fan.
    Leaves without numbers (of size 0) stay as they are. With `draws` the module is initialised that often, from `seed`,
    to measure mean and variance of every leaf.

    Raises ValueError for a pattern that matches nothing, a leaf that is not a floating or complex number, and a module
    without parameters. A parameter that a module shares (a tied embedding) is one leaf, and is generated once.
    """
    check_module(module, "spec")
    if draws < 0 or draws == 1:
        raise ValueError(f"draws={draws}: a variance takes at least 2, and 0 measures none")
    fixed = lambda key: module.init(key, *_concrete(args), **_concrete(kwargs)).get("params", {})
    own = nn.meta.unbox(jax.eval_shape(fixed, jax.random.key(0)))
    shapes = flatten(own)
    if not shapes:
        raise ValueError(f"{type(module).__name__} has no parameters to generate")
    dropped = match(exclude, shapes, "exclude")
    kept = match(select, shapes, "select") - dropped
    chosen = {path: leaf for path, leaf in shapes.items() if path in kept and math.prod(leaf.shape)}
    if not chosen:
        raise ValueError(f"select={select!r} less exclude={exclude!r} leaves nothing to generate")
    stacks = match(stacked, shapes, "stacked")
    leaves = [_describe(path, leaf, shapes, path in stacks) for path, leaf in sorted(chosen.items())]
    if draws:
        keys = jax.random.split(jax.random.key(seed), draws)
        leaves = _measure(leaves, lambda key: flatten(nn.meta.unbox(fixed(key))), keys)
    others = tuple(path for path in shapes if path not in chosen)
    return Spec(tuple(leaves), others, jax.tree.structure(own), tuple(shapes))


def match(patterns: Patterns, shapes: Mapping[str, Any], where: str) -> set[str]:
    """The paths that any of the patterns matches. Raises ValueError for a pattern that matches none."""
    found: set[str] = set()
    single = isinstance(patterns, str | re.Pattern) or callable(patterns)
    listed: Any = [patterns] if single else patterns
    for pattern in listed:
        test = _test(pattern)
        own = {path for path, leaf in shapes.items() if test(path, leaf)}
        if not own:
            name = getattr(pattern, "pattern", pattern)
            raise ValueError(f"{where}={name!r} matches no parameter; there are {', '.join(shapes)}")
        found |= own
    return found


def _test(pattern: Pattern) -> Callable[[str, Any], bool]:
    if isinstance(pattern, str):
        found = re.compile(_glob(pattern))
        return lambda path, leaf: found.fullmatch(path) is not None
    if isinstance(pattern, re.Pattern):
        return lambda path, leaf: pattern.search(path) is not None
    return pattern


def _glob(pattern: str) -> str:
    """A glob over path parts as a regular expression."""
    pieces = {"**/": "(?:[^/]+/)*", "/**": "(?:/[^/]+)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    words = re.split(r"(\*\*/|/\*\*$|\*\*|\*|\?)", pattern)
    return "".join(pieces[word] if word in pieces else re.escape(word) for word in words)


def _describe(path: str, leaf: Any, shapes: Mapping[str, Any], stacked: bool) -> Leaf:
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        raise ValueError(
            f"{path} {leaf.shape} is of {leaf.dtype}: only floating and complex parameters can be generated; exclude it"
        )
    name = path_keys(path)[-1]
    rank = len(leaf.shape) - stacked
    role: Role = "kernel" if name == "kernel" and rank > 1 else "bias" if name == "bias" and rank == 1 else "other"
    kernel = leaf if role == "kernel" else shapes.get(_beside(path, "kernel")) if role == "bias" else None
    if kernel is None or len(kernel.shape) - stacked < 2:
        return Leaf(path, leaf.shape, leaf.dtype, "other", stacked=stacked)
    receptive = math.prod(kernel.shape[stacked:-2])
    fans = receptive * kernel.shape[-2], receptive * kernel.shape[-1]
    return Leaf(path, leaf.shape, leaf.dtype, role, *fans, stacked=stacked)


def _measure(leaves: list[Leaf], draw: Callable[[Any], dict[str, Any]], keys: Any) -> list[Leaf]:
    """The leaves with the moments of their initializers."""
    paths = [leaf.path for leaf in leaves]

    def add(sums, key):  # Welford's update: numbers that never change have no variance at all
        count, means, squares = sums
        drawn = draw(key)
        values = [real(drawn[path]).astype(jnp.float32) for path in paths]
        moved = [value - mean for value, mean in zip(values, means, strict=True)]
        means = [mean + move / (count + 1) for mean, move in zip(means, moved, strict=True)]
        added = [move * (value - mean) for move, value, mean in zip(moved, values, means, strict=True)]
        return (count + 1, means, jax.tree.map(jnp.add, squares, added)), None

    zeros = [jnp.zeros(leaf.real_shape, jnp.float32) for leaf in leaves]
    (count, means, squares), _ = jax.jit(lambda keys: jax.lax.scan(add, (jnp.zeros(()), zeros, zeros), keys))(keys)
    measured = []
    for leaf, mean, square in zip(leaves, means, squares, strict=True):
        mean = np.asarray(mean, np.float64)
        around = float(np.asarray(square, np.float64).mean() / max(count - 1, 1))
        if mean.var() <= STRUCTURED * around / count:  # its elements differ by chance alone
            around, mean = around + mean.var(), mean.mean()
        measured.append(dataclasses.replace(leaf, mean=np.float32(mean), variance=float(around)))
    return measured


def real(array: Any) -> Any:
    """A complex array with a last axis of real and imaginary parts; any other as it is."""
    return jnp.stack([array.real, array.imag], axis=-1) if jnp.iscomplexobj(array) else array


def _concrete(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype) if isinstance(a, jax.ShapeDtypeStruct) else a, tree)


def _beside(path: str, name: str) -> str:
    return "/".join([*path_keys(path)[:-1], name])
