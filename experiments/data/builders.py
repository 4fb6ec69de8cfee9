"""Our own data sets as tensorflow-datasets builders that need no TensorFlow: array_record files, Tensor and ClassLabel.

The program `prepare` finds every builder in this module by its `name`. tensorflow-datasets writes into a directory with
another name and renames it at the end, so what an interrupted preparation leaves (`incomplete...1.0.0` after a kill)
is never read as prepared, and it can be run again.
"""

import contextlib
import inspect
import io
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import tensorflow_datasets as tfds
from rich.console import Console
from rich.progress import track

from experiments.data import listops
from experiments.errors import UserError

T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 10.0


class ListOps(tfds.core.GeneratorBasedBuilder):
    """ListOps with LRA's parameters, sizes and order of splits (Tay et al. 2021); no expression appears twice.

    LRA's own files are one sample of the same distribution; these are another, the same on every machine (a test holds
    the random stream fixed).

    Args (besides tensorflow-datasets' own, such as data_dir):
      processes: how many make expressions. The data do not depend on it.
      sizes: examples of each split, to make a small one; the names are those of SIZES.
      parameters: what to draw, if not LRA's.
    """

    name = "listops"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "LRA's parameters, seed 0."}
    SEED = 0
    SIZES: ClassVar[Mapping[str, int]] = {"train": 96_000, "validation": 2_000, "test": 2_000}

    def __init__(
        self,
        *,
        processes: int = 1,
        sizes: Mapping[str, int] = SIZES,
        parameters: listops.ListOpsParameters = listops.ListOpsParameters(),
        **kwargs: Any,
    ):
        if processes < 1:
            raise UserError(f"processes is {processes}; it must be at least 1")
        self.processes = processes
        self.sizes = dict(sizes)
        self.parameters = parameters
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="ListOps expressions in pre-order tokens: " + " ".join(listops.VOCABULARY),
            features=tfds.features.FeaturesDict(
                {
                    "tokens": tfds.features.Tensor(shape=(None,), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=listops.CLASSES),
                }
            ),
            homepage="https://arxiv.org/abs/2011.04006",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, dict]]]:
        # tensorflow-datasets runs these one after the other, in order; the later splits leave out what is in `seen`.
        seen: set[bytes] = set()
        return {name: self._generate_examples(name, seen) for name in self.sizes}

    def _generate_examples(self, split: str, seen: set[bytes]) -> Iterator[tuple[int, dict]]:
        number = list(self.SIZES).index(split)
        size = self.sizes[split]
        examples = listops.generate_split(self.parameters, self.SEED, number, size, seen, self.processes)
        for key, (tokens, value) in enumerate(show_progress(examples, size, f"{self.name} {split}")):
            yield key, {"tokens": np.array(tokens, np.uint8), "label": value}


def available() -> dict[str, type[tfds.core.GeneratorBasedBuilder]]:
    """Every builder of this module by its name."""
    base = tfds.core.GeneratorBasedBuilder
    found: list[Any] = [item for item in globals().values() if inspect.isclass(item) and issubclass(item, base)]
    return {builder.name: builder for builder in found}


def prepare(builder: tfds.core.GeneratorBasedBuilder) -> Path:
    """Writes the data set unless it is there already, and returns its directory. Raises UserError if it cannot."""
    tfds.disable_progress_bar()
    try:
        # What tensorflow-datasets prints speaks of downloading, and nothing is downloaded.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    except OSError as error:
        raise UserError(f"cannot write {builder.data_dir}: {error}") from error
    return Path(builder.data_dir)


def show_progress(items: Iterable[T], total: int, title: str) -> Iterator[T]:
    """The same items; meanwhile a bar on the terminal, or now and then a line where there is none."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(items, title, total, console=console, transient=True)
        return
    last = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        if number == total or time.monotonic() - last > _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"{title}: {number:,} of {total:,}", file=sys.stderr, flush=True)
