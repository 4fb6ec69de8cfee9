"""Where every parameter of every recipe lies, on every preset of eight devices.

Where that was changed on purpose, `python -m tests.golden.test_sharding` writes sharding.txt anew.
"""

import difflib
from pathlib import Path

import jax
import pytest

from seqboat.parallel.mesh import mesh_sizes
from seqboat.parallel.rules import Layout, Rules
from seqboat.paths import path_name
from tests.experiments.test_build import NO_LAYERS, RECIPES, get_config, model_of, parameters

GOLDEN = Path(__file__).with_name("sharding.txt")
# With a hypernetwork, and for a dictionary, a run takes one device; models without layers are whole on every one.
OTHERS = ("configs/hyper", "configs/interp", *NO_LAYERS)
TREES = [(name, get_config(name)) for name in RECIPES if not name.startswith(OTHERS)]
TREES.append(("configs/lra/listops:s4d", lambda: get_config("configs/lra/listops")("s4d")))
PRESETS = ("ddp", "sequence", "fsdp", "fsdp_hidden", "fsdp=4,fsdp_hidden=2", "data=2,fsdp=2,fsdp_hidden=2")


def layout(preset: str) -> Layout:
    return Layout(Rules(), tuple(mesh_sizes(preset, 8).items()))


def lies(preset: str, path: str, shape: tuple[int, ...]) -> str:
    """The spec, a dimension that is whole as "-"; "refused" if one does not divide."""
    try:
        spec = layout(preset).of_parameter(path, shape)
    except ValueError as error:
        if "does not divide" not in str(error):
            raise
        return "refused"
    words = (axes if isinstance(axes, str) else "x".join(axes or "-") for axes in spec)
    return "(" + ", ".join(words) + ")"


def table(params) -> str:
    rows = [("parameter", "shape", *PRESETS)]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        shape = tuple(leaf.shape)
        rows.append((name, str(shape), *(lies(preset, name, shape) if shape else "()" for preset in PRESETS)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def blocks() -> dict[str, str]:
    """The golden table of every recipe."""
    found = [block.partition("\n") for block in GOLDEN.read_text().removeprefix("# ").split("\n# ")]
    return {name: rows.rstrip("\n") for names, _, rows in found for name in names.split(", ")}


def tables() -> str:
    """One table for all recipes whose parameters have the same names and shapes."""
    recipes: dict[str, list[str]] = {}
    for recipe, make in TREES:
        recipes.setdefault(table(parameters(model_of(make()))), []).append(recipe)
    return "\n".join(f"# {', '.join(names)}\n{rows}\n" for rows, names in recipes.items())


@pytest.mark.parametrize("recipe", ["configs/lra/listops", "configs/lm/enwik8"])
def test_where_the_parameters_of_a_recipe_lie(recipe):
    found = table(parameters(model_of(dict(TREES)[recipe]())))
    difference = difflib.unified_diff(
        blocks()[recipe].splitlines(), found.splitlines(), "golden", "found", lineterm="", n=0
    )
    assert found == blocks()[recipe], "\n".join(difference)


@pytest.mark.breadth  # test_where_the_parameters_of_a_recipe_lie
def test_where_every_parameter_lies():
    found, golden = tables(), GOLDEN.read_text()
    difference = difflib.unified_diff(golden.splitlines(), found.splitlines(), "golden", "found", lineterm="", n=0)
    assert found == golden, "\n".join(difference)


if __name__ == "__main__":
    GOLDEN.write_text(tables())
