"""The pictures of the front page as SVG, without fonts or scripts, for light and dark pages.

    python -m experiments.pages.results        writes them, with the pages

`layer` draws the SeqBoat layer, `tradeoff` test accuracy against the activation rate of every arm of a result, `badge`
a label with a value. All are functions of their arguments alone: the same input gives the same bytes.
"""

import json
import re
import tomllib
from collections.abc import Iterable
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from experiments.common.errors import UserError

# Results with pictures, files of `experiments.pages.curves` in docs/_data/results.
PICTURED = {"tradeoff": "router_seeds.json", "recall": "mqar.json"}

COLORS = (
    "#8b95a1",
    "#d55e00",
    "#e69f00",
    "#cc79a7",
    "#56b4e9",
    "#0072b2",
    "#009e73",
    "#a3b18a",
    "#6a4c93",
    "#c1121f",
    "#7f5539",
    "#3a5a40",
)
STYLE = """
  .card { fill: #ffffff; stroke: #d0d7de } .text { fill: #1f2328 } .quiet { fill: #59636e } .grid { stroke: #d0d7de }
  .box { fill: #eef1f4; stroke: #8b95a1 } .on { fill: #f4a340; stroke: #b3671a }
  .band { fill: #dbe9f8; stroke: #5a8fc7 }
  .line { stroke: #8b95a1; fill: none } .hot { stroke: #d9822b; fill: none; stroke-width: 1.8 }
  @media (prefers-color-scheme: dark) {
    .card { fill: #161b22; stroke: #30363d } .text { fill: #e6edf3 } .quiet { fill: #9aa4af } .grid { stroke: #30363d }
    .box { fill: #262c36; stroke: #6b7683 } .on { fill: #e08a2c; stroke: #f4b266 }
    .band { fill: #1d3550; stroke: #5a8fc7 }
  }
"""


class Arm(NamedTuple):
    """One arm of a study: of each seed the activation rate, mean of layers, and the test accuracy; their summary."""

    label: str
    points: list[tuple[float, float]]
    mean: float
    standard_error: float

    @property
    def rate(self) -> float:
        return fmean(rate for rate, _ in self.points)


def pictures(docs: Path) -> dict[str, str]:
    """Every picture of docs/assets by its name. Raises UserError for a result that is not one."""
    root = docs.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    (jax,) = re.findall(r"^jax([<>=]\S+)$", (root / "requirements.txt").read_text(), re.MULTILINE)
    return {
        "layer.svg": layer(),
        **{f"{name}.svg": tradeoff(arms(docs / "_data/results" / file)) for name, file in PICTURED.items()},
        "badge_python.svg": badge("python", project["requires-python"]),
        "badge_jax.svg": badge("jax", jax.replace(",", ", ")),
        "badge_licence.svg": badge("licence", project["license"]),
    }


def arms(path: Path) -> list[Arm]:
    """The arms of a file of `experiments.pages.curves` that was run with several seeds."""
    try:
        return [_arm(label, run) for label, run in json.loads(path.read_text()).items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a file of experiments.pages.curves with seeds: {error!r}") from error


def _arm(label: str, run: dict[str, Any]) -> Arm:
    accuracy = run["metrics"]["accuracy"]
    rates = [fmean(layers) if layers else 0.0 for layers in run["activation_rate"]]
    seeds = zip(rates, accuracy["values"], strict=True)
    points = [(rate, value) for rate, value in seeds if value is not None]  # None: the run failed
    return Arm(label.replace("_", " "), points, accuracy["mean"], accuracy["standard_error"])


def tradeoff(arms: list[Arm]) -> str:
    """A small dot for every seed, a large one for the mean of an arm, and the numbers below."""
    left, right, top, bottom = 58, 500, 26, 290
    floor = int(min(y for arm in arms for _, y in arm.points) * 5) / 5
    x = lambda rate: left + (right - left) * rate
    y = lambda accuracy: bottom - (bottom - top) * (accuracy - floor) / (1 - floor)
    body = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        body += [_line(x(tick), top, x(tick), bottom, "grid"), _text(x(tick), bottom + 18, f"{tick:g}", "middle")]
    for tick in [floor + (1 - floor) * part / 4 for part in range(5)]:
        body += [_line(left, y(tick), right, y(tick), "grid"), _text(left - 8, y(tick) + 4, f"{tick:.2f}", "end")]
    body += [_text(left, 17, "test accuracy"), _text(right, bottom + 38, "share of tokens that run attention", "end")]
    body += [
        _text(404, bottom + 64, "accuracy ± s.e.", "end", "quiet"),
        _text(right, bottom + 64, "rate", "end", "quiet"),
    ]
    for number, arm in enumerate(arms):
        color, row = COLORS[number % len(COLORS)], bottom + 88 + 22 * number
        body += [_dot(x(rate), y(accuracy), 3.5, color, 0.55) for rate, accuracy in arm.points]
        body += [_dot(x(arm.rate), y(arm.mean), 7, color), _dot(24, row - 5, 6, color)]
        body += [_text(38, row, arm.label, size=14), _text(right, row, f"{arm.rate:.2f}", "end", size=14)]
        body += [_text(404, row, f"{arm.mean:.3f} ± {arm.standard_error:.3f}", "end", size=14)]
    return _document(520, bottom + 84 + 22 * len(arms), "Accuracy against activation rate", body)


# The tokens of the drawing: their number, and which are active.
TOKENS, ACTIVE = 12, (1, 4, 5, 8, 10)
WIDTH, STEP, SIDE = 520, 38, 26


def layer() -> str:
    """The layer from top to bottom: SSM on every token, router, attention on the packed active tokens, gate, sum."""
    columns = [64 + STEP * token for token in range(TOKENS)]
    packed = [columns[0] + 115 + STEP * slot for slot in range(len(ACTIVE))]
    body = [*_row(columns, 34, ()), _text(10, 52, "x", size=16)]
    body += [_line(column, 60, column, 78, "line") for column in columns]
    body += [_band(40, 78, 466, 34, "SSM over every token, linear in the length")]
    body += [_line(column, 112, column, 130, "line") for column in columns]
    body += [*_row(columns, 130, ACTIVE), _text(10, 148, "m", size=16)]
    body += [_text(44, 232, "a router picks", kind="quiet"), _text(44, 249, "the active tokens", kind="quiet")]
    body += [_curve(columns[token], 156, slot, 222) for token, slot in zip(ACTIVE, packed, strict=True)]
    body += [
        *_row(packed, 222, range(len(ACTIVE))),
        _text(packed[-1] + 24, 240, "packed, none dropped", "start", "quiet"),
    ]
    body += [_arc(packed[slot], packed[slot - back], 248) for slot in range(5) for back in (1, 2) if slot >= back]
    body += [_band(packed[0] - 26, 284, 5 * STEP + 14, 34, "attention, exact window")]
    body += [_text(packed[-1] + 36, 306, "gate: × confidence", "start", "quiet")]
    body += [_curve(slot, 318, columns[token], 384) for token, slot in zip(ACTIVE, packed, strict=True)]
    body += [*_row(columns, 384, ACTIVE, "0"), _text(10, 402, "h", size=16)]
    body += [_line(column, 410, column, 428, "line") for column in columns]
    body += [_band(40, 428, 466, 34, "y = silu(x + m W + h)"), *_row(columns, 480, ())]
    body += [_line(column, 462, column, 480, "line") for column in columns]
    body += [_text(10, 498, "y", size=16), '<path class="line" d="M51 143H33V445H40" stroke-dasharray="4 3"/>']
    return _document(WIDTH, 524, "The SeqBoat layer", body)


def badge(label: str, value: str) -> str:
    """Two words side by side, as the field's badges are, in a file of their own."""
    left, right = (10 + round(6.6 * len(word)) for word in (label, value))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img" '
        f'aria-label="{escape(label)}: {escape(value)}"><title>{escape(label)}: {escape(value)}</title>'
        f'<rect width="{left + right}" height="20" rx="3" fill="#444c56"/>'
        f'<path d="M{left} 0h{right - 3}a3 3 0 0 1 3 3v14a3 3 0 0 1-3 3h-{right - 3}z" fill="#1a6fb5"/>'
        '<g fill="#fff" font-family="Verdana, DejaVu Sans, sans-serif" font-size="11" text-anchor="middle">'
        f'<text x="{left / 2:g}" y="14">{escape(label)}</text><text x="{left + right / 2:g}" y="14">{escape(value)}'
        "</text></g></svg>\n"
    )


def _row(columns: Iterable[float], top: float, active: Iterable[int], inactive: str = "") -> list[str]:
    """A row of tokens, the active ones filled, the others with a word."""
    boxes = []
    for token, column in enumerate(columns):
        kind, word = ("on", "") if token in active else ("box", inactive)
        boxes.append(
            f'<rect class="{kind}" x="{column - SIDE / 2:g}" y="{top}" width="{SIDE}" height="{SIDE}" rx="5"/>'
        )
        boxes += [_text(column, top + 18, word, "middle", "quiet")] * bool(word)
    return boxes


def _band(left: float, top: float, width: float, height: float, words: str) -> str:
    rect = f'<rect class="band" x="{left:g}" y="{top}" width="{width:g}" height="{height}" rx="8"/>'
    return rect + _text(left + width / 2, top + 22, words, "middle")


def _curve(x0: float, y0: float, x1: float, y1: float) -> str:
    middle = (y0 + y1) / 2
    return f'<path class="hot" d="M{x0:g} {y0:g}C{x0:g} {middle:g} {x1:g} {middle:g} {x1:g} {y1:g}"/>'


def _arc(x0: float, x1: float, y: float) -> str:
    """From a packed row to an earlier one that it attends to."""
    return f'<path class="hot" d="M{x0:g} {y}C{x0:g} {y + 30} {x1:g} {y + 30} {x1:g} {y}"/>'


def _line(x0: float, y0: float, x1: float, y1: float, kind: str) -> str:
    return f'<path class="{kind}" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"/>'


def _dot(x: float, y: float, radius: float, color: str, opacity: float = 1) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{color}" fill-opacity="{opacity}"/>'


def _text(x: float, y: float, words: str, anchor: str = "start", kind: str = "text", size: int = 13) -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(words)}</text>'
    )


def _document(width: int, height: int, title: str, body: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
    head += f'role="img" aria-label="{title}" font-family="Helvetica, Arial, DejaVu Sans, sans-serif">'
    card = f'<rect class="card" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="10"/>'
    return "\n".join([head, f"<title>{title}</title>", f"<style>{STYLE}</style>", card, *body, "</svg>\n"])
