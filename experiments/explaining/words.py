"""What features fire on in words, with their scores: by rules of predicates, or by a language model on a server."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from experiments.common.errors import require
from experiments.evaluation import explanations
from experiments.evaluation.explanations import COLUMNS, PREDICATES, Halves, Method
from experiments.explaining.chat import Chat, ChatExplainer, ChatJudge
from experiments.reports.measure import Example, batches, sequences
from experiments.training.restore import Run
from seqboat.interp import scorers
from seqboat.interp.explainers import Contexts, split

RULES = "predicates"
SEED = 0  # of the halves and of all windows
COUNT = 20  # windows of each kind that a language model is asked about
CALLS = 500  # of a language model for one dictionary, at most


@dataclasses.dataclass(frozen=True)
class Explaining:
    """A method with its `name` and, of a language model, the `chat`."""

    method: Method = PREDICATES
    name: str = RULES
    chat: Chat | None = None

    def values(self) -> dict[str, Any]:
        """What why.json has of it. Never the key."""
        chat = self.chat
        return {"name": self.name, "url": chat and chat.url, "usage": chat and chat.usage.values()}

    def unanswered(self) -> str:
        """What to warn of: how many questions have no answer, and why; empty if there were none."""
        usage = self.chat and self.chat.usage
        if not usage or not usage.failures:
            return ""
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(usage.failures.items()))
        return f"{self.name} answered {usage.answers} of {usage.calls} calls; questions given up: {reasons}"


def explaining(
    explainer: str, model: str | None = None, dictionaries: int = 1, answers: Path | None = None
) -> Explaining:
    """`explainer` is RULES or the URL of a server with OpenAI's chat completions, whose `model` then answers, but for
    questions with an answer in the file `answers`. Raises UserError for anything else, which is not repeated as it may
    hold a secret, and for a missing or idle model."""
    if explainer == RULES:
        require(not model, f"--explainer_model: {RULES} need no model; name its server with --explainer=URL")
        return Explaining()
    require("://" in explainer, f"--explainer: expected {RULES}, or the URL of a server, http://HOST:PORT/v1")
    require(bool(model), "--explainer_model=NAME is missing: the model that the server of --explainer is asked for")
    chat = Chat(explainer, str(model), budget=CALLS * max(dictionaries, 1), answers=answers)
    return Explaining(Method(ChatExplainer(chat), ChatJudge(chat), COUNT, windowed=True), str(model), chat)


@dataclasses.dataclass(frozen=True)
class Words:
    """The n sequences of some examples in two parts, drawn before any feature is chosen; without them `missing` says
    why nothing can be said. `intervenes`: whether the run's answers have log-probabilities."""

    run: Run
    examples: Sequence[Example]
    explaining: Explaining
    parts: Halves | None
    missing: str = ""
    intervenes: bool = False

    def values(self) -> dict[str, Any]:
        """What why.json has of it."""
        made = int(self.parts.first.sum()) if self.parts else 0
        scored = len(self.parts.first) - made if self.parts else 0
        return {**self.explaining.values(), "made_from": made, "scored_on": scored, "missing": self.missing or None}

    def every(self, stride: int) -> "Words":
        """With the first of every `stride` examples."""
        if stride == 1 or self.parts is None:
            return dataclasses.replace(self, examples=self.examples[::stride])
        return words(self.run, self.examples[::stride], self.explaining)

    def of(
        self,
        site: str,
        layer: int,
        atoms: Any,
        features: Sequence[int],
        active: Float[np.ndarray, "F n L"],
        nearest: Float[np.ndarray, "F n L"] | None,
    ) -> list[dict[str, Any]]:
        """Of every feature of a dictionary of a site, from its activations and those of the nearest other atom: its
        `text`, None without words, the `scores` (COLUMNS), and the number of questions `asked` and of those `failed`.
        """
        if self.parts is None or not features:
            return [{"text": None, "scores": dict.fromkeys(COLUMNS), "asked": 0, "failed": 0}] * len(features)
        effect = self._intervention(site, layer, atoms, features, active)
        near = [None] * len(features) if nearest is None else nearest
        units = zip(features, active, near, strict=True)
        return [
            {
                "text": each.explanation.text,
                "scores": {**each.scores(), "intervention": effect.get(each.unit)},
                "asked": each.asked,
                "failed": each.failed,
            }
            for each in explanations.explained(self.explaining.method, self.parts, units, SEED)
        ]

    def _intervention(
        self, site: str, layer: int, atoms: Any, features: Sequence[int], active: Float[np.ndarray, "F n L"]
    ) -> Mapping[int, float]:
        """By feature; of fewer than two there is none."""
        if not self.intervenes or self.parts is None:
            return {}
        other = ~self.parts.first
        examples = [self.examples[n] for n in np.flatnonzero(other[:: len(other) // len(self.examples)]).tolist()]
        filled = [batch for batch, _ in batches(examples)]
        found = explanations.effects(self.run, site, layer, atoms, features, active[:, other] > 0, filled)
        if len(found) < 2:
            return {}
        return dict(zip(found, scorers.intervention(np.array(list(found.values()))).tolist(), strict=True))


def words(run: Run, examples: Sequence[Example], explaining: Explaining) -> Words:
    """The two documents of a pair are in the same part."""
    missing = ""
    if run.task.config.vocabulary_size is None:
        missing = "The inputs are numbers, which no words describe."
    elif len(examples) < 2:
        missing = "One example alone is too few: words are made from some and scored on others."
    if missing:
        return Words(run, examples, explaining, None, missing)
    tokens, lengths = _stacked(examples)
    shown = np.arange(tokens.shape[1]) < lengths[:, None]
    first = np.repeat(split(len(examples), SEED), len(tokens) // len(examples))
    parts = explanations.halves(Contexts(tokens, run.task.symbol, shown), first)
    return Words(run, examples, explaining, parts, intervenes=explanations.answers(run))


def _stacked(examples: Sequence[Example]) -> tuple[Int[np.ndarray, "n L"], Int[np.ndarray, " n"]]:
    rows = [sequence for example in examples for sequence in sequences(example)]
    return np.stack([values for values, _ in rows]), np.array([length for _, length in rows])
