"""A series of many channels of the user's: windows to be reconstructed, and anomalies if they are labelled.

The file is an npz of `x` (T, C), numbers, and if there are labels `anomalies` (T,), not 0 at an anomalous element.
Training reads the first part of it, which should be normal: its labels are not looked at.
"""

import dataclasses
import hashlib
import io
import math
import zipfile
from typing import Any, ClassVar

import numpy as np
from numpy.lib import format as npy

from experiments.common.config import within
from experiments.common.errors import UserError, require
from experiments.common.files import user_path
from experiments.data.archives import read_files
from experiments.tasks.base import MAX_DRAWN
from experiments.tasks.coupled_series import Series, SeriesTask

WHERE = "config.task.files"


@dataclasses.dataclass(frozen=True)
class Config:
    """One file in `files`, cut by `fractions` into training, validation and test, in this order; windows of `length`
    elements. `channels` are those of the file; None takes however many there are."""

    vocabulary_size: ClassVar[None] = None
    files: tuple[str, ...] = ()
    channels: int | None = None
    fractions: tuple[float, float, float] = (0.6, 0.1, 0.3)
    length: int = 32

    def __post_init__(self):
        if self.channels is not None:
            within(self, 2, 1024, "channels")
        within(self, 1, 2**16, "length")
        if len(self.fractions) != 3 or min(self.fractions) <= 0 or not math.isclose(sum(self.fractions), 1):
            raise ValueError(f"fractions={self.fractions}: must be three above 0 with sum 1")


class Task(SeriesTask):
    """As `coupled_series`, without kinds of anomalies and without a known graph."""

    def __init__(self, config: Config, *, data_dir: str | None = None, **batching: int):
        """`batching` is batch_size, seed, process_index and process_count, as in Task."""
        require(len(config.files) == 1, f"{WHERE}: name one npz file, as in --{WHERE}='(\"series.npz\",)'")
        series, self._fingerprint = read(config)
        super().__init__(dataclasses.replace(config, channels=series.parts["train"].shape[1]), series, **batching)

    @property
    def resolved(self) -> dict[str, Any]:
        return {"channels": self.config.channels}

    @property
    def fingerprint(self) -> dict[str, str]:
        return self._fingerprint


def read(config: Config) -> tuple[Series, dict[str, str]]:
    """The parts of the file, in units of the mean and standard deviation of every channel in training, and the file's
    fingerprint. Raises UserError for a file that cannot be one."""
    path = user_path(config.files[0], WHERE)
    require(
        path.is_file(),
        f"{WHERE}: there is no regular file {path}; for a trained run, --data_dir gives its new directory",
    )  # reading a pipe would block
    require(zipfile.is_zipfile(path), f"{WHERE}: {path} is not an npz; numpy.savez writes one")
    try:
        found = read_files(path, ("x.npy", "anomalies.npy").__contains__)
        arrays = {
            name.removesuffix(".npy"): npy.read_array(io.BytesIO(data), allow_pickle=False) for name, data in found
        }
    except UserError as error:
        raise UserError(f"{WHERE}: {error}") from error
    except Exception as error:  # a broken or hostile file can make its reader raise anything
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{WHERE}: {path} cannot be read as an npz of arrays ({why})") from error
    require("x" in arrays, f"{WHERE}: {path} has no array x (T, C)")
    x, labels = arrays["x"], arrays.get("anomalies")
    require(
        x.ndim == 2 and x.dtype.kind in "fiub" and 2 <= x.shape[1] <= 1024,
        f"{WHERE}: x of {path} is {x.dtype} {x.shape}; it must be numbers (T, C), of 2 to 1024 channels",
    )
    require(
        config.channels in (None, x.shape[1]),
        f"config.task.channels={config.channels}: x of {path} has {x.shape[1]}; leave channels out",
    )
    x = x.astype(np.float64)
    require(bool(np.isfinite(x).all()), f"{WHERE}: x of {path} has numbers that are not finite; fill or leave them out")
    require(x.size <= MAX_DRAWN, f"{WHERE}: x of {path} has {x.size:,} numbers; at most {MAX_DRAWN:,}")
    require(
        labels is None
        or (labels.shape == x.shape[:1] and labels.dtype.kind in "fiub" and bool(np.isfinite(labels).all())),
        f"{WHERE}: anomalies of {path} must be finite numbers ({len(x)},), as x has {len(x)} elements",
    )
    ends = np.round(np.cumsum(config.fractions) * len(x)).astype(int)[:2]
    parts = dict(zip(("train", "validation", "test"), np.split(x, ends), strict=True))
    for split, part in parts.items():
        require(
            len(part) >= config.length,
            f"{WHERE}: the {split} part of {path} has {len(part)} elements, windows have config.task.length="
            f"{config.length}",
        )
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # what becomes of it is checked
        mean, deviation = parts["train"].mean(0), parts["train"].std(0)
        deviation = np.where(np.ptp(parts["train"], axis=0) > 0, deviation, 0)  # of equal numbers it is rounding
        parts = {split: ((part - mean) / deviation).astype(np.float32) for split, part in parts.items()}
    require(
        bool(deviation.min() > 0),
        f"{WHERE}: channel {int(deviation.argmin())} of {path} does not vary in the training part; leave it out",
    )
    finite = np.all([np.isfinite(part).all(0) for part in parts.values()], axis=0) & np.isfinite(deviation)
    require(
        bool(finite.all()),
        f"{WHERE}: channel {int(finite.argmin())} of {path} is too large for its deviation in training",
    )
    kinds = None if labels is None else (labels[ends[1] :] != 0).astype(np.int32)
    packed = path.read_bytes()
    digest = f"{len(packed):,} bytes, sha256 {hashlib.sha256(packed).hexdigest()}"
    return Series(parts, kinds, None), {f"{WHERE}[0]": digest}
