"""The guides: their Python runs, their commands and links name what exists, and the site has them and every module."""

import importlib.util
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import yaml
from ml_collections import ConfigDict

from configs import base
from experiments.pages import figures, site
from tests.helpers import grid
from tests.test_notebooks import NOTEBOOKS, cells
from tests.test_readme import python_blocks

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GUIDES = sorted(path for path in DOCS.rglob("*.md") if "_data" not in path.parts)
NAMES = [path.relative_to(ROOT).as_posix() for path in GUIDES]
TEXTS = {name: (ROOT / name).read_text() for name in (*NAMES, "README.md", "CONTRIBUTING.md", "CHANGELOG.md")}
# The text cells of notebooks, without their comment signs; tests/test_notebooks.py runs the code.
TEXTS |= {
    notebook: "\n".join(text for heading, text in cells(ROOT / notebook) if "markdown" in heading)
    for notebook in (path.relative_to(ROOT).as_posix() for path in NOTEBOOKS)
}
# Blocks that are run by another test, for they need a trained run or the registration of a task.
ELSEWHERE = {
    "docs/streaming.md": "tests/experiments/test_carry.py",
    "docs/prototypes.md": "tests/experiments/test_cases.py",
    "docs/circuits.md": "tests/experiments/test_circuits_study.py",
    "docs/extending.md": "tests/test_readme.py",
    "README.md": "tests/test_readme.py",
}

NEW = "configs/majority.py"  # a file that docs/extending.md writes


def before(page: str) -> dict:
    """The names that a page's blocks take for granted."""
    if page == "docs/export.md":
        return {"inputs": jnp.ones((1, 4), int), "lengths": jnp.array([4])}
    if page != "docs/hypernetworks.md":
        return {}
    names: dict = {"base": base, "config": base.get_config(), "key": jax.random.key(0)}
    exec(python_blocks(TEXTS["docs/how_to/add_a_hypernetwork.md"])[0], names)
    conditions = jnp.linspace(0.1, 1, 3)[:, None]
    return names | {
        "conditions": conditions,
        "loss": lambda variables, z: (names["model"].apply(variables, z, names["x"]) ** 2).mean(),
    }


PAGES = [name for name in NAMES if "```python" in TEXTS[name] and name not in ELSEWHERE]
# tests/interp, test_own_modules.py, test_exports.py, tests/hyper and test_coarse_to_fine.py run what they show.
SLOW = (
    "docs/coarse_to_fine.md",
    "docs/dictionaries.md",
    "docs/disentangle.md",
    "docs/export.md",
    "docs/how_to/add_a_hypernetwork.md",
    "docs/how_to/own_module.md",
    "docs/insight.md",
    "docs/transcoders.md",
)


@pytest.mark.parametrize("page", grid(PAGES, *(page for page in PAGES if page not in SLOW)))
def test_python_blocks_run(page, tmp_path, monkeypatch):
    names = before(page)
    shutil.copy(ROOT / "tests/golden/export.safetensors", tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    for block in python_blocks(TEXTS[page]):
        exec(block, names)
    assert jnp.isfinite(names["output"].logits if "output" in names else names["y"]).all()


def test_blocks_that_run_elsewhere_do():
    for page, test in ELSEWHERE.items():
        assert page in NAMES or page == "README.md"
        assert Path(page).name in (ROOT / test).read_text()


def commands() -> list[tuple[str, str]]:
    """(page, indented block) for every block that starts one of our programs."""
    blocks = [
        (name, block) for name, text in TEXTS.items() for block in re.findall(r"(?:^ {4}.*\n)+", text, re.MULTILINE)
    ]
    return [(name, block) for name, block in blocks if "python -m experiments." in block]


def known_flags() -> set[str]:
    sources = [path.read_text() for room in ("experiments", "examples") for path in (ROOT / room).rglob("*.py")]
    return {
        flag for source in sources for flag in re.findall(r'(?:DEFINE|define)\w*\(\s*(?:_\w+\(\), )?"(\w+)"', source)
    }


def config_of(path: str, variant: str | None) -> ConfigDict:
    spec = importlib.util.spec_from_file_location("recipe", ROOT / path)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe.get_config(variant) if variant else recipe.get_config()


def test_commands_name_flags_configs_and_fields_that_exist():
    flags, cases = known_flags(), commands()
    assert len(cases) > 20
    assert {"workdir", "out", "seeds", "against", "prompt", "parameter_dtype"} <= flags
    for page, block in cases:
        config = None
        for path, variant in re.findall(r"--config=(configs/[\w/]+\.py)(?::([\w,]+))?", block):
            config = None if path == NEW else config_of(path, variant)
        for name in re.findall(r"--(?!config[.=])([a-z]\w*)", block):
            assert name in flags or name.removeprefix("no") in flags, f"{page}: --{name}"
        for field in re.findall(r"--config\.([\w.]+)", block):
            group, _, rest = field.partition(".")
            here = config if config is not None else base.get_config()
            if group == "task" and config is None:
                continue
            while rest:
                here = here[group]
                group, _, rest = rest.partition(".")
            assert group in here, f"{page}: --config.{field}"


def test_links_and_names_exist():
    for page, text in TEXTS.items():
        for link in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"
        for path in re.findall(r"`((?:seqboat|experiments|configs|tests|launch)/[\w/]+(?:\.\w+)?)`", text):
            assert (ROOT / path).exists() or "NAME" in path, f"{page}: {path}"
        for module in re.findall(r"python -m ((?:experiments|tests|examples)\.[\w.]+\w)", text):
            assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), f"{page}: {module}"
        for config in re.findall(r"--config=(configs/[\w/]+\.py)", text):
            assert (ROOT / config).is_file() or config == NEW, f"{page}: {config}"


def anchors(text: str) -> set[str]:
    """What links to the headings of a page may say: where a code host and the site agree."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    headings = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line) for line in re.findall(r"^#+ +(.*)", text, re.MULTILINE)]
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {heading.replace(" ", "-") for heading in plain} & {re.sub(r"[-\s]+", "-", heading) for heading in plain}


def test_anchors_exist():
    found = [
        (page, link, anchor)
        for page, text in TEXTS.items()
        for link, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", text)
    ]
    assert len(found) > 10
    for page, link, anchor in found:
        target = (ROOT / page).parent / link if link else ROOT / page
        assert anchor in anchors(target.read_text()), f"{page}: {link}#{anchor}"
    assert anchors("## A [b](c)'s `d`: e & f\n## It's 2.5 so") == {"its-25-so"}


def test_every_guide_says_what_it_is_for():
    for name in (name for name in TEXTS if name.startswith(("docs/", "notebooks/"))):
        assert "**What you can do here:** " in "\n".join(TEXTS[name].splitlines()[:6]), name


def pages_of(navigation: list) -> list[str]:
    entries = [next(iter(item.values())) if isinstance(item, dict) else item for item in navigation]
    return [page for entry in entries for page in (pages_of(entry) if isinstance(entry, list) else [entry])]


def test_the_site_has_every_guide_and_every_module():
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert [next(iter(section)) for section in navigation] == ["Start", "Guides", "Results", "API", "Design"]
    guides = [name.removeprefix("docs/") for name in NAMES]
    notebooks = [site.site_path(name) for name in site.notebooks()]
    assert len(notebooks) == len(NOTEBOOKS)
    assert sorted(pages_of(navigation)) == sorted([*guides, *notebooks, "api/", "CONTRIBUTING.md", "CHANGELOG.md"])
    modules = site.modules()
    assert {"seqboat.ops.ema", "seqboat.layers.naive", "seqboat", "experiments.train", "configs.lm.enwik8"} <= set(
        modules
    )
    assert not [module for module in modules if "_byte_blocks" in module]
    reached = pages_of([site.api_navigation(package) for package in site.PACKAGES])
    assert sorted(reached) == sorted(map(site.api_page, modules))


def test_links_of_a_page_become_those_of_the_site():
    same = "![c](assets/layer.svg) [d](router.md#the-task) [e](#here) [f](http://x)"
    text = f"[a](../seqboat/ops/ema.py) [b](../tests/helpers.py) {same}"
    assert site.rewrite(text, "docs/layer.md") == f"[a](api/seqboat/ops/ema.md) [b](source/tests/helpers.py.txt) {same}"
    assert site.rewrite("[a](docs/router.md)", "CONTRIBUTING.md") == "[a](router.md)"
    assert site.rewrite("[a](../../CONTRIBUTING.md)", "docs/how_to/own_module.md") == "[a](../CONTRIBUTING.md)"
    with pytest.raises(ValueError, match=r"docs/layer\.md: the site has no page for \.\./nothing\.py"):
        site.rewrite("[a](../nothing.py)", "docs/layer.md")


def test_the_page_of_a_notebook_has_its_outputs():
    name = "notebooks/the_layer.ipynb"
    text, pictures = site.notebook_page(name)
    assert text.startswith("# The layer from its equations\n\n**What you can do here:** ")
    assert "[naive.py](../api/seqboat/layers/naive.md)" in text
    assert "[your own module](your_own_module.md)" in text
    assert "```text\nactive: [" in text
    assert list(pictures) == ["notebooks/the_layer_1.png", "notebooks/the_layer_2.png"]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures.values())
    assert text.index("](the_layer_1.png)") < text.index("](the_layer_2.png)")


def test_heavy_pages_and_foreign_scripts_are_found(tmp_path):
    (tmp_path / "big.png").write_bytes(bytes(site.MAX_PAGE_BYTES))
    (tmp_path / "a.html").write_text('<a href="https://x.org"></a><script src="//x.org/a.js"></script>')
    (tmp_path / "b.html").write_text('<img src="big.png">')
    (tmp_path / "c.html").write_text('<link rel="stylesheet" href="a.html">')
    assert [problem.split(" bytes")[0] for problem in site.problems(tmp_path)] == [
        "a.html loads //x.org/a.js",
        "b.html weighs 1,000,019",
    ]


def test_the_figures_are_what_their_files_make():
    for name, picture in figures.pictures(DOCS).items():
        assert (DOCS / "assets" / name).read_text() == picture, "run python -m experiments.pages.results"


def test_a_figure_has_a_point_for_every_seed():
    arm = figures.Arm("a & b", [(0.25, 0.9), (0.75, 0.7)], 0.8, 0.1)
    picture = figures.tradeoff([arm, arm])
    assert picture.count('r="3.5"') == 4
    assert picture.count('r="7"') == 2
    assert "a &amp; b" in picture
    assert "0.800 ± 0.100" in picture
    assert ">0.50<" in picture
