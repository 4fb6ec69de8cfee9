"""Does data loading keep up with the model?  python -m experiments.benchmarks.loader --config=configs/lra/image.py

Times the loader alone and the training step alone on the same batches, and prints examples per second of each.
"""

import time

import jax
from absl import flags

from experiments.common import cli, runtime
from experiments.training.experiment import build

_CONFIG = cli.define_config()
_BATCHES = flags.DEFINE_integer("batches", 20, "Number of batches to time.", lower_bound=1)


def main() -> None:
    experiment = build(cli.read_config(_CONFIG), one_device=True)
    runtime.use_compilation_cache()
    count, size = _BATCHES.value or 1, experiment.config.train.batch_size
    batches = experiment.task.train_batches(0)
    next(batches)  # starts the readers
    began = time.monotonic()
    kept = [next(batches) for _ in range(count)]
    reading = count * size / (time.monotonic() - began)
    state = jax.jit(experiment.functions.init)(experiment.seed)
    update = jax.jit(experiment.functions.train, donate_argnums=0).lower(state, kept[0], experiment.seed).compile()
    state = update(state, kept[0], experiment.seed)
    jax.block_until_ready(state)
    began = time.monotonic()
    for batch in kept[: max(1, count // 4)]:
        state = update(state, batch, experiment.seed)
    jax.block_until_ready(state)
    training = max(1, count // 4) * size / (time.monotonic() - began)
    print(f"reading {reading:,.0f} examples/s, training {training:,.1f} examples/s, ratio {reading / training:,.1f}")


if __name__ == "__main__":
    cli.run(main, output_is_needed=True)
