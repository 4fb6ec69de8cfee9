"""The suite "codebook": drawing whole sequences of tokens from a codebook, in two stages and in one."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.settings import Row, Settings
from seqboat.models import coarse_to_fine

BATCHES, LENGTH, WIDTH = (1, 16), 32, 64
SIZES = ((16, 16), (64, 128))  # clusters, and codes in each
ARMS = ("two_stages", "plain", "factored")


def suite(settings: Settings) -> Iterator[Row]:
    """Time to draw sequences of LENGTH tokens, with initial parameters: the models of `configs/synthetic/codes.py`, of
    two layers of equal width without attention, at two sizes of the codebook. Every drawing is one program, whose loop
    reads and draws one label or token at a time."""
    length, batches = settings.changes.length or LENGTH, settings.changes.batch
    for clusters, each in SIZES:
        for batch in BATCHES if batches is None else (batches,):
            runners = {arm: drawing(arm, clusters, each, batch, length) for arm in ARMS}
            race = settings.race(runners)
            for arm in ARMS:
                row: Row = {"codes": clusters * each, "sequences": batch, "contender": arm, **race.row(arm)}
                row["tokens_per_second"] = batch * length / race.ms(arm) * 1e3
                yield row if arm == "plain" else row | race.ratio("speedup", "plain", arm)


def drawing(arm: str, clusters: int, each: int, batch: int, length: int) -> Callable[[], jax.Array]:
    """A function that draws `length` tokens of `batch` sequences."""
    # Recipes and tasks need the packages of training, which no other suite needs.
    from configs.synthetic import codes as recipe
    from experiments.tasks import codes
    from experiments.training.models import build_model

    values = recipe.get_config(f"{arm},no_attention").model.to_dict() | {"features": WIDTH}
    task = codes.Config(length=length, coarse=clusters, fine=each, edges=1, choices=1)
    model: Any = build_model(values, task)
    one = jnp.ones(batch, jnp.int32)
    variables = jax.jit(model.init)(jax.random.key(0), one[:, None], one)
    sample = coarse_to_fine.sample if arm == "two_stages" else draw
    program = jax.jit(lambda variables, key: sample(model, variables, one, key, length))
    return lambda: program(variables, jax.random.key(1)).block_until_ready()


def draw(model: Any, variables: Any, begin: jax.Array, key: jax.Array, count: int) -> jax.Array:
    """`coarse_to_fine.sample` of a language model: (B, count)."""

    def step(before: Any, key: jax.Array) -> Any:
        symbols, state = before
        output, state = model.apply(variables, symbols[:, None], jnp.ones_like(symbols), state, method="stream")
        drawn = jax.random.categorical(key, output.logits[:, 0]).astype(symbols.dtype)
        return (drawn, state), drawn

    start = (begin, model.initial_state(len(begin)))
    return jax.lax.scan(step, start, jax.random.split(key, count))[1].T
