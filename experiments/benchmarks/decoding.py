"""Decoding token by token: our language models, and a transformer of equal width with a full key-value cache."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs.lm import enwik8
from experiments.benchmarks import memory
from experiments.benchmarks.cases import router_biases, with_router_bias
from experiments.benchmarks.settings import Row, Settings
from experiments.evaluation.sampling import Sampling, make_step
from experiments.tasks import corpus
from experiments.training.models import build_model
from seqboat.models.encoder import separate
from seqboat.models.language_model import LanguageModel
from seqboat.quantization import quantize

# Positions in a stream, and numbers of streams decoded together.
EARLY, LATE, MANY = 1000, 1_000_000, 16
# Tokens per stream and call, so that its time averages over those that activate more and fewer layers; with several
# streams one token of each averages already.
TOKENS, FEWER_TOKENS = 32, 8
# Elements decoded between two measurements of the process's memory.
STREAMED = 20_000
# Kernels beside float32.
DTYPES = ("bfloat16", "int8")
# Rows of a transformer's cache: tokens per call.
LENGTHS = {16: 32, 64: 32, 1024: 32, 8192: 8, 65_536: 2, 1_048_576: 1}
# Length of the random sequence on which the router's biases are chosen.
SAMPLE = 512
# Bytes of cache; beyond it only the layers that fit are timed. A step also makes a transposed copy of each.
LARGEST_CACHE = 3.5e9


def models() -> dict[str, LanguageModel]:
    """The enwik8 models with full kernels."""
    configs = {"tiny": enwik8.get_config("credit_router,tiny"), "full": enwik8.get_config("credit_router")}
    return {name: build_model(config.model.to_dict(), corpus.Config("enwik8")) for name, config in configs.items()}  # type: ignore[misc]


def tokens_of(batch: int) -> int:
    return TOKENS if batch == 1 else FEWER_TOKENS


class Decoder:
    """A model with initial parameters and router biases, one per layer; decoders that share `step` compile once."""

    def __init__(self, model: LanguageModel, variables: Any = None, step: Any = None):
        self.model, one = model, jnp.ones(1, jnp.int32)
        self.variables = jax.jit(model.init)(jax.random.key(0), one[None], one) if variables is None else variables
        self.step = step or make_step(model, Sampling())

    @functools.cached_property
    def _router_logits(self) -> Callable[[Any], jax.Array]:
        """Of every layer on random symbols, as a function of the variables."""
        symbols = _symbols(1, SAMPLE).T

        @jax.jit
        def logits(variables):
            _, sown = self.model.apply(variables, symbols, jnp.full(1, SAMPLE), mutable=["taps"])
            return sown["taps"]["encoder"]["layers"]["sparse"]["configurator"]["router_logits"]

        return logits

    def at_rate(self, rate: float) -> "Decoder":
        """A decoder with this activation rate in every layer on random symbols; biases are set layer by layer."""
        biases = router_biases(self._router_logits, self.variables, self.model.config.encoder.layers, rate)
        return Decoder(self.model, with_router_bias(self.variables, biases), self.step)

    def quantized(self, dtype: str) -> "Decoder":
        """A decoder whose kernels are in this dtype."""
        return Decoder(self.model, quantize(self.variables, dtype), self.step)

    def parameter_mb(self) -> float:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.variables)) / 1e6

    def read(self) -> Callable[[], object]:
        """Reads and sums all parameters, once per token of a call."""
        total = jax.jit(lambda leaves: sum(leaf.sum() for leaf in leaves))
        leaves = jax.tree.leaves(jax.jit(separate)(self.variables))
        return lambda: [total(leaves).block_until_ready() for _ in range(TOKENS)]

    def runner(self, batch: int, position: int) -> Callable[[], object]:
        """A runner that decodes `tokens_of` random symbols of `streams` streams with full memories, from this
        position."""
        symbols, variables = _symbols(batch, tokens_of(batch)), jax.jit(separate)(self.variables)
        full = lambda memory: memory._replace(now=memory.now + position, pushed=memory.pushed + memory.slots)
        held = tuple(
            layer._replace(memories=tuple(full(memory) for memory in layer.memories))
            for layer in self.model.initial_state(batch)
        )

        def run():
            nonlocal held
            for number in range(len(symbols)):
                drawn, held = self.step(variables, symbols[number], held, number)
                drawn.block_until_ready()

        return run

    def grown(self) -> int | None:
        """Growth of the process in bytes over `STREAMED` elements of one stream, after the first `EARLY`."""
        variables, state, last = jax.jit(separate)(self.variables), self.model.initial_state(1), _symbols(1, 1)[0]
        before = None
        for number in range(EARLY + STREAMED):
            if number == EARLY:
                before = memory.resident()
            last, state = self.step(variables, last, state, number)
        jax.block_until_ready(last)
        after = memory.resident()
        return None if before is None or after is None else after - before

    def state_bytes(self) -> int:
        """Bytes of the state of one stream."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.model.initial_state(1)))


def cache_bytes(model: LanguageModel, length: int) -> int:
    """Bytes of the keys and values of all layers."""
    return 2 * 4 * length * model.config.encoder.layers * model.config.encoder.layer.features


def layers_timed(model: LanguageModel, length: int) -> int:
    """All layers, or as many as fit in `LARGEST_CACHE` bytes of keys and values."""
    depth = model.config.encoder.layers
    return max(1, min(depth, int(LARGEST_CACHE * depth / cache_bytes(model, length))))


def transformer(model: LanguageModel, length: int) -> Callable[[], object]:
    """A runner that decodes several elements through `layers_timed` layers of equal width, each attending to a cache of
    `length` rows that is not written to."""
    width, depth = model.config.encoder.layer.features, layers_timed(model, length)
    layer = CachedTransformerLayer(width)
    shape = (1, length, *layer.heads())
    rng = np.random.default_rng(0)
    make = lambda: tuple(jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(2))
    caches = [make() for _ in range(depth)]
    x = jnp.asarray(rng.standard_normal((1, 1, width)), jnp.float32)
    params = [jax.jit(layer.init)(jax.random.key(i), x, *(leaf[:, :8] for leaf in caches[0])) for i in range(depth)]

    @jax.jit
    def step(params, x, caches):
        for variables, cache in zip(params, caches, strict=True):
            x = layer.apply(variables, x, *cache)
        return x

    return lambda: [step(params, x, caches).block_until_ready() for _ in range(LENGTHS[length])]


class CachedTransformerLayer(nn.Module):
    """`contenders.TransformerLayer` for one new element, given the keys and values of the previous ones."""

    features: int

    @nn.nowrap
    def heads(self) -> tuple[int, int]:
        """The most heads of at least 64 channels that divide the width."""
        count = max(n for n in range(1, max(2, self.features // 64 + 1)) if self.features % n == 0)
        return count, self.features // count

    @nn.compact
    def __call__(self, x, keys, values):
        normed = nn.LayerNorm()(x)
        q, k, v = (nn.Dense(self.features)(normed).reshape(*x.shape[:2], *self.heads()) for _ in range(3))
        # Its own key and value are used in place of the cache's last, so that both are computed and nothing is copied.
        attended = jax.nn.dot_product_attention(q, keys, values) + 0 * (k + v)
        x = x + nn.Dense(self.features)(attended.reshape(x.shape))
        return x + nn.Dense(self.features)(nn.gelu(nn.Dense(4 * self.features)(nn.LayerNorm()(x))))


def suite(settings: Settings) -> Iterator[Row]:
    """Time per generated element of the enwik8 models, tiny and full, at each rate: early and late in a stream, and
    with several streams at once; against one read of all parameters, and a transformer with a cache of N rows.

    `crossing` is the cache size above which our step is faster, interpolated between measured lengths; `over_ours` is
    the transformer's time over ours at the highest rate. There also the same model with kernels in fewer bits: how much
    shorter its step is, alone and with several streams.
    """
    early, late, many = (1, EARLY), (1, LATE), (MANY, LATE)
    for name, model in models().items():
        decoder = Decoder(model)
        biased = {rate: decoder.at_rate(rate) for rate in settings.rates}
        grown = biased[min(settings.rates)].grown()  # first, while there is no freed memory to reuse
        caches = {length: _cached(settings, model, length) for length in LENGTHS}
        runners: dict[Any, Callable[[], object]] = {
            (rate, *stream): found.runner(*stream) for rate, found in biased.items() for stream in (early, late, many)
        }
        fewer_bits = {dtype: biased[max(settings.rates)].quantized(dtype) for dtype in DTYPES}
        runners |= {
            (dtype, *stream): found.runner(*stream) for dtype, found in fewer_bits.items() for stream in (early, many)
        }
        race = settings.race({"read": decoder.read(), **runners})
        read, kept = race.ms("read") / TOKENS, decoder.state_bytes()
        of = lambda rate, stream, race=race: race.ms((rate, *stream)) / tokens_of(stream[0])
        del runners
        ours = of(max(settings.rates), early)
        yield {"model": name, "contender": "all parameters read once", "ms": read}
        for rate in settings.rates:
            yield {
                "model": name,
                "contender": "SeqBoat",
                "rate": rate,
                "kept_mb": kept / 1e6,
                "grown_mb": None if grown is None or rate != min(settings.rates) else grown / 1e6,
                "ms": of(rate, early),
                **race.ratio("over_reading", (rate, *early), "read"),  # as many tokens in a call
                "late_ms": of(rate, late),
                **race.ratio("late_over_early", (rate, *late), (rate, *early)),
                "many_ms": of(rate, many),
                "many_per_second": 1e3 * many[0] / of(rate, many),
                "crossing": crossing(of(rate, early), caches),
            }
        for dtype, smaller in fewer_bits.items():
            rate = max(settings.rates)
            yield {
                "model": name,
                "contender": f"SeqBoat, {dtype} kernels",
                "rate": rate,
                "parameter_mb": smaller.parameter_mb(),
                "ms": of(dtype, early),
                **race.ratio("speedup", (rate, *early), (dtype, *early)),
                "many_ms": of(dtype, many),
                "many_per_second": 1e3 * many[0] / of(dtype, many),
                **race.ratio("many_speedup", (rate, *many), (dtype, *many)),
            }
        for length, found in caches.items():
            yield {
                "model": name,
                "contender": "transformer",
                "rows": length,
                "kept_mb": cache_bytes(model, length) / 1e6,
                "ms": found,
                "over_reading": found / read,
                "over_ours": found / ours,
                "layers_timed": layers_timed(model, length),
            }


def _cached(settings: Settings, model: LanguageModel, length: int) -> float:
    """Milliseconds of the transformer at full depth, extrapolated from the layers that fit. Runs alone and first, since
    its cache takes most of the memory."""
    tokens = LENGTHS[length]
    few = replace(settings, rounds=min(settings.rounds, tokens), seconds=0.0)  # the longest takes a minute
    found = few.race({"cache": transformer(model, length)}).ms("cache") / tokens
    return found * model.config.encoder.layers / layers_timed(model, length)


def crossing(ms: float, caches: dict[int, float]) -> str:
    lengths = sorted(caches)
    if ms <= caches[lengths[0]]:
        return f"under {lengths[0]:,}"
    if ms > caches[lengths[-1]]:
        return f"over {lengths[-1]:,}"
    return f"{np.interp(ms, [caches[length] for length in lengths], lengths):,.0f}"


def _symbols(batch: int, count: int) -> jax.Array:
    """Random bytes (count, batch)."""
    return jnp.asarray(np.random.default_rng(1).integers(1, 257, (count, batch)), jnp.int32)
