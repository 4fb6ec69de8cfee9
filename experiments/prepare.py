"""Makes data sets, generated or from files that the user downloaded, without TensorFlow and without a network.

    python -m experiments.prepare --dataset=listops --data_dir=DIR --processes=4
    python -m experiments.prepare --dataset=pathfinder/32_easy --scale=0.125 --data_dir=DIR  # pathfinder/32_easy_0.125

The examples and their order depend on neither the machine nor the number of processes; the bytes of the files may.
"""

import copy
import os
import time
from typing import Any

from absl import flags, logging

from experiments.common import cli
from experiments.common.errors import UserError
from experiments.data.sources import OWN_DATASETS, data_directory

_DATASET = flags.DEFINE_string("dataset", None, "which data set to make: " + ", ".join(OWN_DATASETS))
_DATA_DIR = flags.DEFINE_string("data_dir", None, "where; else $TFDS_DATA_DIR, else ~/tensorflow_datasets")
_MANUAL_DIR = flags.DEFINE_string("manual_dir", None, "where downloaded files are; else DATA_DIR/downloads/manual")
_PROCESSES = flags.DEFINE_integer("processes", os.cpu_count() or 1, "how many processes make examples", lower_bound=1)
_SCALE = flags.DEFINE_float(
    "scale",
    1.0,
    "make this part of every split, of data sets that are generated; it lies beside the whole under a name of its own, "
    "DATASET_SCALE (DATASET/SCALE if the data set has no configurations)",
    lower_bound=0.0,
    upper_bound=1.0,
)


def main() -> None:
    logging.set_verbosity(logging.ERROR)  # tensorflow-datasets warns of configurations made with --scale
    start = time.monotonic()
    builder = make_builder(
        _DATASET.value,
        _SCALE.value or 0.0,
        data_dir=data_directory(_DATA_DIR.value),
        manual_dir=_MANUAL_DIR.value,
        processes=_PROCESSES.value or 1,
    )
    if builder.is_prepared():
        print(f"{builder.data_dir} is there already; nothing done")
        return
    from experiments.data import preparation

    written = preparation.prepare(builder)
    splits = ", ".join(f"{name} {split.num_examples:,}" for name, split in builder.info.splits.items())
    print(f"wrote {written} ({splits}) in {time.monotonic() - start:.0f} s")


def make_builder(dataset: str | None, scale: float = 1.0, **arguments: Any) -> Any:
    """The builder of what --dataset and --scale name; `arguments` are its own. Raises UserError if there is none."""
    name, _, config = (dataset or "").partition("/")
    if name not in OWN_DATASETS:
        given = "no --dataset" if dataset is None else f"unknown data set {dataset!r}"
        raise UserError(f"{given}; --dataset can be: {', '.join(OWN_DATASETS)}")
    from experiments.data import preparation  # here, not above: it takes seconds

    builder_class = preparation.builder_class(name)
    configs = [item.name for item in builder_class.BUILDER_CONFIGS]
    known = ", ".join(f"{name}/{item}" for item in configs) or name
    if config and config not in configs:
        raise UserError(f"unknown data set {dataset!r}; there is {known} (a part of one is made with --scale)")
    if not config and len(configs) > 1:
        raise UserError(f"--dataset={name} is several data sets; name one of them: {known}")
    return builder_class(**_part(builder_class, config or next(iter(configs), ""), scale), **arguments)


def _part(builder_class: Any, config: str, scale: float) -> dict[str, Any]:
    """The builder's arguments for a configuration, or for a part of it: a configuration with its own name and sizes."""
    if not 0 < scale <= 1:  # NaN too
        raise UserError(f"--scale={scale:g}: must be above 0 and at most 1")
    if scale == 1:
        return {"config": config or None}
    whole = getattr(builder_class, "SIZES", None)
    if whole is None:
        raise UserError("--scale is for data sets that are generated; this one is made from files, all of them")
    sizes = {split: round(scale * size) for split, size in whole.items()}
    if not all(sizes.values()):
        raise UserError(f"--scale={scale:g} leaves a split without examples: {sizes}")
    import tensorflow_datasets as tfds

    configs = {item.name: item for item in builder_class.BUILDER_CONFIGS}
    part = copy.copy(configs[config]) if configs else tfds.core.BuilderConfig(name="")
    part.name = f"{part.name}_{scale:g}".lstrip("_")
    part.description = f"A part, {scale:g} of every split: {sizes} of {dict(whole)} examples"
    return {"config": part, "sizes": sizes}


if __name__ == "__main__":
    cli.run(main)
