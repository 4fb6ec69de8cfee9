"""What dictionaries say about a run's decisions, on examples spread over a split, and the interventions that check it.

`Looks` runs the model, with or without a feature; `explain` is everything about one layer, as plain values.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.evaluation import splicing
from experiments.explaining.contexts import contexts
from experiments.explaining.decisions import Decision, take_apart
from experiments.explaining.dictionaries import SITE, Given
from experiments.explaining.words import Words
from experiments.reports.measure import Example, batches
from experiments.training.restore import Run
from seqboat.interp import attribution, dictionaries, scorers
from seqboat.interp.edits import Steer, Without, at
from seqboat.layers import taps

SHOWN = 4  # features of a layer for attention, and as many against, with contexts and interventions
ROWS = 16_384  # of m, for the health of a dictionary
PAIRS = 500  # of norms
CERTAIN = 1e-4  # margins below it may change sign by rounding
# Of the first sequence, what its decisions by source element need.
MIXED = ("ssm_out", "pre_norm")


class Look(NamedTuple):
    """One layer on a batch of B sequences: `m` (B, L, D) before an edit of it, the model's `margin` (B, L) after it,
    `valid` (B, L), what `MIXED` names of the first sequence (L, D), and the loss as (sum, weight). Of all layers, where
    attention is `active` (layers, B, L)."""

    m: Any
    margin: Any
    valid: Any
    mixed: dict[str, Any]
    loss: Any
    active: Any


class Looks:
    """Passes of a model over examples, by one compiled program for all dictionaries of one shape."""

    def __init__(self, run: Run, examples: list[Example]):
        self.run, self.examples = run, examples
        self.layers = run.model.config.encoder.layers
        self._sites = {site for sites in run.model.config.encoder.layer.sites().values() for site in sites}
        self._look = jax.jit(self._compute)

    def without(
        self, given: Given, feature: int | None = None, taken: Float[np.ndarray, "n L"] | None = None
    ) -> Iterator[Look]:
        """The dictionary's layer in every batch, without the feature in m, or with numbers `taken` from attention's
        margins alone; by default the model as it is."""
        router = np.zeros((len(self.run.model.config.encoder.layer.make_modules()), 2), np.float32)
        router[0, 1] = 1  # of attention, the first module, to be active
        first = 0
        for batch, count in batches(self.examples):
            rows = count * batch["lengths"][0].size  # two documents of a pair are two sequences
            amount = np.zeros((batch["lengths"].size, batch["inputs"].shape[1]), np.float32)
            if taken is not None:
                amount[:rows] = -taken[first : first + rows]
            first += rows
            edits = {
                SITE: Without(feature is not None, given.atoms, np.int32(feature or 0)),
                "router_logits": Steer(True, router, amount),
            }
            edits = {site: at(given.layer, self.layers, edit) for site, edit in edits.items()}
            variables = taps.edited(self.run.model, self.run.variables, edits)
            found = jax.device_get(self._look(variables, batch, given.layer - 1))
            valid = np.arange(found.m.shape[1])[None] < batch["lengths"].reshape(-1)[:rows, None]
            active = found.active[:, :rows]
            yield found._replace(m=found.m[:rows], margin=found.margin[:rows], valid=valid, active=active)

    def _compute(self, variables: Any, batch: Any, layer: Array) -> Look:
        examined = self.run.experiment.functions.evaluate_examples(variables, batch, tapped=True)
        site = lambda name: taps.read(examined.taps, name)[layer].astype(jnp.float32)
        logits = site("router_logits")[:, :, 0]  # of attention, the first module
        mixed = {name: site(name)[0] for name in MIXED if name in self._sites}
        active = taps.read(examined.taps, "active")[..., 0] > 0
        return Look(site(SITE), logits[..., 1] - logits[..., 0], None, mixed, examined.total["loss"], active)


class Terms(NamedTuple):
    """Of the elements (*B) of a batch: the features `f` (*B, F), their terms (*B, F) in the margins, and `flips` (*B,
    F); the `error` and the `margin`, the sum of all (*B,); the `constant` ()."""

    f: Any
    features: Any
    flips: Any
    error: Any
    margin: Any
    constant: Any

    def at(self, valid: np.ndarray) -> "Terms":
        """Those of some elements."""
        each = self._asdict()
        return Terms(**{name: value if name == "constant" else value[valid] for name, value in each.items()})


def terms(given: Given, m: np.ndarray) -> Terms:
    return jax.device_get(_terms(given.atoms, given.router, m))


@jax.jit
def _terms(atoms: Any, router: attribution.Router, m: Array) -> Terms:
    found = attribution.margin_by_feature(atoms, router, m)
    return Terms(atoms.encode(m), found.features, found.flips(), found.error, found.margin, found.constant)


@dataclasses.dataclass(frozen=True)
class Explained:
    """One layer: `values` is what why.json has of it; the pictures draw `decision` and the norms `pairs` (N, 2)."""

    given: Given
    values: dict[str, Any]
    decision: Decision
    pairs: Float[np.ndarray, "N 2"]


def explain(
    looks: Looks,
    given: Given,
    split: str,
    sequences: list[tuple[np.ndarray, int]],
    element: int | None,
    words: Words,
) -> Explained:
    """Raises UserError for an element that the first sequence lacks."""
    plain = list(looks.without(given))
    each, totals, rows = _measure(plain, given)
    decision = take_apart(looks.run, given, plain[0], sequences[0][1], element)
    checked = jax.device_get(jax.jit(dictionaries.health)(given.atoms, rows))
    features = _features(totals, len(each["margin"]), int((each["model"] > 0).sum()))
    shown = largest(features["contribution"], features["against"])
    active, parts = _activations(plain, given, shown)
    effects = _intervene(looks, plain, given, shown, active, parts, each)
    said = words.of(SITE, given.layer, given.atoms, shown, active, near(plain, given, shown, features["fires"]))
    norms = checked.norms[:: max(1, len(checked.norms) // PAIRS)][:PAIRS]
    values = {
        "layer": given.layer,
        "dictionary": {"workdir": str(given.path), "step": given.step, "rows": given.config.rows},
        **_of_layer(each),
        "rates": rates(plain),
        "losses": splicing.losses(looks.run, split, SITE, given.layer, given.atoms),
        "size": len(features["fires"]),
        "alive": int((features["fires"] > 0).sum()),
        "features": {name: column.tolist() for name, column in features.items()},
        "shown": [
            {
                "feature": number,
                **{name: float(column[number]) for name, column in features.items()},
                **effect,
                **own,
                "contexts": contexts(looks.run.task, sequences, where),
            }
            for number, effect, own, where in zip(shown, effects, said, active, strict=True)
        ],
        "decision": decision.values(),
        "health": {
            **{name: float(getattr(checked, name)) for name in ("nmse", "l0", "dead", "coherence", "deviation")},
            "rows": len(rows),
            "norms": norms.astype(float).tolist(),
        },
    }
    return Explained(given, values, decision, norms)


def _measure(plain: Sequence[Look], given: Given) -> tuple[dict, dict, np.ndarray]:
    """Arrays (N,) of all elements, sums (F,) over them, and up to ROWS rows of m."""
    elements: list[dict[str, np.ndarray]] = []
    sums: list[dict[str, np.ndarray]] = []
    rows: list[np.ndarray] = []
    for look in plain:
        chosen, model = terms(given, look.m).at(look.valid), look.margin[look.valid]
        active = model > 0
        needed = sufficient(chosen.features, float(chosen.constant), active)
        whole = {"model": model, "margin": chosen.margin, "error": chosen.error, "needed": needed}
        elements.append(whole | {"constant": np.broadcast_to(chosen.constant, model.shape)})
        sums.append(
            {
                "contribution": chosen.features[active].sum(0, np.float64),
                "against": chosen.features[~active].sum(0, np.float64),
                "fires": (chosen.features != 0).sum(0),
                "flips": chosen.flips.sum(0),
            }
        )
        rows.append(look.m[look.valid])
    join = lambda parts: {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    total = {name: sum(part[name] for part in sums) for name in sums[0]}
    every = np.concatenate(rows)
    return join(elements), total, every[:: -(-len(every) // ROWS)]


def sufficient(features: Float[np.ndarray, "N F"], constant: float, active: np.ndarray) -> Float[np.ndarray, " N"]:
    """The fewest features of every element, largest term first, that decide with the constant as it was decided; 0 is
    the constant alone, infinity that the dictionary does not."""
    order = np.argsort(-np.abs(features), axis=1, kind="stable")
    partial = np.cumsum(np.take_along_axis(features, order, 1), axis=1, dtype=np.float64)
    decided = constant + np.pad(partial, ((0, 0), (1, 0))) > 0
    agrees = decided == active[:, None]
    return np.where(agrees.any(1), agrees.argmax(1), np.inf)


def _features(totals: Mapping[str, Any], elements: int, active: int) -> dict[str, np.ndarray]:
    """Of every feature (F,): its mean `contribution` to the margins of active elements, and its mean `against` those of
    inactive ones, the share of elements where it `fires`, and the share of decisions that its removal `flips`, as
    predicted."""
    counts = {"contribution": active, "against": elements - active, "fires": elements, "flips": elements}
    return {name: totals[name] / max(count, 1) for name, count in counts.items()}


def largest(contribution: np.ndarray, against: np.ndarray) -> list[int]:
    """Up to SHOWN features that add most to the margins of active elements, then as many that take most from those of
    inactive ones."""
    found = [number for number in np.argsort(-contribution, kind="stable")[:SHOWN].tolist() if contribution[number] > 0]
    other = [number for number in np.argsort(against, kind="stable")[:SHOWN].tolist() if against[number] < 0]
    return list(dict.fromkeys([*found, *other]))


def _of_layer(each: Mapping[str, np.ndarray]) -> dict[str, Any]:
    model, needed, constant = each["model"], each["needed"], each["constant"]
    active, spread = model > 0, float(np.var(model, dtype=np.float64))
    kept = lambda margin: float(((margin > 0) == active).mean())
    otherwise = needed[(constant > 0) != active]
    decided = np.isfinite(needed)
    return {
        "elements": len(model),
        "rate": float(active.mean()),
        "margin_explained": 1 - float(np.var(each["error"], dtype=np.float64)) / spread if spread else float("nan"),
        "kept": {"dictionary": kept(each["margin"] - each["error"]), "constant": kept(constant)},
        "sufficient": {
            "median": float(np.median(needed)),
            "mean": float(needed[decided].mean()) if decided.any() else float("nan"),
            "median_where_the_constant_errs": float(np.median(otherwise)) if len(otherwise) else float("nan"),
        },
        "constant": float(constant[0]),
        "largest_difference": float(np.abs(each["margin"] - model).max()),
        "scale": float(np.sqrt(np.square(model, dtype=np.float64).mean())),
    }


def _intervene(
    looks: Looks,
    plain: Sequence[Look],
    given: Given,
    shown: Sequence[int],
    active: Float[np.ndarray, "S n L"],
    parts: Float[np.ndarray, "S N"],
    each: Mapping[str, np.ndarray],
) -> Iterator[dict[str, Any]]:
    """Of every feature shown, with its activations and terms: what taking it away changes, predicted and measured, and
    what taking its terms from the decision alone does."""
    before, loss = each["model"], _loss(plain)
    gain = np.asarray(given.atoms.decoder @ given.router.weight)
    for place, feature in enumerate(shown):
        edited = list(looks.without(given, feature))
        after = np.concatenate([look.margin[look.valid] for look in edited])
        predicted = before - parts[place]
        flipped = [(before > 0) != (margin > 0) for margin in (predicted, after)]
        certain = (np.abs(before) > CERTAIN) & (np.abs(predicted) > CERTAIN)
        yield {
            "measured_flips": float(flipped[1].mean()),
            "compared": int(certain.sum()),
            "disagree": int((flipped[0] != flipped[1])[certain].sum()),
            "loss": loss,
            "loss_without": _loss(edited),
            "loss_decided_without": _loss(list(looks.without(given, taken=active[place] * gain[feature]))),
        }


def _activations(plain: Sequence[Look], given: Given, shown: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Some features (S, n, L), zero in padding, and their terms (S, N) at the N elements."""
    features, parts = [], []
    for look in plain:
        found = terms(given, look.m)
        features.append(np.where(look.valid[..., None], found.f[..., shown], 0))
        parts.append(found.features[look.valid][:, shown])
    return np.moveaxis(np.concatenate(features), -1, 0), np.concatenate(parts).T


def near(
    plain: Sequence[Look], given: Given, shown: Sequence[int], fires: Float[np.ndarray, " F"]
) -> Float[np.ndarray, "S n L"] | None:
    """The activations of the nearest other atom that fires, of every feature shown; None if there is none."""
    if not shown or (fires > 0).sum() < 2:
        return None
    return _activations(plain, given, scorers.nearest(np.asarray(given.atoms.decoder), fires > 0)[shown].tolist())[0]


def rates(plain: Sequence[Look]) -> list[float]:
    """The share of elements where attention is active, by layer."""
    active = np.concatenate([look.active[:, look.valid] for look in plain], axis=1)
    return active.mean(1).tolist()


def _loss(looks: Sequence[Look]) -> float:
    total, weight = np.sum([look.loss for look in looks], axis=0)
    return float(total / weight)
