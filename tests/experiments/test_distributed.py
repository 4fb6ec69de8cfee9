"""What the programs tell XLA before its backend starts."""

import os

import jax
import pytest
from absl.testing import flagsaver

from experiments.common import distributed

TWO = {"coordinator_address": "localhost:1", "num_processes": 2, "process_id": 0}
IN_TURN = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
FOUR = "--xla_force_host_platform_device_count=4"
OWN = "--xla_cpu_enable_concurrency_optimized_scheduler=true"


@pytest.mark.parametrize(
    ("given", "cluster", "simulated", "before", "after"),
    [
        ({}, False, None, "--xla_a=1", "--xla_a=1"),
        ({}, False, "4", "", IN_TURN),
        ({}, False, None, FOUR, f"{FOUR} {IN_TURN}"),
        ({}, True, None, "", IN_TURN),
        (TWO, False, None, "", IN_TURN),
        (TWO, False, None, OWN, OWN),
        (TWO | {"num_processes": 1}, False, None, "", ""),
    ],
)
def test_collectives_run_in_turn_on_several_cpu_devices(given, cluster, simulated, before, after, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", before)
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    if simulated:
        monkeypatch.setenv("JAX_NUM_CPU_DEVICES", simulated)
    joined = []

    def initialize(address=None, **settings):
        if address is None and "coordinator_address" not in settings and not cluster:
            raise ValueError("no cluster was detected")
        joined.append(settings)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with flagsaver.flagsaver(**given):
        distributed.initialize()
    (settings,) = joined
    alone = not given and not cluster
    assert (settings["heartbeat_timeout_seconds"] > 10**7) == alone, "a process alone may be suspended for days"
    assert os.environ["XLA_FLAGS"] == after
