"""Mixers of other repositories beside ours, with stand-ins for their files: tests/parity has their numbers."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import kernels, mixers, sources
from experiments.benchmarks.settings import Changes, Settings
from experiments.common.errors import UserError
from seqboat.layers.mixers import ssd
from seqboat.ops.ssd import chunked, reference

LRU = """
import flax.linen as nn
class LRU(nn.Module):
    d_hidden: int
    d_model: int
    @nn.compact
    def __call__(self, x):
        assert x.ndim == 2 and self.d_hidden == 64
        return nn.Dense(self.d_model)(x)
"""
S5 = """
import jax.numpy as np
from flax import linen as nn
from .ssm_init import make_DPLR_HiPPO
class S5SSM(nn.Module):
    real: np.DeviceArray
    imag: np.DeviceArray
    V: np.DeviceArray
    Vinv: np.DeviceArray
    H: int
    P: int
    C_init: str
    discretization: str
    dt_min: float
    dt_max: float
    @nn.compact
    def __call__(self, x):
        assert self.real.shape == (self.P,) and self.V.shape == (2 * self.P, self.P)
        return nn.Dense(self.H)(x)
"""
START = """
import jax.numpy as np
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
def make_DPLR_HiPPO(n):
    return np.ones(n, complex), None, None, np.eye(n, dtype=complex), None
"""
SETTINGS = Settings({}, (1.0,), rounds=1, seconds=0.0, changes=Changes(batch=2, length=64))


@pytest.fixture
def clones(tmp_path):
    texts = {sources.FILES["lru"]: LRU, sources.FILES["s5"]: S5, "S5/s5/ssm_init.py": START, sources.FILES["ssd"]: ""}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_sources_are_timed_beside_ours(clones, monkeypatch):
    monkeypatch.setattr(mixers, "NAMES", ("lru", "s5"))
    monkeypatch.setattr(mixers, "WIDTHS", (16,))
    monkeypatch.setattr(mixers, "_transformers", lambda data: {"seqboat": lambda: None})
    real = sources.runner
    monkeypatch.setattr(sources, "runner", lambda *a: (lambda: None) if a[1] == "ssd" else real(*a))
    rows = list(mixers.suite(replace(SETTINGS, sources=clones)))
    timed = [(row["mixer"], row["contender"]) for row in rows if row["contender"] != "seqboat"]
    assert timed == [("lru", "source"), ("s5", "source"), ("ssd operator", "ssd_minimal")]
    assert not hasattr(jnp, "DeviceArray")
    (clones / sources.FILES["ssd"]).unlink()
    with pytest.raises(UserError, match=r"--sources: .*ssd_minimal.py does not exist"):
        next(mixers.suite(replace(SETTINGS, sources=clones)))


def test_operands_are_those_of_our_mixer():
    """Decays are at most 1, and the operator is the recurrence on them."""
    x, log_decay, b, c = sources.operands(kernels.signal(1, 8, 16))
    config = ssd.Config()
    assert (x.shape, b.shape, c.shape) == ((1, 8, 1, config.head_size), *[(1, 8, config.state_size)] * 2)
    assert (log_decay <= 0).all()
    state = jnp.zeros((1, 1, config.head_size, config.state_size))
    y, expected = (f[0] for f in (chunked(x, log_decay, b, c, state, 4), reference(x, log_decay, b, c, state)))
    np.testing.assert_allclose(y, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class Other: pass", r"--sources: .*model.py cannot be run: AttributeError: .*'LRU'"),
        ("import not_there", r"--sources: .*model.py cannot be run: ModuleNotFoundError: No module named 'not_there'"),
        ("class :", r"--sources: .*model.py cannot be run: SyntaxError"),
    ],
)
def test_a_clone_of_something_else_is_refused_in_one_line(clones, text, message):
    (clones / sources.FILES["lru"]).write_text(text)
    with pytest.raises(UserError, match=message) as refused:
        sources.runner(clones, "lru", kernels.signal(1, 8, 16))
    assert "\n" not in str(refused.value)
