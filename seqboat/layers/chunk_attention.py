"""The gated attention of MEGA (Ma et al. 2022, arXiv 2209.10655, section 3), within chunks of a sequence."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seqboat.layers.initializers import truncated_normal
from seqboat.layers.taps import tap
from seqboat.ops.chunk_attention import ChunkMemory, attend_chunks, stream_chunks
from seqboat.ops.positions import rotary_bias
from seqboat.ops.window import AttentionFunction, Window


class ChunkAttention(nn.Module):
    """n, m (B, L, D) -> gate u and candidate h, each (B, L, D), and the memory of streams.

        v = silu(n W_v + b_v);   [u | z | r | c] = m W + b;   u = sigmoid(u), z = silu(z), r = silu(r)
        q = z gamma_0 + beta_0;  k = z gamma_1 + beta_1;   h = silu(c + (attend(q, k, v) * r) W_h + b_h)

    z (B, L, Z), v and r (B, L, E). Values come from n, the mixer's input: the difference from SeqBoat's unit
    (`layers.gau`). `max_positions` sizes the table of the bias without a `chunk`; None is the "rotary" bias.
    """

    key_size: int
    value_size: int
    chunk: int | None
    causal: bool
    function: AttentionFunction
    max_positions: int | None

    @nn.compact
    def __call__(
        self, n: Float[Array, "B L D"], m: Float[Array, "B L D"], valid: Bool[Array, "B L"], memory: ChunkMemory | None
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"], ChunkMemory | None]:
        width, keys, values = m.shape[-1], self.key_size, self.value_size
        dense = lambda size, name: nn.Dense(size, dtype=m.dtype, kernel_init=truncated_normal(), name=name)
        v = nn.silu(dense(values, "value")(n))
        parts = dense(2 * width + keys + values, "projection")(m)
        u, z, r, c = jnp.split(parts, [width, width + keys, width + keys + values], axis=-1)
        z, r = nn.silu(z), nn.silu(r)
        gamma = self.param("gamma", truncated_normal(), (2, keys)).astype(m.dtype)[:, None, None]
        beta = self.param("beta", nn.initializers.zeros, (2, keys)).astype(m.dtype)[:, None, None]
        q, k = z[None] * gamma + beta
        # Padding may hold anything, even NaN, and 0 * NaN is NaN.
        k, v = (jnp.where(valid[..., None], a, jnp.zeros((), a.dtype)) for a in (k, v))
        window, table = Window(None, self.causal, self.function, "relative"), self._table(n.shape[1])
        q, k, v, r = (tap(self, name, value) for name, value in {"q": q, "k": k, "v": v, "gate": r}.items())
        if memory is None:
            o = attend_chunks(window, self.chunk, table, q, k, v, valid)
        else:
            o, memory = stream_chunks(window, table, memory, q, k, v, valid)
        o = tap(self, "attended", o)
        y = lambda: tap(self, "gau_out", dense(width, "output")(tap(self, "gated", o * r)))
        return nn.sigmoid(u), nn.silu(c + y()), memory

    def _table(self, length: int) -> Float[Array, "P"]:
        """The bias of every distance, key minus query."""
        if self.max_positions is not None:
            return self.param("position_bias", truncated_normal(), (2 * (self.chunk or self.max_positions) - 1,))
        alpha, beta = self.param("position_vectors", truncated_normal(), (2, self.key_size))
        return rotary_bias(alpha, beta, self.chunk or max(length, 1))
