"""Start-up of the programs: one process of one machine, or one of many."""

import os
import socket

import jax
from absl import flags

from experiments.common.errors import UserError

_ADDRESS = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, for several processes.")
_COUNT = flags.DEFINE_integer("num_processes", None, "How many processes the run has.", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)

# A process that is not heard of for so long is given up, and the others end with it.
HEARTBEAT_SECONDS = 100

# With this scheduler XLA:CPU runs collectives of one device at once, one in a loop and another beside it. Each
# blocks one of few threads, until no other device of the process has a thread left and all wait for each other for good
# (docs/parallel.md). Only programs for CPUs look at it.
SCHEDULER = "--xla_cpu_enable_concurrency_optimized_scheduler"


def initialize() -> None:
    """Call `jax.distributed.initialize` always: with the flags' values, or a detected cluster, or this process alone.

    With it orbax learns of a SIGTERM and the loop saves at that step and exits 0; without it the run would just end.
    """
    given = {flag.name: flag.value for flag in (_ADDRESS, _COUNT, _PROCESS) if flag.value is not None}
    simulated = "JAX_NUM_CPU_DEVICES" in os.environ or "device_count" in os.environ.get("XLA_FLAGS", "")
    if simulated or (_COUNT.value or 1) > 1:
        _run_collectives_in_turn()
    if given:
        _initialize_given(given)
        return
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        _run_collectives_in_turn()
    except ValueError:  # no cluster was detected
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        address = f"127.0.0.1:{port}"
        jax.distributed.initialize(address, num_processes=1, process_id=0, coordinator_bind_address=address)


def _initialize_given(given: dict) -> None:
    """Raises UserError for flags that do not say where this process belongs, and for peers that are not found."""
    missing = [f"--{flag.name}" for flag in (_ADDRESS, _COUNT, _PROCESS) if flag.name not in given]
    if missing:
        raise UserError(f"{' and '.join(missing)} missing: several processes need all three of them")
    count, process = given["num_processes"], given["process_id"]
    if process >= count:
        raise UserError(f"--process_id={process}: must be below --num_processes={count}")
    host, _, port = given["coordinator_address"].rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--coordinator_address={given['coordinator_address']}: must be HOST:PORT")
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except RuntimeError as error:
        raise UserError(f"process {process} of {count} at {given['coordinator_address']}: {error}") from error


def _run_collectives_in_turn() -> None:
    """XLA reads its flags when the backend starts, which is later. A user's own choice stays."""
    own = os.environ.get("XLA_FLAGS", "")
    if SCHEDULER not in own:
        os.environ["XLA_FLAGS"] = f"{own} {SCHEDULER}=false".lstrip()
