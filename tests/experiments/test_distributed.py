"""What the programs tell XLA before its backend starts."""

import os
from types import SimpleNamespace

import pytest
from absl.testing import flagsaver

from experiments import distributed

TWO = {"coordinator_address": "localhost:1", "num_processes": 2, "process_id": 0}
IN_TURN = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
FOUR = "--xla_force_host_platform_device_count=4"
OWN = "--xla_cpu_enable_concurrency_optimized_scheduler=true"


@pytest.mark.parametrize(
    ("given", "cluster", "devices", "before", "after"),
    [
        ({}, False, -1, "--xla_a=1", "--xla_a=1"),
        ({}, False, 4, "", IN_TURN),
        ({}, False, -1, FOUR, f"{FOUR} {IN_TURN}"),
        ({}, True, -1, "", IN_TURN),
        (TWO, False, -1, "", IN_TURN),
        (TWO, False, -1, OWN, OWN),
        (TWO | {"num_processes": 1}, False, -1, "", ""),
    ],
)
def test_collectives_run_in_turn_on_several_cpu_devices(given, cluster, devices, before, after, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", before)
    joined = []

    def initialize(address=None, **settings):
        if address is None and "coordinator_address" not in settings and not cluster:
            raise ValueError("no cluster was detected")
        joined.append(settings)

    fake = SimpleNamespace(
        config=SimpleNamespace(jax_num_cpu_devices=devices), distributed=SimpleNamespace(initialize=initialize)
    )
    monkeypatch.setattr(distributed, "jax", fake)
    with flagsaver.flagsaver(**given):
        distributed.initialize()
    assert len(joined) == 1
    assert os.environ["XLA_FLAGS"] == after
