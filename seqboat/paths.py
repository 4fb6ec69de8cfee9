"""Names of the leaves of trees, as checkpoints, rules and patterns have them: keys joined by '/'."""

from typing import Any

import jax


class Path(str):
    """The name of a leaf. `keys` are its parts as they were joined: one may contain '/' itself, as a key of Flax's
    WeightNorm, "Dense_0/kernel/scale", does."""

    keys: tuple[str, ...]

    def __new__(cls, keys: tuple[str, ...]) -> "Path":
        path = super().__new__(cls, "/".join(keys))
        path.keys = keys
        return path

    def __reduce__(self):
        return Path, (self.keys,)


def path_name(path: Any) -> Path:
    """The name of a path of jax.tree_util: "encoder/layers/ssm/delta"."""
    return Path(tuple(jax.tree_util.keystr((key,), simple=True) for key in path))


def path_keys(name: str) -> tuple[str, ...]:
    """The keys of a name; of a plain string, what stands between '/'."""
    return name.keys if isinstance(name, Path) else tuple(name.split("/"))


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name, a `Path`. Raises ValueError for two of one name."""
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = path_name(path)
        if name in leaves:
            raise ValueError(f"{name}: two leaves have this name, once with '/' as a part of a key; rename one")
        leaves[name] = leaf
    return leaves


def unflatten(leaves: Any) -> dict[str, Any]:
    """Leaves by name as nested dicts: `flatten` of trees of other containers too, which become dicts."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = path_keys(name)
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree
