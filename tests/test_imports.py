"""Who may know whom: the imports of every file, read from its syntax tree.

ops <- layers <- models; seqboat knows nothing of experiments or configs; configs are values, and their base those of
the dataclasses; nobody unpickles.
common <- data <- tasks <- training <- objectives <- evaluation <- reports, benchmarks, studies <- pages <- programs;
explaining knows reports.
No circles.
"""

import ast
import functools
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STANDARD = set(sys.stdlib_module_names) - {"pickle", "_pickle", "shelve", "marshal"}
ARRAYS = {"jax", "jaxlib", "numpy", "jaxtyping"}
HELPERS = {"seqboat.choices", "seqboat.modules", "seqboat.paths"}

# What a file may import besides the standard library and its own package: the longest prefix of its path decides.
ALLOWED = {
    "seqboat": ARRAYS | {"flax", "optax", "seqboat"},
    "seqboat/__init__.py": {"seqboat.version"},
    "seqboat/version.py": set(),
    "seqboat/choices.py": set(),
    "seqboat/paths.py": {"jax"},
    "seqboat/modules.py": ARRAYS | {"flax"},
    "seqboat/ops": ARRAYS | {"scipy.fft"},
    # Not ops.window_attention, which chooses among the kernels.
    "seqboat/ops/kernels": ARRAYS | {f"seqboat.ops.{name}" for name in ("kernels", "packing", "positions", "window")},
    "seqboat/parallel": ARRAYS | {"seqboat.ops", "seqboat.paths"},
    "seqboat/layers/mixers": ARRAYS
    | {"flax", "seqboat.ops", "seqboat.parallel", "seqboat.layers.initializers", "seqboat.layers.mixer"}
    | {"seqboat.layers.mixers"},
    "seqboat/layers": ARRAYS | {"flax", "seqboat.ops", "seqboat.parallel", *HELPERS},
    "seqboat/interp": ARRAYS | {"flax", "optax", "scipy", "seqboat.ops"},
    "seqboat/models": ARRAYS
    | {"flax", "seqboat.ops", "seqboat.parallel", "seqboat.layers", "seqboat.interp", *HELPERS},
    "seqboat/models/heads": ARRAYS
    | {"flax", "seqboat.ops", "seqboat.layers", "seqboat.interp", "seqboat.models.head", *HELPERS},
    "seqboat/hyper": ARRAYS | {"flax", "optax", *HELPERS},
    "seqboat/analysis": ARRAYS | {"flax", "seqboat.ops"},
    "seqboat/interop": ARRAYS | {"seqboat.ops", "seqboat.layers", "seqboat.models", "seqboat.paths"},
    "configs": {"configs", "ml_collections"},
    # A default stands once, in its dataclass: the base is filled from them.
    "configs/base.py": {
        "ml_collections",
        "experiments.tasks.conditioned",
        "seqboat.choices",
        "seqboat.models.bottlenecked",
    }
    | {f"experiments.common.{name}" for name in ("config", "plugs")}
    | {f"experiments.training.{name}" for name in ("experiment", "models", "optimizers")},
}
# The rooms of experiments, each with those that it may import; programs are the files beside them.
ROOMS = {"common": set[str]()}
for room in ("data", "tasks", "training", "objectives", "evaluation"):
    ROOMS[room] = set(ROOMS)
for room in ("reports", "benchmarks", "studies"):
    ROOMS[room] = {"common", "data", "tasks", "training", "evaluation"}
ROOMS["explaining"] = ROOMS["reports"] | {"reports"}
ROOMS["pages"] = set(ROOMS)
PROGRAMS = {
    "train",
    "evaluate",
    "generate",
    "report",
    "explain",
    "export",
    "plan",
    "benchmark",
    "prepare",
    "study",
    "sweep",
    "probe",
}
UNSAFE = {"pickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}


def files(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def called(node: ast.Call) -> str:
    """The last name of what is called: that of a plain or a dotted name, without writing it out."""
    if isinstance(node.func, ast.Name):
        return node.func.id
    return node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func).split(".")[-1]


def imports_by_name(node: ast.Call) -> bool:
    return called(node) in ("__import__", "import_module") and (
        ast.unparse(node.func) in ("__import__", "importlib.import_module")
    )


@functools.cache
def imports(source: str, package: str) -> frozenset[str]:
    """Every module that a source imports, anywhere in it; relative ones are resolved against its package."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, node.module] if node.module else parents)
            # `from seqboat import layers` imports seqboat.layers.
            local = module.split(".")[0] in ("seqboat", "experiments", "configs")
            found |= {f"{module}.{alias.name}" for alias in node.names} if local else {module}
        elif isinstance(node, ast.Call) and imports_by_name(node):
            found.add(node.args[0].value if isinstance(node.args[0], ast.Constant) else "?")
    return frozenset(found)


def within(module: str, packages: set[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def strangers(source: str, path: str) -> set[str]:
    """What a file of seqboat or configs imports and may not."""
    folder = max((name for name in ALLOWED if within(path.replace("/", "."), {name.replace("/", ".")})), key=len)
    own = path.removesuffix(".py").replace("/", ".").rsplit(".", 1)[0]
    known = ALLOWED[folder] | STANDARD | ({own} if folder.count("/") == 1 and not folder.endswith(".py") else set())
    return {module for module in imports(source, own) if not within(module, known)}


def climbs(source: str, path: str) -> set[str]:
    """What a file of experiments imports from a room above its own, beside it, or from a program."""
    parts = Path(path).with_suffix("").parts
    room = parts[1] if len(parts) > 2 else ""
    allowed = ROOMS[room] | {room} if room else set(ROOMS)
    own = ".".join(parts[:-1])
    inside = [module.split(".") for module in imports(source, own) if within(module, {"experiments"})]
    return {".".join(names) for names in inside if len(names) > 1 and names[1] not in allowed}


def circles(packages: str) -> list[list[str]]:
    """Modules that import one another at their head, in groups."""
    graph = {}
    for path in files(packages):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        head = ast.Module([node for node in ast.parse(path.read_text()).body if "Import" in type(node).__name__], [])
        graph[name] = imports(ast.unparse(head), name.rpartition(".")[0])
    reached = {name: {name} for name in graph}
    edges = {name: {other for other in graph if within_any(other, found)} for name, found in graph.items()}
    for _ in graph:
        for name in graph:
            reached[name] |= {far for near in edges[name] for far in reached[near] | {near}}
    return [sorted(edges[name]) for name in graph if any(name in reached[near] for near in edges[name] - {name})]


def within_any(module: str, found: frozenset[str]) -> bool:
    """Whether an import of `found` is of this module, or of a name in it."""
    return any(imported == module or imported.rpartition(".")[0] == module for imported in found)


def touches_files(source: str) -> set[str]:
    """Calls that open a file: by name, as a method of a path, or through numpy."""
    readers = {
        "open",
        "read_text",
        "read_bytes",
        "write_text",
        "write_bytes",
        "load",
        "save",
        "savez",
        "loadtxt",
        "memmap",
    }
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return {ast.unparse(call.func) for call in calls if called(call) in readers}


LIBRARY = [str(path.relative_to(ROOT)) for path in files("seqboat")]
VALUES = [str(path.relative_to(ROOT)) for path in files("configs")]


@pytest.mark.parametrize("path", [*LIBRARY, *VALUES])
def test_every_file_imports_only_whom_it_may_know(path):
    assert strangers((ROOT / path).read_text(), path) == set()


@pytest.mark.parametrize("path", files("experiments"), ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_downward(path):
    assert climbs(path.read_text(), str(path.relative_to(ROOT))) == set()


def test_there_are_no_circles():
    assert circles("seqboat") == []
    assert circles("experiments") == []


def test_outside_of_the_rooms_are_the_programs_alone():
    folder = ROOT / "experiments"
    assert {path.stem for path in folder.glob("*.py")} == PROGRAMS | {"__init__"}
    assert {path.parent.name for path in folder.glob("*/__init__.py")} == set(ROOMS)


@pytest.mark.parametrize(
    ("path", "source", "found"),
    [
        ("experiments/data/planted.py", "from experiments.tasks import base", {"experiments.tasks.base"}),
        ("experiments/training/planted.py", "import experiments.evaluation.seeds", {"experiments.evaluation.seeds"}),
        (
            "experiments/studies/planted.py",
            "from experiments.reports.page import page",
            {"experiments.reports.page.page"},
        ),
        ("experiments/pages/planted.py", "from experiments.train import main", {"experiments.train.main"}),
        ("experiments/pages/planted.py", "from experiments.reports import page", set()),
        ("experiments/planted.py", "from experiments.common import cli\nimport experiments.pages.curves", set()),
        ("experiments/planted.py", "from experiments.evaluate import main", {"experiments.evaluate.main"}),
    ],
)
def test_the_check_finds_a_planted_climb(path, source, found):
    assert climbs(source, path) == found


@pytest.mark.parametrize("path", LIBRARY)
def test_the_library_opens_no_file(path):
    assert touches_files((ROOT / path).read_text()) == set()


@pytest.mark.parametrize("path", files("seqboat", "experiments", "configs"), ids=lambda p: str(p.relative_to(ROOT)))
def test_nobody_imports_what_runs_code_on_loading(path):
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    assert not {module for module in imports(path.read_text(), package) if within(module, UNSAFE)}


def test_there_is_something_to_check():
    for folder in ("ops", "layers", "models", "interop", "analysis"):
        assert [path for path in LIBRARY if path.startswith(f"seqboat/{folder}/")]
    assert "configs/base.py" in VALUES


@pytest.mark.parametrize(
    ("path", "source", "found"),
    [
        ("seqboat/ops/planted.py", "import flax.linen as nn", {"flax.linen"}),
        ("seqboat/ops/planted.py", "from seqboat.layers.ema import EMA", {"seqboat.layers.ema.EMA"}),
        ("seqboat/ops/planted.py", "from seqboat import layers", {"seqboat.layers"}),
        ("seqboat/ops/planted.py", "from ..layers import ema", {"seqboat.layers.ema"}),
        ("seqboat/ops/planted.py", "import jax, math\nfrom seqboat.ops import ema\nfrom . import s4d", set()),
        (
            "seqboat/layers/planted.py",
            "def f():\n    from seqboat.models.encoder import Encoder",
            {"seqboat.models.encoder.Encoder"},
        ),
        (
            "seqboat/layers/planted.py",
            "import flax\nfrom seqboat.ops import ema\nfrom seqboat.layers import norm",
            set(),
        ),
        ("seqboat/models/planted.py", "import experiments.train", {"experiments.train"}),
        ("seqboat/models/planted.py", "from seqboat.layers.norm import NORMS\nimport optax", {"optax"}),
        (
            "seqboat/ops/kernels/planted.py",
            "from seqboat.ops.window import Window\nfrom seqboat.ops.window_attention import attend",
            {"seqboat.ops.window_attention.attend"},
        ),
        ("seqboat/hyper/planted.py", "from seqboat.layers import gau", {"seqboat.layers.gau"}),
        ("seqboat/parallel/planted.py", "from seqboat.models import encoder", {"seqboat.models.encoder"}),
        ("seqboat/interop/planted.py", "import torch\nimport pickle", {"torch", "pickle"}),
        (
            "seqboat/planted.py",
            "import absl, orbax.checkpoint, grain, tensorflow",
            {"absl", "orbax.checkpoint", "grain", "tensorflow"},
        ),
        (
            "seqboat/planted.py",
            "import importlib\nimportlib.import_module('tensorflow_datasets')",
            {"tensorflow_datasets"},
        ),
        ("configs/lra/planted.py", "import jax\nfrom configs import base\nimport ml_collections", {"jax"}),
        ("configs/planted.py", "from seqboat import version", {"seqboat.version"}),
        (
            "configs/planted.py",
            "from experiments.training.optimizers import OptimizerConfig",
            {"experiments.training.optimizers.OptimizerConfig"},
        ),
        (
            "configs/base.py",
            "import jax\nfrom experiments.training.optimizers import OptimizerConfig\nfrom experiments import train",
            {"jax", "experiments.train"},
        ),
    ],
)
def test_the_check_finds_a_planted_import(path, source, found):
    assert strangers(source, path) == found


def test_the_check_finds_a_planted_file():
    assert touches_files("with open('x') as f: pass") == {"open"}
    assert touches_files("np.load('x'); Path('x').read_text()") == {"np.load", "Path('x').read_text"}
    assert touches_files("x.reshape(3)") == set()
