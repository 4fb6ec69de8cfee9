"""The contract of a head: what a model does with the features of a sequence, or of each of its elements.

A head is one file in `seqboat/models/heads`: a module, and its `Config`. Every classifier and language model takes it
by the file's name: `config.model.head = {"name": NAME, field: value}`.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
from jaxtyping import Array, Float

from seqboat.choices import check_choices


class Head(nn.Module):
    """x (..., D) -> logits (..., Y) in float32, of every row alone; `train` turns dropout and terms on.

    It may state terms of the loss (`layers.terms.term`), name values (`layers.taps.tap`) and keep statistics in the
    collection "batch_stats". In a language model, rows of padding hold anything finite. A head whose config says
    `reads_inputs` takes `inputs` (B, L, ...) and `valid` (B, L) of a classifier's sequences too, and does without.
    """

    def __call__(self, x: Float[Array, "*N D"], train: bool = False) -> Float[Array, "*N Y"]:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """The fields of a head, with defaults; `given()` ones (`seqboat.choices`) are those of the task's config, such as
    `vocabulary_size`. Subclasses define `make`; `__post_init__` refuses choices outside a field's Literal."""

    reads_inputs: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The file's name, by which it is found."""
        return type(self).__module__.rpartition(".")[2]

    def __post_init__(self):
        check_choices(self)

    def make(self, features: int, outputs: int, **owner: Any) -> Head:
        """The module from D = `features` to Y = `outputs`, the classes or the vocabulary; `owner` is `parent` and
        `name` of Flax."""
        raise NotImplementedError


def check_head(head: Any, *names: str) -> None:
    """Raise ValueError for a model's field `head` that is neither one of its names nor the config of a head."""
    if not isinstance(head, HeadConfig) and head not in names:
        raise ValueError(f"head={head!r}: must be one of {', '.join(names)}, or the group of a head")
