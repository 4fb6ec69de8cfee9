"""Sampling from a trained model: bytes of a language model, whose prompt is read in pieces, then each byte is one
compiled step; and whole sequences of tokens of a model in two stages."""

import codecs
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from experiments.common.errors import UserError, require
from experiments.tasks.features import BYTE_VOCABULARY, byte_ids
from experiments.training.experiment import read_config, read_task
from experiments.training.restore import Run
from seqboat.layers.streaming import fork
from seqboat.models import coarse_to_fine
from seqboat.models.bottlenecked import force
from seqboat.models.encoder import separate
from seqboat.models.language_model import LanguageModel
from seqboat.quantization import quantized_products

# The range by which float32 logits can be divided.
TEMPERATURES = (1e-30, 1e30)
# Bytes of a prompt read at once.
PIECE = 256


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Samples from softmax(logits / temperature), restricted to the `top_k` likeliest symbols and to the smallest set
    with total probability `top_p`. Temperature 0 takes the likeliest. Symbol 0, the padding, is never drawn.

    A model in two stages draws labels and then the symbols of its labels, and each draw is restricted by itself."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        least, most = TEMPERATURES
        require(
            self.temperature == 0 or least <= self.temperature <= most,
            f"--temperature={self.temperature}: must be 0, or in {least:g}..{most:g}",
        )
        require(self.top_k is None or self.top_k >= 1, f"--top_k={self.top_k}: must be at least 1")
        require(0 < self.top_p <= 1, f"--top_p={self.top_p}: must be above 0 and at most 1")
        require(0 <= self.seed < 2**32, f"--seed={self.seed}: must be in 0..{2**32 - 1}")

    def draw(self, logits: Float[Array, "B V"], number: Int[Array, ""]) -> Int[Array, "B"]:
        """Symbol `number` of every sample: a function of the seed, `number`, and the sample's index."""
        logits = self.restrict(logits.at[:, 0].set(-jnp.inf))
        key = jax.random.fold_in(jax.random.key(self.seed), number)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(len(logits)))
        return jax.vmap(jax.random.categorical)(keys, logits)

    def restrict(self, logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
        """The logits of the distribution that is drawn from: of temperature 0, of the likeliest alone."""
        if self.temperature == 0:
            return jnp.where(jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=bool), 0.0, -jnp.inf)
        return self.keep(logits / self.temperature)

    def keep(self, logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
        """The logits, with -inf for symbols excluded by `top_k` and `top_p`; ties are kept or excluded together."""
        ordered = -jnp.sort(-logits, axis=-1)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits = jnp.where(logits >= ordered[..., self.top_k - 1, None], logits, -jnp.inf)
            first = jnp.expand_dims(jnp.arange(ordered.shape[-1]) < self.top_k, range(ordered.ndim - 1))
            ordered = jnp.where(first, ordered, -jnp.inf)
        if self.top_p < 1:
            probability = jax.nn.softmax(ordered, axis=-1)
            before = jnp.cumsum(probability, axis=-1) - probability
            least = jnp.where(before < max(self.top_p, TEMPERATURES[0]), ordered, jnp.inf).min(axis=-1, keepdims=True)
            logits = jnp.where(logits >= least, logits, -jnp.inf)
        return logits


def forced(model: LanguageModel, variables: dict[str, Any], codes: list[str]) -> dict[str, Any]:
    """The variables of a model with codebooks that takes, at every byte, the codes that are named as SITE:LAYER:CODE.

    Raises UserError for another name, and for codes that there are not.
    """
    sites: dict[str, dict[int, int]] = {}
    for name in codes:
        site, *numbers = name.split(":")
        require(
            len(numbers) == 2 and all(number.isdecimal() for number in numbers),
            f"--force={name}: expected SITE:LAYER:CODE, as m:1:17",
        )
        sites.setdefault(site, {})[int(numbers[0])] = int(numbers[1])
    try:
        for site, choices in sites.items():
            variables = force(model, variables, site, choices)
    except ValueError as error:
        raise UserError(f"--force: {error}") from error
    return variables


def generate(
    model: LanguageModel, variables: dict[str, Any], prompt: bytes, sampling: Sampling, *, batch: int, count: int
) -> Iterator[UInt8[np.ndarray, " B"]]:
    """Yields the next byte of every sample, `count` times. Raises UserError before computing any."""
    require(len(prompt) > 0, "--prompt is empty: the first generated byte needs a byte before it")
    symbols = model.config.vocabulary_size
    require(
        symbols == BYTE_VOCABULARY,
        f"the model's {symbols} symbols are not bytes: a prompt needs a model of bytes, such as those of configs/lm",
    )
    return _generate(model, variables, byte_ids(prompt), sampling, batch, count, _initial_state(model))


def draw_tokens(run: Run, sampling: Sampling, *, batch: int, count: int | None) -> Int[np.ndarray, "B N"]:
    """`count` tokens of each of `batch` sequences of a model in two stages, which follow the first symbol of its task,
    by default as many as its sequences have. Raises UserError."""
    module, config = read_task(read_config(run.values))
    name = module.__name__.rpartition(".")[2]
    require(
        hasattr(config, "begin"), f"config.task.name={name!r}: its sequences have no known first symbol to draw from"
    )
    _initial_state(run.model)
    begin = jnp.full(batch, config.begin, jnp.int32)
    key, count = jax.random.key(sampling.seed), count or config.length - 1
    return np.asarray(coarse_to_fine.sample(run.model, run.variables, begin, key, count, sampling.restrict))


def make_step(model: LanguageModel, sampling: Sampling) -> Any:
    """The compiled step (variables, last symbols (B,), state, number of the step) -> (next symbols (B,), state).

    The state is donated. Parameters that are `separate` are read once and not copied.
    """

    @functools.partial(jax.jit, donate_argnums=2)
    def step(variables, last, state, number):
        with quantized_products():
            output, state = model.apply(variables, last[:, None], jnp.ones_like(last), state, method="stream")
        return sampling.draw(output.logits[:, 0], number), state

    return step


def _initial_state(model: Any) -> Any:
    """Of one stream. Raises UserError for a model that cannot be streamed."""
    try:
        return model.initial_state(1)
    except ValueError as error:
        raise UserError(f"this model cannot generate: {error}") from error


def _generate(model, variables, ids: np.ndarray, sampling: Sampling, batch: int, count: int, state):
    @functools.partial(jax.jit, donate_argnums=2)
    def read(variables, ids, state, length):
        with quantized_products():
            return model.apply(variables, ids[None], length[None], state, method="stream")[1]

    state = _placed(state)
    for first in range(0, len(ids) - 1, PIECE):
        piece = ids[first : min(first + PIECE, len(ids) - 1)]
        state = read(variables, np.resize(piece, PIECE), state, np.int32(len(piece)))
    step, variables = make_step(model, sampling), jax.jit(separate)(variables)
    last, state = _placed((jnp.full(batch, ids[-1]), fork(state, jnp.zeros(batch, jnp.int32))))
    for number in range(count):
        last, state = step(variables, last, state, np.int32(number))
        yield (np.asarray(last) - 1).astype(np.uint8)


def _placed(tree: Any) -> Any:
    """Commits arrays to the device of a step's results; for uncommitted arrays the step would be compiled twice."""
    return jax.device_put(tree, jax.devices()[0])


class Terminal:
    """Bytes as text that is safe for a terminal: invalid UTF-8, and unprintable characters other than newline and tab,
    become U+FFFD."""

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def text(self, data: bytes, final: bool = False) -> str:
        """The text that these bytes complete; a partial character waits for the next call unless `final`."""
        decoded = self._decoder.decode(data, final)
        return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in decoded)
