"""Estimate what a training step needs on other machines, by compiling it without running it.

python -m experiments.plan --config=FILE --devices=64 --config.mesh=fsdp=8,sequence=8 [--rate=0.25]
"""

import jax
from absl import flags
from rich.table import Table

from experiments.common import cli, terminal
from experiments.common.errors import UserError

_CONFIG = cli.define_config()
_DEVICES = flags.DEFINE_integer(
    "devices", 8, "Number of devices to simulate, at most 2048.", lower_bound=1, upper_bound=2048
)
_RATE = flags.DEFINE_float("rate", 0.5, "Activation rate to count FLOPs at.", lower_bound=0.0, upper_bound=1.0)


def main() -> None:
    values = cli.read_config(_CONFIG)
    devices, rate = _DEVICES.value or 1, float(_RATE.value or 0.0)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    from experiments.training.experiment import build
    from experiments.training.footprint import ACCELERATORS, make_plan

    if values.get("mesh") == "pmap":
        raise UserError("config.mesh='pmap': a plan needs a mesh, for instance data")
    experiment = build(values)
    plan = make_plan(experiment, rate)
    console = terminal.console(width=120)
    table = Table("per device and step", title=f"{experiment.describe()}\n{experiment.partition.describe()}")
    table.add_column("", justify="right")
    table.add_row(f"parameters ({plan.parameters:,} in total)", _bytes(plan.parameter_bytes))
    table.add_row("optimiser state", _bytes(plan.optimizer_bytes))
    table.add_row("everything else, as compiled for a CPU", _bytes(plan.temporary_bytes))
    for (axes, kind), sent in plan.wire.items():
        table.add_row(f"sent along {axes} by {kind}", _bytes(sent))
    table.add_row(f"TFLOP in matrix products at an activation rate of {rate:g}", f"{plan.flops / 1e12:,.3g}")
    for name in ACCELERATORS:
        parts = plan.seconds(name)
        shares = ", ".join(f"{what} {1e3 * seconds:.3g}" for what, seconds in parts.items())
        table.add_row(f"{name}, lower bound in milliseconds ({shares})", f"{1e3 * max(parts.values()):.3g}")
    console.print(table)


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:,.0f} B"


if __name__ == "__main__":
    cli.run(main, output_is_needed=True)
