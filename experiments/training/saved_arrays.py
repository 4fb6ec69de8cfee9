"""The arrays of a saved step, compared with those wanted before they are read."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from experiments.common.errors import UserError
from seqboat.paths import path_name
from seqboat.version import metric_today


def open_all(path: Path) -> None:
    """Opens every array. Raises whatever orbax does if it cannot."""
    ocp.PyTreeCheckpointHandler().metadata(path)


def read(path: Path, wanted: Any, what: str, *, partial: bool) -> Any:
    """The tree in `path`, saved by orbax, on the current devices; `wanted` has its shapes, dtypes and shardings.

    With `partial` only the fields of `wanted`. Raises UserError, naming the checkpoint by `what`, if the tree is
    another than `wanted` or cannot be read.
    """
    handler = ocp.PyTreeCheckpointHandler()
    try:
        tree = handler.metadata(path).tree
        older = {metric_today(name): name for name in tree.get("metrics") or {}}
        target = _with_metrics(jax.tree.map(_with_sharding, wanted), older)
        differences = tree_differences(tree, target, partial=partial)
        if differences and all(line.startswith("streams/") for line in differences):
            raise UserError(
                f"{what} was saved with a different config.task.carry_state or batch_size: resume with "
                "the original values, or use only the parameters by --init_from"
            )
        if differences and all(line.startswith("frozen/") for line in differences):
            raise UserError(
                f"{what} was saved with other config.objectives: resume with the original ones, or use only the "
                "parameters by --init_from"
            )
        if differences:
            more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise UserError(
                f"{what} does not fit this model: {'; '.join(differences[:3])}{more}; "
                "use the config it was made with, or another directory"
            )
        arguments = ocp.checkpoint_utils.construct_restore_args(target)
        args = ocp.args.PyTreeRestore(item=target, restore_args=arguments, partial_restore=True)
        with ocp.Checkpointer(handler) as reader:
            state = reader.restore(path, args=args)
            return _with_metrics(state, {name: today for today, name in older.items()})
    except UserError:
        raise
    except Exception as error:  # a forged or foreign file can make orbax raise anything
        raise UserError(f"{what} cannot be read: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    return (str(error) or repr(error)).splitlines()[0]


def _with_metrics(state: Any, names: Mapping[str, str]) -> Any:
    """The state with its metrics, if any, renamed."""
    if getattr(state, "metrics", None) is None:
        return state
    return dataclasses.replace(state, metrics={names.get(name, name): sums for name, sums in state.metrics.items()})


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


# SGD's state has had one that nothing reads.
_SECOND_MOMENT = "opt_state/second/"


def tree_differences(saved: Any, wanted: Any, *, partial: bool) -> list[str]:
    """One phrase per array that is missing, unexpected, or of a different shape or dtype (orbax would cast)."""
    here, there = _arrays(wanted), _arrays(saved)
    differences = []
    for path, array in here.items():
        if path not in there:
            differences.append(f"{path} {array} is missing in it")
        elif there[path] != array:
            differences.append(f"{path} is {there[path]} in it, {array} here")
    fields = {path.split("/")[0] for path in there} & set(wanted) if partial else None
    unknown = [path for path in there if path not in here and (fields is None or path.split("/")[0] in fields)]
    if not any(path.startswith(_SECOND_MOMENT) for path in here):
        unknown = [path for path in unknown if not path.startswith(_SECOND_MOMENT)]
    return differences + [f"{path} {there[path]} is only in it" for path in unknown]


def _arrays(tree: Any) -> dict[str, str]:
    """Path -> shape and dtype as stored; a typed key is stored as key data."""
    stored: dict[str, str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        stored[path_name(path)] = f"{tuple(leaf.shape)} {leaf.dtype}"
    return stored
