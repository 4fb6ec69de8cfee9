"""The suite "mixers": every mixer, beside what a user of JAX or PyTorch would otherwise take for it."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.benchmarks import contenders, kernels, sources
from experiments.benchmarks.cases import Data
from experiments.benchmarks.settings import Row, Settings
from seqboat.layers import mixers, transformer
from seqboat.layers.mixers import ssd
from seqboat.ops.ssd import chunked
from seqboat.parallel.rules import SINGLE_DEVICE

BATCH, LENGTH, WIDTHS = 16, 512, (64, 128)
NAMES = tuple(name for _, name, _ in pkgutil.iter_modules(mixers.__path__) if not name.startswith("_"))
# By flax's and by PyTorch's name.
FLAX = {
    "elman": (nn.SimpleCell,),
    "gru": (nn.GRUCell,),
    "lstm": (nn.LSTMCell, nn.OptimizedLSTMCell),
}
TORCH = {"elman": "RNN", "gru": "GRU", "lstm": "LSTM"}


def suite(settings: Settings) -> Iterator[Row]:
    """Causal, forward and backward, at two widths: each mixer, with the recurrent layers of flax and, where it is
    installed, of PyTorch; and our transformer block, with a layer around `jax.nn.dot_product_attention`. With --sources
    also the sources of LRU and S5, and for SSD our operator beside ssd_minimal."""
    batch, length = settings.changes.batch or BATCH, settings.changes.length or LENGTH
    if settings.sources:
        sources.check(settings.sources)  # before anything is timed
    for width in WIDTHS:
        data = kernels.signal(batch, length, width)
        for name in NAMES:
            others = _others(name, data)
            if settings.sources and name in ("lru", "s5"):
                others["source"] = sources.runner(settings.sources, name, data)
            yield from _rows(settings, name, data, {"seqboat": _ours(name, data), **others})
        if settings.sources:
            operators = {"seqboat": _operator(data), "ssd_minimal": sources.runner(settings.sources, "ssd", data)}
            yield from _rows(settings, "ssd operator", data, operators)
        yield from _rows(settings, "transformer", data, _transformers(data))


def _rows(settings: Settings, name: str, data: Data, runners: dict[str, Callable[[], object]]) -> Iterator[Row]:
    race = settings.race(runners)
    for who in runners:
        row: Row = {"mixer": name, "features": data.x.shape[2], "contender": who, **race.row(who)}
        yield row if who == "seqboat" else row | race.ratio("seqboat_over_it", "seqboat", who)


def _transformers(data: Data) -> dict[str, Callable[[], object]]:
    """Of equal width and heads; ours has a gated MLP of 8/3 D, as many products as theirs of 4 D."""
    width = data.x.shape[2]
    block = transformer.TransformerLayer(transformer.LayerConfig(width, heads=max(1, width // 64), causal=True))
    theirs = contenders.TransformerLayer(width, causal=True)
    variables = jax.jit(block.init)(jax.random.key(0), data.x, data.valid)
    ours = contenders.Gradient(lambda variables, x: block.apply(variables, x, data.valid)[0], data).runner(variables)
    variables = jax.jit(theirs.init)(jax.random.key(0), data.x)
    return {"seqboat": ours.run, "jax.nn": contenders.Gradient(theirs.apply, data).runner(variables).run}


def _ours(name: str, data: Data) -> Callable[[], object]:
    config = importlib.import_module(f"{mixers.__name__}.{name}").Config()
    module = config.make(True, SINGLE_DEVICE)
    variables = jax.jit(module.init)(jax.random.key(0), data.x, data.valid)
    return contenders.Gradient(lambda variables, x: module.apply(variables, x, data.valid), data).runner(variables).run


def _operator(data: Data) -> Callable[[], object]:
    """Of SSD, without what is dense around it."""
    config, operands = ssd.Config(), sources.operands(data)
    state = jnp.zeros((len(data.x), *operands[0].shape[2:], config.state_size))
    loss = lambda x, decay, b, c: chunked(x, decay, b, c, state, config.chunk_size)[0].sum()
    program = jax.jit(jax.grad(loss, range(4))).lower(*operands).compile()
    return lambda: contenders.wait(program, *operands)


def _others(name: str, data: Data) -> dict[str, Callable[[], object]]:
    found = {}
    for cell in FLAX.get(name, ()):
        layer = nn.RNN(cell(data.x.shape[2]))
        variables = jax.jit(layer.init)(jax.random.key(0), data.x)
        found[f"flax {cell.__name__}"] = contenders.Gradient(layer.apply, data).runner(variables).run
    if name in TORCH and jax.default_backend() == "cpu":
        try:
            import torch
        except ImportError:
            return found
        found[f"torch {TORCH[name]}"] = _torch(torch, TORCH[name], data)
    return found


def _torch(torch: Any, name: str, data: Data) -> Callable[[], object]:
    layer = getattr(torch.nn, name)(data.x.shape[2], data.x.shape[2], batch_first=True)
    tensor = lambda array: torch.from_numpy(jnp.asarray(array).__array__().copy())
    x, cotangent = tensor(data.x).requires_grad_(True), tensor(data.cotangent)

    def run() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        (layer(x)[0] * cotangent).sum().backward()

    return run
