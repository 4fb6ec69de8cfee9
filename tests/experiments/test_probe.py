"""The probe on a small classifier of padded sequences: against the plain gradient, padding, files, refusals."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.errors import UserError
from experiments.reports import probe
from seqboat.models.encoder import Encoder
from tests.helpers import load_program

program = load_program("probe")

EXAMPLES, DRAWS = 4, 2


@pytest.fixture(scope="module")
def subject(tiny):
    return probe.at_start(tiny({"model.activation": "always", "model.form": "dense"}), EXAMPLES)


@pytest.mark.breadth  # tests/analysis/test_reach.py: reach itself
def test_the_reach_of_the_network_is_that_of_its_gradient(subject):
    found = probe.measure(subject, ("reach", "depth"), DRAWS, seed=3)
    assert list(found["reach"]) == ["layer 1", "layer 2", "network"]
    x, valid = probe._given_to_the_encoder(subject.model, subject.variables, subject.batch)
    params = {"params": subject.variables["params"]["encoder"]}
    run = lambda x: Encoder(subject.model.config.encoder, parent=None).apply(params, x, valid)[0]
    lengths = np.asarray(subject.batch["lengths"])
    assert len(set(lengths.tolist())) > 1
    direction = np.asarray(jax.random.normal(jax.random.key(3), (DRAWS, x.shape[-1])))
    lags = min(lengths)

    @jax.jit
    def gradients(u):
        return jax.grad(lambda x: (run(x)[np.arange(EXAMPLES), lengths - 1] @ u).sum())(x)

    norms = sum(np.linalg.norm(np.asarray(gradients(u)), axis=-1) for u in direction)
    expected = sum(norms[i, lengths[i] - 1 - np.arange(lags)] for i in range(EXAMPLES))
    np.testing.assert_allclose(found["reach"]["network"]["r"][:lags], expected / expected[0], rtol=1e-3)
    one = found["reach"]["layer 1"]["r"][:lags]
    assert 0 < one[1] < 1
    depth = found["depth"]
    assert (len(depth["mean_square"]), len(depth["growth"]), depth["layers"], depth["width"]) == (3, 2, 2, 8)
    real = np.asarray(x)[np.asarray(valid)]
    np.testing.assert_allclose(depth["mean_square"][0], np.square(real).mean(), rtol=1e-5)
    assert np.isfinite(depth["growth"]).all()


@pytest.mark.breadth  # tests/analysis/test_depth.py: test_a_gain_multiplies_signals_and_differences_of_valid_elements
def test_what_stands_in_padding_changes_nothing(subject):
    inputs, lengths = np.array(subject.batch["inputs"]), np.asarray(subject.batch["lengths"])
    padding = np.arange(inputs.shape[1]) >= lengths[:, None]
    assert padding.any()
    other = subject._replace(batch={"inputs": np.where(padding, inputs + 1, inputs), "lengths": lengths})
    assert (other.batch["inputs"] != inputs).any()
    measured = [probe.measure(s, ("reach", "depth"), DRAWS, seed=3) for s in (subject, other)]
    for kind in probe.KINDS:
        for first, second in zip(*(jax.tree.leaves(found[kind]) for found in measured), strict=True):
            np.testing.assert_allclose(first, second, rtol=1e-4)


@pytest.mark.breadth  # test_the_program_writes_what_it_measured_of_a_run
def test_a_model_without_sequences_has_depth_alone(typed):
    values = typed("--config=configs/hyper/rotation.py")
    subject = probe.at_start(values, EXAMPLES)
    found = probe.measure(subject, ("depth",), DRAWS, seed=0)
    assert len(found["depth"]["growth"]) == len(subject.model.config.hidden) == found["depth"]["layers"]
    hidden = subject.variables["params"]["hidden_0"]
    first = subject.batch["inputs"].reshape(EXAMPLES, -1) @ hidden["kernel"] + hidden["bias"][None]
    np.testing.assert_allclose(found["depth"]["mean_square"][1], jnp.square(first).mean(), rtol=1e-5)
    with pytest.raises(UserError, match="--what=reach: a MLP has no sequence"):
        probe.measure(subject, ("reach",), DRAWS, seed=0)


@pytest.mark.breadth  # test_the_program_writes_what_it_measured_of_a_run
def test_a_picture_and_a_table_of_what_was_found(tmp_path, capsys):
    found = {
        "reach": {"network": {"slope": float("nan"), "horizon": 1, "r": [1.0, 0.5, 0.0]}},
        "depth": {"mean_square": [1.0, 2.0], "growth": [1.5], "layers": 1, "width": 4},
    }
    probe.show(found)
    shown = capsys.readouterr().out
    assert "0.5" in shown
    assert "L/n 0.25" in shown
    for number, kinds in enumerate((("reach",), ("depth",), ("reach", "depth"))):
        probe.draw({kind: found[kind] for kind in kinds}, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 1000


@pytest.fixture(scope="module")
def workdir(tiny, untrained, tmp_path_factory):
    return untrained(tiny({"model.activation": "never"}), tmp_path_factory.mktemp("probe") / "run", step=6)


@pytest.fixture
def run(monkeypatch, tmp_path, workdir):
    """run(name=value) is the program with these flags, on the checkpoint of a run."""

    def start(**changes):
        defaults = {"workdir": str(workdir), "what": ["depth"], "out": str(tmp_path / "new/found")}
        for name, value in {**defaults, **changes}.items():
            monkeypatch.setattr(program, f"_{name.upper()}", type("Flag", (), {"value": value}))
        program.main()
        return json.loads((tmp_path / "new/found.json").read_text())

    return start


def test_the_program_writes_what_it_measured_of_a_run(run, tmp_path, capsys):
    found = run(examples=2)
    assert (tmp_path / "new/found.png").exists()
    assert (found["step"], found["examples"]) == (6, 2)
    assert "growth of a small difference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"what": ["reach", "width"]}, r"--what=reach,width: expected reach or depth, or both"),
        ({"what": []}, r"--what=: expected reach"),
        ({"workdir": None}, r"--config=FILE or --workdir=DIR: one of them"),
        ({"workdir": "nowhere"}, r"there is no work directory"),
    ],
)
def test_mistakes_are_one_line(run, changes, message):
    with pytest.raises(UserError, match=message):
        run(**changes)
