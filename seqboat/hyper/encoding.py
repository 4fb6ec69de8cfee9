"""Encodings of the hyper-input before a hypernetwork's first layer.

A hypernetwork of ReLU layers without biases is homogeneous, h(c z) = c h(z): the scale of everything it generates is
proportional to its input, and a scalar input gives only one direction. An encoding whose norm does not depend on the
input removes both problems (Gonzalez Ortiz et al. 2024, arXiv 2304.07645).

With z in [0, 1]^M the hyper-input in its range:

    none          z
    cos_sin       [cos(pi z / 2), sin(pi z / 2)]       squared norm M for every z: the encoding of MIP
    complement    [z, 1 - z]                           L1 norm M
    fourier       cos and sin of j pi z / 2 for j = 1 .. k
    l2            z / |z|
    embedding     a learned vector for each of `tasks` integers
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from seqboat.choices import check_choices

Kind = Literal["none", "cos_sin", "complement", "fourier", "l2", "embedding"]


@dataclasses.dataclass(frozen=True)
class Encoding:
    """`inputs` M hyper-inputs between `low` and `high`; of "embedding" one integer in 0..tasks-1.

    `size` is k of "fourier" or the width of "embedding". `unit_norm` divides codes by sqrt(M), or sqrt(M k) for
    "fourier", so that cos_sin and fourier have norm 1 for any number of inputs.
    """

    kind: Kind = "cos_sin"
    inputs: int = 1
    low: float = 0.0
    high: float = 1.0
    size: int = 8
    tasks: int = 0
    unit_norm: bool = False

    def __post_init__(self):
        check_choices(self)
        for field in ("inputs", "size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 1")
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"low={self.low}: must be below high={self.high}, and both must be finite")
        if self.kind == "embedding" and (self.tasks < 1 or self.inputs != 1):
            raise ValueError(
                f"kind='embedding' with inputs={self.inputs} and tasks={self.tasks}: needs 1 input and at least 1 task"
            )
        if self.kind == "l2" and self.inputs == 1:
            raise ValueError("kind='l2' with one input: normalising it leaves only its sign; use cos_sin")

    @property
    def width(self) -> int:
        """The width of a code."""
        return {
            "none": self.inputs,
            "cos_sin": 2 * self.inputs,
            "complement": 2 * self.inputs,
            "fourier": 2 * self.size * self.inputs,
            "l2": self.inputs,
            "embedding": self.size,
        }[self.kind]

    @property
    def energy(self) -> float:
        """The expected squared norm of a code for a uniform hyper-input (exact for cos_sin, fourier, l2)."""
        whole = {
            "none": self.inputs / 3,
            "cos_sin": self.inputs,
            "complement": self.inputs * 2 / 3,
            "fourier": self.inputs * self.size,
            "l2": 1.0,
            "embedding": 1.0,
        }[self.kind]
        return whole / self._divisor**2

    @property
    def _divisor(self) -> float:
        if not self.unit_norm or self.kind in ("l2", "embedding"):
            return 1.0
        return math.sqrt(self.inputs * (self.size if self.kind == "fourier" else 1))

    def check(self, condition: Any) -> None:
        """Raises ValueError for a wrong width or, outside jit where values are known, for a value out of range."""
        if condition.ndim < 1 or condition.shape[-1] != self.inputs:
            raise ValueError(f"hyper-input of shape {condition.shape}: its last axis must have {self.inputs} numbers")
        if jnp.iscomplexobj(condition):
            raise ValueError("hyper-input: complex numbers have no range; pass real and imaginary parts")
        if not isinstance(condition, jax.core.Tracer):
            low, high = self._range
            values = np.asarray(condition)
            if not np.all((values >= low) & (values <= high)):
                raise ValueError(
                    f"hyper-input {values.tolist()} is outside its range {low}..{high}: clip it, or widen the range"
                )
            if self.kind == "embedding" and np.any(values != np.round(values)):
                raise ValueError(f"hyper-input {values.tolist()}: tasks are whole numbers")

    def __call__(self, condition: Num[Array, "M"], table: Float[Array, "N S"] | None = None) -> Float[Array, "C"]:
        """The code of one hyper-input; NaN out of range or between two tasks, since a compiled program cannot raise and
        a training loop stops at NaN. `table` has the learned vectors of "embedding"."""
        low, high = self._range
        inside = (condition >= low) & (condition <= high)
        if table is not None:
            code = table[condition[0].astype(jnp.int32)]
            inside &= condition == jnp.round(condition)
        else:
            z = (condition.astype(jnp.result_type(float)) - low) / (high - low)
            code = self._code(z)
        return jnp.where(inside.all(), code / self._divisor, jnp.nan)

    @property
    def _range(self) -> tuple[float, float]:
        return (0.0, self.tasks - 1.0) if self.kind == "embedding" else (self.low, self.high)

    def _code(self, z: Float[Array, "M"]) -> Float[Array, "C"]:
        if self.kind == "none":
            return z
        if self.kind == "complement":
            return jnp.concatenate([z, 1 - z])
        if self.kind == "l2":
            return z / jnp.maximum(jnp.linalg.norm(z), jnp.finfo(z.dtype).tiny)
        frequencies = np.arange(1, 1 + (self.size if self.kind == "fourier" else 1))
        angle = (math.pi / 2 * z[:, None] * frequencies[None]).reshape(-1)
        return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)])
