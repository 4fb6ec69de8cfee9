"""What the section "Classified like these" shows of a classifier with prototypes: for a few examples, the training
examples that are nearest to the prototypes they are nearest to."""

from typing import Any

from experiments.evaluation.prototypes import Case, cases
from experiments.reports.excerpts import EXAMPLES, evenly, plain
from experiments.reports.measure import Measured
from experiments.training.restore import Run

LIKE = 3  # prototypes of an example


def classified_like(run: Run, measured: Measured) -> dict[str, Any] | None:
    """None for a model without prototypes."""
    if measured.distances is None:
        return None
    found, examples = cases(run), []
    for number in evenly(range(len(measured.examples)), EXAMPLES):
        example, distances = measured.examples[number], measured.distances[number]
        told = {"number": measured.numbers[number] + 1, "target": run.task.class_name(int(example["targets"]))}
        told |= {"answer": run.task.class_name(int(measured.answers[number])), **plain(run.task, example)}
        nearest = distances.argsort()[:LIKE].tolist()
        examples.append({**told, "like": [_case(run.task, found.cases[j], float(distances[j])) for j in nearest]})
    return {
        "examples": examples,
        "count": len(found.cases),
        "looked": found.looked,
        "total": found.total,
        "closeness": found.closeness,
        "agree": sum(case.vote == case.target for case in found.cases),
    }


def _case(task: Any, case: Case, distance: float) -> dict[str, Any]:
    vote, target = task.class_name(case.vote), task.class_name(case.target)
    told = {"vote": vote, "number": case.number + 1, "target": target, "distance": distance}
    return {**told, **plain(task, case.example)}
