"""The SeqBoat layer as its equations: short and slow, the reference that every fast form is tested against.

    e_t = EMA(norm(x))_t        m_t = silu(e_t)                       a state space model runs over all tokens
    u_t = m_t W_u + b_u         a_t = [u_t1 > u_t0]                   every token decides whether to attend
    c_t = max softmax(u_t / tau)                                      the decision has no gradient, its confidence does
    h_t = a_t c_t GAU(m)_t                                            attention among the active tokens
    y_t = silu(x_t + m_t W_h + b_h + h_t)

(Ren et al. 2023, arXiv 2306.11197, section 3.) Omits dropout, batch norm, S4D and other routers. The fast forms:
EMA, `ops/ema.py`; router, `layers/router.py`; attention over packed tokens, `layers/execution.py`, `ops/packing.py`,
`ops/window_attention.py`, `ops/kernels`; streams, `layers/streaming.py`; split sequences, `parallel/sequence.py`.
"""

import math

import jax
import jax.numpy as jnp
from jax.nn import sigmoid, silu, softmax


def seqboat_layer(params, x, valid, config):
    """x (B, L, D), valid (B, L), a `LayerConfig` -> the layer's output (B, L, D), and the active tokens (B, L)."""

    def one_sequence(x, valid):
        m = silu(ema(params["ssm"], norm("pre", params, x, config), valid, config.mixer.truncation))
        active, confidence = router(params, m, valid, config.activation)
        y = x + dense(params["skip_projection"], m)
        if config.activation != "never":
            y += jnp.where(active, confidence, 0)[:, None] * gated_attention(params["gau"], m, active, config)
        return norm("post", params, silu(y), config), active

    return jax.vmap(one_sequence)(x, valid)


def ema(p, x, valid, truncation):
    """h_t = q h_{t-1} + p beta x_t,  y_t = <gamma, h_t> / sqrt(N) + omega x_t,  unrolled into a kernel kappa_l of lags.

    A bidirectional layer has a second kernel for the tokens after t; both include lag 0. Kernels end at `truncation`.
    """
    length, width = x.shape
    q = 1 - sigmoid(p["delta"]) * sigmoid(p["alpha"])  # (D or 2D, N)
    weight = sigmoid(p["delta"]) * p["beta"] * p["gamma"] / math.sqrt(q.shape[1])
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None]
    signal, y = jnp.where(valid[:, None], x, 0), p["omega"] * x
    for first, lag in zip(range(0, len(q), width), (distance, -distance), strict=False):
        kept = (lag >= 0) & (lag < (truncation or length))
        powers = q[first : first + width, :, None, None] ** jnp.where(kept, lag, 0)
        kappa = jnp.where(kept, jnp.einsum("dn,dnts->dts", weight[first : first + width], powers), 0)
        y += jnp.einsum("dts,sd->td", kappa, signal)
    return y


def router(params, m, valid, activation):
    """The decision a (L,) and its confidence c (L,); tau is learned, initially sqrt(D)."""
    if activation != "learned":
        return valid & (activation == "always"), jnp.ones(len(m))
    p = params["sparse"]["configurator"]
    u = dense(p["logits"], m)
    return (u[:, 1] > u[:, 0]) & valid, softmax(u / jnp.exp(p["log_temperature"])).max(axis=-1)


def gated_attention(p, m, active, config):
    """[z | g | v] = silu(m W + b),  q, k = z gamma_i + beta_i,  (sum_j phi(s_tj) v_j * g_t) W_o + b_o.

    j runs over the active tokens at most `window_size` active tokens away from t, none after t if causal.
    """
    z, gate, v = jnp.split(silu(dense(p["projection"], m)), [config.key_size, config.key_size + config.value_size], 1)
    q, k = (z * p["gamma"][i] + p["beta"][i] for i in (0, 1))
    t, rank, size = jnp.arange(len(m)), jnp.cumsum(active) - active, config.window_size
    if config.position == "rotary":
        q, k = rotate(q, t), rotate(k, t)
    scale = config.key_size**-0.5
    if config.attention_function != "softmax":  # divided by the number of keys in reach
        everything = jnp.where(config.causal, rank + 1, jnp.maximum(active.sum(), 1))[:, None]
        scale = 1 / (everything if size is None else size * (2 - config.causal))
    distance, slots = t[None, :] - t[:, None], rank[None, :] - rank[:, None]
    visible = active[None, :] & ((distance <= 0) | (not config.causal)) & (abs(slots) <= (size or len(m)))
    scores = scale * q @ k.T + bias(p.get("position_bias"), distance, slots, config)
    if config.attention_function == "softmax":
        weights = softmax(scores, where=visible | (distance == 0))  # an active token always sees itself
    elif config.attention_function == "relu2":
        weights = jnp.where(visible, jnp.maximum(scores, 0) ** 2, 0)
    else:  # Laplace: the value and slope of relu2 at sqrt(2)
        mean, std = math.sqrt(0.5), math.sqrt(0.25 / math.pi)
        weights = jnp.where(visible, (1 + jax.lax.erf((scores - mean) / (std * math.sqrt(2)))) / 2, 0)
    return dense(p["output"], (weights @ v) * gate)


def bias(table, distance, slots, config):
    """A learned scalar per pair: by distance in tokens, in active tokens (slot), or in T5's buckets."""
    if table is None:
        return 0.0
    if config.position == "relative":
        return table[jnp.clip((len(table) - 1) // 2 + distance, 0, len(table) - 1)]
    if config.position == "slot":  # the offset is the published layer's
        return table[jnp.clip(4 * config.window_size - 1 + slots, 0, len(table) - 1)]
    ahead, far = (0, -distance) if config.causal else (jnp.where(distance > 0, 16, 0), abs(distance))
    exact = 16 if config.causal else 8  # one bucket per distance up to here, then logarithmic up to 128
    coarse = exact + (jnp.log(jnp.maximum(far, 1) / exact) * exact / math.log(128 / exact)).astype(int)
    return table[ahead + jnp.where(far < exact, jnp.maximum(far, 0), jnp.minimum(coarse, 2 * exact - 1))]


def rotate(x, t):
    """Channels (2i, 2i + 1) rotated by the angle t 10000^(-2i / Z)."""
    angle = t[:, None] * 10000.0 ** (-jnp.arange(0, x.shape[1], 2) / x.shape[1])
    turned = (x[:, 0::2] + 1j * x[:, 1::2]) * jnp.exp(1j * angle)
    return jnp.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def norm(place, params, x, config):
    """Layer norm; RMS norm without mean and offset; scale norm with one scale for all channels."""
    if place != config.norm_placement:
        return x
    p = params.get("norm", {})
    x = x - x.mean(axis=-1, keepdims=True) if config.norm == "layer" else x
    return x / jnp.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * p.get("scale", 1.0) + p.get("offset", 0.0)


def dense(p, x):
    return x @ p["kernel"] + p["bias"]
