"""Links between features from weights alone, without data (Dunefsky et al. 2024, arXiv 2406.11944).

A feature of one dictionary writes its atom d_i into a vector x; a feature of another, for instance of a transcoder that
replaces a feed-forward network, reads the same vector by a column e_j of its encoder. With  x = sum_i f_i d_i + o + err
of the upper dictionary (offset o, error err), and centre c and bias b of the lower one:

    z_j = <x - c, e_j> + b_j  =  sum_i f_i <d_i, e_j>  +  <o - c, e_j> + b_j  +  <err, e_j>
                                       links               constant             error

The links are the same for every input, the features f are those of one. A residual connection that a SiLU follows is
not linear: paths stay inside one layer.
"""

from typing import Any, NamedTuple

from jaxtyping import Array, Float


class PathTerms(NamedTuple):
    """The pre-activations of G features at vectors x (*B, W) by F features that write x: the `features` (*B, F) times
    the `links` (F, G), a `constant` (G,), and what the writing dictionary misses, `error` (*B, G)."""

    links: Array
    features: Array
    constant: Array
    error: Array

    @property
    def pre_activation(self) -> Float[Array, "*B G"]:
        linked = self.features @ self.links
        return linked + self.constant[(None,) * (linked.ndim - 1)] + self.error

    def active(self, feature: int) -> Float[Array, "*B F"]:
        """The terms f_i <d_i, e_j> of one reading feature j. Raises ValueError if there is no such feature."""
        if not 0 <= feature < self.links.shape[1]:
            raise ValueError(f"feature={feature}: must be in 0..{self.links.shape[1] - 1}")
        return self.features * self.links[:, feature][(None,) * (self.features.ndim - 1)]


def paths(up: Any, down: Any) -> Float[Array, "F G"]:
    """<d_i, e_j> of every feature of `up` and of `down` (`seqboat.interp.dictionaries.Atoms`).

    Raises ValueError if `down` does not read vectors of the width that `up` writes.
    """
    written, read = up.decoder.shape[-1], down.encoder.shape[-2]
    if written != read:
        raise ValueError(f"paths: features that write {written} channels, and others that read {read}")
    return up.decoder @ down.encoder


def pre_activations(up: Any, down: Any, x: Float[Array, "*B W"]) -> PathTerms:
    """The terms of what `down` reads from x before its selection. `up` is a dictionary of x itself.

    Raises ValueError as `paths`.
    """
    links, features = paths(up, down), up.encode(x)
    constant = (up.offset - down.centre) @ down.encoder + down.bias
    return PathTerms(links, features, constant, (x - up.decode(features)) @ down.encoder)


def pull_back(
    reader: Float[Array, "D"],
    output: Float[Array, "E D"],
    gate: Float[Array, "E"],
    weights: Float[Array, "L"],
    slope: Float[Array, "L E"],
    value: Float[Array, "D E"],
) -> Float[Array, "L D"]:
    """The reader e of one element's attention output, `gau_out`, as readers r_s of every source element's m:

        <gau_out_t, e>  =  sum_s <m_s, r_s> + const,      r_s = A_ts W_v (sigma_s * g_t * W_o e)

    exact with the attention `weights` A_t, the `gate` g_t and the `slope` sigma frozen, as an attention pattern is in
    direct attribution: v = silu(p) = p sigma(p), with p = m W_v + b_v; sigma of a linear value is 1. `output` is W_o.
    The constant is  <b_o, e> + sum_s A_ts <sigma_s * b_v, g_t * W_o e>.  `readers @ up.decoder.T` (L, F) are the links
    of the features that write m_s.
    """
    return weights[:, None] * ((slope * (gate * (output @ reader))[None]) @ value.T)
