"""Which parts of a model a behaviour needs, told from discrete codes (O'Neill and Bui 2024, arXiv 2405.12522).

A node is a group of one layer's value channels. To an example of L elements it adds, in the mean,

    x = 1/L sum_t c_t gated_t[group] W_o[group]           (D,),      c the confidence, `contributions`
    code = argmax_i f_i(x),   F if no feature is positive            `node_codes`

with f the features of one dictionary of all nodes' contributions (`seqboat.interp.dictionaries.Atoms`). A node belongs
to the circuit if its codes differ between positive examples, which show the behaviour, and negative ones, which do not.
This needs one forward pass, no ablation and no gradient, and it does not need the means to differ.

Codes are (N, K) of N examples and K nodes, `positive` (N,) booleans; ValueError if all are, or none. A score is
(codes, positive) -> (K,), larger for a node that tells the examples apart. Few examples favour nodes of many codes by
chance: `debiased` takes that away.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.special import rel_entr

Codes = Int[np.ndarray, "N K"]
Positive = Bool[np.ndarray, "N"]
Score = Callable[[Codes, Positive], Float[np.ndarray, "K"]]


def contributions(
    gated: Float[Array, "N L E"], kernel: Float[Array, "E D"], weights: Float[Array, "N L"], groups: int
) -> Float[Array, "N G D"]:
    """What each of `groups` equal groups of a layer's value channels adds to every example,

        sum_t weights_t gated_t[group] W_o[group]

    with the tap `gated`, the `kernel` W_o of the GAU's output, and as `weights` c_t / L where an element is active, 0
    elsewhere. Raises ValueError if the groups are not of one size.
    """
    examples, channels = gated.shape[0], gated.shape[2]
    if groups < 1 or channels % groups:
        raise ValueError(f"contributions: {channels} channels do not make {groups} groups of one size")
    mean = jnp.einsum("nle,nl->ne", gated, weights).reshape(examples, groups, -1)
    return jnp.einsum("ngc,gcd->ngd", mean, kernel.reshape(groups, -1, kernel.shape[1]))


def node_codes(atoms: Any, contributions: Float[Array, "N K D"]) -> Codes:
    """The number of each contribution's strongest feature; F, the number of features, where none is positive, and where
    the contribution is zero, whatever the dictionary's biases make of it."""
    f, x = np.asarray(atoms.encode(contributions)), np.asarray(contributions)
    fires = (f > 0).any(-1) & (x != 0).any(-1)
    return np.where(fires, f.argmax(-1), f.shape[-1])


def unique(codes: Codes, positive: Positive) -> Float[np.ndarray, "K"]:
    """How many codes of each node occur in positive examples only."""
    counts = _counts(codes, positive)
    return ((counts[..., 1] > 0) & (counts[..., 0] == 0)).sum(1).astype(float)


def information(codes: Codes, positive: Positive) -> Float[np.ndarray, "K"]:
    """The mutual information of each node's code and the label, in nats, less its first-order bias (Miller 1955):

        sum_{c,y} p(c,y) ln(p(c,y) / (p(c) p(y)))  -  (C - 1) / 2n,       C the number of codes of the node

    The first term is at least 0; the difference is below 0 for most nodes that are independent of the label.
    """
    joint = _counts(codes, positive) / len(codes)
    expected = joint.sum(2, keepdims=True) * joint.sum(1, keepdims=True)
    number = (joint.sum(2) > 0).sum(1)
    return rel_entr(joint, expected).sum((1, 2)) - (number - 1) / (2 * len(codes))


def debiased(
    score: Score, codes: Codes, positive: Positive, key: Array, permutations: int = 30
) -> Float[np.ndarray, "K"]:
    """A score less its mean over random permutations of the labels, which is what a node's variety alone gives."""
    order = np.asarray(jax.random.uniform(key, (permutations, len(positive)))).argsort(1)
    return score(codes, positive) - np.mean([score(codes, positive[row]) for row in order], axis=0)


def pairs(codes: Codes, positive: Positive) -> Float[np.ndarray, "K K"]:
    """How many pairs of codes of two nodes occur together in positive examples only; on the diagonal `unique`."""
    _check(positive)
    base = codes.max() + 1
    together = codes[:, :, None].astype(np.int64) * base + codes[:, None]
    only = [len(np.setdiff1d(pair[positive], pair[~positive])) for pair in together.reshape(len(codes), -1).T]
    return np.array(only, float).reshape(codes.shape[1], -1)


def mean_difference(contributions: Float[np.ndarray, "N K D"], positive: Positive) -> Float[np.ndarray, "K"]:
    """The distance of the mean contributions to positive and to negative examples: the score without codes."""
    _check(positive)
    return np.linalg.norm(contributions[positive].mean(0) - contributions[~positive].mean(0), axis=1)


def auc(score: Float[np.ndarray, "K"], truth: Bool[np.ndarray, "K"]) -> float:
    """The probability that a true node has a larger score than another, ties counted half: the area under the ROC
    curve. Raises ValueError if all nodes are true, or none."""
    if truth.all() or not truth.any():
        raise ValueError(f"auc: {truth.sum()} of {len(truth)} nodes are true; there must be some of both kinds")
    above = score[truth][:, None] - score[~truth]
    return float((above > 0).mean() + (above == 0).mean() / 2)


def _counts(codes: Codes, positive: Positive) -> Int[np.ndarray, "K C 2"]:
    """How many negative and positive examples have each code of a node."""
    _check(positive)
    counts = np.zeros((codes.shape[1], codes.max() + 1, 2), int)
    np.add.at(counts, (np.arange(codes.shape[1]), codes, positive[:, None].astype(int)), 1)
    return counts


def _check(positive: Positive) -> None:
    if positive.all() or not positive.any():
        raise ValueError(f"circuits: {positive.sum()} of {len(positive)} examples are positive; both kinds are needed")
