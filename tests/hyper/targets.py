"""Modules whose parameters are generated: one of each kind, small."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqboat.layers.mixers import ema
from seqboat.layers.mixers.s4d import S4D
from seqboat.layers.seqboat import LayerConfig
from seqboat.models.classifier import Classifier, ClassifierConfig
from seqboat.models.encoder import EncoderConfig

X = jax.random.normal(jax.random.key(7), (4, 12))


class MLP(nn.Module):
    hidden: tuple[int, ...] = (16, 16)
    out: int = 5
    norm: bool = False
    batch_norm: bool = False
    use_bias: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        for index, width in enumerate(self.hidden):
            x = nn.Dense(width, use_bias=self.use_bias, name=f"dense_{index}")(x)
            if self.norm:
                x = nn.LayerNorm(name=f"norm_{index}")(x)
            if self.batch_norm:
                x = nn.BatchNorm(use_running_average=not train, name=f"batch_norm_{index}")(x)
            x = nn.relu(x)
        return nn.Dense(self.out, use_bias=self.use_bias, name="out")(x)


class Conv(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3,), name="conv_0")(x))
        return nn.Conv(4, (3,), name="conv_1")(x)


class StateSpace(nn.Module):
    @nn.compact
    def __call__(self, x, valid):
        return nn.Dense(4, name="out")(S4D(8, True, None, name="ssm")(x, valid))


class Tied(nn.Module):
    """An embedding that is also the output."""

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(11, 6, name="embedding")
        return table.attend(nn.Dense(6, name="dense")(table(tokens)))


def classifier(norm="layer", layers=2) -> Classifier:
    layer = LayerConfig(
        features=8, key_size=4, value_size=8, mixer=ema.Config(4), window_size=4, block_size=8, norm=norm
    )
    return Classifier(ClassifierConfig(EncoderConfig(layer, layers, remat="none"), classes=3, vocabulary_size=7))


TOKENS, LENGTHS = jnp.ones((2, 6), jnp.int32), jnp.full(2, 6)
# name -> (module, what it is called with, which leaves count layers first)
TARGETS = {
    "mlp": (MLP(norm=True), (X,), ()),
    "conv": (Conv(), (jnp.ones((2, 9, 3)),), ()),
    "lstm": (nn.RNN(nn.OptimizedLSTMCell(8)), (jnp.ones((2, 5, 3)),), ()),
    "s4d": (StateSpace(), (jnp.ones((2, 9, 6)), jnp.ones((2, 9), bool)), ()),
    "seqboat": (classifier(), (TOKENS, LENGTHS), "encoder/layers/**"),
}
