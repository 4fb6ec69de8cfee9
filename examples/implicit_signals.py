"""DDMI (Park et al. 2024, arXiv 2401.12517): signals as functions of the coordinate, and a diffusion model of them.

    python -m examples.implicit_signals [--seeds=5] [--out=FILE]

A variational autoencoder codes 128 samples of a signal in a latent (8, 8), of eight positions and eight channels. Two
ways from a latent to a function of the coordinate u in [0, 1]:

    adaptive           the decoder makes three fields, of 16, 32 and 64 positions; an MLP that all signals share reads
                       them at u, interpolated, from coarse to fine:  h <- h + MLP([h, field(u)])
    hypernetwork_mip,  `seqboat.hyper` generates the weights of an MLP of fixed sines of u from the same latent, with
    hypernetwork       magnitude-invariant parametrizations, or without them
    constant           one function of u for all signals, the best that a field without the signal can do

Loss: mean |x - decoded| + weight KL(latent | N(0, 1)) per number, whose weight rises to 0.01 in the first half of the
steps. Where this differs from the paper: one dimension, dense layers, and no injection of the scale, since training has
one resolution. A DDPM (Ho et al. 2020, arXiv 2006.11239) then learns the latents of `adaptive`.

    error     mean |x - decoded| of new chirps at 4 times the resolution of training, from the latent's mean
    distance  root mean squared distance to the nearest of 4,096 chirps: of decoded samples of the diffusion model, of
              decoded latents from N(0, 1), and of new chirps, which is the best there is
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from examples import _fit
from seqboat import hyper

SAMPLES, FINE, BATCH, TEST, BANK = 128, 512, 32, 256, 4096
GRID = (8, 8)
FIELDS, CHANNELS, WIDTH = (16, 32, 64), 16, 52
SINES, TARGET_WIDTH, TRUNK = 12, 20, (16, 16, 16)
RATE, KL_WEIGHT, NOISES = 2e-3, 0.01, 100
LATENT = GRID[0] * GRID[1]


def chirps(key: Array, count: int, samples: int) -> Float[Array, "N U"]:
    """sin(2 pi (phase + f u + (g - f) u^2 / 2)), from frequency f to g, in the middle of each of `samples` parts."""
    first, last, phase = jax.random.uniform(key, (3, count, 1)) * jnp.array([6.0, 6.0, 1.0])[:, None, None]
    u = coordinates(samples)[None]
    return jnp.sin(2 * jnp.pi * (phase + (1 + first) * u + (last - first) * jnp.square(u) / 2))


def coordinates(samples: int) -> Float[Array, "U"]:
    return (jnp.arange(samples) + 0.5) / samples


def interpolate(field: Float[Array, "R C"], u: Float[Array, "U"]) -> Float[Array, "U C"]:
    """Linear between the middles of the R parts of [0, 1], constant beyond the outer ones."""
    size = field.shape[0]
    at = jnp.clip(u * size - 0.5, 0, size - 1)
    return jnp.maximum(0, 1 - jnp.abs(at[:, None] - jnp.arange(size)[None])) @ field


class Encoder(nn.Module):
    """A signal (U,) -> mean and logarithm of the standard deviation of its latent, each of `GRID`."""

    @nn.compact
    def __call__(self, x: Float[Array, "U"]) -> tuple[Array, Array]:
        for index in range(2):
            x = nn.gelu(nn.Dense(256, name=f"hidden_{index}")(x))
        mean, log_std = jnp.split(nn.Dense(2 * LATENT, name="out")(x), 2)
        return mean.reshape(GRID), log_std.reshape(GRID) - 2


class Adaptive(nn.Module):
    """A latent (8, 8) and coordinates (U,) -> the signal there (U,)."""

    @nn.compact
    def __call__(self, latent: Float[Array, "P C"], u: Float[Array, "U"]) -> Float[Array, "U"]:
        field, hidden = latent, 0.0
        for size in FIELDS:
            field = jnp.repeat(field, size // field.shape[0], 0)
            padded = jnp.pad(field, ((1, 1), (0, 0)), mode="edge")
            near = jnp.concatenate([padded[:-2], field, padded[2:]], 1)  # a convolution of width 3
            field = nn.gelu(nn.Dense(CHANNELS, name=f"field_{size}")(near))
            read = interpolate(field, u)
            inputs = read if size == FIELDS[0] else jnp.concatenate([hidden, read], 1)
            inner = nn.gelu(nn.Dense(WIDTH, name=f"in_{size}")(inputs))
            hidden = hidden + nn.Dense(WIDTH, name=f"out_{size}")(inner)
        return nn.Dense(1, name="out")(hidden)[:, 0]


class Sines(nn.Module):
    """The target of the hypernetworks: coordinates (U,) -> (U,), through sines of 1/2 .. SINES/2 periods."""

    @nn.compact
    def __call__(self, u: Float[Array, "U"]) -> Float[Array, "U"]:
        angle = jnp.pi * u[:, None] * jnp.arange(1, SINES + 1)[None]
        hidden = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], 1)
        for index in range(2):
            hidden = nn.gelu(nn.Dense(TARGET_WIDTH, name=f"hidden_{index}")(hidden))
        return nn.Dense(1, name="out")(hidden)[:, 0]


class Generated(nn.Module):
    """`Sines` with weights that a hypernetwork generates from the latent, whose tanh is in its range."""

    mip: bool

    @nn.compact
    def __call__(self, latent: Float[Array, "P C"], u: Float[Array, "U"]) -> Float[Array, "U"]:
        target = Sines(parent=None)
        spec = hyper.spec(target, jax.ShapeDtypeStruct((4,), jnp.float32))
        encoding = hyper.Encoding("cos_sin" if self.mip else "none", inputs=LATENT, low=-1.0, high=1.0)
        config = hyper.HyperConfig(encoding=encoding, hidden=TRUNK, residual=self.mip)
        network = hyper.HyperNetwork(spec, config, parent=None)
        return hyper.Hyper(target, network, name="hyper")(jnp.tanh(latent.reshape(-1)), u)


HYPERNETWORKS = {"hypernetwork_mip": Generated(mip=True), "hypernetwork": Generated(mip=False)}
DECODERS: dict[str, nn.Module] = {"adaptive": Adaptive(), **HYPERNETWORKS}


def decode(arm: str, params: Any, latents: Float[Array, "N P C"], samples: int) -> Float[Array, "N U"]:
    """Signals at a resolution."""
    one = lambda latent: DECODERS[arm].apply({"params": params["decoder"]}, latent, coordinates(samples))
    return jax.vmap(one)(latents)


def encode(params: Any, x: Float[Array, "N U"]) -> tuple[Array, Array]:
    return jax.vmap(lambda x: Encoder().apply({"params": params["encoder"]}, x))(x)


def kl(mean: Float[Array, "*B"], log_std: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """KL(N(mean, std^2) | N(0, 1)) of each number."""
    return (jnp.exp(2 * log_std) + jnp.square(mean) - 1) / 2 - log_std


def initialize(arm: str, key: Array) -> Any:
    keys = jax.random.split(key)
    encoder = Encoder().init(keys[1], jnp.zeros(SAMPLES))["params"]
    return {"encoder": encoder, "decoder": DECODERS[arm].init(keys[0], jnp.zeros(GRID), coordinates(4))["params"]}


def train(arm: str, key: Array, steps: int) -> Any:
    """The autoencoder of one arm, on new chirps in every step."""

    def loss(params: Any, batch: tuple[Array, Array]) -> Array:
        key, step = batch
        draw, noise = jax.random.split(key)
        x = chirps(draw, BATCH, SAMPLES)
        mean, log_std = encode(params, x)
        latents = mean + jnp.exp(log_std) * jax.random.normal(noise, mean.shape)
        weight = KL_WEIGHT * jnp.minimum(1.0, 2 * step / steps)
        return jnp.abs(decode(arm, params, latents, SAMPLES) - x).mean() + weight * kl(mean, log_std).mean()

    start, batches = jax.random.split(key)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(RATE, steps)))
    batch = lambda step: (jax.random.fold_in(batches, step), step)
    return _fit.fit(loss, initialize(arm, start), batch, optimizer, steps)[0]


class Denoiser(nn.Module):
    """A noisy latent (64,) and its noise level -> the noise in it."""

    @nn.compact
    def __call__(self, x: Float[Array, "D"], level: Float[Array, ""]) -> Float[Array, "D"]:
        angle = level * jnp.pi * jnp.arange(1, 9)
        hidden = jnp.concatenate([x, jnp.sin(angle), jnp.cos(angle)])
        for index in range(3):
            hidden = nn.gelu(nn.Dense(256, name=f"hidden_{index}")(hidden))
        return nn.Dense(x.shape[0], name="out")(hidden)


def initialize_denoiser(key: Array) -> Any:
    return Denoiser().init(key, jnp.zeros(LATENT), jnp.zeros(()))["params"]


def kept() -> Float[Array, "T"]:
    """The share of a latent's variance that is left at every noise level, prod (1 - beta); 0.0001 to 0.2 for beta."""
    return jnp.cumprod(1 - jnp.linspace(1e-4, 0.2, NOISES))


def noisy(x: Float[Array, "N D"], noise: Float[Array, "N D"], level: Any) -> Float[Array, "N D"]:
    share = kept()[level][:, None]
    return jnp.sqrt(share) * x + jnp.sqrt(1 - share) * noise


def predict(params: Any, x: Float[Array, "N D"], level: Any) -> Float[Array, "N D"]:
    return jax.vmap(lambda x, level: Denoiser().apply({"params": params}, x, level))(x, level / NOISES)


def train_denoiser(autoencoder: Any, key: Array, steps: int) -> Any:
    """Mean squared error of the predicted noise, on latents of new chirps."""

    def loss(params: Any, key: Array) -> Array:
        draw, noise, level = jax.random.split(key, 3)
        x = encode(autoencoder, chirps(draw, BATCH, SAMPLES))[0].reshape(BATCH, LATENT)
        noise, level = jax.random.normal(noise, x.shape), jax.random.randint(level, (BATCH,), 0, NOISES)
        return jnp.square(predict(params, noisy(x, noise, level), level) - noise).mean()

    start, batches = jax.random.split(key)
    batch = functools.partial(jax.random.fold_in, batches)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    return _fit.fit(loss, initialize_denoiser(start), batch, optimizer, steps)[0]


def sample(params: Any, key: Array, count: int) -> Float[Array, "N D"]:
    """Latents from noise, level by level: x <- (x - beta / sqrt(1 - kept) noise) / sqrt(1 - beta) + sqrt(beta) draw."""
    shares = kept()
    betas = 1 - shares / jnp.concatenate([jnp.ones(1), shares[:-1]])

    def step(x: Array, level: Array) -> tuple[Array, None]:
        noise = predict(params, x, jnp.full(count, level))
        x = (x - betas[level] / jnp.sqrt(1 - shares[level]) * noise) / jnp.sqrt(1 - betas[level])
        draw = jax.random.normal(jax.random.fold_in(key, level), x.shape)
        return x + jnp.where(level > 0, jnp.sqrt(betas[level]), 0.0) * draw, None

    noise = jax.random.normal(jax.random.fold_in(key, NOISES), (count, LATENT))
    return jax.lax.scan(step, noise, jnp.arange(NOISES)[::-1])[0]


def nearest(x: Float[Array, "N U"], bank: Float[Array, "M U"]) -> Float[Array, ""]:
    """The mean over signals of the root mean squared distance to the nearest of the bank."""
    return jax.lax.map(lambda x: jnp.sqrt(jnp.square(x[None] - bank).mean(1).min()), x).mean()


@functools.partial(jax.jit, static_argnums=(0, 2))
def measure(arm: str, seed: Array, steps: int) -> dict[str, dict[str, Array]]:
    """Error of one arm; with `adaptive` also that of `constant`, and all distances."""
    keys = jax.random.split(jax.random.key(seed), 7)
    params = train(arm, keys[0], steps)
    means, fine = encode(params, chirps(keys[1], TEST, SAMPLES))[0], chirps(keys[1], TEST, FINE)
    found = {arm: {"error": jnp.abs(decode(arm, params, means, FINE) - fine).mean()}}
    if arm == "adaptive":
        median = jnp.median(chirps(keys[2], BANK, FINE), axis=0, keepdims=True)
        found["constant"] = {"error": jnp.abs(median - fine).mean()}
        made = sample(train_denoiser(params, keys[3], 3 * steps), keys[4], TEST)
        latents = {"diffusion": made, "normal_latents": jax.random.normal(keys[5], made.shape)}
        signals = {name: decode(arm, params, z.reshape(TEST, *GRID), SAMPLES) for name, z in latents.items()}
        signals["new_chirps"] = chirps(keys[6], TEST, SAMPLES)
        bank = chirps(keys[2], BANK, SAMPLES)
        found |= {name: {"distance": nearest(x, bank)} for name, x in signals.items()}
    return found


def run(seeds: range, steps: int) -> dict[str, Any]:
    found = [{k: v for arm in DECODERS for k, v in measure(arm, jnp.asarray(seed), steps).items()} for seed in seeds]
    return jax.tree.map(lambda *values: [float(value) for value in values], *found)


if __name__ == "__main__":
    _fit.main(run, steps=500)
