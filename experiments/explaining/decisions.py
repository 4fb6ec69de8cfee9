"""One decision taken apart twice: by the features of a dictionary, and by the elements that the mixer read."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from experiments.common.errors import UserError
from experiments.explaining.dictionaries import Given
from experiments.training.restore import Run
from seqboat.interp import attribution


class Decision(NamedTuple):
    """The `margin` of element `position` of the first sequence, as the model computed it, and two sums:

        features (F,) + constant + error          sources (L,) + source_constant

    without a kernel `sources` is empty and `missing` says why.
    """

    position: int
    margin: float
    features: Float[np.ndarray, " F"]
    constant: float
    error: float
    sources: Float[np.ndarray, " L"]
    source_constant: float
    missing: str

    def values(self) -> dict[str, Any]:
        """What why.json has of it: both sums, and their terms, of features those that fire."""
        fires = np.flatnonzero(self.features)
        by_source = {"sum": self.sources.sum() + self.source_constant, "constant": self.source_constant}
        return {
            "position": self.position,
            "margin": self.margin,
            "by_feature": {
                "sum": float(self.features.sum() + self.constant + self.error),
                "features": {str(number): float(self.features[number]) for number in fires.tolist()},
                "constant": self.constant,
                "error": self.error,
            },
            "by_source": None if self.missing else {**by_source, "sources": self.sources.tolist()},
            "missing": self.missing or None,
        }


def take_apart(run: Run, given: Given, look: Any, length: int, element: int | None) -> Decision:
    """The decision of an element of the first sequence, by default that of the largest margin, from its layer on the
    first batch (`measure.Look`). Raises UserError for an element beyond the `length`."""
    if element is not None and not 0 <= element < length:
        raise UserError(f"--element={element}: the first example has {length} elements, the first of them is 0")
    margin = look.margin[0, :length]
    position = int(margin.argmax()) if element is None else element
    terms = attribution.margin_by_feature(given.atoms, given.router, jnp.asarray(look.m[0, position]))
    sources, missing = _sources(run, given, look.mixed, length, position)
    return Decision(
        position,
        float(margin[position]),
        np.asarray(terms.features, np.float64),
        float(terms.constant),
        float(terms.error),
        sources,
        float(given.router.constant),
        missing,
    )


def _sources(run: Run, given: Given, mixed: Any, length: int, position: int) -> tuple[np.ndarray, str]:
    """The terms of the source elements, or none and the reason."""
    layer = run.model.config.encoder.layer
    if not hasattr(layer, "mixer") or set(mixed) != {"ssm_out", "pre_norm"}:
        return np.zeros(0), f"a {layer.block().__name__} has no mixer between its input and m"
    own = run.variables["params"]["encoder"]["layers"]["ssm"]
    try:
        kernel, direct = layer.mixer.kernel(jax.tree.map(lambda leaf: leaf[given.layer - 1], own), length)
    except ValueError as error:
        return np.zeros(0), str(error)
    ssm_out, pre_norm = (jnp.asarray(mixed[name][:length]) for name in ("ssm_out", "pre_norm"))
    found = attribution.margin_by_source(kernel, direct, given.router.weight, ssm_out, pre_norm, position)
    return np.asarray(found, np.float64), ""
