"""Meshes from words, rules for parameters, and what one step communicates."""

import re

import jax
import pytest
from jax.sharding import PartitionSpec
from test_steps import values

from experiments.training.experiment import build
from experiments.training.footprint import computations
from seqboat.parallel.mesh import AXES, make_mesh, mesh_sizes
from seqboat.parallel.rules import Layout, Rules


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        ("data", (8, 1, 1, 1)),
        ("ddp", (8, 1, 1, 1)),
        ("ddp=4,fsdp_hidden", (4, 1, 2, 1)),
        ("fsdp", (1, 8, 1, 1)),
        ("data=2,sequence", (2, 1, 1, 4)),
        (" fsdp_hidden = 2 , fsdp = 4 ", (1, 4, 2, 1)),
    ],
)
def test_words_make_sizes(words, sizes):
    assert mesh_sizes(words, 8) == dict(zip(AXES, sizes, strict=True))
    mesh = make_mesh(words)
    assert mesh.shape == dict(zip(AXES, sizes, strict=True))
    assert list(mesh.devices.reshape(-1)) == jax.devices()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "there is no mesh axis ''"),
        ("data=x", "mesh axis data=x: its size must be"),
        ("data=3,fsdp", "'data=3,fsdp' needs a multiple of 3 devices, there are 8"),
        ("data=16", "'data=16' needs 16 devices, there are 8"),
    ],
)
def test_words_that_make_no_mesh(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        mesh_sizes(words, 8)


def test_neighbouring_devices_share_sequences():
    mesh = make_mesh("data=4,sequence=2")
    assert [device.id for device in mesh.devices[0, 0, 0]] == [0, 1]


def layout(words, **rules):
    return Layout.of(make_mesh(words), Rules(**rules))


def test_a_parameter_is_split_by_the_names_of_its_axes():
    both = layout("fsdp=4,fsdp_hidden=2")
    assert both.of_parameter("encoder/layers/gau/projection/kernel", (2, 8, 40)) == PartitionSpec(
        None, "fsdp", "fsdp_hidden"
    )
    assert both.of_parameter("opt_state/0/mu/skip_projection/kernel", (8, 8)) == PartitionSpec("fsdp", "fsdp_hidden")
    assert both.of_parameter("norm/scale", (8,)) == PartitionSpec(None)


def test_without_a_rule_a_parameter_is_whole_where_none_is_split():
    assert layout("data=4,sequence=2").of_parameter("own/weights", (8, 6)) == PartitionSpec(None, None)


RULE_MISTAKES = [
    ({"batch": ("rows",)}, "", (), "rule batch: there is no mesh axis 'rows'"),
    ({"batch": ("data", "sequence")}, "", (), "share a mesh axis"),
    (
        {"hidden": ("fsdp",)},
        "gau/projection/kernel",
        (8, 40),
        "gau/projection/kernel (8, 40), dimension 1 (hidden): mesh axis 'fsdp' already splits another dimension of it",
    ),
    ({}, "gau/output/kernel", (10, 6), "dimension 1 (embed): 6 does not divide evenly among fsdp = 4"),
    ({}, "own/weights", (8, 8), "own/weights of 2 dimensions: no rule names its axes; add one to Rules.parameters"),
    ({}, "norm/scale", (2, 2, 8), "norm/scale has 3 dimensions; the rule 'scale' names (None,)"),
]


@pytest.mark.parametrize(("rules", "path", "shape", "message"), RULE_MISTAKES)
def test_mistakes_name_the_parameter(rules, path, shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        layout("fsdp=4,fsdp_hidden=2", **rules).of_parameter(path, shape)


# The kinds of collectives in the compiled step of each mesh.
BUDGET = {
    "ddp": {"all-reduce"},
    "fsdp": {"all-reduce", "all-gather", "reduce-scatter"},
    "sequence": {"all-reduce", "collective-permute"},
}
COLLECTIVE = re.compile(r"= \S+.* (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(")


# test_plan.py: test_groups_of_devices_are_axes_of_the_mesh; test_steps.py trains a model on split sequences, and
# test_sequence.py exchanges rows of attention.
@pytest.mark.breadth
@pytest.mark.parametrize("mesh", BUDGET)
def test_what_a_step_communicates(mesh):
    experiment = build(values("language model", mesh=mesh))
    partition = experiment.partition
    batch = partition.put(experiment.task.train_batch(0))
    state = partition.abstract(experiment.functions.init, experiment.seed)
    text = partition.compile(experiment.functions.train, state, batch, experiment.seed).as_text()
    found = [(computation, kind, line) for computation, line, kind in _collectives(text)]
    assert {kind for _, kind, _ in found} == BUDGET[mesh]
    bodies = _bodies_of_loops_over_blocks(text)
    assert bodies, "the loops over blocks of active rows were not found"
    assert not [line for computation, _, line in found if computation in bodies]
    if mesh == "ddp":  # no activation is gathered, and gradients are summed once, outside the loop over layers
        assert len(found) == 2, [line for _, _, line in found]
        assert all(computation == "ENTRY" for computation, _, _ in found)


def _collectives(text):
    for name, lines in computations(text).items():
        for line in lines:
            if match := COLLECTIVE.search(line):
                yield name, line.strip()[:160], match[1]


def _bodies_of_loops_over_blocks(text) -> set[str]:
    """The bodies, and what they call, of while loops inside the sparse modules."""
    lines = computations(text)
    found = set()
    for body in lines.values():
        for line in body:
            if " while(" in line and "sparse.advance/while" in line:
                found.add(re.search(r"body=%([\w.\-]+)", line)[1])
    grown = True
    while grown:
        text = "\n".join(line for one in found for line in lines[one])
        called = set(re.findall(r"(?:body|calls|to_apply)=%([\w.\-]+)", text))
        grown = not called <= found
        found |= called
    return found
