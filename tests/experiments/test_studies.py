"""Studies: what they say of runs, a tiny run of each, and that the page in the docs is the one their files make."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import experiments.studies
from configs.hyper import rotation
from experiments.common.errors import UserError
from experiments.pages import hypernetworks as page
from experiments.pages import studies as pages
from experiments.studies import arms, continual, copied, dictionaries, planted, protocol, reach
from seqboat.interp.dictionaries import Atoms
from tests.helpers import SMALL_MODEL, load_program, plant

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_what_its_files_make(tmp_path):
    for path in (DOCS / "_data/hypernetworks").iterdir():
        if path.suffix != ".png":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert (DOCS / "hypernetworks.md").read_text() == page.page(tmp_path), "run python -m experiments.pages.results"
    drawn, kept = ({path.name for path in folder.glob("*.png")} for folder in (tmp_path, DOCS / "_data/hypernetworks"))
    assert drawn == kept


def test_a_file_of_something_else_is_named(tmp_path):
    (tmp_path / "rotation.json").write_text(json.dumps({"arms": {"mip": {}}}))
    with pytest.raises(UserError, match=r"rotation\.json is not a file of experiments\.study"):
        page.page(tmp_path)


def test_an_arm_is_told_by_its_best_rate():
    loss = np.array([[[2.0, 0.3], [1.0, 0.1]], [[0.5, 0.19], [0.2, 0.25]], [[9.0, np.nan], [9.0, 0.15]]])
    runs = {
        "loss": loss,
        "steps": np.array([50, 100]),
        "test": np.ones((3, 2)),
        "variation": np.ones((3, 2, 2)),
    }
    found = arms.summary(runs, (0.1, 0.2, 0.3))
    # Medians of the last losses: 0.2, 0.22, infinite.
    assert found["rate"] == 0.1
    np.testing.assert_allclose(found["loss"], [0.2, 0.1, 0.3])
    assert found["reached"]["0.25"] == [None, 100]
    assert found["reached"]["0.4"] == [100, 100]
    assert found["rates_within_1.5"] == 2
    assert found["diverged"] == 1


def test_forgetting_is_what_was_learned_less_what_is_left():
    matrix = np.zeros((1, 3, 3))
    matrix[0] = [[0.9, 0.1, 0.1], [0.7, 0.8, 0.2], [0.6, 0.5, 1.0]]
    found = continual.summary(matrix)
    np.testing.assert_allclose(found["learned"], 0.9)
    np.testing.assert_allclose(found["last"], 0.7)
    np.testing.assert_allclose(found["forgetting"], 0.3)


def test_tasks_of_digits():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    split, permuted = continual.sequence("split", 0), continual.sequence("permuted", 0)
    assert split["train"]["x"].shape == (5, 260, 64)
    assert split["test"]["y"].shape == (5, 90)
    assert set(np.unique(split["train"]["y"])) == {0, 1}
    first, second = permuted["train"]["x"][:2]
    np.testing.assert_array_equal(np.sort(first, 1), np.sort(second, 1))
    assert np.any(first != second)
    assert np.any(permuted["train"]["x"] != continual.sequence("permuted", 1)["train"]["x"])


@pytest.mark.slow
def test_one_tiny_run_of_each():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    values = rotation.get_config("mip").to_dict()
    values["train"]["steps"] = 2
    runs = arms.run(values, (0.01, 0.1), range(2))
    assert runs["loss"].shape == (2, 2, 1)
    assert np.isfinite(runs["loss"]).all()
    assert runs["variation"].shape == (2, 2, 2)
    matrix = np.asarray(continual.run("split", "recurrent", 1.0, "importance", range(2), 2))
    assert matrix.shape == (2, 5, 5)
    assert ((matrix >= 0) & (matrix <= 1)).all()


def test_the_study_of_reach_is_a_table_of_slopes(monkeypatch):
    monkeypatch.setattr(reach, "ARMS", {"elman": reach.ARMS["elman"]})
    saved = []
    reach.study(saved.append, seeds=range(2))
    spread = saved[-1]["elman"]["metrics"]["slope"]
    assert len(spread["values"]) == 2
    assert all(-0.9 < slope < -0.6 for slope in spread["values"])
    assert spread["values"][0] != spread["values"][1]
    assert spread["standard_error"] > 0
    assert protocol.stamped(reach, saved[-1], {"command": "c"})["elman"]["command"] == "c"


# The program.

COINS = '''
"""Coins."""
from experiments.studies.protocol import Bar, judge
FOLDER = "probes"
def study(save, *, seeds=range(10, 13), steps=4) -> list[Bar]:
    heads = [seed % 2 * steps for seed in seeds]
    save({"heads": heads, "bars": (bars := [judge("heads", heads, 1)])})
    return bars
'''


def test_a_study_is_one_file_found_by_its_name(monkeypatch, tmp_path, capsys):
    program = load_program("study")
    plant(monkeypatch, tmp_path, experiments.studies, "coins", COINS)
    out = tmp_path / "found"

    def run(**flags):
        for flag, value in {"study": "coins", "out": str(out), **flags}.items():
            monkeypatch.setattr(program, f"_{flag.upper()}", SimpleNamespace(value=value))
        program.main()

    run(seeds=2, check=False)
    result = json.loads(out.with_suffix(".json").read_text())
    assert result["heads"] == [0, 4]
    assert {"command", "versions", "hardware"} < set(result)
    assert "NOT MET: heads: 0.000, at least 1" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(check=True)
    run(seeds=1, steps=3, check=False)
    assert json.loads(out.with_suffix(".json").read_text())["heads"] == [0]
    page = "# A\n<!-- study: coins -->\nold\n<!-- end of study -->\nend\n"
    assert "Not run yet." in pages.fill(page, tmp_path)
    (tmp_path / "probes").mkdir()
    out.with_suffix(".json").rename(tmp_path / "probes/coins.json")
    filled = pages.fill(page, tmp_path)
    assert "| heads | 0.000 | at least 1 | **not met** |" in filled
    assert "[coins.json](_data/probes/coins.json)" in filled
    assert pages.fill(filled, tmp_path) == filled


@pytest.mark.parametrize(
    ("study", "flags", "message"),
    [
        ("wrong", {}, "--study=wrong: unknown study; choose from .*continual, .*, noise, pareto_copy"),
        ("planted", {}, "--study=planted: unknown study"),
        ("reach", {"steps": 3}, "--steps: the study reach does not read it; remove it"),
        ("rotation", {"workdir": Path("a")}, "--workdir: the study rotation does not read it; remove it"),
        ("noise", {"check": True}, "--check: the study noise has no bars; remove it"),
        ("pareto_copy", {"check": True}, "--check: the study pareto_copy has no bars; remove it"),
        ("dictionaries", {"check": True}, "--workdir=DIR is missing: the directory for the runs of dictionaries"),
    ],
)
def test_a_study_refuses_flags_that_it_does_not_read(study, flags, message):
    flags = {"seeds": None, "steps": None, "arms": None, "workdir": None, **flags}
    with pytest.raises(UserError, match=f"^{message}"):
        protocol.arguments(protocol.find_study(study), flags, flags.pop("check", False))


def test_seeds_are_counted_from_the_first_of_the_study():
    flags = {"seeds": 2, "steps": None, "arms": ["mip"], "workdir": None}
    assert protocol.arguments(protocol.find_study("noise"), flags, False) == {"seeds": range(2), "arms": ["mip"]}
    flags |= {"arms": None, "workdir": Path("a")}
    found = protocol.arguments(protocol.find_study("dictionaries"), flags, True)
    assert found == {"seeds": range(10, 12), "workdir": Path("a")}


def test_every_section_in_a_page_is_what_its_file_makes():
    filled = {path.name: pages.fill(path.read_text(), DOCS / "_data") for path in DOCS.glob("*.md")}
    stale = [name for name, text in filled.items() if text != (DOCS / name).read_text()]
    assert not stale, "run python -m experiments.pages.results"


# Dictionaries.


def test_a_state_is_told_by_the_unit_that_was_best_on_other_sequences():
    rng = np.random.default_rng(0)
    states, half = rng.integers(3, size=3000), np.arange(3000) < 1500
    exact = np.stack([(states == state) * rng.uniform(1, 2, 3000) for state in range(3)], 1)
    noise = rng.normal(size=(3000, 3))
    assert dictionaries.best_f1(np.concatenate([noise, exact], 1), states, half) == 1
    assert dictionaries.best_f1(noise, states, half) < 0.6
    # Exact where they are chosen, and of the next state where they are measured.
    turned = np.where(half[:, None], exact, np.roll(exact, 1, axis=1))
    assert dictionaries.best_f1(turned, states, half) == 0
    rare = np.where(half, states, np.minimum(states, 1))  # state 2 is missing in a half, and does not count
    exact = np.stack([1.0 * (rare == state) for state in range(3)], 1)
    assert dictionaries.best_f1(exact, rare, half) == 1


def row(seed, cost, transition, features, channels):
    f1 = {"dictionary": features, "channels": channels, "directions": channels}
    return {"seed": seed, "site": "m", "layer": 2, "cost": cost, "spliced": {"transition": transition}, "f1": f1}


def test_the_worst_seed_meets_a_bar_or_does_not():
    rows = [row(10, 0.1, 0.95, 0.8, 0.4), row(11, 0.16, 0.91, 0.6, 0.46)]
    copies = [{"layer": 1, "right": 0.1, "other": 0.5}, {"layer": 2, "right": 0.95, "other": 0.06}]
    found = [{"select": "norm", "correlation": None}, {"select": "top_k", "correlation": 0.9}]
    checked = dictionaries.bars(rows, copies, found)
    assert [(round(bar["value"], 2), bar["met"]) for bar in checked] == [
        (0.16, False),
        (0.91, True),
        (0.14, False),
        (0.14, True),
        (0.95, True),
        (0.06, False),
        (0.0, False),
    ]
    assert protocol.verdict(checked[0]) == "NOT MET: m of layer 2: loss that a splice adds: 0.160, at most 0.15"
    assert protocol.verdict(checked[1]) == "met: m of layer 2: transition with it: 0.910, at least 0.9"


def test_the_tables_of_the_dictionaries():
    losses = {"channels": {"loss": 2.0}, "random": {"loss": 3.0}}
    f1 = dict.fromkeys(("dictionary", "channels", "directions", "sparse_channels", "random_atoms", "untrained"), 0.5)
    layers = [
        {
            "seed": seed, "site": site, "layer": 1, "cost": cost, "plain": {"loss": 1.0, "transition": 0.9},
            "spliced": {"transition": 0.8}, "ablated": {"loss": 4.0}, "spliced_controls": losses,
            "health": {"dictionary": {"nmse": 0.1}}, "f1": f1,
        }
        for seed, site, cost in ((1, "m", 0.1), (1, "gated", 0.3), (2, "m", 0.2))
    ]  # fmt: skip
    shares = dict.fromkeys(("accuracy", "queries", "right", "other", "most", "attention"), 0.25)
    atoms = {"seed": 1, "nmse": 0.2, "l0": 4.0, "recovered": 1.0, "correlation": None}
    found = [{**atoms, "select": "top_k", "k": 4}, {**atoms, "select": "norm", "norm_matching": 1 / 32}]
    text = dictionaries.section({"layers": layers, "copied": 2 * [{"layer": 2, **shares}], "planted": found})
    assert "| TokFSM | `m`, layer 1 | `gated`, layer 1 |" in text
    assert "| loss that the splice adds | 0.150 (0.100 to 0.200) | 0.300 (0.300 to 0.300) |" in text
    assert "| that of as many channels | 1.000 (1.000 to 1.000) |" in text
    assert "| selective copying | `gated`, layer 2, by seed |" in text
    assert "| to all other symbols | 0.250 0.250 |" in text
    assert "| `top_k` k 4 | 0.20 (0.20 to 0.20) | 4.00 (4.00 to 4.00) | 1.00 (1.00 to 1.00) |  |" in text
    assert text.count("`norm`") == 1
    assert dictionaries.section({"layers": layers, "planted": []}).count("|---") == 3


def test_shares_at_a_query_are_those_of_its_symbol_and_of_the_others(monkeypatch):
    """Two symbols among four elements, then two queries. Feature 1 is the strongest; the second sequence has no active
    query."""
    inputs = np.array([[1, 5, 1, 4, 2, 2], [7, 1, 6, 1, 2, 2]])
    active = np.array([[True] * 6, [True] * 4 + [False] * 2])
    gated = np.where(active[..., None], np.array([1.0, 2.0]), 0).astype(np.float32)
    terms = np.array([[0, 3.0, 1, 0, 0, 0], [-9, 1, 0, 3, 0, 0]])  # of the two queries
    asked = []

    def by_source(run, layer, taken):
        return lambda *asks: asked.append(asks) or SimpleNamespace(terms=terms, weights=terms / 4)

    monkeypatch.setattr(copied.attention, "take", lambda *_: SimpleNamespace(gated=gated, active=active))
    monkeypatch.setattr(copied.attention, "BySource", by_source)
    config = SimpleNamespace(length=4, symbols=2)
    run = SimpleNamespace(task=SimpleNamespace(config=config, evaluation_batches=lambda split: [{"inputs": inputs}]))
    encoder, none = jnp.array([[1.0, 0], [0, 1]]), jnp.zeros(2)
    atoms = Atoms(encoder, none, jnp.eye(2), none, none, jnp.zeros(()), "top_k", 2)
    found = copied.measure(run, 2, atoms)
    assert found == {"queries": 0.5, "right": 0.75, "other": 0.125, "most": 1.0, "attention": 0.75}
    ((vectors, numbers, positions),) = asked
    assert vectors.tolist() == [[0, 1], [0, 1]]
    assert (numbers.tolist(), positions.tolist()) == ([0, 0], [4, 5])


def test_controls_of_a_dictionary_keep_as_many_features():
    x = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32) + 3
    channels = dictionaries.largest_channels(x, 2)
    f = channels.encode(jnp.asarray(x))
    y = np.asarray(channels.decode(f))
    assert ((f > 0).sum(1) == 2).all()
    far = np.abs(x - x.mean(0)).argsort(1)[:, -2:]
    np.testing.assert_allclose(np.take_along_axis(y, far, 1), np.take_along_axis(x, far, 1), rtol=1e-5)
    noise = dictionaries.random_atoms(x, channels)
    error = lambda scale: np.square(x - noise.decode(noise.encode(jnp.asarray(x)) * scale)).sum()
    assert error(1.0) < min(error(0.9), error(1.1)), "the scale fits"


@pytest.mark.breadth  # test_controls_of_a_dictionary_keep_as_many_features
def test_planted_atoms_are_what_the_rows_are_made_of():
    source = planted.Planted(3, width=8, atoms=12, most=3, positions=256)
    f, (x, _) = source.features("train", 1), source.rows("train", 0, 2)
    # Products of other shapes may round otherwise, by the processor: the truth is that of float64.
    np.testing.assert_allclose(x[256:], f.astype(np.float64) @ source.directions.astype(np.float64), rtol=0, atol=5e-7)
    np.testing.assert_allclose(np.linalg.norm(source.directions, axis=1), 1, rtol=1e-5)
    assert set((f > 0).sum(1)) == {1, 2, 3}
    assert np.any(source.features("validation", 1) != f)
    found = planted.measure(source, {"select": "top_k", "k": 2, "auxiliary_k": 4}, 3, 60)
    assert found["l0"] == 2
    assert found["correlation"] is None, "as many in every row"
    assert 0 < found["nmse"] < 1
    assert 0 <= found["recovered"] <= 1


@pytest.mark.slow
def test_a_tiny_study_of_dictionaries(tmp_path):
    sizes = {"task.test_examples": 128, "task.states": 12, "task.edges": 2, "task.length": 16, "train.steps": 2}
    few = {"train.steps": 2, "train.batch_size": 64, "task.chunk": 1, "task.evaluation_batches": 1}
    few |= {"model.k": 2, "optimizer.warmup_steps": 1}
    plan = dictionaries.Plan(
        seeds=(3,),
        model={**SMALL_MODEL, **sizes, "optimizer.warmup_steps": 1},
        dictionary={**few, "model.auxiliary_k": 2},
        copy={**SMALL_MODEL, "task.test_examples": 64, "train.steps": 2, "optimizer.warmup_steps": 1},
        sites={"gated": 24},
        layers=(2,),
        planted_steps=60,
        planted_arms=[{"select": "norm"}],
    )
    saved = []
    checked = dictionaries.run(plan, tmp_path, lambda result: saved.append(json.dumps(result)))
    result = json.loads(saved[-1])
    assert result["bars"] == json.loads(json.dumps(checked))
    (layer,) = result["layers"]
    assert layer["cost"] == pytest.approx(layer["spliced"]["loss"] - layer["plain"]["loss"])
    assert {name: found["l0"] for name, found in layer["health"].items() if name != "untrained"} == {
        "dictionary": pytest.approx(2, abs=0.5),
        "channels": pytest.approx(2, abs=0.5),
        "random": pytest.approx(2, abs=0.5),
    }
    assert all(0 <= value <= 1 for value in layer["f1"].values())
    assert len(result["planted"]) == 1
    (copies,) = result["copied"]
    assert 0 <= copies["right"] + copies["other"] <= 1
    assert 0 < copies["queries"] <= 1
    assert {path.name for path in (tmp_path / "seed_3").iterdir()} == {
        "model", "model_gated_2", "untrained", "untrained_gated_2", "copy", "copy_gated_2",
    }  # fmt: skip
