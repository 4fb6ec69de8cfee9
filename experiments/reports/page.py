"""What the page of a report shows. All of its HTML and prose is in `report.html.j2`."""

import dataclasses
import functools
import importlib.resources
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from experiments.common.terminal import printable
from experiments.reports import pictures
from experiments.reports.excerpts import SHADES, around, evenly, excerpts
from experiments.reports.history import History
from experiments.reports.measure import QUERIES, Measured, sequences

TEMPLATE = "report.html.j2"
WITHOUT_ATTENTION = "config.model.activation: 'learned' -> 'never'"


@dataclasses.dataclass(frozen=True)
class Content:
    """Everything the page shows about one step of a run: measurements, training history, its evaluation if there is
    one, and the checkpoint's metadata. `at`: the hyper-input, if a hypernetwork generates the parameters; `explained`:
    whether `experiments.explain` wrote its page beside; `cases`: those of a classifier by prototypes.
    """

    workdir: Path
    split: str
    at: tuple[float, ...] | None
    step: int
    parameters: int
    task: Any
    layer: Any
    measured: Measured
    history: History
    evaluation: Mapping[str, Any] | None
    baseline: Mapping[str, float]
    meta: Mapping[str, Any]
    explained: bool
    cases: Mapping[str, Any] | None

    @property
    def task_name(self) -> str:
        task = self.meta["config"]["task"]
        return str(task.get("dataset") or {"corpus": "this text"}.get(task["name"], task["name"])).replace("_", " ")

    @property
    def metric(self) -> str:
        return _label(self.task.selection_metric)

    @property
    def decides(self) -> bool:
        """Whether a router activates tokens; without one nothing changes in training and there is no confidence."""
        return self.layer.activation == "learned" and bool(self.measured.names)


def page(content: Content) -> str:
    """The whole file. Raises whatever an evaluation with values of the wrong kind leads to: nothing checked them."""
    measured = content.measured
    return template(TEMPLATE).render(
        run=content.workdir.name,
        step=content.step,
        unfinished=unfinished(content),
        split=content.split,
        at=None if content.at is None else ", ".join(f"{z:g}" for z in content.at),
        task=content.task_name,
        metric=content.metric,
        examples=len(measured.examples),
        total=measured.total,
        activation=content.layer.activation,
        decides=content.decides,
        shades=shades(len(measured.names)),
        attention=attention(content),
        score=score(content),
        against=against(content.evaluation or {}),
        training=training(content),
        position=position(measured),
        confidence=pictures.confidence(measured) if content.decides else None,
        span=span(content),
        excerpts=excerpts(content.task, measured),
        margins=list(margins(content)),
        explained=content.explained,
        cases=content.cases,
        learning=list(learning(content)),
        facts=facts(content),
        config=[(name, repr(value)) for name, value in _leaves(content.meta["config"])],
    )


@functools.cache
def template(name: str, package: str = __package__) -> jinja2.Template:
    """A template of a package, which may import those here: it escapes every value, and fails on a name that it is not
    given."""

    def read(name: str) -> str | None:
        paths = (importlib.resources.files(folder).joinpath(name) for folder in (package, __package__))
        return next((path.read_text(encoding="utf-8") for path in paths if path.is_file()), None)

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "thousands": "{:,}".format}
    return environment.get_template(name)


def _visible(value: Any) -> str:
    """A value as text without control characters, which HTML cannot escape. Markup was made of such text already."""
    return value if isinstance(value, Markup) else printable(str(value))


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share == 0 or share >= 0.1 else f"{100 * share:.1f} %"


def shades(count: int) -> list[tuple[int, int, str]]:
    """(series, shade, colour) of marked text: more opaque for more confidence."""
    alpha = lambda shade: f"{round(255 * (0.2 + 0.5 * shade / (SHADES - 1))):02x}"
    pairs = itertools.product(range(count), range(SHADES))
    return [(series, shade, pictures.color(series, count) + alpha(shade)) for series, shade in pairs]


def unfinished(content: Content) -> dict[str, int] | None:
    """The last recorded step and the number of steps to train, if training has begun and is not finished."""
    step, steps = content.history.last_step(), content.meta["config"].get("train", {}).get("steps")
    return {"step": step, "steps": steps} if steps and 0 < step < steps else None


def attention(content: Content) -> dict[str, Any]:
    """The mean activation rate and that of each series, on the whole split if it was evaluated."""
    names, rates = content.measured.names, content.measured.rates()
    evaluated = np.ravel((content.evaluation or {}).get("activation_rate") or ())
    whole_split = bool(names) and len(evaluated) == len(names)
    rates = evaluated if whole_split else rates
    rate = {"never": 0, "always": 1}.get(content.layer.activation, rates.mean() if names else 0)
    colors = [pictures.color(number, len(names)) for number in range(len(names))]
    return {"rate": rate, "bars": list(zip(names, rates, colors, strict=True)), "whole_split": whole_split}


def score(content: Content) -> dict[str, Any]:
    """The selection metric, on the whole split if it was evaluated, and that of the baseline."""
    name, found = content.task.selection_metric, content.evaluation or {}
    value, error = content.measured.metrics[name]
    if whole_split := found.get(name) is not None:
        value, error = found[name], found.get("standard_errors", {}).get(name)
    digits = 3 if error is None or error == 0 or error >= 0.0005 else 4  # an error of 0.0004 is not 0.000
    return {
        "value": f"{value:.{digits}f}" + (f" ±\u00a0{error:.{digits}f}" if error is not None else ""),
        "whole_split": whole_split,
        "examples": found.get("examples", content.measured.total),
        "baseline": f"{content.baseline[name]:.3f}" if name in content.baseline else None,
        "baseline_name": content.task.baseline_name,
    }


def against(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    """The run that this one was compared with, if any; `without_attention`: it has attention off."""
    other = evaluation.get("against")
    if not other:
        return None
    workdir, differences = Path(str(other["workdir"])), [str(line) for line in other.get("differences", ())]
    return {
        "name": f"{workdir.parent.name}/{workdir.name}",
        "verdicts": other["verdicts"],
        "differences": differences,
        "without_attention": WITHOUT_ATTENTION in differences,
    }


def training(content: Content) -> dict[str, str] | None:
    """Activation rate and temperature over training, if there is a router and a record."""
    if not content.decides or not len(content.history.curve("train", "activation_rate")[0]):
        return None
    return {
        "rates": pictures.rates_over_training(content.history),
        "temperature": pictures.temperature_over_training(content.history),
    }


def position(measured: Measured) -> dict[str, Any] | None:
    if not measured.names:
        return None
    return {"picture": pictures.rates_over_position(measured), "one_length": bool(measured.valid.all())}


def span(content: Content) -> dict[str, Any] | None:
    """Attention distances of each series, and what its window is; None if no token is attended."""
    spans, rows = content.measured.spans, []
    for (name, found), kind in itertools.product(spans.items(), ("may read", "attends")):
        values = pictures.summary(found, kind)
        if values is not None:
            rows.append((name, kind, [f"{value:,.1f}" for value in values]))
    if not rows:
        return None
    return {
        "rows": rows,
        "picture": pictures.spans(spans, content.measured.names),
        "window": content.layer.window_size,
        "causal": content.layer.causal,
        "queries": QUERIES,
        "carried": getattr(content.task.config, "carry_state", False),
    }


def margins(content: Content) -> Iterator[dict[str, Any]]:
    measured = content.measured
    values, length = sequences(measured.examples[0])[0]
    for found in evenly(measured.margins):
        before, here, after = around(content.task, values[:length], found.position)
        yield {
            "picture": pictures.margin(found, measured.names),
            "name": measured.names[found.series],
            "position": found.position,
            "before": before,
            "here": here,
            "after": after,
            "sum": found.channels.sum() + found.bias,
            "logits": found.logits,
        }


def learning(content: Content) -> Iterator[str]:
    """Curves of the loss and of the selection metric, if they were recorded."""
    for name in dict.fromkeys(("loss", content.task.selection_metric)):
        if len(content.history.curve("train", name)[0]):
            yield pictures.learning(content.history, name, "loss, nats" if name == "loss" else _label(name))


def facts(content: Content) -> list[tuple[str, Any]]:
    """What the numbers depend on besides the config."""
    versions = content.meta.get("versions")
    rows = [
        *((name, content.meta.get(name)) for name in ("command", "hardware")),
        ("parameters", f"{content.parameters:,}"),
        *(versions.items() if isinstance(versions, Mapping) else ()),
    ]
    return [(name, value) for name, value in rows if value]


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _label(metric: str) -> str:
    return {"bits_per_byte": "bits per byte"}.get(metric, metric)
