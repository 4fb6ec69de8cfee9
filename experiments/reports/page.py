"""The page of a report: one file of HTML that loads nothing and runs nothing."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.reports import pictures
from experiments.reports.history import History
from experiments.reports.html import Html, join, tag
from experiments.reports.measure import QUERIES, Measured, sequences
from experiments.tasks.features import PixelConfig

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
SHOWN_EXAMPLES = 4
SHOWN_SERIES = 4  # of an example
SHOWN_SYMBOLS = 600
SHADES = 4  # of confidence in text
STYLE = """
:root { color-scheme: light }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: #fff; color: #333b42;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .4rem 0 }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; padding-top: .8rem; border-top: 1px solid #e3e7ea }
h3 { font-size: .95rem; margin: 1.2rem 0 .2rem }
p, ul { margin: .4rem 0; max-width: 50rem } ul { padding-left: 1.2rem }
.quiet, figcaption, .none { color: #66727c; font-size: .9rem }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .8rem; margin: 1rem 0 }
.card { border: 1px solid #e3e7ea; border-radius: .5rem; padding: .7rem .9rem }
.card b { display: block; font-size: 1.7rem; line-height: 1.2; font-weight: 600 }
.card span { font-size: .9rem; color: #66727c }
.bar { display: grid; grid-template-columns: 8rem 1fr 4rem; gap: .6rem; align-items: center; margin: .25rem 0;
  font-size: .9rem }
.track { background: #eef0f2; border-radius: .2rem; height: .9rem } .fill { height: 100%; border-radius: .2rem }
.number { text-align: right; font-variant-numeric: tabular-nums }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem }
figure { margin: .6rem 0 } img { max-width: 100%; height: auto; display: block }
table { border-collapse: collapse; font-size: .88rem; margin: .5rem 0 } .wide { overflow-x: auto }
td, th { padding: .2rem .7rem .2rem 0; text-align: left; vertical-align: top; overflow-wrap: break-word }
td:first-child { white-space: nowrap }
th { font-weight: 600; border-bottom: 1px solid #c9cfd4 } td.n, th.n { text-align: right; white-space: nowrap }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.55 ui-monospace, "DejaVu Sans Mono", monospace;
  background: #fafbfb; border: 1px solid #e3e7ea; border-radius: .4rem; padding: .5rem .6rem; margin: .2rem 0 .8rem;
  max-height: 18rem; overflow-y: auto } mark { color: inherit; border-radius: .15rem }
code { font: .85rem ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere }
"""


@dataclasses.dataclass(frozen=True)
class Content:
    """Everything that the page shows: of a step of a run, what was measured, the run's history, its evaluation file if
    there is one, and what its checkpoint carries. `at`: the hyper-input, where a hypernetwork generates the parameters.
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

    @property
    def task_name(self) -> str:
        task = self.meta["config"]["task"]
        return str(task.get("dataset") or {"corpus": "this text"}.get(task["name"], task["name"])).replace("_", " ")

    @property
    def metric(self) -> str:
        return _label(self.task.selection_metric)


def page(content: Content) -> str:
    """The whole file."""
    count = len(content.measured.names)
    shades = "\n".join(
        f".s{series}.a{shade} {{ background: {pictures.color(series, count)}{_alpha(shade)} }}"
        for series, shade in itertools.product(range(count), range(SHADES))
    )
    title = f"{content.task_name}: where attention goes"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", **{"http-equiv": "Content-Security-Policy", "content": POLICY}),
        tag("title", title),
        tag("style", Html(STYLE + shades)),
    )
    together = tag("div", over_position(content), confidence(content), class_="pair")
    body = [answer(content), over_training(content), together]
    body += [part(content) for part in (span, inputs, margin, learning, facts)]
    return f"<!doctype html>\n{tag('html', head, tag('body', *body), lang='en')}\n"


def answer(content: Content) -> Html:
    """The first screen: how much attention, and how good the answers are."""
    measured, evaluation = content.measured, content.evaluation
    rates, source = measured.rates(), f"the {len(measured.examples):,} examples looked at"
    evaluated = np.ravel((evaluation or {}).get("activation_rate") or ())
    if len(rates) and len(evaluated) == len(rates):
        rates, source = evaluated, f"the whole {content.split} split"
    if content.layer.activation == "never":
        said, big = "of the elements wake attention: this model has none", "0 %"
    elif content.layer.activation == "always":
        said, big = "of the elements are attended: the config says so, nothing was decided", "100 %"
    elif not len(rates):
        said, big = "of the elements wake a module: the config has none", "0 %"
    else:
        said, big = "of the elements wake attention, mean of the layers", _percent(rates.mean())
    trained = content.history.last_step()
    steps = content.meta["config"].get("train", {}).get("steps")
    unfinished = f" (training stands at {trained:,} of {steps:,})" if steps and 0 < trained < steps else ""
    at = "" if content.at is None else f" · hyper-input {', '.join(f'{z:g}' for z in content.at)}"
    parts = [
        tag(
            "p",
            f"{content.workdir.name} · step {content.step:,}{unfinished} · {content.split} split{at}",
            class_="quiet",
        ),
        tag("h1", f"How much attention does {content.task_name} need?"),
        tag("div", _card(big, said), *_scores(content), class_="cards"),
        *(
            _bar(name, rate, number, len(rates))
            for number, (name, rate) in enumerate(zip(measured.names, rates, strict=True))
        ),
        tag("p", f"Shares of the elements of {source}; ± is one standard error.", class_="quiet") if len(rates) else "",
    ]
    against = (evaluation or {}).get("against")
    if against:
        other = f"{Path(str(against['workdir'])).parent.name}/{Path(str(against['workdir'])).name}"
        parts.append(tag("p", tag("b", f"Against {other}, example by example:")))
        apart = [str(line) for line in against.get("differences", ())]
        told = [f"config, here → there: {'; '.join(apart)}"] if apart else []
        parts.append(tag("ul", *(tag("li", line) for line in [*against["verdicts"], *told])))
    if content.layer.activation == "learned" and not _tells_what_attention_is_worth(against):
        parts.append(
            tag(
                "p",
                "What the model uses is not yet what the task needs: train the same config with attention switched "
                "off, and ",
                tag("code", "experiments.evaluate --against"),
                " says on the same examples whether it does worse.",
                class_="quiet",
            )
        )
    return tag("section", *parts)


def over_training(content: Content) -> Html:
    learned = content.layer.activation == "learned" and len(content.measured.names)
    if not learned:
        return _section("Activation over training", _none("Nothing is decided in this model, so nothing changes."))
    if not len(content.history.curve("train", "activation_rate")[0]):
        return _section("Activation over training", _none("The work directory has no record of its training."))
    return _section(
        "Activation over training",
        tag(
            "div",
            _figure(
                pictures.rates_over_training(content.history), "Activation rate of each layer, means between reports."
            ),
            _figure(
                pictures.temperature_over_training(content.history),
                "Temperature τ of the confidence max softmax(u / τ): higher is less sure.",
            ),
            class_="pair",
        ),
    )


def over_position(content: Content) -> Html:
    if not len(content.measured.names):
        return _section("Activation over position", _none("There is no module to wake."))
    text = "Share of the elements at a position that are active"
    text += "." if content.measured.valid.all() else "; grey, the share of sequences that reach it."
    return _section("Activation over position", _figure(pictures.rates_over_position(content.measured), text))


def confidence(content: Content) -> Html:
    if content.layer.activation != "learned" or not len(content.measured.names):
        return _section("Confidence", _none("Nothing is decided in this model: there is no confidence."))
    text = (
        "Probability of the decision that was taken, 0.5 is a coin. Active elements' results are multiplied by it. "
        "Left and right together are all elements of a layer."
    )
    return _section("Confidence", _figure(pictures.confidence(content.measured), text))


def span(content: Content) -> Html:
    title, spans = "How far attention reaches", content.measured.spans
    rows = [
        (name, kind, values)
        for name, found in spans.items()
        for kind in ("may read", "attends")
        if (values := pictures.summary(found, kind)) is not None
    ]
    if not rows:
        return _section(title, _none("No element is attended in this model."))
    window = content.layer.window_size
    most = "all activated elements" if window is None else f"{window:,} activated elements"
    side = "before it" if content.layer.causal else "on each side"
    text = (
        f"Distances in original positions. An activated element may read {most} {side}: “may read” is the distance to "
        f"the farthest of them. “Attends” is the mean distance to what it does read, weighted by attention (of up to "
        f"{QUERIES} activated elements a sequence). Thick: from the 10 % to the 90 % quantile; white: the median; dot: "
        "the mean; thin: up to the maximum."
    )
    if getattr(content.task.config, "carry_state", False):
        text += (
            " Examples are looked at by themselves, each from an empty state: in a stream attention reaches further."
        )
    numbers = [[name, kind, *(f"{value:,.1f}" for value in values)] for name, kind, values in rows]
    header = ["", "", "mean", "10 %", "median", "90 %", "maximum"]
    drawn = _figure(pictures.spans(spans, content.measured.names), "")
    return _section(title, tag("p", text), tag("div", drawn, _table(header, numbers, left=2), class_="pair"))


def inputs(content: Content) -> Html:
    """A few examples, their active elements marked."""
    measured = content.measured
    series = list(enumerate(measured.names))
    chosen = _some(series)
    show: Callable[..., Html] = _waveform
    if content.task.config.vocabulary_size is not None:
        show = _text
    elif isinstance(content.task.config, PixelConfig):
        show = _pixels
    count = len(measured.examples)
    each = len(measured.valid) // count  # two documents of a pair
    parts = []
    for number in sorted({round(place) for place in np.linspace(0, count - 1, SHOWN_EXAMPLES)}):
        example = measured.examples[number]
        drawn = []
        for place, (values, length) in enumerate(sequences(example), start=each * number):
            on, sure = measured.active[:, place, :length], measured.confidence[:, place, :length]
            drawn.append(show(content, values[:length], on, sure, chosen))
        title = f"Example {measured.numbers[number] + 1:,} of {measured.total:,}"
        parts.append(tag("div", tag("h3", f"{title}{_answer(example, measured.answers[number])}"), *drawn))
    left_out = f" {len(chosen)} of the {len(series)} layers and modules are shown." if len(chosen) < len(series) else ""
    strong = "where more of them are" if show is _waveform else "a surer decision"
    text = f"Marked elements are active; a stronger colour is {strong}.{left_out}" if series else ""
    if show is _text and any((example["inputs"] == 0).any() for example in measured.examples):
        text += " ∅ is the symbol 0: where a text begins, or padding."
    return _section("What wakes it", tag("p", text), tag("div", *parts, class_=None if show is _text else "pair"))


def margin(content: Content) -> Html:
    title, found = "One decision taken apart", content.measured.margins
    if not found:
        return _section(title, _none("Nothing is decided in this model."))
    text = (
        "The router is linear in m = silu(SSM), so its margin u₁ − u₀ is exactly a sum over the channels of m, "
        "Σ m_d (W₁ − W₀)_d, and a bias. Of the first example, the element with the largest margin of each layer, or "
        "the one asked for by --element."
    )
    parts = []
    values, length = sequences(content.measured.examples[0])[0]
    for one in _some(found):
        shown = _around(content, values[:length], one.position)
        caption = join(
            f"{content.measured.names[one.series]}, position {one.position:,}{shown}: the terms sum to "
            f"{one.channels.sum() + one.bias:+.4f}, the model's logits differ by {one.logits:+.4f}."
        )
        parts.append(_figure(pictures.margin(one, content.measured.names), caption))
    return _section(title, tag("p", text), tag("div", *parts, class_="pair"))


def learning(content: Content) -> Html:
    metrics = [
        name
        for name in dict.fromkeys(("loss", content.task.selection_metric))
        if len(content.history.curve("train", name)[0])
    ]
    if not metrics:
        return _section("Learning curves", _none("The work directory has no record of its training."))
    drawn = (
        _figure(pictures.learning(content.history, name, "loss, nats" if name == "loss" else _label(name)), "")
        for name in metrics
    )
    return _section("Learning curves", tag("div", *drawn, class_="pair"))


def facts(content: Content) -> Html:
    """Config, versions, and what else a number depends on."""
    versions = content.meta.get("versions")
    rows = [(name, content.meta.get(name)) for name in ("command", "hardware")]
    rows += [("parameters", f"{content.parameters:,}")]
    rows += list(versions.items()) if isinstance(versions, Mapping) else []
    config = [[name, repr(value)] for name, value in _leaves(content.meta["config"])]
    return _section(
        "The run",
        _table(["", ""], [[name, str(value)] for name, value in rows if value], left=2),
        tag("details", tag("summary", f"config, {len(config)} fields"), _table(["field", "value"], config, left=2)),
        tag(
            "p",
            f"Made by experiments.report from {len(content.measured.examples):,} of {content.measured.total:,} "
            f"examples of the {content.split} split, at even distances.",
            class_="quiet",
        ),
    )


def _tells_what_attention_is_worth(against: Mapping[str, Any] | None) -> bool:
    """Whether the other run is one without attention."""
    return "config.model.activation: 'learned' -> 'never'" in (against or {}).get("differences", ())


def _scores(content: Content) -> Iterator[Html]:
    """Cards of the selection metric, on the whole split where it was evaluated, and of the baseline."""
    name = content.task.selection_metric
    value, error = content.measured.metrics[name]
    on = f"{len(content.measured.examples):,} of {content.measured.total:,} examples; experiments.evaluate scores all"
    if content.evaluation and content.evaluation.get(name) is not None:
        value, error = content.evaluation[name], content.evaluation.get("standard_errors", {}).get(name)
        on = f"all {content.evaluation.get('examples', content.measured.total):,} examples"
    number = f"{value:.3f}" + (f" ±\u00a0{error:.3f}" if error is not None else "")
    yield _card(number, f"{content.split} {content.metric} ({on})")
    if name in content.baseline:
        yield _card(f"{content.baseline[name]:.3f}", f"{content.metric} of the baseline: {content.task.baseline_name}")


def _text(content: Content, ids: np.ndarray, active: np.ndarray, confidence: np.ndarray, chosen: list) -> Html:
    shown = ids[:SHOWN_SYMBOLS].tolist()
    symbols = [content.task.symbol(number) for number in shown]
    parts = []
    for number, name in chosen:
        shade = np.clip((confidence[number] - 0.5) * 2 * SHADES, 0, SHADES - 1).astype(int)
        classes = [f"s{number} a{shade[i]}" if active[number][i] else "" for i in range(len(shown))]
        runs = itertools.groupby(zip(classes, symbols, strict=True), key=lambda pair: pair[0])
        texts = [(marked, "".join(symbol for _, symbol in group)) for marked, group in runs]
        body = [tag("mark", text, class_=marked) if marked else join(text) for marked, text in texts]
        first = f", first {len(shown)} of {len(ids):,}" if len(ids) > len(shown) else ""
        parts.append(tag("div", f"{name}: {_percent(active[number].mean())}{first}", class_="quiet"))
        parts.append(tag("div", *body, class_="text"))
    return join(*parts) if chosen else tag("div", "".join(symbols), class_="text")


def _pixels(content: Content, values: np.ndarray, active: np.ndarray, confidence: np.ndarray, chosen: list) -> Html:
    return _figure(pictures.picture(values[:, 0], active, confidence, chosen, len(content.measured.names)), "")


def _waveform(content: Content, values: np.ndarray, active: np.ndarray, confidence: np.ndarray, chosen: list) -> Html:
    return _figure(pictures.waveform(values[:, 0], active, chosen, len(content.measured.names)), "")


def _around(content: Content, values: np.ndarray, position: int) -> str:
    """The symbol at a position among its neighbours."""
    if content.task.config.vocabulary_size is None:
        return ""
    cut = lambda first, last: "".join(content.task.symbol(number) for number in values[max(first, 0) : last].tolist())
    before, here, after = cut(position - 12, position), cut(position, position + 1), cut(position + 1, position + 13)
    return f" (…{before}⟦{here.strip() or here}⟧ {after}…)".replace("\n", "")


def _answer(example: Mapping[str, np.ndarray], answer: np.ndarray) -> str:
    """What was answered, of an example with one target."""
    if example["targets"].ndim:
        return ""
    target, given = int(example["targets"]), int(answer)
    return f": class {target}, answered {given}" + ("" if target == given else " (wrong)")


def _some(found: Sequence[Any]) -> list[Any]:
    """At most SHOWN_SERIES of them, at even distances."""
    if len(found) <= SHOWN_SERIES:
        return list(found)
    places = sorted({round(place) for place in np.linspace(0, len(found) - 1, SHOWN_SERIES)})
    return [found[place] for place in places]


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _section(title: str, *children: str) -> Html:
    return tag("section", tag("h2", title), *children)


def _none(text: str) -> Html:
    return tag("p", text, class_="none")


def _figure(uri: str, caption: str) -> Html:
    text = tag("figcaption", caption) if caption else ""
    return tag("figure", tag("img", src=uri, alt=caption or "figure"), text)


def _card(big: str, text: str) -> Html:
    return tag("div", tag("b", big), tag("span", text), class_="card")


def _bar(name: str, rate: float, number: int, count: int) -> Html:
    fill = tag("div", class_="fill", style=f"width: {100 * rate:.1f}%; background: {pictures.color(number, count)}")
    return tag(
        "div",
        tag("span", name),
        tag("div", fill, class_="track"),
        tag("span", _percent(rate), class_="number"),
        class_="bar",
    )


def _table(header: list[str], rows: list, left: int) -> Html:
    """Columns after the first `left` are numbers."""
    of = lambda place: None if place < left else "n"
    line = lambda name, cells: tag("tr", *(tag(name, str(cell), class_=of(i)) for i, cell in enumerate(cells)))
    head = [line("th", header)] if any(header) else []
    return tag("div", tag("table", *head, *(line("td", row) for row in rows)), class_="wide")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share == 0 or share >= 0.1 else f"{100 * share:.1f} %"


def _label(metric: str) -> str:
    return {"bits_per_byte": "bits per byte"}.get(metric, metric)


def _alpha(shade: int) -> str:
    return f"{round(255 * (0.2 + 0.5 * shade / (SHADES - 1))):02x}"
