"""The results page: what it says of files, and that the one in the docs is the one that they make."""

import json
from pathlib import Path

import pytest

from experiments.common.errors import UserError
from experiments.pages import claims, tables
from experiments.pages.results import page, section, today

DOCS = Path(__file__).parents[2] / "docs"
RUN = {
    "config": {"seed": 3, "train": {"steps": 1000, "batch_size": 8}},
    "versions": {"python": "3.11", "jax": "0.10", "flax": "0.12"},
    "hardware": "1 x cpu",
    "command": "python -m experiments.train --config=configs/a.py",
    "training_seconds": 90.0,
    "test": [
        {
            "selection_metric": "bits_per_byte",
            "bits_per_byte": 2.5,
            "baseline": {"bits_per_byte": 4.75},
            "activation_rate": [0.25, 0.5],
        }
    ],
}
SEEDS = {
    **RUN,
    "seeds": [3, 4],
    "metrics": {"bits_per_byte": {"values": [2.0, 3.0], "mean": 2.5, "standard_error": 0.5}},
    "activation_rate": [[0.0, 1.0], [0.5, 0.5]],
}


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_the_page_is_what_its_files_make():
    assert (DOCS / "results.md").read_text() == page(DOCS / "_data/results"), "run python -m experiments.pages.results"


def test_a_row_names_everything(tmp_path):
    lines = section(write(tmp_path / "a_b.json", {"ours": RUN, "five": SEEDS})).splitlines()
    assert lines[0] == "## a b"
    assert "    python -m experiments.train --config=configs/a.py" in lines
    assert "| ours | 3 | 1,000 | 8 | 1.5 | bits per byte | 2.5000 | 4.7500 | 0.25 0.50 |" in lines
    assert (
        "| five | 3 to 4 | 1,000 | 8 | 1.5 | bits per byte | 2.5000 ± 0.5000 (2.000 to 3.000) | 4.7500 | 0.25 0.75 |"
        in lines
    )


def test_a_recorded_command_runs_today():
    def shown(variant, **router):
        command = f"train --config=configs/a.py{variant} --config.train.tensorboard=False --seeds=5"
        return today({"command": command, "config": {"model": {"router": router}}})

    assert shown("") == "train --config=configs/a.py --seeds=5"
    assert shown(":credit_router", eviction_cost=True) == "train --config=configs/a.py:credit_router --seeds=5"
    assert shown(":credit_router").endswith(":credit_router --seeds=5 --config.model.router.eviction_cost=False")


def test_what_was_not_tested_is_not_run(tmp_path):
    text = section(write(tmp_path / "a.json", {"ours": {**RUN, "test": []}}))
    assert "| ours | 3 | 1,000 | 8 | 1.5 | accuracy | not run |  | - |" in text


def test_pictures_and_remarks_are_found(tmp_path):
    path = write(tmp_path / "a.json", {"ours": RUN})
    assert "![" not in section(path)
    (tmp_path / "a.png").touch()
    (tmp_path / "a.md").write_text("A remark.\n")
    assert section(path).endswith("![curves of a](_data/results/a.png)\n\nA remark.\n")


@pytest.mark.parametrize("content", [{}, [], {"ours": {}}, {"ours": {**RUN, "config": 3}}])
def test_a_file_of_something_else_is_named(tmp_path, content):
    with pytest.raises(UserError, match=r"a\.json is .* experiments\.pages\.curves"):
        section(write(tmp_path / "a.json", content))


def test_tables_inside_a_page_are_made_from_their_files(tmp_path):
    path = write(
        tmp_path / "copy_seeds.json", {"none_at_all": {**SEEDS, "activation_rate": [None, None]}, "ours": SEEDS}
    )
    text = "before\n<!-- table: copy_seeds -->\nold\n<!-- end of table -->\nafter\n"
    made = tables.fill(text, tmp_path)
    assert made.startswith("before\n<!-- table: copy_seeds -->\n")
    assert made.endswith("<!-- end of table -->\nafter\n")
    assert "| none at all | 2.000 3.000 | 2.500 ± 0.500 | 2.000 | - |" in made
    assert "| ours | 2.000 3.000 | 2.500 ± 0.500 | 2.000 | 0.50, 0.50 to 0.50 |" in made
    assert (
        "Seeds from 3; where scores are missing, a seed was not run. 1 x cpu; python 3.11, jax 0.10, flax 0.12;" in made
    )
    assert tables.fill(made, tmp_path) == made
    path.write_text('{"ours": {}}')
    with pytest.raises(UserError, match=r"copy_seeds\.json is not a table of experiments\.sweep"):
        tables.fill(text, tmp_path)


def test_a_table_of_target_rates_has_what_was_asked_and_got(tmp_path):
    def run(asked, *rates):
        config = {**RUN["config"], "model": {"router": {"target_rate": asked}}}
        return {**SEEDS, "config": config, "activation_rate": rates}

    text = "<!-- table: rates -->\n<!-- end of table -->\n"
    path = write(tmp_path / "rates.json", {"a": run(0.25, [0.2, 0.32], [0.25, 0.23]), "b": run(0.5, [0.5], [0.49])})
    made = tables.fill(text, tmp_path)
    assert "| asked | got by seed | largest deviation |\n|---|---|---|---|---|---|---|---|\n" in made
    assert "| a | 2.000 3.000 | 2.500 ± 0.500 | 2.000 | 0.25, 0.24 to 0.26 | 0.25 | 0.260 0.240 | 0.010 |" in made
    assert "| 0.5 | 0.500 0.490 | 0.010 |" in made
    write(path, {"a": run(0.25, [0.2], [0.25]), "none": SEEDS})
    assert "asked" not in tables.fill(text, tmp_path), "only if every arm has a target"


def test_the_arms_of_several_files_are_one_table_by_score(tmp_path):
    def run(mean, parameters, **model):
        config = {**RUN["config"], "model": {"block": "seqboat", "window_size": 16, "activation": "learned"} | model}
        metrics = {"bits_per_byte": {"values": [mean, None], "mean": mean, "standard_error": None}}
        if "chunk" in model:
            del config["model"]["activation"]
        return {**SEEDS, "config": config, "metrics": metrics, "test": [{**RUN["test"][0], "parameters": parameters}]}

    text = "<!-- arms: some others -->\n<!-- end of arms -->\n"
    some = write(tmp_path / "some.json", {"router": run(0.75, 68_000)})
    assert tables.fill(text, tmp_path) == "<!-- arms: some others -->\n\nNot run yet.\n\n<!-- end of arms -->\n"
    others = {
        "full": run(1.0, 9, window_size=None),
        "mega": run(0.5, 9, block="mega", chunk=8),
        "no_attention": run(0.25, 9, activation="never"),
    }
    write(tmp_path / "others.json", others)
    lines = [line for line in tables.fill(text, tmp_path).splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[:2] for line in lines[1:]] == [
        ["| full", "everything"],
        ["| router", "16 keys"],
        ["| mega", "chunks of 8"],
        ["| no attention", "none"],
    ]
    assert "| bits per byte: mean ± s.e. | lowest | seeds | of |" in lines[0]
    assert lines[2] == "| router | 16 keys | 68,000 | 0.50, 0.50 to 0.50 | - | 0.750 | 1 | some |"
    alone = tables.fill(text.replace(" others", ""), tmp_path)
    assert "| router | 16 keys | 68,000 | 0.50, 0.50 to 0.50 | - | 0.750 | 1 |\n" in alone
    write(some, {"router": SEEDS})
    with pytest.raises(UserError, match=r"some\.json is not a table of experiments\.sweep"):
        tables.fill(text, tmp_path)


def test_a_claim_is_a_row_with_its_control(tmp_path):
    claim = {"claim": "ssd selects", "measure": "accuracy", "bar": "+.15", "verdict": "met", "table": "mixers"}
    results, folder = tmp_path / "results", tmp_path / "claims"
    results.mkdir()
    folder.mkdir()
    (folder / "select.json").write_text(json.dumps(claim | {"arm": "ssd", "control": "ema"}))
    run = {
        "metrics": {
            "accuracy": {"values": [0.5, None, 0.7], "mean": 0.6, "standard_error": 0.1},
            "size": {"values": [4.0], "mean": 4.0, "standard_error": None},
        },
        "test": [{"selection_metric": "accuracy", "baseline": {"size": 3.0}, "baseline_name": "a_guess"}],
        "versions": {"python": "3.11", "jax": "0.10", "flax": "0.12"},
        "hardware": "1 x cpu",
        "command": "python -m experiments.sweep",
        "seeds": [40, 41, 42],
    }
    (results / "mixers.json").write_text(json.dumps({"ema": run, "ssd": run}))
    probes = tmp_path / "probes"
    probes.mkdir()
    (probes / "reach.json").write_text(json.dumps({"lru": run, "elman": run}))
    (folder / "reach.json").write_text(json.dumps(claim | {"table": "reach", "arm": "lru", "control": "elman"}))
    named = claim | {"claim": "ssd is small", "arm": "ssd", "control": "ema", "metric": "size"}
    (folder / "size.json").write_text(json.dumps(named))
    (folder / "guess.json").write_text(json.dumps(named | {"claim": "ssd beats a guess", "control": "baseline"}))
    other = claim | {"claim": "ssd beats it", "arm": "ssd", "control": "always", "control_table": "copying"}
    (folder / "other.json").write_text(json.dumps(other))
    best = {"accuracy": {"values": [1.0], "mean": 1.0, "standard_error": None}}
    (results / "copying.json").write_text(json.dumps({"always": {**run, "metrics": best}}))
    page = claims.page(folder)
    assert "| ssd beats it | accuracy | always | 0.600 ± 0.100 (2 seeds) | 1.000 (1 seeds) | +.15 | met |" in page
    assert "- [copying.json](_data/results/copying.json): `python -m" in page
    assert "- [reach.json](_data/probes/reach.json): `python -m" in page
    assert "- [mixers.json](_data/results/mixers.json): `python -m" in page
    assert "| ssd selects | accuracy | ema | 0.600 ± 0.100 (2 seeds) | 0.600 ± 0.100 (2 seeds) | +.15 | met |" in page
    assert "| ssd is small | accuracy | ema | 4.000 (1 seeds) | 4.000 (1 seeds) | +.15 | met |" in page
    assert "| ssd beats a guess | accuracy | a guess | 4.000 (1 seeds) | 3.000 | +.15 | met |" in page
    assert "`python -m experiments.sweep`; seeds from 40; 1 x cpu" in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control": None}, "a claim needs 'control'"),
        ({"control": ""}, "a claim needs 'control'"),
        ({"control": "gru"}, "has no arm 'gru'"),
        ({"arm": "baseline"}, "has no arm 'baseline'"),
        ({"table": "other"}, "there is no table"),
        ({"control_table": "other"}, "there is no table"),
        ({"control_table": "others", "control": "baseline"}, "has no arm 'baseline'"),
    ],
)
def test_a_claim_without_a_control_is_refused(tmp_path, changes, message):
    claim = dict.fromkeys(claims.FIELDS, "x") | {"table": "mixers", "arm": "ema", "control": "ema"} | changes
    for folder in ("results", "claims"):
        (tmp_path / folder).mkdir()
    for table in ("mixers", "others"):
        (tmp_path / f"results/{table}.json").write_text(json.dumps({"ema": {}}))
    (tmp_path / "claims/one.json").write_text(json.dumps(claim))
    with pytest.raises(UserError, match=message):
        claims.page(tmp_path / "claims")


def test_a_table_without_its_file_is_not_run_yet(tmp_path):
    text = "<!-- table: rates -->\nold\n<!-- end of table -->\n"
    made = tables.fill(text, tmp_path)
    assert made == "<!-- table: rates -->\n\nNot run yet.\n\n<!-- end of table -->\n"
    assert tables.fill(made, tmp_path) == made


def test_the_tables_of_all_pages_are_what_their_files_make():
    texts = {path.name: path.read_text() for path in DOCS.glob("*.md")}
    assert {name for name, text in texts.items() if tables.BLOCK.search(text)} == {"router.md", "comparisons.md"}
    for name, text in texts.items():
        assert tables.fill(text, DOCS / "_data/results") == text, f"{name}: run python -m experiments.pages.results"


def test_commands_of_pages_do_not_overwrite_the_projects_own_files():
    command = (
        "python -m experiments.sweep --config=configs/sweeps/mqar.py --workdir=runs/mqar --out=docs/_data/results/mqar"
    )
    assert tables.for_readers(command).endswith(" --workdir=runs/mqar --out=runs/mqar")
    pages = {path.name: path.read_text() for path in DOCS.glob("*.md")}
    assert [name for name, text in pages.items() if "--out=docs/_data" in text] == []
