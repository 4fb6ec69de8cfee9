"""Memory of one layer at length 65,536, forward and backward: it grows with the length, not with its square."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_IN_PLACE_LENGTH, LONG = 16_384, 65_536
LIMIT = 4e9  # bytes
GROWTH = 4.4  # for four times the length

# One process a length, so that a peak belongs to one length alone. Everything is active: the layer's worst case.
PROGRAM = """
import json, resource, sys
import jax, jax.numpy as jnp
from seqboat.layers.seqboat import LayerConfig, SeqBoatLayer

length = int(sys.argv[1])
config = LayerConfig(features=64, key_size=32, value_size=128, window_size=128, causal=sys.argv[2] == "causal")
layer, valid = SeqBoatLayer(config), jnp.ones((1, length), bool)
variables = jax.jit(layer.init)(jax.random.key(0), jnp.zeros((1, 256, 64)), valid[:, :256])
logits = variables["params"]["sparse"]["configurator"]["logits"]
logits["bias"] = logits["bias"].at[1].set(100.0)
x = jax.random.normal(jax.random.key(1), (1, length, 64))

def loss(variables, x):
    y, stats = layer.apply(variables, x, valid)
    return jnp.square(y).mean(), stats.active

program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)).lower(variables, x).compile()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
(_, active), gradients = jax.block_until_ready(program(variables, x))
finite = all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradients))
temporary = program.memory_analysis().temp_size_in_bytes
result = {"active": int(active[0]), "finite": finite, "temporary": temporary, "grown": peak() - before}
print(json.dumps({**result, "peak": peak()}))
"""


def measure(length, direction):
    command = [sys.executable, "-c", PROGRAM, str(length), direction]
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["causal", "both"])
def test_memory_grows_with_the_length(direction):
    short, long = measure(MAX_IN_PLACE_LENGTH, direction), measure(LONG, direction)
    for length, result in ((MAX_IN_PLACE_LENGTH, short), (LONG, long)):
        assert result["active"] == length
        assert result["finite"]
    assert long["peak"] < LIMIT, long
    assert long["temporary"] <= GROWTH * short["temporary"], (short, long)
    # Where compiling took more than running the short one, that one did not grow at all.
    assert long["grown"] <= GROWTH * max(short["grown"], short["temporary"]), (short, long)
