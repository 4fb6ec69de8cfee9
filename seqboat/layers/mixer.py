"""The contract of a mixer: the part of a layer that carries the sequence, at constant cost per element.

A mixer is one file in `seqboat/layers/mixers`: a module, and its `Config`. Every recipe takes it by the file's name.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Bool, Float

from seqboat.choices import check_choices
from seqboat.parallel.rules import Layout

Tree = Any
# Sizes are 32-bit integers in compiled programs, as are sums of a few of them.
MAX_SIZE = 2**30


class Mixer(nn.Module):
    """x (B, L, D) -> y (B, L, D), in the dtype of x. Subclasses have a field `causal`, and define

    `initial_state(batch, row)`: the state of B streams at their start, a tree of arrays (B, ...); `row` (1, D) is an
    example of the input. Not traced by Flax: decorate it with `nn.nowrap`.
    `advance(x, valid, state) -> (y, state)`: of pieces of streams, valid elements first, and the state after each
    stream's last valid element; with state None, of complete sequences, and no state is returned.

    An element that is not valid leaves the state as it was, and y there is anything finite. Unless `causal`, a second
    set of parameters runs from the last valid element to the first, and both outputs are added. States are float32 or
    complex64 whatever the dtype of x.
    """

    def __call__(self, x: Float[Array, "B L D"], valid: Bool[Array, "B L"]) -> Float[Array, "B L D"]:
        return self.advance(x, valid, None)[0]

    def initial_state(self, batch: int, row: jax.ShapeDtypeStruct) -> Tree:
        raise NotImplementedError

    def advance(self, x: Array, valid: Array, state: Tree | None) -> tuple[Array, Tree | None]:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class MixerConfig:
    """The fields of a mixer, with defaults. Subclasses define `make`, and override what differs.

    `__post_init__` refuses choices outside a field's Literal, and a `*_size` outside 1..MAX_SIZE.
    """

    def __post_init__(self):
        check_choices(self)
        for field in dataclasses.fields(self):
            if field.name.endswith("_size"):
                check_size(field.name, getattr(self, field.name))

    @property
    def name(self) -> str:
        """The file's name, by which it is found."""
        return type(self).__module__.rpartition(".")[2]

    def make(self, causal: bool, layout: Layout, **owner: Any) -> Mixer:
        """The module; `owner` is `parent` and `name` of Flax."""
        raise NotImplementedError

    def width_refusal(self, features: int) -> str | None:
        """The reason, beginning with FIELD=VALUE, why a layer of width `features` cannot have this mixer; or None."""
        return None

    def stream_refusal(self) -> str | None:
        """The reason, beginning with FIELD=VALUE, why a causal mixer cannot be streamed; or None."""
        return None

    def split_refusal(self) -> str | None:
        """The reason, beginning with FIELD=VALUE, why sequences cannot be split over a mesh; or None."""
        return f"name={self.name!r}: config.mesh splits sequences, and this mixer cannot pass its state between devices"

    def kernel(self, params: Tree, length: int) -> tuple[Float[Array, "S K"], Float[Array, "D"]]:
        """kappa and omega of one layer's parameters, for sequences of this length, with

            y_t = sum_l kappa[:D, l] x_{t-l} + sum_l kappa[D:, l] x_{t+l} + omega x_t

        S is D, or 2D in a mixer that is not causal. Raises ValueError for another mixer.
        """
        raise ValueError(f"mixer {self.name}: its output is not a sum over earlier elements with a kernel per channel")

    def describe(self, length: int) -> str:
        """The mixer and how it is computed for sequences of this length, for the line that a run prints."""
        return self.name

    def multiplications(self, features: int, causal: bool) -> int:
        """Per element, for `experiments.plan`."""
        raise NotImplementedError


def check_size(name: str, value: int, otherwise: str = "") -> None:
    """Raise ValueError for a size or a number of lags outside 1..MAX_SIZE."""
    if value < 1:
        raise ValueError(f"{name}={value}: must be at least 1{otherwise}")
    if value > MAX_SIZE:
        raise ValueError(f"{name}={value}: must be at most {MAX_SIZE}")
