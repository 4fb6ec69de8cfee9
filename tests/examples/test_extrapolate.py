"""What is counted on streams, on a reader that is right by construction; which directories are runs; the picture."""

from types import SimpleNamespace

import numpy as np
import pytest

from experiments.common.errors import UserError
from experiments.tasks import induction
from tests.helpers import load_program

extrapolate = load_program("examples.extrapolate")

ALPHABET = 4


class Reader:
    """Remembers what followed the first trigger; tokens that are a trigger are active, in the second of two layers."""

    def initial_state(self, batch):
        return np.zeros(batch, int), np.zeros(batch, bool)

    def stream(self, variables, inputs, lengths, state):
        answer, asked = state
        for token in inputs.T:
            answer, asked = np.where(asked & (answer == 0), token, answer), asked | (token == induction.TRIGGER)
        logits = np.eye(induction.FIRST_SYMBOL + ALPHABET)[answer][:, None]
        active = np.stack([np.zeros(len(inputs)), (inputs == induction.TRIGGER).sum(1)])
        return SimpleNamespace(logits=logits, layers=SimpleNamespace(active=active)), (answer, asked)


@pytest.mark.parametrize("piece", [16, 64])
def test_a_reader_that_remembers_is_right_and_activates_the_two_triggers(monkeypatch, piece):
    monkeypatch.setattr(extrapolate, "PIECE", piece)
    reader, task = Reader(), SimpleNamespace(config=induction.Config(length=8, alphabet=ALPHABET))
    run = SimpleNamespace(model=reader, task=task, variables=None)
    assert extrapolate.read(run, reader.stream, 64, 8) == {"accuracy": 1.0, "active": [0.0, 2.0]}


def test_a_directory_of_a_sweep_has_its_runs_by_arm(tmp_path):
    for name in ("always/seed_1", "always/seed_0", "none/seed_0"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    arms = [(arm, str(path.relative_to(tmp_path))) for arm, path in extrapolate.runs(tmp_path)]
    assert arms == [("always", "always/seed_0"), ("always", "always/seed_1"), ("none", "none/seed_0")]
    assert extrapolate.runs(tmp_path / "none/seed_0") == [("seed_0", tmp_path / "none/seed_0")]
    with pytest.raises(UserError, match="has no checkpoints"):
        extrapolate.runs(tmp_path / "nothing")


def test_an_arm_has_a_value_per_seed_the_longest_length_first_and_a_picture(tmp_path):
    seeds = [[{"length": n, "accuracy": a, "active": [3.0, n / 2]} for n in (256, 1024)] for a in (0.5, 1.0)]
    found = extrapolate.metrics(seeds)
    assert list(found)[:3] == ["accuracy_1024", "active_1_1024", "active_2_1024"]
    assert found["accuracy_256"] == [0.5, 1.0]
    assert found["active_2_1024"] == [512.0, 512.0]
    extrapolate.draw({"learned": seeds}, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
