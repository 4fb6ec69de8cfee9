"""The benchmarked layers: in width, window, attention function and direction those of the published recipes.

They differ from the recipes in batch size, in having no dropout, and in router temperature, which costs nothing; and:
text has LayerNorm and a table of relative positions (recipe: ScaleNorm, slot positions) and 4096 tokens for 4000;
listops has the whole kernel (recipe: 1024 lags) and 2048 tokens for 2000; lm and enwik8 have width 512 (recipe: 616),
and lm the whole kernel. `language_model.RECIPE` is the recipe's own layer of enwik8.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqboat.layers.mixers import ema
from seqboat.layers.seqboat import LayerConfig, SeqBoatLayer


@dataclass(frozen=True)
class Case:
    """A layer and the batch it is timed on."""

    layer: LayerConfig
    batch: int
    length: int


def _case(batch: int, length: int, features: int, key_size: int, **fields: Any) -> Case:
    return Case(LayerConfig(features, key_size, 2 * features, max_positions=length, **fields), batch, length)


CASES = {
    "text": _case(4, 4096, 128, 64, mixer=ema.Config(truncation=1024), norm_placement="post"),
    "listops": _case(4, 2048, 80, 64, norm_placement="post"),
    "image": _case(8, 1024, 160, 96, mixer=ema.Config(truncation=1024), attention_function="relu2", norm="batch"),
    "speech": _case(
        1, 16_000, 60, 30, mixer=ema.Config(truncation=4000), attention_function="relu2", position="slot", norm="batch"
    ),
    "lm": _case(1, 8192, 512, 128, causal=True, window_size=1024, position="rotary"),
    "enwik8": _case(
        1, 8192, 512, 128, mixer=ema.Config(truncation=2048), causal=True, window_size=1024, position="rotary"
    ),
}


def active_flops(case: Case) -> int:
    """FLOPs of the matrix products per active element, forward and backward, without recomputation or masked keys."""
    layer = case.layer
    keys = (layer.window_size or case.length) * (1 if layer.causal else 2) + 1
    projections = layer.features * (layer.key_size + 3 * layer.value_size)
    return 3 * 2 * (projections + keys * (layer.key_size + layer.value_size))


@dataclass(frozen=True)
class Data:
    """x (B, L, D), and the cotangent of the layer's output: the loss is their inner product."""

    x: jax.Array
    cotangent: jax.Array
    valid: jax.Array


def make_data(case: Case, seed: int = 0) -> Data:
    rng = np.random.default_rng(seed)
    shape = (case.batch, case.length, case.layer.features)
    x, cotangent = (jnp.asarray(rng.standard_normal(shape), case.layer.dtype) for _ in range(2))
    return Data(x, cotangent, jnp.ones(shape[:2], bool))


def init_layer(case: Case, seed: int = 0) -> Any:
    """Variables of the case's layer with learned activation."""
    short = jnp.zeros((1, 8, case.layer.features), case.layer.dtype)
    return jax.jit(SeqBoatLayer(case.layer).init)(jax.random.key(seed), short, jnp.ones((1, 8), bool))


def router_logits(case: Case, variables: Any, data: Data) -> np.ndarray:
    """The router's logits (B, L, 1, 2); `threshold` gives the bias for a rate."""
    layer = SeqBoatLayer(replace(case.layer, activation="learned"))

    @jax.jit
    def taps(variables, x, valid):
        return layer.apply(variables, x, valid, True, mutable=["taps", "batch_stats"])[1]["taps"]

    with jax.default_matmul_precision("highest"):  # in which two implementations are compared
        return np.asarray(taps(variables, data.x, data.valid)["sparse"]["configurator"]["router_logits"])


def threshold(u: np.ndarray, rate: float) -> float:
    """The bias for router logits u (..., 2), in the widest gap near that quantile of the margins, so that rounding
    flips no decision. At rates 0 and 1 it lies a quarter of the margins' range, and 1, outside them: far enough for
    dropout, and not so far that the confidence is 1 in float32 and has no gradient to compare."""
    margins = np.sort((u[..., 1].astype(np.float64) - u[..., 0]).reshape(-1))
    if rate in (0, 1):
        beyond = 1 + (margins[-1] - margins[0]) / 4
        return float(beyond - margins[0]) if rate else float(-beyond - margins[-1])
    target, near = round((1 - rate) * len(margins)), max(1, len(margins) // 500)
    first = max(1, target - near)
    gaps = margins[first : target + near] - margins[first - 1 : target + near - 1]
    index = first + int(np.argmax(gaps))
    return -float(margins[index - 1 : index + 1].mean())


def router_biases(logits: Callable[[Any], jax.Array], variables: Any, depth: int, rate: float) -> np.ndarray:
    """One bias per layer of a stack; each depends on the biases of the previous layers. `logits` maps variables to the
    router's logits of all layers (depth, ..., 2)."""
    biases = np.zeros(depth)
    for layer in range(depth):
        biases[layer] = threshold(np.asarray(logits(with_router_bias(variables, biases))[layer]), rate)
    return biases


def with_router_bias(variables: Any, bias: float | np.ndarray) -> Any:
    """The variables with `bias` added to the activation logit; an array gives one bias per layer of a stack."""

    def change(path, leaf):
        keys = tuple(key.key for key in path)
        return leaf.at[..., 1].add(bias) if keys[-3:] == ("configurator", "logits", "bias") else leaf

    return jax.tree_util.tree_map_with_path(change, variables)
