"""Makes data sets, generated or from files that the user downloaded, without TensorFlow and without a network.

    python -m experiments.prepare --dataset=listops --data_dir=DIR --processes=4
    python -m experiments.prepare --dataset=pathfinder/32_easy --scale=0.125 --data_dir=DIR  # pathfinder/32_easy_0.125

The examples and their order depend on neither the machine nor the number of processes; the bytes of the files may.
"""

import os
import time

from absl import flags, logging

from experiments.common import cli
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
    from experiments.data import preparation  # here, not above: it takes seconds

    builder = preparation.make_builder(
        _DATASET.value,
        _SCALE.value or 0.0,
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
