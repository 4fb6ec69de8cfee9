"""Plans: exact memory of parameters, bytes on the wire as the layouts promise, groups of devices as XLA writes them."""

import dataclasses
import functools

import jax
import pytest
from test_steps import values

from configs.synthetic import gliding_digits
from experiments.training.experiment import build
from experiments.training.footprint import _abstract_batch, _axes, make_plan, step_flops
from seqboat.models.language_model import LanguageModel
from seqboat.parallel.mesh import make_mesh
from seqboat.paths import path_name
from tests.helpers import grid


@functools.cache
def sizes() -> dict[str, int]:
    """Bytes of the parameters: of those that fsdp leaves whole, of a layer's that it splits, and of the embedding."""
    found = dict.fromkeys(("whole", "layers", "embedding"), 0)
    params = jax.eval_shape(functools.partial(build(values("language model")).functions.init, 0)).params
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        split = ("kernel" in name and "logits" not in name) or "ssm/" in name
        found["embedding" if "table" in name else "layers" if split else "whole"] += 4 * leaf.size
    return found


# test_groups_of_devices_are_axes_of_the_mesh, test_products_follow_the_rate_and_are_shared_among_devices
@pytest.mark.parametrize("mesh", grid(("data", "fsdp")))
def test_memory_and_bytes_on_the_wire(mesh):
    plan, size = make_plan(build(values("language model", mesh=mesh, **{"model.remat": "layer"})), 0.5), sizes()
    total, metrics = sum(size.values()), 1024  # sums of metrics go with the gradients
    assert plan.parameters * 4 == total
    assert plan.temporary_bytes > 0
    reduced = plan.wire[mesh, "all-reduce"]
    if mesh == "data":
        assert set(plan.wire) == {("data", "all-reduce")}
        assert plan.parameter_bytes == total
        assert 2 * plan.parameter_bytes <= plan.optimizer_bytes < 2 * plan.parameter_bytes + 64
        assert 0 <= reduced - 2 * 7 / 8 * total < metrics
        return
    split = size["layers"] + size["embedding"]
    assert plan.parameter_bytes == size["whole"] + split // 8
    assert plan.wire["fsdp", "reduce-scatter"] == pytest.approx(7 / 8 * split)
    # A layer's parameters are gathered again for the backward pass.
    assert plan.wire["fsdp", "all-gather"] == pytest.approx(7 / 8 * (split + size["layers"]))
    assert 0 <= reduced - 2 * 7 / 8 * size["whole"] < metrics


def test_products_follow_the_rate_and_are_shared_among_devices():
    def flops(rate, mesh=None):
        return make_flops(values("language model", mesh=mesh), rate)

    assert flops(0.0) < flops(0.5) < flops(1.0)
    assert flops(1.0) - flops(0.5) == pytest.approx(flops(0.5) - flops(0.0))
    assert flops(0.5, "data=2,sequence=4") == pytest.approx(flops(0.5) / 8)
    assert flops(0.5, "fsdp_hidden") == flops(0.5)


def make_flops(config, rate):
    experiment = build(config)
    return step_flops(experiment, _abstract_batch(experiment), rate)


def test_two_documents_are_two_sequences_and_only_a_language_model_answers_everywhere():
    experiment = build(values("classifier"))
    batch = _abstract_batch(experiment)
    pairs = batch | {"lengths": jax.ShapeDtypeStruct((*batch["lengths"].shape, 2), "int32")}
    assert step_flops(experiment, pairs, 0.5) == 2 * step_flops(experiment, batch, 0.5)
    one_way = build(values("classifier", **{"model.causal": True, "model.norm": "layer"}))
    config = build(values("language model")).model.config
    config = dataclasses.replace(config, encoder=one_way.model.config.encoder)
    everywhere = dataclasses.replace(one_way, model=LanguageModel(config))
    elements = batch["lengths"].size * batch["inputs"].shape[1]
    answers = step_flops(everywhere, batch, 0.5) - step_flops(one_way, batch, 0.5)
    assert answers == pytest.approx(6 * elements * 8 * config.vocabulary_size)


def test_the_encoder_of_frames_counts():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    config = gliding_digits.get_config("tiny,unordered")
    config.task.update(train_examples=40, test_examples=10)
    experiment = build(config.to_dict())
    layers = experiment.model.config.encoder.layer.multiplications(8, 0.5)
    found = step_flops(experiment, _abstract_batch(experiment), 0.5)
    own = 8 * 8 * 9 * 8 + 4 * 4 * 9 * 8 * 16 + 4 * 4 * 16 * 32
    assert found == pytest.approx(6 * 32 * 8 * (layers + own))


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("sequence",)),
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", ("fsdp",)),
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("fsdp", "sequence")),
        ("replica_groups=[2,4]<=[8]", ("fsdp", "sequence")),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("replica_groups={}", ("data", "fsdp", "sequence")),
        ("source_target_pairs={{0,1},{2,3}}", ("sequence",)),
        ("source_target_pairs={{2,0},{3,1}}", ("fsdp",)),
    ],
)
def test_groups_of_devices_are_axes_of_the_mesh(groups, axes):
    assert _axes(f"%x = f32[4] all-reduce(%y), {groups}", make_mesh("data=2,fsdp=2,sequence=2")) == axes
