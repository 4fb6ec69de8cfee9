"""Sparse dictionaries of activations, trained as any model: sparse autoencoders, and transcoders from one site to
another. `atoms` gives the trained arrays, which need no model (`seqboat.interp.dictionaries`)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqboat.choices import check_choices, given
from seqboat.interp import dictionaries
from seqboat.interp.dictionaries import Atoms, Select
from seqboat.layers.router import ActivationStats, no_decisions
from seqboat.layers.terms import term

# Batches that the centre and the scale of the inputs are the mean of; then they stay.
SETTLING = 100
TINY = 1e-12


@dataclasses.dataclass(frozen=True)
class DictionaryConfig:
    """`size` features F of vectors of `width` W. `target_width` None reconstructs the inputs; a number makes a
    transcoder, to other vectors.

    `select` keeps of the positive features all ("relu"), the `k` largest of every row ("top_k"), k for every row on
    average ("batch_top_k"), or those whose norm is nearest to that of the input ("norm").

    Terms of the loss, beside the normalised squared error: `sparsity` times the sum of features over W;
    `norm_matching` times (|f| - |x|)^2 / W; `auxiliary` times the share of the error that remains if the
    `auxiliary_k` strongest features that did not fire in the last `dead_after` rows may explain it, which revives them.
    A "relu" feature that never fires has no gradient, and is not revived.
    """

    width: int = given()
    target_width: int | None = given()
    size: int = 512
    select: Select = "top_k"
    k: int = 8
    sparsity: float = 0.0
    norm_matching: float = 0.0
    dead_after: int = 20_000
    auxiliary: float = 1 / 32
    auxiliary_k: int = 32

    def __post_init__(self):
        check_choices(self)
        for field in ("width", "size", "dead_after"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 1")
        for field in ("k", "auxiliary_k"):
            if not 1 <= getattr(self, field) <= self.size:
                raise ValueError(f"{field}={getattr(self, field)}: must be in 1..{self.size}, the size")
        for field in ("sparsity", "norm_matching", "auxiliary"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field}={getattr(self, field)}: must not be negative")
        if self.target_width is not None and self.auxiliary:
            raise ValueError(
                f"auxiliary={self.auxiliary:g}: must be 0 with a target_site, whose error the model does not see"
            )


class Reconstruction(NamedTuple):
    """`logits` (B, 1, W'), the reconstructions; the stats of no layers; of every row the number of its features `l0`
    (B,), and the share of features that are `dead` (B,), the same for all."""

    logits: Array
    layers: ActivationStats
    l0: Array
    dead: Array


class Dictionary(nn.Module):
    """inputs (B, 1, W) -> `Reconstruction`; `lengths` are 0 for rows that are not counted.

        z = (x - centre) / scale - b_d,    f = S(relu(z E + b_e)),    x^ = (f D + b_d) scale + centre

    D = V / |V| has rows of length 1 at every step. The centre is the mean of the first batches, the scale makes the
    mean norm of (x - centre) / scale sqrt(W). A transcoder has f D + b_d, times the scale.
    """

    config: DictionaryConfig

    @nn.compact
    def __call__(self, inputs: Float[Array, "B 1 W"], lengths: Int[Array, "B"], train: bool = False) -> Reconstruction:
        config, x = self.config, inputs[:, 0]
        same = config.target_width is None
        train = train and not self.is_initializing()
        out = config.width if config.target_width is None else config.target_width
        # Rows of length 1 from the start, so that they learn as fast as the encoder's.
        decoder = unit(self.param("decoder", lambda key: unit(jax.random.normal(key, (config.size, out)))))
        aligned = lambda key: decoder.T if same else unit(jax.random.normal(key, (config.size, config.width))).T
        encoder = self.param("encoder", aligned)
        encoder_bias = self.param("encoder_bias", nn.initializers.zeros, (config.size,))
        decoder_bias = self.param("decoder_bias", nn.initializers.zeros, (out,))
        settled, centre, scale = self._units(x, train)
        z = (x - centre[None]) / scale
        origin = z - decoder_bias[None] if same else z
        positive = nn.relu(origin @ encoder + encoder_bias[None])
        f = self._select(positive, jnp.linalg.norm(origin, axis=1), settled, train)
        y = f @ decoder + decoder_bias[None]
        dead = self._dead(f, train)
        if train:
            self._terms(f, origin)
            if config.auxiliary and config.select != "relu":
                self._revive(jnp.where(dead[None], positive, 0), jax.lax.stop_gradient(z - y), decoder)
        logits = scale * y + centre[None] if same else scale * y
        share = jnp.broadcast_to(dead.mean(), len(x))
        stats = no_decisions((lengths > 0).sum(keepdims=True).astype(jnp.float32))
        return Reconstruction(logits[:, None], stats, (f > 0).sum(1).astype(jnp.float32), share)

    def _units(self, x: Float[Array, "B W"], train: bool) -> tuple[Array, Float[Array, " W"], Float[Array, ""]]:
        """How many batches came before, up to SETTLING, and the centre and scale of the inputs."""
        seen = self.variable("batch_stats", "batches", jnp.zeros, ())
        centre = self.variable("batch_stats", "centre", jnp.zeros, x.shape[1])
        norm = self.variable("batch_stats", "norm", lambda: jnp.sqrt(float(x.shape[1])))
        before = seen.value
        if train:
            share = jnp.where(before < SETTLING, 1 / (before + 1), 0.0)
            centre.value += share * (x.mean(0) - centre.value)
            norm.value += share * (jnp.linalg.norm(x - centre.value[None], axis=1).mean() - norm.value)
            seen.value = jnp.minimum(before + 1, SETTLING)
        return before, centre.value, jnp.maximum(norm.value, TINY) / jnp.sqrt(x.shape[1])

    def _select(self, f: Array, norm: Array, settled: Array, train: bool) -> Float[Array, "B F"]:
        config = self.config
        if config.select == "top_k":
            return dictionaries.top_k(f, config.k)
        if config.select == "norm":
            return dictionaries.by_norm(f, norm)
        if config.select == "relu":
            return f
        threshold = self.variable("batch_stats", "threshold", jnp.zeros, ())
        if not train:
            return jnp.where(f >= threshold.value, f, 0)
        f, least = dictionaries.batch_top_k(f, config.k)
        threshold.value += (jax.lax.stop_gradient(least) - threshold.value) / (settled + 1)
        return f

    def _dead(self, f: Float[Array, "B F"], train: bool) -> Bool[Array, " F"]:
        """Which features had not fired for `dead_after` rows before this batch."""
        silent = self.variable("batch_stats", "silent_rows", jnp.zeros, self.config.size, jnp.int32)
        before = silent.value
        if train:
            longer = jnp.minimum(before + len(f), self.config.dead_after)
            silent.value = jnp.where((f > 0).any(0), 0, longer)
        return before >= self.config.dead_after

    def _terms(self, f: Float[Array, "B F"], origin: Float[Array, "B W"]) -> None:
        config, rows = self.config, jnp.float32(len(f))
        if config.sparsity:
            term(self, "sparsity", config.sparsity, f.sum() / config.width, rows)
        if config.norm_matching:
            norm = lambda a: jnp.sqrt(jnp.maximum(jnp.square(a).sum(1), TINY))
            total = jnp.square(norm(f) - norm(origin)).sum()
            term(self, "norm_matching", config.norm_matching, total / config.width, rows)

    def _revive(self, f: Float[Array, "B F"], error: Float[Array, "B W"], decoder: Float[Array, "F W"]) -> None:
        """`f` are the features of the dead alone."""
        remaining = lambda f: jnp.square(error - dictionaries.top_k(f, self.config.auxiliary_k) @ decoder).sum()
        whole = jnp.square(error).sum()
        total = jax.lax.cond(f.any(), remaining, lambda f: whole, f)  # mostly none is dead, and the search is not cheap
        term(self, "revival", self.config.auxiliary, total, whole)


def unit(rows: Float[Array, "F W"]) -> Float[Array, "F W"]:
    """Rows of length 1."""
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), TINY)


def atoms(variables: Mapping[str, Any], config: DictionaryConfig) -> Atoms:
    """A trained dictionary in the units of its inputs: the centre and the scale are folded away."""
    params, stats = variables["params"], variables["batch_stats"]
    scale = jnp.maximum(stats["norm"], TINY) / jnp.sqrt(config.width)
    offset, centre = scale * params["decoder_bias"], stats["centre"]
    if config.target_width is None:
        offset = centre = centre + offset
    return Atoms(
        params["encoder"],
        scale * params["encoder_bias"],
        unit(params["decoder"]),
        centre,
        offset,
        scale * stats.get("threshold", jnp.zeros(())),
        config.select,
        config.k,
    )


Config, Model = DictionaryConfig, Dictionary
