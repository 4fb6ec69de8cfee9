"""Prepare data sets, generated or from downloaded files, without TensorFlow and without network access.

    python -m experiments.prepare --dataset=listops --data_dir=DIR --processes=4
    python -m experiments.prepare --dataset=pathfinder/32_easy --scale=0.125 --data_dir=DIR  # pathfinder/32_easy_0.125

Examples and their order depend on neither the machine nor the number of processes; the bytes of the files may.
"""

import os
import time

from absl import flags, logging

from experiments.common import cli
from experiments.data.sources import OWN_DATASETS, data_directory

_DATASET = flags.DEFINE_string("dataset", None, "Data set to prepare: " + ", ".join(OWN_DATASETS) + ".")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where to write it; else $TFDS_DATA_DIR, else ~/tensorflow_datasets.")
_MANUAL_DIR = flags.DEFINE_string("manual_dir", None, "Where downloaded files are; else DATA_DIR/downloads/manual.")
_PROCESSES = flags.DEFINE_integer("processes", os.cpu_count() or 1, "Number of worker processes.", lower_bound=1)
_SCALE = flags.DEFINE_float(
    "scale",
    1.0,
    "Fraction of every split to make, for generated data sets. The result is stored next to the full data set as "
    "DATASET_SCALE (DATASET/SCALE if the data set has no configurations).",
    lower_bound=0.0,
    upper_bound=1.0,
)


def main() -> None:
    logging.set_verbosity(logging.ERROR)  # tensorflow-datasets warns of configurations made with --scale
    start = time.monotonic()
    from experiments.data import preparation  # imported late: it takes seconds

    builder = preparation.make_builder(
        _DATASET.value,
        _SCALE.value or 0.0,
        data_dir=data_directory(_DATA_DIR.value),
        manual_dir=_MANUAL_DIR.value,
        processes=_PROCESSES.value or 1,
    )
    if builder.is_prepared():
        print(f"{builder.data_dir} already exists; nothing to do")
        return
    written = preparation.prepare(builder)
    splits = ", ".join(f"{name} {split.num_examples:,}" for name, split in builder.info.splits.items())
    print(f"wrote {written} ({splits}) in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    cli.run(main)
