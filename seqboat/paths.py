"""Names of tree leaves, as used by checkpoints, rules and patterns: keys joined by '/'."""

from typing import Any

import jax


class Path(str):
    """The name of a leaf. `keys` are its parts before joining: a key may itself contain '/', as in Flax's WeightNorm,
    "Dense_0/kernel/scale"."""

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
    """The keys of a name; a plain string is split at '/'."""
    return name.keys if isinstance(name, Path) else tuple(name.split("/"))


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name, a `Path`. Raises ValueError for duplicate names."""
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = path_name(path)
        if name in leaves:
            raise ValueError(f"{name}: two leaves have this name, one with '/' inside a key; rename one")
        leaves[name] = leaf
    return leaves


def unflatten(leaves: Any) -> dict[str, Any]:
    """Nested dicts from leaves by name; other containers of a flattened tree become dicts."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = path_keys(name)
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree
