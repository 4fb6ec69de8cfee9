"""A field's choices are those of its annotation."""

import dataclasses
import re
from typing import Literal

import pytest

from seqboat.choices import check_choices, choices

Colour = Literal["red", "green"]


@dataclasses.dataclass(frozen=True)
class Painted:
    colour: Colour = "red"
    size: Literal[1, 2] = 1
    width: int | None = None
    name: str = "x"
    mixed: Colour | int = 3


def test_literals_are_choices():
    assert choices(Painted) == {"colour": ("red", "green"), "size": (1, 2)}
    check_choices(Painted(width=5, name="blue", size=2))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("colour", "blue", "colour='blue': must be one of red, green"),
        ("colour", None, "colour=None: must be one of red, green"),
        ("size", 3, "size=3: must be one of 1, 2"),
        ("size", [1], "size=[1]: must be one of 1, 2"),
    ],
)
def test_another_value_is_refused(field, value, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_choices(dataclasses.replace(Painted(), **{field: value}))
