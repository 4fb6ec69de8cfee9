"""Dictionaries as models: units, terms, dead features, and the arrays that they leave."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqboat.interp.dictionaries import SELECTIONS
from seqboat.layers.terms import collect
from seqboat.models import dictionary
from seqboat.models.dictionary import Dictionary, DictionaryConfig, atoms
from tests.helpers import assert_close, grid, normal

WIDTH, SIZE, ROWS = 6, 16, 12
SMALL = DictionaryConfig(width=WIDTH, target_width=None, size=SIZE, k=3, auxiliary_k=4, dead_after=30)
LENGTHS = jnp.ones(ROWS, jnp.int32)
INPUTS = 3 * normal(0, ROWS, 1, WIDTH) + 2
WEIGHTED = {"sparsity": 0.5, "norm_matching": 0.25}


def random_variables(config: DictionaryConfig) -> dict:
    model = Dictionary(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), INPUTS[:1], LENGTHS[:1])
    draw = lambda path, leaf: normal(len(jax.tree_util.keystr(path)), *leaf.shape) / 2
    params = jax.tree_util.tree_map_with_path(draw, shapes["params"])
    stats = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes["batch_stats"])
    stats |= {"centre": normal(7, WIDTH), "norm": jnp.float32(5.0), "batches": jnp.float32(dictionary.SETTLING)}
    if "threshold" in stats:
        stats["threshold"] = jnp.float32(0.8)
    return {"params": params, "batch_stats": stats}


def train(config: DictionaryConfig, variables: dict, inputs=INPUTS):
    """The output and what training changes."""
    return jax.jit(
        lambda variables, inputs: Dictionary(config).apply(
            variables, inputs, LENGTHS, True, mutable=["batch_stats", "terms"]
        )
    )(variables, inputs)


# Selections: tests/interp/test_dictionaries.py.
@pytest.mark.parametrize(
    ("select", "target_width"),
    grid([*((select, None) for select in SELECTIONS), ("top_k", 4)], ("batch_top_k", None), ("top_k", 4)),
)
def test_the_arrays_of_a_dictionary_compute_what_it_does(select, target_width):
    """In the units of the inputs: centre and scale are folded away."""
    own = {"auxiliary": 0.0} if target_width else {}
    config = dataclasses.replace(SMALL, select=select, target_width=target_width, **own)
    variables = random_variables(config)

    @jax.jit
    def run(variables):
        found = atoms(variables, config)
        f = found.encode(INPUTS[:, 0])
        return Dictionary(config).apply(variables, INPUTS, LENGTHS), found, f, found.decode(f)

    out, found, f, decoded = run(variables)
    assert_close(decoded, out.logits[:, 0])
    assert (f > 0).sum(1).tolist() == out.l0.tolist()
    assert_close(jnp.linalg.norm(found.decoder, axis=1), jnp.ones(SIZE))
    assert out.layers.elements.tolist() == [ROWS]
    assert float(out.l0.mean()) == 3 if select == "top_k" else 0 < float(out.l0.mean()) < SIZE


def test_atoms_have_length_1_and_no_gradient_along_themselves():
    variables = random_variables(SMALL)

    def loss(params):
        out = Dictionary(SMALL).apply({**variables, "params": params}, INPUTS, LENGTHS)
        return jnp.square(out.logits - INPUTS).sum()

    gradient = jax.jit(jax.grad(loss))(variables["params"])["decoder"]
    used = np.linalg.norm(gradient, axis=1) > 0
    assert used.any()
    along = (gradient * variables["params"]["decoder"]).sum(1) / jnp.linalg.norm(gradient, axis=1)
    assert np.abs(along[used]).max() < 1e-4


def test_the_first_batches_decide_the_units(monkeypatch):
    monkeypatch.setattr(dictionary, "SETTLING", 2)
    stats = jax.jit(Dictionary(SMALL).init)(jax.random.key(0), INPUTS[:1], LENGTHS[:1])
    assert not stats["batch_stats"]["centre"].any()
    run = jax.jit(
        lambda variables, inputs: Dictionary(SMALL).apply(variables, inputs, LENGTHS, True, mutable=["batch_stats"])[1]
    )
    batches = [normal(seed, ROWS, 1, WIDTH) + seed for seed in (1, 2, 3)]
    found = []
    for batch in batches:
        stats = {**stats, **run(stats, batch)}
        found.append(stats["batch_stats"])
    assert_close(found[0]["centre"], batches[0].mean((0, 1)))
    assert_close(found[0]["norm"], jnp.linalg.norm(batches[0] - batches[0].mean(0, keepdims=True), axis=2).mean())
    assert_close(found[1]["centre"], (batches[0] + batches[1]).mean((0, 1)) / 2)
    for name in ("centre", "norm", "batches"):
        np.testing.assert_array_equal(found[2][name], found[1][name])


def test_a_transcoders_targets_have_their_own_width():
    config = dataclasses.replace(SMALL, target_width=4, auxiliary=0.0)
    shapes = jax.eval_shape(Dictionary(config).init, jax.random.key(0), INPUTS[:1], LENGTHS[:1])
    assert shapes["params"]["decoder"].shape == (SIZE, 4)
    assert shapes["params"]["encoder"].shape == (WIDTH, SIZE)


def test_the_terms_of_the_loss():
    config = dataclasses.replace(SMALL, select="relu", **WEIGHTED)
    variables = random_variables(config)
    found = collect(train(config, variables)[1]["terms"])
    assert set(found) == {"sparsity", "norm_matching"}
    trained = atoms(variables, config)
    f, scale = trained.encode(INPUTS[:, 0]), 5 / np.sqrt(WIDTH)
    norms = [jnp.linalg.norm(a, axis=1) / scale for a in (f, INPUTS[:, 0] - trained.centre[None])]
    expected = {"sparsity": f.sum() / scale / WIDTH, "norm_matching": jnp.square(norms[0] - norms[1]).sum() / WIDTH}
    for name, term in found.items():
        assert_close(term.total, expected[name])
        assert_close(term.scaled, WEIGHTED[name] * expected[name])
        assert float(term.weight) == ROWS


def test_features_that_are_dead_explain_the_error_and_no_others_do():
    variables = random_variables(SMALL)
    silent = jnp.zeros(SIZE, jnp.int32).at[jnp.array([2, 5])].set(30)

    @jax.jit
    def run(params, silent):
        def loss(params):
            stats = {**variables["batch_stats"], "silent_rows": silent}
            out, changed = Dictionary(SMALL).apply(
                {"params": params, "batch_stats": stats}, INPUTS, LENGTHS, True, mutable=["batch_stats", "terms"]
            )
            term = collect(changed["terms"])["revival"]
            return term.scaled / term.weight, (term, changed["batch_stats"]["silent_rows"], out)

        return jax.grad(loss, has_aux=True)(params)

    gradient, (term, after, out) = run(variables["params"], silent)
    moved = np.flatnonzero(np.abs(gradient["encoder"]).max(0)).tolist()
    assert moved == [2, 5]
    assert np.flatnonzero(np.abs(gradient["decoder"]).max(1)).tolist() == [2, 5]
    assert float(term.total) != float(term.weight)
    assert out.dead.tolist() == [pytest.approx(2 / SIZE)] * ROWS
    f = atoms(variables, SMALL).encode(INPUTS[:, 0])
    fired = np.asarray((f > 0).any(0))
    assert after.tolist() == np.where(fired, 0, np.minimum(np.asarray(silent) + ROWS, 30)).tolist()
    assert 0 < fired.sum() < SIZE

    gradient, (term, *_) = run(variables["params"], jnp.zeros(SIZE, jnp.int32))
    assert float(term.total) == float(term.weight)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


def test_a_batchs_threshold_is_remembered_for_rows_by_themselves():
    config = dataclasses.replace(SMALL, select="batch_top_k")
    variables = random_variables(config)
    variables["batch_stats"] |= {"batches": jnp.zeros(()), "threshold": jnp.zeros(())}
    _, changed = train(config, variables)
    after = {**variables, "batch_stats": {**variables["batch_stats"], **changed["batch_stats"]}}
    f = atoms(after, config).encode(INPUTS[:, 0])
    assert (f > 0).sum() == 3 * ROWS, "the first batch's own threshold"
    assert_close(atoms(after, config).encode(INPUTS[:2, 0]), f[:2])


# What each field changes of a program.
KNOBS = {
    "size": 17,
    "select": "norm",
    "k": 4,
    "sparsity": 0.1,
    "norm_matching": 0.1,
    "dead_after": 31,
    "auxiliary": 0.1,
    "auxiliary_k": 5,
}


def test_every_knob_does_something():
    def text(config: DictionaryConfig) -> str:
        model = Dictionary(config)
        variables = jax.eval_shape(model.init, jax.random.key(0), INPUTS[:1], LENGTHS[:1])
        apply = lambda v: model.apply(v, INPUTS, LENGTHS, True, mutable=["batch_stats", "terms"])
        return str(jax.make_jaxpr(apply)(variables))

    fields = {field.name for field in dataclasses.fields(DictionaryConfig)}
    assert set(KNOBS) == fields - {"width", "target_width"}
    expected = text(SMALL)
    for name, value in KNOBS.items():
        assert text(dataclasses.replace(SMALL, **{name: value})) != expected, name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 0}, "k=0: must be in 1..16, the size"),
        ({"k": 17}, "k=17: must be in 1..16, the size"),
        ({"auxiliary_k": 17}, "auxiliary_k=17: must be in 1..16"),
        ({"sparsity": -1.0}, "sparsity=-1.0: must not be negative"),
        ({"dead_after": 0}, "dead_after=0: must be at least 1"),
        ({"target_width": 3}, "auxiliary=0.03125: must be 0 with a target_site"),
    ],
)
def test_a_dictionary_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **fields)
