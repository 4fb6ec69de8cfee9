"""Makes data sets, generated or from files that the user downloaded, without TensorFlow and without a network.

    python -m experiments.prepare --dataset=listops --data_dir=DIR --processes=4

The examples and their order depend on neither the machine nor the number of processes; the bytes of the files may.
"""

import os
import time

from absl import flags

from experiments import cli
from experiments.data.sources import OWN_DATASETS, data_directory
from experiments.errors import UserError

_DATASET = flags.DEFINE_string("dataset", None, "which data set to make: " + ", ".join(OWN_DATASETS))
_DATA_DIR = flags.DEFINE_string("data_dir", None, "where; else $TFDS_DATA_DIR, else ~/tensorflow_datasets")
_MANUAL_DIR = flags.DEFINE_string("manual_dir", None, "where downloaded files are; else DATA_DIR/downloads/manual")
_PROCESSES = flags.DEFINE_integer("processes", os.cpu_count() or 1, "how many processes make examples", lower_bound=1)


def main() -> None:
    name, _, config = (_DATASET.value or "").partition("/")
    if name not in OWN_DATASETS:
        given = "no --dataset" if _DATASET.value is None else f"unknown data set {_DATASET.value!r}"
        raise UserError(f"{given}; --dataset can be: {', '.join(OWN_DATASETS)}")
    from experiments.data import preparation  # here, not above: it takes seconds

    start = time.monotonic()
    builder_class = preparation.builder_class(name)
    configs = [item.name for item in builder_class.BUILDER_CONFIGS]
    if config and config not in configs:
        known = f"{', '.join(f'{name}/{item}' for item in configs)}" if configs else name
        raise UserError(f"unknown data set {_DATASET.value!r}; there is {known}")
    builder = builder_class(
        config=config or None,
        data_dir=data_directory(_DATA_DIR.value),
        manual_dir=_MANUAL_DIR.value,
        processes=_PROCESSES.value or 1,
    )
    if builder.is_prepared():
        print(f"{builder.data_dir} is there already; nothing done")
        return
    written = preparation.prepare(builder)
    splits = ", ".join(f"{name} {split.num_examples:,}" for name, split in builder.info.splits.items())
    print(f"wrote {written} ({splits}) in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    cli.run(main)
