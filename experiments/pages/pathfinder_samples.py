"""Draws a page of Pathfinder and Path-X pictures.

python -m experiments.pages.pathfinder_samples --out=docs/assets/pathfinder_samples.png
"""

from itertools import count

from absl import flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.common import cli
from experiments.data.pathfinder import DIFFICULTIES, PRESETS, Example, generate

_OUT = flags.DEFINE_string("out", "pathfinder_samples.png", "the file to write, its format by its name")


def main() -> None:
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    parts = figure.add_gridspec(1, 2, width_ratios=[len(DIFFICULTIES), 4])
    panels = figure.add_subfigure(parts[0]).subplots(2, len(DIFFICULTIES))
    for column, difficulty in enumerate(DIFFICULTIES):
        for label in (0, 1):
            _show(panels[label, column], _first(f"32_{difficulty}", label), f"32 {difficulty}")
    for label, panel in enumerate(figure.add_subfigure(parts[1]).subplots(1, 2)):
        _show(panel, _first("128_hard", label), "Path-X (128 hard)")
    figure.savefig(_OUT.value, dpi=100)
    print(f"wrote {_OUT.value}")


def _first(name: str, label: int) -> Example:
    """The first training example with this label."""
    return next(example for index in count() if (example := generate(PRESETS[name], 0, 0, index)).label == label)


def _show(panel: Axes, example: Example, title: str) -> None:
    panel.imshow(example.image, cmap="gray", interpolation="nearest")
    panel.set_title(f"{title}: {example.label}", fontsize=10)
    panel.set_axis_off()


if __name__ == "__main__":
    cli.run(main)
