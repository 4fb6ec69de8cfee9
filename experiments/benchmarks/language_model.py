"""Training steps of the enwik8 recipe on random bytes, at forced activation rates; no data and no loader."""

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.cases import Case, router_biases, with_router_bias
from experiments.benchmarks.settings import Row, Settings
from experiments.training.optimizers import OptimizerConfig, make_optimizer
from experiments.training.step import StepFunctions, TrainState, means
from seqboat.layers.mixers import ema
from seqboat.layers.seqboat import LayerConfig
from seqboat.models.encoder import EncoderConfig
from seqboat.models.language_model import LanguageModel, LanguageModelConfig
from seqboat.ops.losses import cross_entropy

# configs/lm/enwik8.py, without its data: its layer, batch and length, and its depth.
RECIPE = Case(
    LayerConfig(
        features=616,
        key_size=128,
        value_size=1232,
        window_size=1024,
        causal=True,
        position="rotary",
        mixer=ema.Config(truncation=2048),
        dropout=0.15,
    ),
    batch=8,
    length=8192,
)
DEPTH, VOCABULARY = 14, 257
OPTIMIZER = OptimizerConfig("radam", 0.005, warmup_steps=24_000, warmup_start=2e-3, weight_decay=0.1, clip_norm=0.25)


def training_step(settings: Settings) -> Iterator[Row]:
    """Milliseconds of a training step, with clipping and optimiser, and tokens per second. `activation_rate` is the
    step's own, with dropout; `temporary_gb` what XLA reserves besides parameters and optimiser state."""
    case, depth = settings.changes(replace(RECIPE, layer=replace(RECIPE.layer, max_positions=1024))), settings.depth
    model = make_model(case, depth or DEPTH)
    batch = random_batch(case)
    functions = StepFunctions(model, loss, functools.partial(make_optimizer, OPTIMIZER, 400_000), batch)
    seed = np.uint32(0)
    state = jax.jit(functions.init)(seed)
    began = time.perf_counter()
    program = jax.jit(functions.train).lower(state, batch, seed).compile()
    seconds = time.perf_counter() - began
    memory = program.memory_analysis()
    states = {rate: at_rate(model, state, batch, rate) for rate in settings.rates}
    run: Callable[[TrainState], TrainState] = lambda state: jax.block_until_ready(program(state, batch, seed))
    race = settings.race({rate: functools.partial(run, state) for rate, state in states.items()})
    for rate in settings.rates:
        found = means(run(states[rate]).metrics)
        row = {"case": "enwik8", "layers": depth or DEPTH, "dtype": case.layer.dtype, "rate": rate, **race.row(rate)}
        row["tokens_per_second"] = case.batch * case.length / race.ms(rate) * 1e3
        row |= {"activation_rate": float(np.mean(found["activation_rate"])), "compile_seconds": seconds}
        yield row | {"temporary_gb": memory.temp_size_in_bytes / 1e9 if memory else math.nan, "loss": found["loss"]}


def make_model(case: Case, depth: int) -> LanguageModel:
    encoder = EncoderConfig(case.layer, depth, final_norm_affine=False)
    return LanguageModel(LanguageModelConfig(encoder, VOCABULARY))


def random_batch(case: Case, seed: int = 0) -> dict[str, Any]:
    ids = np.random.default_rng(seed).integers(1, VOCABULARY, (case.batch, case.length + 1)).astype(np.int32)
    batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:], "lengths": np.full(case.batch, case.length, np.int32)}
    return jax.tree.map(jnp.asarray, batch | {"weights": np.ones((case.batch, case.length), np.float32)})


def loss(output: Any, batch: Any) -> tuple[Any, Any, dict[str, tuple[Any, Any]]]:
    """The sum of cross-entropies, and the number of targets."""
    total, count = (batch["weights"] * cross_entropy(output.logits, batch["targets"])).sum(), batch["weights"].sum()
    return total, count, {"loss": (total, count)}


def at_rate(model: LanguageModel, state: TrainState, batch: Any, rate: float) -> TrainState:
    """The state with router biases at which every layer has this activation rate, on the batch's first sequence."""
    symbols, lengths = batch["inputs"][:1], batch["lengths"][:1]

    @jax.jit
    def logits(variables):
        sown = model.apply(variables, symbols, lengths, mutable=["taps"])[1]
        return sown["taps"]["encoder"]["layers"]["sparse"]["configurator"]["router_logits"]

    variables = {"params": state.params}
    biases = router_biases(logits, variables, model.config.encoder.layers, rate)
    return replace(state, params=with_router_bias(variables, biases)["params"])
