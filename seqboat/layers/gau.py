"""The gated attention unit as a sparsely activated module (Hua et al. 2022, arXiv 2202.10447; Ma et al. 2022)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqboat.layers.initializers import truncated_normal
from seqboat.layers.streaming import MAX_IN_PLACE_LENGTH
from seqboat.layers.taps import tap
from seqboat.layers.windowed import WindowedModule
from seqboat.ops.blocks import Blocks
from seqboat.ops.packing import RowInfo
from seqboat.ops.positions import T5_BUCKETS
from seqboat.ops.window import Window
from seqboat.ops.window_attention import attend, attend_blocks, attend_packed


class GatedAttentionUnit(WindowedModule):
    """Rows (T, D) -> (T, D), attending within a window of activated rows.

        [z | g | v] = silu(m W + b)     q = z gamma_0 + beta_0     k = z gamma_1 + beta_1
        y = (attend(q, k, v) * g) W_o + b_o

    z (T, Z), gate g and value v (T, E). `max_positions` sizes the table of the "relative" kind. v and the attention
    weights have dropout if a "dropout" RNG is given. Packed rows attend by a Pallas `kernel`, or in blocks.
    """

    features: int
    key_size: int
    value_size: int
    window: Window
    max_positions: int
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    kernel: bool = False
    dtype: jnp.dtype = jnp.dtype(jnp.float32)

    def setup(self):
        self.projection = Columns(self.key_size + 2 * self.value_size, self.dtype, name="projection")
        self.output = nn.Dense(self.features, dtype=self.dtype, kernel_init=truncated_normal(), name="output")
        self.drop_value = nn.Dropout(self.hidden_dropout)
        self.gamma = self.param("gamma", truncated_normal(), (2, self.key_size))
        self.beta = self.param("beta", nn.initializers.zeros, (2, self.key_size))
        sizes = {"relative": 2 * self.max_positions - 1, "slot": 6 * (self.window.size or 0) - 1, "t5": T5_BUCKETS}
        size = sizes.get(self.window.position)
        self.table = None if size is None else self.param("position_bias", truncated_normal(), (size,))

    def mixes_packed(self, every: bool) -> bool:
        return (self.kernel or every) and not self.attention_dropout

    def projects_once(self) -> bool:
        return True

    def halo(self, length: int) -> tuple[int, int]:
        return self.window.halo(length)

    def context(self, x: Float[Array, "T D"], rows: RowInfo) -> dict:
        """Keys and values."""
        k = self._rotated(x, rows, 1)
        v = nn.silu(self.projection(x, self.key_size + self.value_size, None))
        v = self.drop_value(v, deterministic=not self.has_rng("dropout"))
        # Rows that may not be read can hold anything, even NaN, and 0 * NaN is NaN.
        k, v = (jnp.where(rows.active[:, None], a, jnp.zeros((), a.dtype)) for a in (k, v))
        return {"k": k, "v": tap(self, "v", v)}

    def project(self, x: Float[Array, "T D"], rows: RowInfo) -> tuple[dict, dict]:
        """`context`, and queries and gates. For few rows all are columns of one product, which XLA computes once."""
        return self.context(x, rows), {"q": self.query(x, rows), "gate": self._gate(x)}

    def mix(
        self, x: Float[Array, "T D"], halo: dict, rows: RowInfo, halo_rows: RowInfo, own: dict | None = None
    ) -> Float[Array, "T D"]:
        own = own or {"q": self.query(x, rows), "gate": self._gate(x)}
        drop = None
        if self.attention_dropout and self.has_rng("dropout"):
            keep = 1 - self.attention_dropout
            shape = (rows.active.shape[0], halo_rows.active.shape[0])
            drop = jax.random.bernoulli(self.make_rng("dropout"), keep, shape) / keep
        attended = attend(self.window, self.table, own["q"], halo["k"], halo["v"], rows, halo_rows, drop)
        return self._output(attended, own["gate"])

    def query(self, x: Float[Array, "T D"], rows: RowInfo) -> Float[Array, "T Z"]:
        """Queries."""
        return self._rotated(x, rows, 0)

    def mix_packed(self, q: Float[Array, "T Z"], halo: dict, rows: RowInfo, blocks: Blocks) -> Float[Array, "T E"]:
        attend = attend_packed if self.kernel else attend_blocks
        return attend(self.window, self.table, q, halo["k"], halo["v"], rows, blocks)

    def finish(self, x: Float[Array, "T D"], attended: Float[Array, "T E"]) -> Float[Array, "T D"]:
        return self._output(attended, self._gate(x))

    def _gate(self, x: Float[Array, "T D"]) -> Float[Array, "T E"]:
        return tap(self, "gate", nn.silu(self.projection(x, self.key_size, self.key_size + self.value_size)))

    def _output(self, attended: Float[Array, "T E"], gate: Float[Array, "T E"]) -> Float[Array, "T D"]:
        gated = tap(self, "gated", tap(self, "attended", attended) * gate)
        return tap(self, "gau_out", self.output(gated))

    def _rotated(self, x: Float[Array, "T D"], rows: RowInfo, i: int) -> Float[Array, "T Z"]:
        """Queries (i = 0) or keys (1), rotated to their positions."""
        z = nn.silu(self.projection(x, 0, self.key_size))
        placed = z * self.gamma[i].astype(z.dtype)[None] + self.beta[i].astype(z.dtype)[None]
        return self.window.apply_rotary(tap(self, "qk"[i], placed), rows)


class Columns(nn.Module):
    """A dense layer, of which only columns first..last are computed."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "T D"], first: int, last: int | None) -> Float[Array, "T C"]:
        kernel = self.param("kernel", truncated_normal(), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        few = x.shape[0] <= MAX_IN_PLACE_LENGTH  # slicing the kernel then costs more than computing all columns
        if not few:
            kernel, bias = kernel[:, first:last], bias[first:last]
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = x @ kernel + bias[None]
        return y[:, first:last] if few else y
