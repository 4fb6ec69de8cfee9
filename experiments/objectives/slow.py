"""The slow loss of HyperZZW (arXiv 2401.17948): kernels of different layers that are near one another.

    loss + weight * mean over pairs of layers of |k_i - k_j|^2 / (lags * channels)

between the kernels that the layers' slow networks make (`seqboat.layers.mixers.hyperzzw`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from experiments.common.errors import UserError
from experiments.training.experiment import Experiment
from experiments.training.step import Batch
from seqboat.layers.mixers import hyperzzw

Tree = Any
WHERE = "config.objectives.slow"


@dataclasses.dataclass(frozen=True)
class Config:
    """`weight` of the mean squared distance."""

    weight: float = 1.0

    def __post_init__(self):
        if not self.weight >= 0:
            raise ValueError(f"weight={self.weight}: must not be negative")


class Objective:
    """See `experiments.training.objectives`. Nothing of it is frozen or remembered."""

    taps = False

    def __init__(self, config: Config, experiment: Experiment, remembered: None):
        self.config = config
        self.mixer = _mixer(experiment)
        self.lags = min(self.mixer.kernel_size, experiment.functions.example["inputs"].shape[1])

    def remember(self) -> None:
        return None

    def abstract(self) -> Tree:
        return {}

    def frozen(self) -> Tree:
        return {}

    def __call__(self, frozen: Tree, params: Tree, out: Any, taps: Tree, batch: Batch, key: Array, step: Array) -> dict:
        own = hyperzzw.Params(**params["encoder"]["layers"]["ssm"])
        kernels = jax.vmap(lambda p: hyperzzw.slow_kernel(p, self.mixer, self.lags))
        if own.out.ndim > 3:  # of two directions, each compared with itself
            kernels = jax.vmap(kernels, in_axes=1)
        found = kernels(own)
        total = jax.vmap(distance)(found).mean() if found.ndim > 3 else distance(found)
        return {"kernel_distance": (self.config.weight, total, jnp.ones(()))}


def distance(kernels: Float[Array, "layers lags D"]) -> Float[Array, ""]:
    """The mean over pairs of different layers of the mean squared difference.

    By the mean over all numbers of n^2 pairs being twice the variance over layers:  2 n / (n - 1) variance.
    """
    count = len(kernels)
    return 2 * count / (count - 1) * kernels.var(0).mean()


def _mixer(experiment: Experiment) -> hyperzzw.Config:
    """The mixer of all layers. Raises UserError if it makes no kernels, or if there are no two layers."""
    encoder: Any = getattr(experiment.network.config, "encoder", None)
    mixer = getattr(encoder.layer, "mixer", None) if encoder else None
    if not isinstance(mixer, hyperzzw.Config):
        raise UserError(f"{WHERE}: the layers' kernels are those of config.model.mixer.name='hyperzzw'; take :hyperzzw")
    if encoder.layers < 2:
        raise UserError(f"config.model.layers={encoder.layers}: {WHERE} compares two layers or more")
    if experiment.config.hypernetwork is not None:
        raise UserError(f"config.hypernetwork: a model with its own parameters is expected with {WHERE}")
    return mixer
