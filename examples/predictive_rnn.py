"""PV-RNN (Ahmadi and Tani 2019, arXiv 1811.01339): a recurrent network with random states that reads no input. It finds
a code for a sequence, whether it was trained on it or not, by the error of its own prediction.

    python -m examples.predictive_rnn [--seeds=5] [--out=FILE]

State d and random state z of every step, with time constants tau of 1 (half of d) and 4 (the other half):

    h_t = (1 - 1 / tau) h_{t-1} + (W d_{t-1} + V z_t + b) / tau,    d_t = tanh h_t,    x_t = O d_t + o
    prior        z_t ~ N(tanh(P d_{t-1} + p), exp(Q d_{t-1} + q)^2),  and N(0, 1) for t = 1
    posterior    z_t ~ N(tanh a_t^mu, exp(a_t^sigma)^2),  with free numbers a for each sequence and step
    loss         mean over sequences of  sum_t |x_t - data_t|^2 / F + w sum_t KL(posterior | prior) / Z

w is the meta-prior. Error regression: `regress` fits a to a window of a new sequence, with the network fixed; after the
window the prior generates. Where this differs: b is trained (the public reimplementation h-idei/pvrnn_sa draws it
once), there is one layer, and KL at t = 1 has the same weight as the others. The posterior is a alone, as in that code.

The data are three points of the plane in the order of a probabilistic automaton: A to B; B to C (0.7) or A (0.3); C to
A. For four w, from every seed:

    sigma        mean standard deviation of the posterior, over the training sequences
    ngrams       KL divergence in nats from the automaton's 3-grams to those that the prior generates
    window       squared error per number in a window of 12 points of new sequences
    next         the same of the next point: after error regression, and by the prior alone
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from examples import _fit

POINTS = np.array([[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]], np.float32)
CHAIN = np.array([[0.0, 1.0, 0.0], [0.3, 0.0, 0.7], [1.0, 0.0, 0.0]])
META_PRIORS = (1e-4, 2e-3, 5e-2, 1.0)
HIDDEN, Z, FAST, SLOW = 24, 2, 1.0, 4.0
SEQUENCES, LENGTH, RATE = 32, 32, 1e-2
WINDOW, REGRESSION_STEPS, REGRESSION_RATE = 12, 200, 0.1
GENERATED = (256, 40)  # sequences, and their length; of each the first 10 points are left out
BURN_IN = 10

Params = dict[str, Array]
Gaussian = tuple[Array, Array]  # mean, logarithm of the standard deviation


def initialize(key: Array, hidden: int = HIDDEN, z: int = Z, features: int = 2) -> Params:
    keys = iter(jax.random.split(key, 4))
    draw = lambda rows, columns: jax.random.normal(next(keys), (rows, columns)) / max(rows, 1) ** 0.5
    return {
        "W": draw(hidden, hidden),
        "V": draw(z, hidden),
        "b": jnp.zeros(hidden),
        "prior": draw(hidden, 2 * z),
        "prior_bias": jnp.zeros(2 * z),
        "out": draw(hidden, features),
        "out_bias": jnp.zeros(features),
    }


def gaussian(a: Float[Array, "*B 2*Z"]) -> Gaussian:
    """N(tanh a^mu, exp(a^sigma)^2) of the two halves of a."""
    mean, log_std = jnp.split(a, 2, -1)
    return jnp.tanh(mean), log_std


def kl(q: Gaussian, p: Gaussian) -> Float[Array, "*B"]:
    """KL(q | p) of normal distributions: the sum over the last axis of
    log(s_p / s_q) + (s_q^2 + (m_q - m_p)^2) / (2 s_p^2) - 1/2."""
    (q_mean, q_log), (p_mean, p_log) = q, p
    ratio = jnp.exp(2 * (q_log - p_log)) + jnp.square(q_mean - p_mean) * jnp.exp(-2 * p_log)
    return jnp.sum(p_log - q_log + ratio / 2 - 0.5, -1)


def rollout(
    params: Params, a: Float[Array, "S A"] | None, key: Array, length: int
) -> tuple[Float[Array, "T F"], Float[Array, "T"]]:
    """One sequence x (T, F), T = `length`, and KL / Z of every step. z is drawn from the posterior of a in the first S
    steps, and from the prior in the others, where the KL divergence is 0; without a, from the prior throughout."""
    hidden, size = params["b"].shape[0], params["V"].shape[0]
    known = 0 if a is None else a.shape[0]
    codes = jnp.zeros((length, 2 * size)) if a is None else jnp.pad(a, ((0, length - known), (0, 0)))
    tau = jnp.where(jnp.arange(hidden) < hidden // 2, FAST, SLOW)
    noise = jax.random.normal(key, (length, size))

    def step(h: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        t, code, noise = inputs
        d = jnp.tanh(h)
        prior = gaussian(jnp.where(t > 0, d @ params["prior"] + params["prior_bias"], 0.0))
        posterior = tuple(jnp.where(t < known, *pair) for pair in zip(gaussian(code), prior, strict=True))
        z = posterior[0] + jnp.exp(posterior[1]) * noise
        h = (1 - 1 / tau) * h + (d @ params["W"] + z @ params["V"] + params["b"]) / tau
        return h, (h, kl(posterior, prior) / max(size, 1))

    _, (h, divergence) = jax.lax.scan(step, jnp.zeros(hidden), (jnp.arange(length), codes, noise))
    return jnp.tanh(h) @ params["out"] + params["out_bias"][None], divergence


def loss(params: Params, a: Float[Array, "N S A"], data: Float[Array, "N S F"], key: Array, w: Any) -> Array:
    """The mean loss of N sequences, with one draw of z."""
    keys = jax.random.split(key, len(data))
    x, divergence = jax.vmap(lambda a, key: rollout(params, a, key, data.shape[1]))(a, keys)
    return (jnp.square(x - data).mean(-1) + w * divergence).sum(1).mean()


def train(params: Params, data: Float[Array, "N S F"], key: Array, w: Any, steps: int) -> tuple[Params, Array]:
    """The network and the codes a of its training sequences."""
    codes = jnp.zeros((*data.shape[:2], 2 * params["V"].shape[0]))
    objective = lambda both, key: loss(*both, data, key, w)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(RATE))
    return _fit.fit(objective, (params, codes), functools.partial(jax.random.fold_in, key), optimizer, steps)[0]


def regress(params: Params, data: Float[Array, "N S F"], key: Array, w: Any, steps: int) -> Float[Array, "N S A"]:
    """Error regression: codes for windows of new sequences. The network is fixed."""
    codes = jnp.zeros((*data.shape[:2], 2 * params["V"].shape[0]))
    objective = lambda a, key: loss(params, a, data, key, w)
    batch = functools.partial(jax.random.fold_in, key)
    return _fit.fit(objective, codes, batch, optax.adam(REGRESSION_RATE), steps)[0]


def symbols(draw: np.random.Generator, count: int, length: int) -> Int[np.ndarray, "N T"]:
    """Sequences of the automaton, which start anywhere in it."""
    drawn = [draw.choice(3, size=count, p=stationary())]
    for _ in range(length - 1):
        drawn.append((draw.random((count, 1)) > CHAIN.cumsum(1)[drawn[-1]]).sum(1))
    return np.stack(drawn, 1)


def stationary() -> Float[np.ndarray, "3"]:
    return np.linalg.matrix_power(CHAIN, 1000)[0]


def trigrams() -> Float[np.ndarray, "27"]:
    """Their probabilities under the automaton."""
    return np.einsum("a,ab,bc->abc", stationary(), CHAIN, CHAIN).reshape(-1)


def ngram_divergence(x: Float[Array, "N T 2"]) -> Float[Array, ""]:
    """KL(automaton | generated) of 3-grams of nearest points; half a count is added to each of the 27."""
    near = jnp.square(x[:, :, None] - POINTS[None, None]).sum(-1).argmin(-1)
    found = near[:, :-2] * 9 + near[:, 1:-1] * 3 + near[:, 2:]
    counts = jnp.bincount(found.reshape(-1), length=27) + 0.5
    true = trigrams()
    return jnp.where(true > 0, true * (jnp.log(jnp.maximum(true, 1e-9)) - jnp.log(counts / counts.sum())), 0).sum()


def measure(params: Params, data: Array, new: Array, seed: Array, w: Array, steps: int) -> dict[str, Array]:
    """One network: trained, generating, and with the codes of new windows."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params, codes = train(params, data, keys[0], w, steps)
    free = jax.vmap(lambda key: rollout(params, None, key, GENERATED[1]))
    x, _ = free(jax.random.split(keys[1], GENERATED[0]))
    window = new[:, :WINDOW]
    found = regress(params, window, keys[2], w, min(steps, REGRESSION_STEPS))
    draws = jax.random.split(keys[3], len(new))
    regressed, _ = jax.vmap(lambda a, key: rollout(params, a, key, WINDOW + 1))(found, draws)
    alone, _ = jax.vmap(lambda key: rollout(params, None, key, WINDOW + 1))(draws)
    error = lambda x, part: jnp.square((x - new)[:, part]).mean()
    return {
        "sigma": jnp.exp(gaussian(codes)[1]).mean(),
        "ngrams": ngram_divergence(x[:, BURN_IN:]),
        "window": error(regressed, slice(WINDOW)),
        "next": error(regressed, slice(WINDOW, None)),
        "window_prior": error(alone, slice(WINDOW)),
        "next_prior": error(alone, slice(WINDOW, None)),
    }


def run(seeds: range, steps: int) -> dict[str, Any]:
    draws = [np.random.default_rng(seed) for seed in seeds]
    data = jnp.asarray(np.stack([POINTS[symbols(draw, SEQUENCES, LENGTH)] for draw in draws]))
    new = jnp.asarray(np.stack([POINTS[symbols(draw, SEQUENCES, WINDOW + 1)] for draw in draws]))
    params = jax.vmap(lambda seed: initialize(jax.random.key(seed)))(jnp.asarray(seeds))
    of_seed = lambda w, *given: measure(*given, w, steps)
    every = jax.vmap(jax.vmap(of_seed, (None, 0, 0, 0, 0)), (0, None, None, None, None))
    found = jax.jit(every)(jnp.asarray(META_PRIORS), params, data, new, jnp.asarray(seeds))
    rows: dict[str, Any] = {}
    for index, w in enumerate(META_PRIORS):
        row = {name: values[index] for name, values in found.items()}
        prior = {name: row.pop(f"{name}_prior") for name in ("window", "next")}
        rows |= {f"w_{w:g}": row, f"w_{w:g}_prior_alone": prior}
    return rows


if __name__ == "__main__":
    _fit.main(run, steps=1500)
