"""The pictures of a report: matplotlib figures as data URIs, in one style."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from experiments.reports.history import History
from experiments.reports.measure import Margin, Measured, Span

PALETTE = ("#2a6f97", "#d9772b", "#3f8f5b", "#8a5aa8", "#b23a48", "#5f6b76")
INK, FAINT = "#333b42", "#c9cfd4"
STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.edgecolor": "#9aa3aa",
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "grid.color": "#e6e9ec",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "svg.hashsalt": "seqboat",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
SIZE = (5.2, 2.9)  # inches; a phone shows it at two thirds
BINS = 64  # of positions
SHOWN_TERMS = 12  # of a margin
MOST_LABELS = 6  # of a legend: with more series only the first and the last are named


def color(number: int, count: int) -> str:
    """The colour of a series, the same in every picture and in the page's text."""
    if count <= len(PALETTE):
        return PALETTE[number]
    return matplotlib.colors.to_hex(plt.get_cmap("viridis")(0.9 * number / (count - 1)))


def rates_over_training(history: History) -> str:
    return _curves(history, "activation_rate", "activation rate", top=1.02, bottom=-0.02)


def temperature_over_training(history: History) -> str:
    return _curves(history, "temperature", "temperature τ", bottom=0)


def learning(history: History, metric: str, label: str) -> str:
    """A metric in training, every logged mean, and in validation."""
    with plt.style.context(STYLE):
        figure, axis = _axis()
        for kind, style in (("train", {"color": FAINT}), ("evaluation", {"color": PALETTE[0], "marker": "o", "ms": 3})):
            steps, values = history.curve(kind, metric)
            if len(steps):
                axis.plot(steps, values[:, 0], label={"evaluation": "validation"}.get(kind, "training"), **style)
        axis.set(xlabel="step", ylabel=label)
        axis.legend()
        return _uri(figure)


def rates_over_position(measured: Measured) -> str:
    """Activation rate by position, in bins; grey: the share of sequences that reach it."""
    length = max(int(measured.valid.sum(1).max()), 1)
    edges = np.unique(np.linspace(0, length, min(BINS, length) + 1).round().astype(int))
    add = lambda a: np.add.reduceat(a[..., :length].sum(-2), edges[:-1], axis=-1)
    total, active = add(measured.valid), add(measured.active)
    with plt.style.context(STYLE):
        figure, axis = _axis()
        there = total / np.diff(edges) / len(measured.valid)
        if there.min() < 1:
            axis.stairs(there, edges, fill=True, color="#eef0f2")
        count = len(measured.names)
        for number, name in enumerate(measured.names):
            rate = np.where(total, active[number] / np.maximum(total, 1), np.nan)
            axis.stairs(rate, edges, baseline=None, color=color(number, count), linewidth=1.4, label=name)
        axis.set(xlabel="position", ylabel="activation rate", ylim=(-0.02, 1.02), xlim=(0, length))
        _legend(axis, measured.names)
        return _uri(figure)


def confidence(measured: Measured) -> str:
    """Histograms of the confidence in the decision taken, for active and inactive tokens."""
    edges = np.linspace(0.5, 1, 41)
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=SIZE, constrained_layout=True, sharey=True)
        for axis, title, chosen in zip(
            axes, ("active", "inactive"), (measured.active, ~measured.active & measured.valid[None]), strict=True
        ):
            for number, name in enumerate(measured.names):
                counts, _ = np.histogram(measured.confidence[number][chosen[number]], edges)
                share = counts / max(measured.valid.sum(), 1)
                axis.stairs(share, edges, color=color(number, len(measured.names)), linewidth=1.4, label=name)
            axis.set(title=f"{title} tokens", xlabel="confidence")
        axes[0].set(ylabel="share of all tokens")
        _legend(axes[1], measured.names)
        return _uri(figure)


def spans(found: dict[str, Span], names: Sequence[str]) -> str:
    """Two rows per series, what it may read and what it attends to: the middle 80 %, median, mean and maximum."""
    rows = [(name, kind) for name in found for kind in ("may read", "attends")]
    height = 0.9 + 0.34 * len(rows)
    with plt.style.context(STYLE):
        figure, axis = plt.subplots(figsize=(SIZE[0], height), constrained_layout=True)
        least, most = 1e9, 1.0
        for place, (name, kind) in enumerate(rows):
            values = summary(found[name], kind)
            if values is None:
                continue
            mean, low, median, high, top = (max(value, 0) for value in values)
            least, most = min(least, low if low >= 1 else 0), max(most, top)
            shade = color(list(names).index(name), len(names))
            style: dict[str, Any] = {"color": shade, "alpha": 1 if kind == "attends" else 0.45}
            axis.plot([low, high], [place, place], linewidth=7, solid_capstyle="butt", **style)
            axis.plot([high, top], [place, place], linewidth=1, **style)
            axis.plot([median], [place], "|", color="white", markersize=8, markeredgewidth=2)
            axis.plot([mean], [place], "o", color=INK, markersize=4)
            axis.plot([top], [place], "|", color=shade, markersize=8)
        axis.set_yticks(range(len(rows)), [f"{name} {kind}" for name, kind in rows])
        axis.set_xscale("symlog", linthresh=1, linscale=0.25)
        axis.set(xlabel="distance in positions", ylim=(len(rows) - 0.5, -0.5), xlim=(0.6 * least, 1.4 * most))
        ticks = [tick * 10**power for power in range(7) for tick in (1, 3)]
        ticks = [0, *(tick for tick in ticks if 0.6 * least <= tick <= 1.4 * most)][least > 0 :]
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(axis="y", visible=False)
        return _uri(figure)


def summary(span: Span, kind: str) -> tuple[float, ...] | None:
    """Mean, 10 %, 50 % and 90 % quantile, and maximum over activated elements; None if there are none."""
    values, weights = (span.reach, None) if kind == "may read" else (span.attended, span.weights)
    if not len(values):
        return None
    quantiles = np.quantile(values, (0.1, 0.5, 0.9), weights=weights, method="inverted_cdf")
    return (float(np.average(values, weights=weights)), *map(float, quantiles), float(values.max()))


def margin(found: Margin, names: Sequence[str]) -> str:
    """The terms of a margin: the channels, the bias, and their sum."""
    channels = [(f"channel {number}", float(value)) for number, value in enumerate(found.channels)]
    return terms(channels, [("bias", found.bias)], "channels", color(found.series, len(names)))


def terms(parts: Sequence[tuple[str, float]], ends: Sequence[tuple[str, float]], kind: str, shade: str) -> str:
    """The terms of a margin: the largest parts, all others of this kind, the `ends`, and their sum."""
    order = sorted(parts, key=lambda part: -abs(part[1]))
    shown, rest = order[:SHOWN_TERMS], order[SHOWN_TERMS:]
    others = [(f"{len(rest)} other {kind}", sum(value for _, value in rest))] if rest else []
    bars = [*shown, *others, *ends]
    with plt.style.context(STYLE):
        figure, axis = plt.subplots(figsize=(SIZE[0], 0.8 + 0.2 * (len(bars) + 1)), constrained_layout=True)
        labels = [name for name, _ in bars]
        for place, (_, value) in enumerate(bars):
            axis.barh(place, value, color=shade if value > 0 else FAINT, height=0.72)
        axis.barh(len(bars), sum(value for _, value in bars), color=INK, height=0.72)
        axis.axvline(0, color=INK, linewidth=0.8)
        axis.set_yticks(range(len(bars) + 1), [*labels, "sum = margin"], fontsize=8)
        axis.set(xlabel="contribution to the margin (above 0 the token is active)", ylim=(len(bars) + 0.6, -0.6))
        axis.grid(axis="y", visible=False)
        return _uri(figure)


def pairs(values: np.ndarray, labels: tuple[str, str], shade: str) -> str:
    """Points (N, 2), and the diagonal."""
    with plt.style.context(STYLE):
        figure, axis = _axis()
        axis.axline((0, 0), slope=1, color=FAINT, linewidth=1)
        axis.plot(*values.T, ".", color=shade, markersize=3, alpha=0.5)
        axis.set(xlabel=labels[0], ylabel=labels[1])
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        return _uri(figure)


def descending(curves: Sequence[tuple[str, np.ndarray, str, str]], label: str) -> str:
    """Values from the largest to the least over the share of all of them, for each of (name, values, colour, line)."""
    with plt.style.context(STYLE):
        figure, axis = _axis()
        for name, values, shade, line in curves:
            share = (np.arange(len(values)) + 0.5) / len(values)
            axis.plot(share, np.sort(values)[::-1], line, color=shade, label=name)
        axis.set(xlabel="share of pairs, the best first", ylabel=label, xlim=(0, 1))
        axis.set_ylim(top=1.02)
        axis.legend()
        return _uri(figure)


def picture(
    values: np.ndarray, active: np.ndarray, confidence: np.ndarray, chosen: Sequence[tuple[int, str]], count: int
) -> str:
    """A square picture beside the active pixels of each chosen series, darker where the decision is more confident."""
    side = round(len(values) ** 0.5)
    with plt.style.context({**STYLE, "axes.grid": False}):
        panels = 1 + len(chosen)
        figure, axes = plt.subplots(1, panels, figsize=(1.75 * panels, 2.0), constrained_layout=True)
        axes = np.atleast_1d(axes)
        axes[0].imshow(values.reshape(side, side), cmap="gray", interpolation="nearest")
        axes[0].set_title("input")
        for axis, (number, name) in zip(axes[1:], chosen, strict=True):
            shades = matplotlib.colors.LinearSegmentedColormap.from_list("", ["#ffffff", color(number, count)])
            strength = np.where(active[number], 0.3 + 1.4 * (confidence[number] - 0.5), 0)
            axis.imshow(strength.reshape(side, side), cmap=shades, vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(f"{name}: {active[number].mean():.0%}")
        for axis in axes:
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set_visible(True)
        return _uri(figure)


def plain(values: np.ndarray, square: bool) -> str:
    """Numbers (L, F) without marks: the rows of a square picture, a trace of one number per element, or a column of
    shades per element."""
    with plt.style.context({**STYLE, "axes.grid": False}):
        traced = values.shape[1] == 1 and not square
        figure, axis = plt.subplots(figsize=(2.6, 0.9) if traced else (1.3, 1.3), constrained_layout=True)
        if traced:
            axis.plot(values[:, 0], color=INK, linewidth=0.5)
        else:
            side = round(len(values) ** 0.5)
            shown = values.reshape(side, side) if square else values
            axis.imshow(shown, cmap="gray", interpolation="nearest", aspect="equal" if square else "auto")
        axis.set(xticks=[], yticks=[])
        return _uri(figure)


def waveform(values: np.ndarray, active: np.ndarray, chosen: Sequence[tuple[int, str]], count: int) -> str:
    """A trace, and below it where each chosen series is active."""
    length = len(values)
    with plt.style.context({**STYLE, "axes.grid": False}):
        height = 1.5 + 0.3 * len(chosen)
        figure, (top, below) = plt.subplots(
            2,
            1,
            figsize=(SIZE[0], height),
            sharex=True,
            constrained_layout=True,
            height_ratios=(1.5, 0.3 * len(chosen)),
        )
        top.plot(values, color=INK, linewidth=0.5)
        top.set(ylabel="input", xlim=(0, length))
        for place, (number, _) in enumerate(chosen):
            # Columns of the picture, so that even a single active element of a long trace is visible.
            edges = np.unique(np.linspace(0, length, min(length, 800) + 1).astype(int))
            share = np.add.reduceat(active[number].astype(float), edges[:-1]) / np.diff(edges)
            shades = matplotlib.colors.LinearSegmentedColormap.from_list("", ["#ffffff", color(number, count)])
            below.imshow(
                share[None], cmap=shades, vmin=0, vmax=1, aspect="auto", extent=(0, length, place + 0.42, place - 0.42)
            )
        below.set_yticks(
            range(len(chosen)), [f"{name}: {active[number].mean():.0%}" for number, name in chosen], fontsize=8
        )
        below.set(xlabel="position", ylim=(len(chosen) - 0.5, -0.5))
        return _uri(figure)


def _curves(history: History, name: str, label: str, **limits: float) -> str:
    steps, values = history.curve("train", name)
    with plt.style.context(STYLE):
        figure, axis = _axis()
        for number in range(values.shape[1]):
            axis.plot(steps, values[:, number], color=color(number, values.shape[1]), label=history.names[number])
        axis.set(xlabel="step", ylabel=label)
        axis.set_ylim(**limits)
        _legend(axis, history.names)
        return _uri(figure)


def _axis() -> tuple[Any, Any]:
    return plt.subplots(figsize=SIZE, constrained_layout=True)


def _legend(axis: Any, names: Sequence[str]) -> None:
    """Names of the series: the first and the last of more than MOST_LABELS, none for a single series."""
    handles, labels = axis.get_legend_handles_labels()
    if len(names) > MOST_LABELS:
        handles, labels = [handles[0], handles[-1]], [labels[0], labels[-1]]
    if len(names) > 1:
        axis.legend(handles, labels)


def _uri(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
