"""A trained model in one file: safetensors, with the config and the versions as JSON in its metadata.

    tensors   params/encoder/layers/..., batch_stats/...; or the names of the published implementation
    metadata  {"seqboat": JSON}: format, names, step, best, config, versions, data, and a sha256 of all of it

Nothing in a file is executed, and nothing in it is trusted: what does not fit is one line for the user.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from experiments.common.errors import UserError, require
from experiments.training.experiment import read_config, read_task
from experiments.training.models import build_model
from experiments.training.saved_arrays import tree_differences
from seqboat.interop.published import convert_classifier
from seqboat.models.classifier import Classifier
from seqboat.paths import flatten, path_name, unflatten
from seqboat.version import CHECKPOINT_FORMAT, migrate

SUFFIX = ".safetensors"
METADATA = "seqboat"
COLLECTIONS = ("params", "batch_stats")
# Sizes of config.model that are axes of parameters.
SIZES = ("features", "layers", "key_size", "value_size", "state_size", "feed_forward_size", "head_size")
Names = Literal["seqboat", "published"]

Arrays = dict[str, np.ndarray]


def write(path: Path, arrays: Arrays, meta: Mapping[str, Any]) -> None:
    """Writes a file atomically. Raises UserError if writing fails, and for a file that is not an export."""
    refuse_overwriting(path)
    about = {**meta, "format": "seqboat", "format_version": CHECKPOINT_FORMAT}
    text = json.dumps({**about, "sha256": digest(about, arrays)}, allow_nan=False)
    data = _library(path).numpy.save(arrays, {METADATA: text})
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise UserError(f"could not write {path}: {error.strerror}") from error


def refuse_overwriting(path: Path) -> None:
    """Raises UserError for a name that an export cannot have, or that something else has."""
    require(path.suffix == SUFFIX, f"--out={path}: expected a name that ends with {SUFFIX}")
    if path.exists() or path.is_symlink():
        require(is_export(path), f"--out={path} exists and is not an export: choose another name, or remove it")


def is_export(path: Path) -> bool:
    """Whether a file says that it was written here; it may be damaged all the same."""
    try:
        return path.is_file() and METADATA in _header(path)[0]
    except UserError:
        return False


def digest(meta: Mapping[str, Any], arrays: Arrays) -> str:
    """sha256 of the metadata and of every array's name, dtype, shape and numbers: any changed byte is detected."""
    found = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        found.update(f"\n{name} {array.dtype} {array.shape}\n".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def named(variables: Mapping[str, Any]) -> Arrays:
    """The arrays of a tree of variables by the names that they have in a file."""
    kept = {name: variables.get(name, {}) for name in COLLECTIONS}
    return {str(name): np.asarray(leaf) for name, leaf in flatten(kept).items()}


class Exported:
    """A file of one trained model, read like a step of a work directory (`restore.open_run`). Raises UserError."""

    def __init__(self, path: Path, step: int | None = None):
        self.path = path
        metadata, self._shapes = _header(path)
        require(
            METADATA in metadata,
            f"{path} was not written by experiments.export: it holds no config (--init_from takes a state dict)",
        )
        self._stored = self._parse(metadata[METADATA])
        self._arrays: Arrays | None = None
        try:
            self.meta = migrate(dict(self._stored))
        except ValueError as error:
            raise UserError(f"{path} {error}") from error
        self.values: dict[str, Any] = self.meta["config"]
        self._refuse_larger_model()
        self.step, self.best = self.meta["step"], self.meta["best"]
        require(step in (None, self.step), f"--step={step}: {path} holds step {self.step} alone; remove --step")

    def _parse(self, text: str) -> dict[str, Any]:
        """The metadata, of the right kinds: nothing else in the house checks them."""
        try:
            found = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path} is damaged: its metadata cannot be read ({error})") from error
        kinds = {"config": dict, "versions": dict, "step": int, "best": bool, "names": str, "sha256": str}
        for name, kind in kinds.items():
            value = found.get(name) if isinstance(found, dict) else None
            require(
                type(value) is kind, f"{self.path} is damaged: {name!r} of its metadata is not of type {kind.__name__}"
            )
        require(0 <= found["step"] < 2**62, f"{self.path} is damaged: step {found['step']} in its metadata")
        require(found["names"] in ("seqboat", "published"), f"{self.path}: unknown names {found['names']!r}")
        return found

    def _refuse_larger_model(self) -> None:
        """Raises UserError for sizes that the arrays cannot have, before anything is allocated for them."""
        count, model = sum(map(math.prod, self._shapes.values())), self.values.get("model")
        fields: dict[str, Any] = dict(model) if isinstance(model, dict) else {}
        if isinstance(mixer := fields.get("mixer"), dict):
            fields |= {f"mixer.{name}": value for name, value in mixer.items()}
        for name, size in fields.items():
            if name.removeprefix("mixer.") in SIZES and type(size) is int and size > count:
                raise UserError(
                    f"{self.path} does not fit its config: config.model.{name}={size}, {count} numbers in all"
                )

    def verify(self) -> None:
        """Raises UserError if a byte of the arrays or of the metadata has changed."""
        if self._arrays is None:
            self._arrays = _read(self.path, list(self._shapes))
            about = {name: value for name, value in self._stored.items() if name != "sha256"}
            whole = digest(about, self._arrays) == self._stored["sha256"]
            require(whole, f"{self.path} is damaged: its contents have changed")

    def restore(self, abstract_params: Any, abstract_batch_stats: Any) -> dict[str, Any]:
        """Parameters and batch statistics, on the first device. Raises UserError unless they are those of the model."""
        self.verify()
        wanted = {"params": abstract_params, "batch_stats": abstract_batch_stats}
        tree = self._tree(self._arrays or {})
        if differences := tree_differences(tree, wanted, partial=False):
            more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise UserError(f"{self.path} does not fit this model: {'; '.join(differences[:3])}{more}")
        leaves = flatten(tree)
        filled = jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], wanted)
        return jax.device_put(filled, jax.local_devices()[0])

    def _tree(self, arrays: Arrays) -> dict[str, Any]:
        if self.meta["names"] == "seqboat":
            return unflatten(arrays)
        config = read_config(self.values)
        model = build_model(config.model, read_task(config)[1])
        weight = arrays.get("encoder.weight")
        require(
            isinstance(model, Classifier) and weight is not None and weight.ndim == 2,
            f"{self.path} is damaged: published names are of classifiers of numbers",
        )
        try:
            return convert_classifier(arrays, model.config, weight.shape[1])  # type: ignore
        except ValueError as error:
            raise UserError(f"{self.path}: {error}") from error


def _header(path: Path) -> tuple[dict[str, str], dict[str, list[int]]]:
    """The metadata of a safetensors file, and the shapes of its arrays."""
    require(path.is_file(), f"there is no file {path}")
    with _errors(path), _open(path) as file:
        return dict(file.metadata() or {}), {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def _read(path: Path, names: list[str]) -> Arrays:
    with _errors(path), _open(path) as file:
        return {name: file.get_tensor(name) for name in names}


def _open(path: Path) -> Any:
    return _library(path).safe_open(path, framework="numpy")


def _library(path: Path) -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise UserError(f"{path} needs the package safetensors; pip install safetensors") from error
    return safetensors


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """A broken or hostile file can make its reader raise anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read: {reason}") from error


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")
