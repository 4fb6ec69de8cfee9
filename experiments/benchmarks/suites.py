"""Benchmark suites: each yields rows of plain values, which the program prints and stores."""

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import cases, contenders, decoding, memory
from experiments.benchmarks.cases import CASES, Case
from experiments.benchmarks.timing import interleave
from experiments.common.errors import UserError
from seqboat.models.classifier import Classifier, ClassifierConfig
from seqboat.models.encoder import EncoderConfig
from seqboat.ops import ema

Row = dict[str, Any]
# Largest relative RMS difference between two implementations whose times may be compared.
AGREEMENT = 1e-4
LENGTHS = (4096, 8192, 16_384, 32_768, 65_536)
EMA_LENGTHS = (4096, 16_384, 65_536)


@dataclass(frozen=True)
class Settings:
    """Cases and rates; minimum rounds and seconds per comparison; the published file; whether to time a transformer
    layer."""

    cases: tuple[str, ...]
    rates: tuple[float, ...]
    rounds: int
    seconds: float
    published: Path | None
    transformer: bool

    def theirs(self) -> contenders.Published | None:
        return contenders.Published(self.published) if self.published else None

    def race(self, runners: dict[str, Callable[[], object]]) -> dict[str, Row]:
        """Median milliseconds of each runner, timed in turn."""
        found = interleave(runners, rounds=self.rounds, seconds=self.seconds)
        return {
            name: {"median_ms": 1e3 * times.median, "best_ms": 1e3 * times.best, "rounds": len(times.seconds)}
            for name, times in found.items()
        }


def agree(what: str, ours: contenders.Runner, published: contenders.Runner) -> float:
    """The difference of the results (`contenders.disagreement`). Raises UserError above AGREEMENT."""
    difference = contenders.disagreement(ours.results(), published.results())
    if not difference <= AGREEMENT:  # also true for NaN
        raise UserError(
            f"{what}: our results and the published file's differ by {difference:.1e}, so they are not compared"
        )
    return difference


def layers(settings: Settings) -> Iterator[Row]:
    """One layer, forward and backward, at given activation rates, after checking our results against the published."""
    theirs = settings.theirs()
    for name in settings.cases:
        case = CASES[name]
        data = cases.make_data(case)
        layer = theirs.layer(case) if theirs else None
        variables = theirs.variables(case, layer) if theirs else cases.init_layer(case)
        runners: dict[tuple[str, float | None], contenders.Runner] = {}
        differences: dict[float | None, float] = {}
        for rate in settings.rates:
            bias = cases.router_bias(case, variables, data, rate)
            ours = contenders.ours(case, cases.with_router_bias(variables, bias), data)
            runners["sparse", rate] = ours
            if theirs:
                published = theirs.runner(case, layer, data, bias)
                differences[rate] = agree(f"{name} at {rate}", ours, published)
                runners["published", rate] = published
        for form in ("always active", "no attention"):
            runners[form, None] = contenders.ours(case, variables, data, form)
        if settings.transformer:
            runners["transformer", None] = contenders.transformer(case, data)
        times = settings.race({f"{who} {rate}": runner.run for (who, rate), runner in runners.items()})
        for (who, at), runner in runners.items():
            row: Row = {"case": name, "contender": who, "rate": at, **times[f"{who} {at}"]}
            row["elements_per_second"] = case.batch * case.length / row["median_ms"] * 1e3
            row["compile_seconds"] = runner.compile_seconds
            if who == "sparse" and theirs:
                row["difference"] = differences[at]
                row["speedup"] = times[f"published {at}"]["median_ms"] / row["median_ms"]
            yield row


def peak_memory(settings: Settings) -> Iterator[Row]:
    """Peak memory growth of each contender, each in its own process."""
    for name in settings.cases:
        for rate in settings.rates:
            for who in ("sparse", *(["published"] if settings.published else [])):
                grown = memory.measure(name, who, rate, settings.published)
                yield {"case": name, "contender": who, "rate": rate, "peak_bytes": grown}


def sparsity(settings: Settings) -> Iterator[Row]:
    """Eleven rates: the least-squares fit t0 + s n, its residual, rate 0 against no attention, and the fraction of the
    machine's matrix-product peak that the active part reaches."""
    for name in settings.cases:
        case = CASES[name]
        data, variables = cases.make_data(case), cases.init_layer(case)
        rates = [i / 10 for i in range(11)]
        runners = {"no attention": contenders.ours(case, variables, data, "no attention").run, "peak": _product()}
        for rate in rates:
            bias = cases.router_bias(case, variables, data, rate)
            runners[str(rate)] = contenders.ours(case, cases.with_router_bias(variables, bias), data).run
        times = settings.race(runners)
        elements = case.batch * case.length
        ms = np.array([times[str(rate)]["median_ms"] for rate in rates])
        slope, start = np.polyfit(np.array(rates) * elements, ms, 1)
        peak = _PRODUCT_FLOPS / times["peak"]["median_ms"] * 1e3
        fit = start + slope * np.array(rates) * elements
        for rate, value, line in zip(rates, ms, fit, strict=True):
            yield {"case": name, "rate": rate, "median_ms": value, "off_the_line": value / line - 1}
        yield {
            "case": name,
            "start_ms": start,
            "microseconds_per_active_element": 1e3 * slope,
            "rate_0_over_no_attention": ms[0] / times["no attention"]["median_ms"],
            "peak_gflops": peak / 1e9,
            "share_of_peak": cases.active_flops(case) / (slope / 1e3) / peak,
        }


def ema_alone(settings: Settings) -> Iterator[Row]:
    """The bidirectional EMA with full kernels: D 64, B 2, N 16, forward and backward."""
    theirs = settings.theirs()
    rng, width, states = np.random.default_rng(0), 64, 16

    def normal(scale: float, *shape: int) -> jax.Array:
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

    sign = np.where(np.arange(states) % 2, -1.0, 1.0)
    params = ema.EMAParams(
        delta=normal(0.2, 2 * width, states),
        alpha=normal(0.2, 2 * width, states),
        beta=normal(0.02, 2 * width, states) + sign[None].astype(np.float32),
        gamma=normal(1, 2 * width, states),
        omega=normal(1, width),
    )
    for length in EMA_LENGTHS:
        x, cotangent = normal(1, 2, length, width), normal(1, 2, length, width)
        data = cases.Data(x, cotangent, jnp.ones(x.shape[:2], bool))
        run = contenders.jax_runner(lambda v, x: ema.convolve(ema.EMAParams(*v["params"]), x), {"params": params}, data)
        runners = {"ours": run.run}
        if theirs:
            published = theirs.ema(params, data)
            difference = agree(f"EMA of {length}", run, published)
            runners["published"] = published.run
        times = settings.race(runners)
        for who in runners:
            row = {"length": length, "contender": who, **times[who]}
            if who == "ours" and theirs:
                row |= {"difference": difference, "speedup": times["published"]["median_ms"] / row["median_ms"]}
            yield row


def lengths(settings: Settings) -> Iterator[Row]:
    """One layer at each of LENGTHS, and a copy of as many bytes: times relative to the shortest length."""
    for name in settings.cases:
        runners = {}
        for length in LENGTHS:
            case = Case(replace(CASES[name].layer, max_positions=length), 1, length)
            data, variables = cases.make_data(case), cases.init_layer(case)
            bias = cases.router_bias(case, variables, data, settings.rates[0])
            runners[f"layer {length}"] = contenders.ours(case, cases.with_router_bias(variables, bias), data).run
            copy = jax.jit(lambda x: x + 1).lower(data.x).compile()
            runners[f"copy {length}"] = functools.partial(_run, copy, data.x)
        times = settings.race(runners)
        first = {what: times[f"{what} {LENGTHS[0]}"]["median_ms"] for what in ("layer", "copy")}
        for length in LENGTHS:
            grown = {what: times[f"{what} {length}"]["median_ms"] / first[what] for what in first}
            row = {"case": name, "rate": settings.rates[0], "length": length}
            yield {**row, "median_ms": times[f"layer {length}"]["median_ms"], **grown}


def model(settings: Settings) -> Iterator[Row]:
    """A classifier of four layers of the text case on numbers (B, L, 1), with every layer at the given rate and full
    kernels, as in the published model."""
    theirs = settings.theirs()
    case = replace(CASES["text"], layer=replace(CASES["text"].layer, ssm_truncation=None))
    stack = contenders.Stack(case, 4, theirs)
    for rate in settings.rates:
        biases = stack.router_biases(rate)
        runners = {"sparse": stack.ours(biases)}
        if theirs:
            runners["published"] = stack.published(biases)
            difference = agree(f"the model at {rate}", runners["sparse"], runners["published"])
        times = settings.race({who: runner.run for who, runner in runners.items()})
        for who in runners:
            row = {"case": "text, 4 layers", "contender": who, "rate": rate, **times[who]}
            if who == "sparse" and theirs:
                row |= {"difference": difference, "speedup": times["published"]["median_ms"] / row["median_ms"]}
            yield row


def compilation(settings: Settings) -> Iterator[Row]:
    """Seconds to compile the gradient of classifiers of 4 and 12 layers, without a compilation cache."""
    for name in settings.cases:
        case = CASES[name]
        if case.layer.causal:
            continue
        inputs = jnp.zeros((case.batch, case.length), jnp.int32)
        count = jnp.full(case.batch, case.length)
        seconds = {}
        for depth in (4, 12):
            classifier = Classifier(ClassifierConfig(EncoderConfig(case.layer, depth), 10, vocabulary_size=20))
            variables = jax.jit(classifier.init)(jax.random.key(0), inputs[:1, :8], count[:1] * 0 + 8)

            loss = functools.partial(_loss, classifier, variables, inputs, count)
            began = time.perf_counter()
            jax.jit(jax.grad(loss)).lower(variables["params"]).compile()
            seconds[depth] = time.perf_counter() - began
        yield {"case": name, **{f"seconds_{depth}_layers": value for depth, value in seconds.items()}}


def _loss(model: Any, variables: Any, inputs: jax.Array, lengths: jax.Array, params: Any) -> jax.Array:
    return model.apply({**variables, "params": params}, inputs, lengths, True, mutable=["batch_stats"])[0].logits.sum()


def decode(settings: Settings) -> Iterator[Row]:
    """Time per generated element of the enwik8 models, tiny and full, at each rate: early and late in a stream, and
    with several streams at once; against one read of all parameters, and a transformer with a cache of N rows.

    `crossing` is the cache size above which our step is faster, interpolated between measured lengths; `over_ours` is
    the transformer's time over ours at the highest rate.
    """
    early, late, many = (1, decoding.EARLY), (1, decoding.LATE), (decoding.MANY, decoding.LATE)
    for name, model in decoding.models().items():
        decoder = decoding.Decoder(model)
        biased = {rate: decoder.at_rate(rate) for rate in settings.rates}
        grown = biased[min(settings.rates)].grown()  # first, while there is no freed memory to reuse
        caches = {length: _cached(settings, model, length) for length in decoding.LENGTHS}
        runners: dict[Any, Callable[[], object]] = {
            (rate, *stream): found.runner(*stream) for rate, found in biased.items() for stream in (early, late, many)
        }
        ms = {key: row["median_ms"] for key, row in settings.race({"read": decoder.read(), **runners}).items()}
        read, kept = ms["read"] / decoding.STEPS, decoder.state_bytes()
        of = lambda rate, stream, ms=ms: ms[rate, *stream] / decoding.steps_of(stream[0])
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
                "over_reading": of(rate, early) / read,
                "late_ms": of(rate, late),
                "late_over_early": of(rate, late) / of(rate, early),
                "many_ms": of(rate, many),
                "many_per_second": 1e3 * many[0] / of(rate, many),
                "crossing": _crossing(of(rate, early), caches),
            }
        for length, found in caches.items():
            yield {
                "model": name,
                "contender": "transformer",
                "rows": length,
                "kept_mb": decoding.cache_bytes(model, length) / 1e6,
                "ms": found,
                "over_reading": found / read,
                "over_ours": found / ours,
                "layers_timed": decoding.layers_timed(model, length),
            }


def _cached(settings: Settings, model: Any, length: int) -> float:
    """Milliseconds of the transformer at full depth, extrapolated from the layers that fit. Runs alone and first, since
    its cache takes most of the memory."""
    steps = decoding.LENGTHS[length]
    few = replace(settings, rounds=min(settings.rounds, steps), seconds=0.0)  # the longest takes a minute
    found = few.race({"cache": decoding.transformer(model, length)})["cache"]["median_ms"] / steps
    return found * model.config.encoder.layers / decoding.layers_timed(model, length)


def _crossing(ms: float, caches: dict[int, float]) -> str:
    lengths = sorted(caches)
    if ms <= caches[lengths[0]]:
        return f"under {lengths[0]:,}"
    if ms > caches[lengths[-1]]:
        return f"over {lengths[-1]:,}"
    return f"{np.interp(ms, [caches[length] for length in lengths], lengths):,.0f}"


SUITES = {
    "layers": layers,
    "memory": peak_memory,
    "sparsity": sparsity,
    "ema": ema_alone,
    "lengths": lengths,
    "model": model,
    "compilation": compilation,
    "decode": decode,
}

_SIZE = 2048
_PRODUCT_FLOPS = 2 * _SIZE**3


def _run(program: Callable[..., Any], *arguments: Any) -> object:
    return jax.block_until_ready(program(*arguments))


def _product() -> Callable[[], object]:
    """A square matrix product: the machine's peak."""
    a = jnp.ones((_SIZE, _SIZE))
    program = jax.jit(lambda a: a @ a).lower(a).compile()
    return functools.partial(_run, program, a)
