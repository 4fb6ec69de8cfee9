"""Bytes from a trained language model: a prompt is read in pieces, and every further byte is one compiled step."""

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
from seqboat.layers.streaming import fork
from seqboat.models.encoder import separate
from seqboat.models.language_model import LanguageModel

# What float32 logits can be divided by.
TEMPERATURES = (1e-30, 1e30)
# How many bytes of a prompt are read at once.
PIECE = 256


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Drawn from softmax(logits / temperature), of the `top_k` likeliest symbols, of the fewest that together have
    probability `top_p`. Temperature 0 takes the likeliest. The first symbol, the padding, is never drawn."""

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
        """The symbol with this number of every sample: a function of the seed, the number, and the sample's place."""
        logits = logits.at[:, 0].set(-jnp.inf)
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1)
        logits = self.keep(logits / self.temperature)
        key = jax.random.fold_in(jax.random.key(self.seed), number)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(len(logits)))
        return jax.vmap(jax.random.categorical)(keys, logits)

    def keep(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """The logits, -inf where `top_k` and `top_p` leave a symbol out; equally likely ones stay together."""
        ordered = -jnp.sort(-logits, axis=-1)
        if self.top_k is not None and self.top_k < logits.shape[1]:
            logits = jnp.where(logits >= ordered[:, self.top_k - 1, None], logits, -jnp.inf)
            ordered = jnp.where(jnp.arange(ordered.shape[1])[None] < self.top_k, ordered, -jnp.inf)
        if self.top_p < 1:
            probability = jax.nn.softmax(ordered, axis=-1)
            before = jnp.cumsum(probability, axis=-1) - probability
            least = jnp.where(before < max(self.top_p, TEMPERATURES[0]), ordered, jnp.inf).min(axis=-1, keepdims=True)
            logits = jnp.where(logits >= least, logits, -jnp.inf)
        return logits


def generate(
    model: LanguageModel, variables: dict[str, Any], prompt: bytes, sampling: Sampling, *, batch: int, count: int
) -> Iterator[UInt8[np.ndarray, " B"]]:
    """`count` times the next byte of every sample. Raises UserError before any is computed."""
    require(len(prompt) > 0, "--prompt is empty: the first byte that is generated needs one before it")
    symbols = model.config.vocabulary_size
    require(
        symbols == BYTE_VOCABULARY,
        f"the model's {symbols} symbols are no bytes: a prompt needs a model of bytes, as those of configs/lm",
    )
    try:
        state = model.initial_state(1)
    except ValueError as error:
        raise UserError(f"this model cannot generate: {error}") from error
    return _generate(model, variables, byte_ids(prompt), sampling, batch, count, state)


def make_step(model: LanguageModel, sampling: Sampling) -> Any:
    """The compiled step (variables, last symbols (B,), state, number of the step) -> (next symbols (B,), state).

    It takes the state's memory over. Parameters that are `separate` are read once and not copied.
    """

    @functools.partial(jax.jit, donate_argnums=2)
    def step(variables, last, state, number):
        output, state = model.apply(variables, last[:, None], jnp.ones_like(last), state, method="stream")
        return sampling.draw(output.logits[:, 0], number), state

    return step


def _generate(model, variables, ids: np.ndarray, sampling: Sampling, batch: int, count: int, state):
    @functools.partial(jax.jit, donate_argnums=2)
    def read(variables, ids, state, length):
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
    """Where a step leaves what it returns: for arrays without a place it would be compiled once more."""
    return jax.device_put(tree, jax.devices()[0])


class Terminal:
    """Bytes as text that a terminal may be given: what is no UTF-8, and what is no printable character but a new line
    or a tab, becomes U+FFFD."""

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def text(self, data: bytes, final: bool = False) -> str:
        """What can be said after these bytes; the rest waits for the next, unless these were the last."""
        decoded = self._decoder.decode(data, final)
        return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in decoded)
