"""The gated attention unit as a module of sparse activation (Hua et al. 2022, arXiv 2202.10447; Ma et al. 2022)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqboat.layers.initializers import truncated_normal
from seqboat.layers.sparse_activation import WindowedModule
from seqboat.layers.taps import tap
from seqboat.ops.packing import Rows
from seqboat.ops.positions import T5_BUCKETS
from seqboat.ops.window_attention import Window, attend


class GatedAttentionUnit(WindowedModule):
    """Rows (T, D) -> (T, D), attending within a window of activated rows.

        [z | g | v] = silu(m W + b)     q = z gamma_0 + beta_0     k = z gamma_1 + beta_1
        y = (attend(q, k, v) * g) W_o + b_o

    z (T, Z), gate g and value v (T, E). `max_positions` sizes the table of the "relative" kind. Dropout of v and of the
    attention weights happens where a "dropout" RNG is given.
    """

    features: int
    key_size: int
    value_size: int
    window: Window
    max_positions: int
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: jnp.dtype = jnp.dtype(jnp.float32)

    def setup(self):
        dense = lambda size, name: nn.Dense(size, dtype=self.dtype, kernel_init=truncated_normal(), name=name)
        self.projection = dense(self.key_size + 2 * self.value_size, "projection")
        self.output = dense(self.features, "output")
        self.drop_value = nn.Dropout(self.hidden_dropout)
        self.gamma = self.param("gamma", truncated_normal(), (2, self.key_size))
        self.beta = self.param("beta", nn.initializers.zeros, (2, self.key_size))
        sizes = {"relative": 2 * self.max_positions - 1, "slot": 6 * (self.window.size or 0) - 1, "t5": T5_BUCKETS}
        size = sizes.get(self.window.position)
        self.table = None if size is None else self.param("position_bias", truncated_normal(), (size,))

    def halo(self, length: int) -> tuple[int, int]:
        return self.window.halo(length)

    def project(self, x: Float[Array, "T D"], rows: Rows) -> tuple[dict, dict]:
        z, gate, v = jnp.split(nn.silu(self.projection(x)), [self.key_size, self.key_size + self.value_size], axis=-1)
        gamma, beta = self.gamma.astype(z.dtype), self.beta.astype(z.dtype)
        q, k = (z * gamma[i][None] + beta[i][None] for i in (0, 1))
        v = self.drop_value(v, deterministic=not self.has_rng("dropout"))
        # What may not be read may have come of anything, NaN too, and 0 * NaN is NaN.
        k, v = (jnp.where(rows.active[:, None], a, jnp.zeros((), a.dtype)) for a in (k, v))
        for name, value in (("q", q), ("k", k), ("v", v), ("gate", gate)):
            tap(self, name, value)
        q, k = (self.window.place(a, rows) for a in (q, k))
        return {"q": q, "gate": gate}, {"k": k, "v": v}

    def mix(self, own: dict, halo: dict, rows: Rows, halo_rows: Rows) -> Float[Array, "T D"]:
        drop = None
        if self.attention_dropout and self.has_rng("dropout"):
            keep = 1 - self.attention_dropout
            shape = (rows.active.shape[0], halo_rows.active.shape[0])
            drop = jax.random.bernoulli(self.make_rng("dropout"), keep, shape) / keep
        attended = attend(self.window, self.table, own["q"], halo["k"], halo["v"], rows, halo_rows, drop)
        tap(self, "attended", attended)
        y = self.output(attended * own["gate"])
        tap(self, "gau_out", y)
        return y
