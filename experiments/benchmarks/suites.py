"""Benchmark suites: each yields rows of plain values, which the program prints and stores."""

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import cases, codebook, contenders, kernels, language_model, memory, mixers
from experiments.benchmarks.cases import CASES, Case
from experiments.benchmarks.settings import Row, Settings, agree
from seqboat.layers.mixers import ema
from seqboat.models.classifier import Classifier, ClassifierConfig
from seqboat.models.encoder import EncoderConfig

LENGTHS = (4096, 8192, 16_384, 32_768, 65_536)
EMA_LENGTHS = (4096, 16_384, 65_536)


def layers(settings: Settings) -> Iterator[Row]:
    """One layer, forward and backward, at given activation rates, after checking our results against the published."""
    theirs = settings.theirs()
    for name, case in settings.cases.items():
        data = cases.make_data(case)
        layer = theirs.layer(case) if theirs else None
        variables = theirs.variables(case, layer) if theirs else cases.init_layer(case)
        runners: dict[tuple[str, float | None], contenders.Runner] = {}
        differences: dict[float | None, Row] = {}
        sparse, exact = contenders.ours(case, data), contenders.float32(case, data)
        compared = sparse if case == exact[0] else contenders.ours(*exact)
        logits = cases.router_logits(case, variables, data)
        for rate in settings.rates:
            bias = cases.threshold(logits, rate)
            biased = cases.with_router_bias(variables, bias)
            runners["sparse", rate] = sparse.runner(biased)
            if theirs:
                published = theirs.runner(*exact, layer, bias)
                differences[rate] = agree(f"{name} at {rate}", compared.runner(biased), published)
                runners["published", rate] = theirs.runner(case, data, layer, bias)
        for form in ("always active", "no attention") if settings.forms else ():
            runners[form, None] = contenders.ours(case, data, form).runner(variables)
        if settings.transformer:
            runners["transformer", None] = contenders.transformer(case, data)
        race = settings.race({key: runner.run for key, runner in runners.items()})
        for (who, at), runner in runners.items():
            row: Row = {"case": name, "contender": who, "rate": at, **race.row((who, at))}
            row["elements_per_second"] = case.batch * case.length / row["median_ms"] * 1e3
            row["compile_seconds"] = runner.compile_seconds
            if who == "sparse" and theirs:
                row |= differences.get(at, {}) | race.ratio("speedup", ("published", at), (who, at))
            yield row


def agreement(settings: Settings) -> Iterator[Row]:
    """One layer against its dense form on this device, output and gradients, leaf by leaf, in float32. Nothing is
    timed."""
    for name, given in settings.cases.items():
        case, data = contenders.float32(given, cases.make_data(given))
        variables, ours, reference = (
            cases.init_layer(case),
            contenders.ours(case, data),
            contenders.reference(case, data),
        )
        logits = cases.router_logits(case, variables, data)
        for rate in settings.rates:
            biased = cases.with_router_bias(variables, cases.threshold(logits, rate))
            checked = agree(f"{name} at {rate}", ours.runner(biased), reference.runner(biased))
            yield {"case": name, "rate": rate, **checked}


def peak_memory(settings: Settings) -> Iterator[Row]:
    """Peak memory growth of each contender, each in its own process."""
    for name in settings.cases:
        for rate in settings.rates:
            for who in ("sparse", *(["published"] if settings.published else [])):
                grown = memory.measure(name, who, rate, settings.published, settings.changes)
                yield {"case": name, "contender": who, "rate": rate, "peak_bytes": grown}


def sparsity(settings: Settings) -> Iterator[Row]:
    """Eleven rates: the least-squares fit t0 + s n, its residual, rate 0 against no attention, and the fraction of the
    machine's matrix-product peak that the active part reaches."""
    for name, case in settings.cases.items():
        data, variables = cases.make_data(case), cases.init_layer(case)
        rates = [i / 10 for i in range(11)]
        product, flops = kernels.product(case.layer.dtype)
        runners: dict[Any, Callable[[], object]] = {"peak": product}
        runners["no attention"] = contenders.ours(case, data, "no attention").runner(variables).run
        sparse, logits = contenders.ours(case, data), cases.router_logits(case, variables, data)
        for rate in rates:
            biased = cases.with_router_bias(variables, cases.threshold(logits, rate))
            runners[rate] = sparse.runner(biased).run
        race = settings.race(runners)
        elements = case.batch * case.length
        ms = np.array([race.ms(rate) for rate in rates])
        slope, start = np.polyfit(np.array(rates) * elements, ms, 1)
        peak = flops / race.ms("peak") * 1e3
        fit = start + slope * np.array(rates) * elements
        for rate, value, line in zip(rates, ms, fit, strict=True):
            yield {"case": name, "rate": rate, "median_ms": value, "off_the_line": value / line - 1}
        yield {
            "case": name,
            "start_ms": start,
            "microseconds_per_active_element": 1e3 * slope,
            **race.ratio("rate_0_over_no_attention", rates[0], "no attention"),
            "peak_gflops": peak / 1e9,
            "share_of_peak": cases.active_flops(case) / (slope / 1e3) / peak,
        }


def ema_alone(settings: Settings) -> Iterator[Row]:
    """The bidirectional EMA with full kernels: D 64, B 2, N 16, forward and backward."""
    theirs, width = settings.theirs(), 64
    params = kernels.ema_params(width, 2 * width, 16)
    for length in EMA_LENGTHS:
        data = kernels.signal(2, length, width)
        run = kernels.ema_runner(params, data, None, "auto")
        runners = {"ours": run.run}
        if theirs:
            published = theirs.ema(params, data)
            checked = agree(f"EMA of {length}", run, published)
            runners["published"] = published.run
        race = settings.race(runners)
        for who in runners:
            row = {"length": length, "contender": who, **race.row(who)}
            if who == "ours" and theirs:
                row |= checked | race.ratio("speedup", "published", who)
            yield row


def lengths(settings: Settings) -> Iterator[Row]:
    """One layer at each of LENGTHS, and a copy of as many bytes: times relative to the shortest length."""
    for name, of in settings.cases.items():
        runners: dict[Any, Callable[[], object]] = {}
        for length in LENGTHS:
            case = Case(replace(of.layer, max_positions=length), 1, length)
            data, variables = cases.make_data(case), cases.init_layer(case)
            bias = cases.threshold(cases.router_logits(case, variables, data), settings.rates[0])
            runners["layer", length] = contenders.ours(case, data).runner(cases.with_router_bias(variables, bias)).run
            copy = jax.jit(lambda x: x + 1).lower(data.x).compile()
            runners["copy", length] = functools.partial(contenders.wait, copy, data.x)
        race = settings.race(runners)
        for length in LENGTHS:
            grown = [race.ratio(what, (what, length), (what, LENGTHS[0])) for what in ("layer", "copy")]
            row = {"case": name, "rate": settings.rates[0], "length": length, "median_ms": race.ms(("layer", length))}
            yield row | grown[0] | grown[1]


def model(settings: Settings) -> Iterator[Row]:
    """A classifier of four layers of the text case on numbers (B, L, 1), with every layer at the given rate and full
    kernels, as in the published model."""
    theirs = settings.theirs()
    text = CASES["text"]
    case = settings.changes(replace(text, layer=replace(text.layer, mixer=ema.Config())))
    stack = contenders.Stack(case, settings.depth or 4, theirs)
    for rate in settings.rates:
        biases, checked = stack.router_biases(rate), {}
        runners = {"sparse": stack.ours(biases)}
        if theirs:
            runners["published"] = stack.published(biases)
            checked = agree(f"the model at {rate}", *runners.values())
        race = settings.race({who: runner.run for who, runner in runners.items()})
        for who in runners:
            row = {"case": f"text, {stack.depth} layers", "contender": who, "rate": rate, **race.row(who)}
            if who == "sparse" and theirs:
                row |= checked | race.ratio("speedup", "published", who)
            yield row


def compilation(settings: Settings) -> Iterator[Row]:
    """Seconds to compile the gradient of classifiers of 4 and 12 layers, without a compilation cache."""
    for name, case in settings.cases.items():
        if case.layer.causal:
            continue
        inputs = jnp.zeros((case.batch, case.length), jnp.int32)
        count = jnp.full(case.batch, case.length)
        seconds = {}
        for depth in (4, 12):
            classifier = Classifier(ClassifierConfig(EncoderConfig(case.layer, depth), 10, vocabulary_size=20))
            others = dict(jax.eval_shape(classifier.init, jax.random.key(0), inputs, count))
            params, loss = others.pop("params"), functools.partial(_loss, classifier, inputs, count)
            began = time.perf_counter()
            jax.jit(jax.grad(loss)).lower(params, others).compile()
            seconds[depth] = time.perf_counter() - began
        yield {"case": name, **{f"seconds_{depth}_layers": value for depth, value in seconds.items()}}


def _loss(model: Any, inputs: jax.Array, lengths: jax.Array, params: Any, others: Any) -> jax.Array:
    return model.apply({**others, "params": params}, inputs, lengths, True, mutable=["batch_stats"])[0].logits.sum()


def decode(settings: Settings) -> Iterator[Row]:
    from experiments.benchmarks import decoding  # late: it reads recipes, and needs what training needs

    return decoding.suite(settings)


SUITES = {
    "layers": layers,
    "agreement": agreement,
    "kernels": kernels.attention,
    "memory": peak_memory,
    "sparsity": sparsity,
    "ema": ema_alone,
    "ema_methods": kernels.ema_methods,
    "lengths": lengths,
    "model": model,
    "language_model": language_model.training_step,
    "compilation": compilation,
    "mixers": mixers.suite,
    "codebook": codebook.suite,
    "decode": decode,
}
