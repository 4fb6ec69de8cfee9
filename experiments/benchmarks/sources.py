"""Mixers of other repositories, from clones of them in the directory of --sources; their files are executed.

A clone keeps its repository's name: minimal-LRU (NicolasZucchet), S5 (lindermanlab), mamba (state-spaces), whose
ssd_minimal.py needs PyTorch and einops.
"""

import contextlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.benchmarks import contenders
from experiments.benchmarks.cases import Data
from experiments.common.errors import UserError
from seqboat.layers.mixers import lru, s5, ssd

FILES = {"lru": "minimal-LRU/lru/model.py", "s5": "S5/s5/ssm.py", "ssd": "mamba/mamba_ssm/modules/ssd_minimal.py"}


def check(sources: Path) -> None:
    """Raises UserError for a file that is not there."""
    for name in FILES.values():
        if not (sources / name).is_file():
            raise UserError(f"--sources: {sources / name} does not exist")


def runner(sources: Path, name: str, data: Data) -> Callable[[], object]:
    """Forward and backward of the source of that mixer, of our mixer's default sizes; for "ssd" of its operator."""
    path = sources / FILES[name]
    try:
        return {"lru": _lru, "s5": _s5, "ssd": _ssd}[name](path, data)
    except (ImportError, AttributeError, TypeError, SyntaxError, OSError) as error:
        raise UserError(f"--sources: {path} cannot be run: {type(error).__name__}: {error}") from error


def _lru(path: Path, data: Data) -> Callable[[], object]:
    return _flax(_module(path).LRU(d_hidden=lru.Config().state_size, d_model=data.x.shape[2]), data)


def _s5(path: Path, data: Data) -> Callable[[], object]:
    size = s5.Config().state_size  # theirs counts conjugates too where it draws them
    module, start = _module(path), _module(path.with_name("ssm_init.py"))
    values, _, _, vectors, _ = start.make_DPLR_HiPPO(2 * size)
    values, vectors = values[:size], vectors[:, :size]
    return _flax(
        module.S5SSM(
            values.real,
            values.imag,
            vectors,
            vectors.conj().T,
            H=data.x.shape[2],
            P=size,
            C_init="trunc_standard_normal",
            discretization="zoh",
            dt_min=s5.Config().shortest_step,
            dt_max=s5.Config().longest_step,
        ),
        data,
    )


def _flax(module: nn.Module, data: Data) -> Callable[[], object]:
    """Of a module of one sequence (L, D)."""
    variables = jax.jit(module.init)(jax.random.key(0), data.x[0])
    apply = lambda variables, x: jax.vmap(lambda row: module.apply(variables, row))(x)
    return contenders.Gradient(apply, data).runner(variables).run


def operands(data: Data) -> tuple[jax.Array, ...]:
    """x (B, L, H, P), log decay (B, L, H), b and c (B, L, N) of the heads of our mixer at this width."""
    config, (batch, length, width) = ssd.Config(), data.x.shape
    heads = config.heads(width)
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((heads, config.head_size), (heads,), (config.state_size,), (config.state_size,))
    x, decay, b, c = (jax.random.normal(key, (batch, length, *shape)) for key, shape in zip(keys, shapes, strict=True))
    return x, -jax.nn.softplus(decay), b, c


def _ssd(path: Path, data: Data) -> Callable[[], object]:
    import torch

    function, chunk = _module(path).ssd_minimal_discrete, ssd.Config().chunk_size
    if data.x.shape[1] % chunk:
        raise UserError(f"--length={data.x.shape[1]}: must be a multiple of {chunk}, the chunk of {path.name}")
    x, decay, b, c = (torch.from_numpy(jnp.asarray(a).__array__().copy()) for a in operands(data))
    leaves = [a.requires_grad_(True) for a in (x, decay, b, c)]

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        y, _ = function(x, decay, *(a[:, :, None].expand(-1, -1, x.shape[2], -1) for a in (b, c)), chunk)
        y.sum().backward()

    return run


def _module(path: Path) -> Any:
    """The module of a file, as one of its folder's package."""
    package = f"_sources_{path.parent.name}"
    sys.modules[package] = types.ModuleType(package)
    sys.modules[package].__path__ = [str(path.parent)]
    spec = importlib.util.spec_from_file_location(f"{package}.{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    with _what_they_import():
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _what_they_import() -> Iterator[None]:
    """Names that the files import or mention and do not need here: jax's former name of arrays, a kernel of Triton."""
    kernel = "mamba_ssm.ops.triton.ssd_combined"
    names = [kernel.rsplit(".", n)[0] for n in range(4)]
    own = {name: sys.modules.get(name) for name in names}
    former = hasattr(jnp, "DeviceArray")
    sys.modules.update({name: types.ModuleType(name) for name in names})
    sys.modules[kernel].mamba_chunk_scan_combined = None  # type: ignore[attr-defined]
    if not former:
        jnp.DeviceArray = jax.Array  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name, module in own.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
        if not former:
            del jnp.DeviceArray  # type: ignore[attr-defined]
