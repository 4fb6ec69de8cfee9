"""Makes the data sets that this project generates itself, without TensorFlow and without a network.

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
_PROCESSES = flags.DEFINE_integer("processes", os.cpu_count(), "how many processes make examples", lower_bound=1)


def main() -> None:
    if _DATASET.value not in OWN_DATASETS:
        given = "no --dataset" if _DATASET.value is None else f"unknown data set {_DATASET.value!r}"
        raise UserError(f"{given}; --dataset can be: {', '.join(OWN_DATASETS)} (others need TensorFlow to prepare)")
    from experiments.data import builders  # here, not above: it takes seconds

    start = time.monotonic()
    builder_class = builders.available()[_DATASET.value]
    directory = data_directory(_DATA_DIR.value)
    builder = builder_class(data_dir=directory, processes=_PROCESSES.value)
    if builder.is_prepared():
        print(f"{builder.data_dir} is there already; nothing done")
        return
    written = builders.prepare(builder)
    splits = ", ".join(f"{name} {split.num_examples:,}" for name, split in builder.info.splits.items())
    print(f"wrote {written} ({splits}) in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    cli.run(main)
