"""Router decisions taken apart, without approximation, and attention outputs with attention and gate frozen.

The router is linear in m, with nothing in between. With w = W_1 - W_0, b = b_1 - b_0, mu the running mean of a centred
router (else 0), and a dictionary m = sum_i f_i d_i + o + e of atoms d_i, offset o and error e:

    u_1 - u_0  =  sum_c w_c (m - mu)_c + b                                                   by channel
               =  sum_i f_i <d_i, w>  +  <o - mu, w> + b  +  <e, w>                          by feature: what
               =  sum_s sum_c w_c sigma(e_tc) k_c[t - s] x_sc  -  <mu, w> + b                by source element: where

The last holds as m = silu(e) = e sigma(e), with e the mixer's output (`ssm_out`) at t and x its input (`pre_norm`):
with sigma frozen, as direct attribution freezes attention weights, m is linear in everything the mixer read. k is the
mixer's kernel (`MixerConfig.kernel`); mixers without one, such as an LSTM, have no such sum.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Router(NamedTuple):
    """One layer's router for one module:  u_1 - u_0 = <m - mean, weight> + bias,  `weight` and `mean` (D,), `bias`
    ()."""

    weight: Array
    bias: Array
    mean: Array

    @property
    def constant(self) -> Array:
        """The margin of m = 0."""
        return self.bias - (self.mean * self.weight).sum()


def router(variables: Mapping[str, Any], layer: int, module: int = 0) -> Router:
    """The router of a layer, from 1, of a model with an `Encoder`, for one of its modules, from 0.

    The bias includes the threshold of a `RateControl`. Raises ValueError for a model without routers.
    """
    encoder = lambda collection: variables.get(collection, {}).get("encoder", {})
    of = lambda collection: encoder(collection).get("layers", {}).get("sparse", {}).get("configurator", {})
    if "logits" not in of("params"):
        raise ValueError("the layers of this model have no router: nothing is decided in them")
    kernel, bias = (of("params")["logits"][name][layer - 1] for name in ("kernel", "bias"))
    weight = kernel[:, 2 * module + 1] - kernel[:, 2 * module]
    mean = of("batch_stats")["mean"][layer - 1] if "mean" in of("batch_stats") else 0 * weight
    threshold = encoder("batch_stats").get("rate", {}).get("threshold", 0.0)
    return Router(weight, bias[2 * module + 1] - bias[2 * module] - threshold, mean)


def margin_by_channel(router: Router, m: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """The terms of the channels; with `router.bias` they sum to the margin."""
    over = (None,) * (m.ndim - 1)
    return (m - router.mean[over]) * router.weight[over]


class MarginTerms(NamedTuple):
    """Margins of elements as the sum of `features` (*B, F), a `constant` () and what the dictionary misses, `error`
    (*B,)."""

    features: Array
    constant: Array
    error: Array

    @property
    def margin(self) -> Float[Array, "*B"]:
        return self.features.sum(-1) + self.constant + self.error

    def flips(self) -> Array:
        """(*B, F): whether the decision changes when one feature is taken away (`edits.Without` at `m`)."""
        return (self.margin > 0)[..., None] != (self.margin[..., None] - self.features > 0)


def margin_by_feature(atoms: Any, router: Router, m: Float[Array, "*B D"]) -> MarginTerms:
    """The margins of elements by the features of a dictionary of m (`seqboat.interp.dictionaries.Atoms`)."""
    features = atoms.encode(m)
    constant = (atoms.offset - router.mean) @ router.weight + router.bias
    error = (m - atoms.decode(features)) @ router.weight
    terms = features * (atoms.decoder @ router.weight)[(None,) * (m.ndim - 1)]
    return MarginTerms(terms, constant, error)


def margin_by_source(
    kernel: Float[Array, "S K"],
    direct: Float[Array, "D"],
    weight: Float[Array, "D"],
    ssm_out: Float[Array, "L D"],
    pre_norm: Float[Array, "L D"],
    t: Array | int,
) -> Float[Array, "L"]:
    """The terms of the source elements in the margin of element t of one sequence, without padding; with
    `router.constant` they sum to the margin.

    `kernel` and `direct` are those of `MixerConfig.kernel`; S is D, or 2D with the second half looking ahead. With a
    row e_i of a dictionary's encoder as `weight`, the terms are those of the feature's <e_i, m_t>.
    """
    length, width = pre_norm.shape
    lag = t - jnp.arange(length)

    def reached(rows: Float[Array, "D K"], lag: Array) -> Float[Array, "D L"]:
        last = rows.shape[1] - 1
        return jnp.where(((lag >= 0) & (lag <= last))[None], rows[:, jnp.clip(lag, 0, last)], 0)

    weights = reached(kernel[:width], lag) + jnp.where((lag == 0)[None], direct[:, None], 0)
    if len(kernel) > width:
        weights += reached(kernel[width:], -lag)
    return jnp.einsum("d,dl,ld->l", weight * jax.nn.sigmoid(ssm_out[t]), weights, pre_norm)


def feature_by_source(
    encoder: Float[Array, "E"], gate: Float[Array, "E"], weights: Float[Array, "L"], v: Float[Array, "L E"]
) -> Float[Array, "L"]:
    """The terms of the source elements in a feature's <e_i, gated_t> of `gated` = attended * gate:

        A_ts <e_i * g_t, v_s>,    A_ts the attention `weights` of element t, g_t its `gate`

    exact with A and g frozen.
    """
    return weights * (v @ (encoder * gate))
