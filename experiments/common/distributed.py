"""Start-up of the programs: one process of one machine, or one of many."""

import os
import socket

import jax
from absl import flags

from experiments.common.errors import UserError

_ADDRESS = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, for runs of several processes.")
_COUNT = flags.DEFINE_integer("num_processes", None, "Number of processes of the run.", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.", lower_bound=0)

# Seconds without a heartbeat after which a process is considered dead and the others exit.
HEARTBEAT_SECONDS = 100
# A process alone has nobody to leave behind. It may be suspended (Ctrl-Z, a laptop that sleeps) and resumed: years.
ALONE_SECONDS = 10**8

# With this scheduler XLA:CPU may run two collectives of one device concurrently, such as one inside a loop and one
# beside it. Each blocks a thread of a small pool, until no other device of the process gets a thread: a deadlock
# (docs/parallel.md). The flag affects CPU programs only.
SCHEDULER = "--xla_cpu_enable_concurrency_optimized_scheduler"


def initialize() -> None:
    """Always call `jax.distributed.initialize`: with the flags' values, a detected cluster, or this process alone.

    It lets orbax notice SIGTERM, so that the loop saves at that step and exits with 0 instead of dying.
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
        jax.distributed.initialize(
            address,
            num_processes=1,
            process_id=0,
            coordinator_bind_address=address,
            heartbeat_timeout_seconds=ALONE_SECONDS,
        )


def _initialize_given(given: dict) -> None:
    """Raises UserError for incomplete or inconsistent flags, and if the coordinator cannot be reached."""
    missing = [f"--{flag.name}" for flag in (_ADDRESS, _COUNT, _PROCESS) if flag.name not in given]
    if missing:
        raise UserError(f"{' and '.join(missing)} missing: runs of several processes need all three flags")
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
    """Sets the XLA flag, unless the user has set it; XLA reads its flags later, when the backend starts."""
    own = os.environ.get("XLA_FLAGS", "")
    if SCHEDULER not in own:
        os.environ["XLA_FLAGS"] = f"{own} {SCHEDULER}=false".lstrip()
