"""Start-up of the programs: one process of one machine, or one of many."""

import socket

import jax

# With it orbax learns of a SIGTERM and the loop saves at that step and exits 0; without it the run would just end.


def initialize() -> None:
    """Call `jax.distributed.initialize` always: a detected cluster, or else this process alone."""
    try:
        jax.distributed.initialize()
    except ValueError:  # no cluster was detected
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        address = f"127.0.0.1:{port}"
        jax.distributed.initialize(address, num_processes=1, process_id=0, coordinator_bind_address=address)
