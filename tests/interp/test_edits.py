"""Edits of named values: at every site of every block, in every form, and what refuses to be edited."""

import dataclasses
import functools
import importlib
import pkgutil
import re

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, grid, normal, random_like, rms

import seqboat.layers
from seqboat import hyper
from seqboat.interp.edits import Force, Replace, Splice, Steer, Transcode, Without, at, each
from seqboat.layers import mega, taps, transformer
from seqboat.layers.mixers import ema
from seqboat.layers.router import RouterConfig
from seqboat.layers.seqboat import LayerConfig, SeqBoatLayer
from seqboat.models.encoder import EncoderConfig, separate
from seqboat.models.language_model import LanguageModel, LanguageModelConfig

BATCH, LENGTH, LAYERS, VOCABULARY, D = 2, 13, 2, 5, 8
TOKENS = jnp.asarray(np.random.default_rng(0).integers(VOCABULARY, size=(BATCH, LENGTH)))
LENGTHS = jnp.array([LENGTH, 9])
REAL = np.arange(LENGTH) < np.asarray(LENGTHS)[:, None]
PACKED = LayerConfig(
    D, 4, 6, mixer=ema.Config(2), window_size=3, causal=True, position="none", block_size=4, feed_forward_size=6
)
CONFIGS = {
    "packed": PACKED,
    "dense": dataclasses.replace(PACKED, form="dense"),
    "mega": mega.LayerConfig(D, 4, 6, chunk=5, causal=True, mixer=ema.Config(2), feed_forward_size=6),
    "transformer": transformer.LayerConfig(D, 2, window_size=3, causal=True, activation="learned", block_size=4),
}
EVERYWHERE = np.ones((BATCH, LENGTH), bool)


class Same(flax.struct.PyTreeNode):
    """A dictionary whose features are the channels."""

    encoder: jax.Array
    decoder: jax.Array

    def encode(self, x):
        return x

    def decode(self, f):
        return f


def same(width, *layers):
    return Same(jnp.ones((*layers, width, width)), jnp.ones((*layers, width, width)))


class Probe(Steer):
    """Scales and shifts, for a shift alone of all keys does nothing."""

    def change(self, x):
        return super().change(x * (1 + self.amount))


@functools.cache
def model_of(name):
    layer = CONFIGS[name]
    return LanguageModel(LanguageModelConfig(EncoderConfig(layer, LAYERS), VOCABULARY))


@functools.cache
def initial(name):
    return random_like(jax.eval_shape(model_of(name).init, jax.random.key(0), TOKENS, LENGTHS))


@functools.cache
def variables_of(name):
    """Parameters with which half of the elements are active, in every layer and module."""
    if name == "packed":
        return variables_of("dense")
    variables = jax.tree.map(lambda leaf: leaf, initial(name))
    if "router_logits" in widths_of(name):
        logits = variables["params"]["encoder"]["layers"]["sparse"]["configurator"]["logits"]
        for layer in range(LAYERS):
            where = EVERYWHERE if name == "dense" else True
            _, found = compiled(name)({**variables, "edits": probes(name, where=where)})
            u = np.asarray(taps.read(found["taps"], "router_logits"))[layer][REAL]
            logits["bias"] = logits["bias"].at[layer, 1::2].add(-np.median(u[..., 1] - u[..., 0], axis=0) - 1e-3)
    return variables


@functools.cache
def widths_of(name):
    """{site: the trailing axes of its values}, from the shapes of all that is published, apart from decisions."""
    apply = functools.partial(model_of(name).apply, mutable=["taps"])
    found = jax.eval_shape(lambda v: apply(v, TOKENS, LENGTHS)[1]["taps"], initial(name))
    sites = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(found)} - {"active", "confidence"}
    shapes = jax.eval_shape(lambda found: {site: taps.read(found, site) for site in sites}, found)
    assert all(shape.shape[:3] == (LAYERS, BATCH, LENGTH) for shape in shapes.values())
    return {site: shapes[site].shape[3:] for site in sorted(sites)}


def probes(name, site=None, layer=0, where=True):
    """A probe at every site, which is on in one layer of one of them."""

    def one(own, width):
        on = (np.arange(1, LAYERS + 1) == layer) & (own == site)
        on = on.reshape(-1, *[1] * np.ndim(where)) & np.asarray(where)[None]
        return Probe(jnp.asarray(on), normal(len(own), LAYERS, *width), jnp.ones(LAYERS))

    return taps.write(model_of(name), {own: one(own, width) for own, width in widths_of(name).items()})


@functools.cache
def compiled(name):
    """(variables with edits) -> logits and, of one form for all, taps."""
    mutable = [] if name == "packed" else ["taps"]
    return jax.jit(lambda variables: model_of(name).apply(variables, TOKENS, LENGTHS, mutable=mutable))


def run(name, edits=None):
    added = {} if edits is None else {"edits": edits}
    output, found = compiled(name)({**variables_of(name), **added})
    return np.asarray(output.logits), found.get("taps")


@pytest.mark.parametrize("name", grid(list(CONFIGS), "dense"))
def test_an_edit_changes_its_site_in_its_layer_and_what_follows(name):
    where = EVERYWHERE if name in ("dense", "mega") else True
    off, before = run(name, probes(name, where=where))
    for site in widths_of(name):
        logits, after = run(name, probes(name, site, 2, where))
        assert rms((logits - off)[REAL]) > 1e-6, site  # the same program: without an effect 0
        if after:
            # The first layer comes before, and what is published is before its own edit.
            for other in widths_of(name):
                np.testing.assert_array_equal(taps.read(after, other)[0], taps.read(before, other)[0])
            np.testing.assert_array_equal(taps.read(after, site), taps.read(before, site))


@pytest.mark.breadth  # test_an_edit_changes_its_site_in_its_layer_and_what_follows
def test_packed_rows_are_edited_as_all_rows_are():
    for site in (None, *widths_of("dense")):
        dense, packed = (
            run(name, probes(name, site, 1, where))[0] for name, where in (("dense", EVERYWHERE), ("packed", True))
        )
        assert_close(packed[REAL], dense[REAL])


def test_a_located_edit_changes_one_element_and_what_reads_it():
    off = run("dense", probes("dense", where=EVERYWHERE))[0]
    here = EVERYWHERE & (np.arange(LENGTH) == 6) & (np.arange(BATCH) == 0)[:, None]
    for site in widths_of("dense"):
        logits = run("dense", probes("dense", site, 1, here))[0]
        np.testing.assert_array_equal(logits[1], off[1])
        assert_close(logits[0, :6], off[0, :6])


@pytest.mark.parametrize("name", grid(["packed", "mega", "transformer"], "packed"))
def test_without_edits_the_program_is_the_one_without_taps(name, monkeypatch):
    value = lambda variables: model_of(name).apply(variables, TOKENS, LENGTHS).logits
    text = lambda: jax.jit(lambda variables: value(variables)).lower(initial(name)).as_text()
    tapped = text()
    for module in pkgutil.iter_modules(seqboat.layers.__path__, "seqboat.layers."):
        if not module.ispkg and hasattr(found := importlib.import_module(module.name), "tap"):
            monkeypatch.setattr(found, "tap", lambda module, name, value, *beside: value)
    assert text() == tapped


BLOCKS = {
    **CONFIGS,
    "never": dataclasses.replace(PACKED, activation="never"),
    "always": dataclasses.replace(PACKED, activation="always", feed_forward_size=0),
    "nothing to choose": dataclasses.replace(PACKED, attention=False, feed_forward_size=0),
    "attention everywhere": transformer.LayerConfig(D, 2, causal=True),
    "capacity": dataclasses.replace(CONFIGS["transformer"], router=RouterConfig(rule="capacity")),
    "no feed-forward": dataclasses.replace(CONFIGS["mega"], feed_forward_size=0),
}


@pytest.mark.parametrize("name", grid(list(BLOCKS), "packed", "capacity"))
def test_a_block_has_the_sites_that_it_publishes(name):
    """`write` accepts exactly these: apart from decisions, which follow."""
    config, valid, x = BLOCKS[name], jnp.ones((1, 3), bool), jnp.zeros((1, 3, D))
    block = config.block()(config)
    variables = jax.eval_shape(block.init, jax.random.key(0), x, valid)
    found = jax.eval_shape(functools.partial(block.apply, mutable=["taps"]), variables, x, valid)[1]["taps"]
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(found)} - {"active", "confidence"}
    assert {site for sites in config.sites().values() for site in sites} == names


ROWS = dataclasses.replace(PACKED, attention=False)
X = normal(3, BATCH, LENGTH, D)


@functools.cache
def rows():
    """(edits) -> (y, taps) of one layer with row-wise modules, which compiles in a second."""
    layer = SeqBoatLayer(ROWS)
    variables = random_like(jax.eval_shape(layer.init, jax.random.key(0), X, jnp.asarray(REAL)))

    @jax.jit
    def apply(edits):
        (y, _), found = layer.apply({**variables, **edits}, X, jnp.asarray(REAL), mutable=["taps"])
        return y, found["taps"]

    return apply


def test_an_identical_splice_of_a_layer_changes_nothing():
    np.testing.assert_array_equal(rows()({"edits": {"m": Splice(True, same(D))}})[0], rows()({})[0])


class Network(flax.struct.PyTreeNode):
    """A feed-forward network as a transcoder."""

    params: dict

    encoder = property(lambda self: self.params["up"]["kernel"])
    decoder = property(lambda self: self.params["down"]["kernel"])

    def encode(self, x):
        return jax.nn.silu(x @ self.encoder + self.params["up"]["bias"][(None,) * (x.ndim - 1)])

    def decode(self, f):
        return f @ self.decoder + self.params["down"]["bias"][(None,) * (f.ndim - 1)]


@pytest.mark.breadth  # test_splicing.py: test_a_transcoder_is_spliced_where_the_network_writes
def test_a_transcoder_takes_the_place_of_the_network_and_changes_nothing_before_it():
    y, before = rows()({})
    own = random_like(jax.eval_shape(SeqBoatLayer(ROWS).init, jax.random.key(0), X, jnp.asarray(REAL)))
    params = own["params"]["feed_forward"]
    spliced = lambda params, where=True: rows()(
        {"edits": {"feed_forward": {"feed_forward_out": Transcode(jnp.asarray(where), Network(params))}}}
    )
    assert_close(spliced(params)[0], y)  # the network itself
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    changed, after = spliced(other)
    np.testing.assert_array_equal(spliced(other, False)[0], spliced(params, False)[0])
    for site in widths_of("packed").keys() & {"pre_norm", "ssm_out", "m", "skip", "router_logits", "feed_forward_out"}:
        np.testing.assert_array_equal(*(taps.read({"resid": y[None], **t}, site) for t in (before, after)))
    active, confidence = (np.asarray(after["sparse"][name])[..., 0] for name in ("active", "confidence"))
    network = Network(other)
    written = network.decode(network.encode(after["m"]))
    expected = jax.nn.silu(X + after["skip"] + jnp.where(active, confidence, 0)[..., None] * written)
    assert_close(np.asarray(changed)[REAL], np.asarray(expected)[REAL])
    moved = (np.asarray(changed) != np.asarray(y)).any(-1)
    assert 0 < (active & REAL).sum() < REAL.sum()
    np.testing.assert_array_equal(moved[REAL], active[REAL])


@pytest.mark.parametrize("active", [True, False])
def test_a_decision_is_forced_at_one_element_and_nowhere_else(active):
    y, before = rows()({})
    sparse = before["sparse"]
    b, t = np.argwhere((np.asarray(sparse["active"])[..., 0] != active) & REAL)[0]
    here = np.zeros((BATCH, LENGTH), bool)
    here[b, t] = here[1, LENGTH - 1] = True  # padding stays inactive
    edits = {"sparse": {"configurator": {"router_logits": Force(jnp.asarray(here), jnp.asarray([active]))}}}
    forced, after = rows()({"edits": edits})
    expected = np.where((here & REAL)[..., None], active, sparse["active"])
    np.testing.assert_array_equal(after["sparse"]["active"], expected)
    assert_close(after["sparse"]["confidence"][b, t], sparse["confidence"][b, t])  # of the same size of margin
    changed = (np.asarray(forced) != np.asarray(y)).any(-1) & REAL
    np.testing.assert_array_equal(changed, here & REAL)


def test_a_margin_of_zero_is_forced_too():
    u = jnp.stack([jnp.array([2.0, 1e6, -3.0, 0.0])] * 2, -1)[None, :, None]
    for active in (True, False):
        forced = Force(True, active)(u)
        np.testing.assert_array_equal(forced[..., 1] > forced[..., 0], np.full((1, 4, 1), active))


@pytest.mark.parametrize("located", grid((False, True), True))
def test_edits_of_values_and_of_their_rows(located):
    """What every edit computes, of (B, L, W) and of the same values as rows (B L, W)."""
    x, which = np.asarray(X), np.array([1, 4])
    where = REAL if located else True
    value, direction, amount = normal(4, *X.shape), normal(5, D), normal(6, BATCH, LENGTH)
    atoms = Same(jnp.eye(D), normal(7, D, D))
    inside = np.broadcast_to(np.asarray(where)[..., None], (BATCH, LENGTH, 1))
    for edit, expected in (
        (Replace(where, direction), np.broadcast_to(direction, x.shape)),
        (Replace(where, value) if located else Replace(where, 0.5), value if located else np.full_like(x, 0.5)),
        (Steer(where, direction, 2.0), x + 2 * np.asarray(direction)),
        (Splice(where, same(D)), x),
        (Without(where, atoms, which), x - x[..., which] @ np.asarray(atoms.decoder)[which]),
        (Without(where, atoms, 2), x - x[..., 2:3] * np.asarray(atoms.decoder)[2]),
    ):
        for form in (X, X.reshape(-1, D)):
            assert_close(edit(form).reshape(X.shape), np.where(inside, expected, x), 1e-6)
    shifted = Steer(where, direction, amount)(X.reshape(-1, D)).reshape(X.shape)
    assert_close(shifted, np.where(inside, x + np.asarray(amount)[..., None] * np.asarray(direction), x), 1e-6)


def test_at_and_each_number_layers_from_one():
    edit = at(2, 3, Steer(jnp.ones((BATCH, LENGTH), bool), normal(0, D), 1.0))
    np.testing.assert_array_equal(edit.where.any((1, 2)), [False, True, False])
    assert edit.direction.shape == (3, D)
    both = each([Replace(True, 0.0), Replace(False, 1.0)])
    np.testing.assert_array_equal(both.where, [True, False])
    np.testing.assert_array_equal(both.value, [0, 1])


def cut(edit):
    return lambda: jax.eval_shape(lambda: run("packed", taps.write(model_of("packed"), edit)))


NARROW = Same(jnp.ones((6, D)), jnp.ones((D, 6)))
REFUSALS = {
    "another site": (
        cut({"attention": at(1, 2, Replace(True, 0.0))}),
        "there is no site 'attention' in this model; it",
    ),
    "not of these layers": (cut({"m": at(1, 3, Replace(True, 0.0))}), "a leading axis of the model's 2 layers"),
    "no axis of layers": (cut({"m": Replace(True, 0.0)}), "use interp.edits.at or each"),
    "a layer beyond": (lambda: at(3, 2, Replace(True, 0.0)), "layer=3: layers are numbered from 1 to 2"),
    "of two kinds": (lambda: each([Replace(True, 0.0), Force(True, True)]), "of one kind and of the same shapes"),
    "located in packed rows": (cut({"q": at(1, 2, Replace(EVERYWHERE, 0.0))}), 'q: packed rows.* form="dense"'),
    "located elsewhere": (cut({"m": at(1, 2, Replace(EVERYWHERE[:1], 0.0))}), "located at 1 x 13 elements, and the v"),
    "a value of another shape": (cut({"m": at(1, 2, Replace(True, jnp.ones(6)))}), r"\(6,\) does not broadcast to"),
    "a direction of another width": (cut({"m": at(1, 2, Steer(True, jnp.ones(6), 1.0))}), r"direction of shape \(6,\)"),
    "a dictionary of another site": (
        cut({"m": at(1, 2, Splice(True, NARROW))}),
        "from 6 to 6 channels at a value of 8",
    ),
    "features of another site": (
        cut({"m": at(1, 2, Without(True, NARROW, 0))}),
        "from 6 to 6 channels at a value of 8",
    ),
    "a transcoder of another width": (
        cut({"feed_forward_out": at(1, 2, Transcode(True, NARROW))}),
        "Transcode: a dictionary from 6 to 6 channels at a value of 8, which reads one of 8",
    ),
    "a transcoder from elsewhere": (
        cut({"feed_forward_out": at(1, 2, Transcode(True, same(D), "gated"))}),
        "feed_forward_out: cannot be computed from gated here: its rows are a function of feed_forward_hidden, m",
    ),
    "a transcoder to elsewhere": (
        cut({"resid": at(1, 2, Transcode(True, same(D)))}),
        "edits: resid: cannot be computed from m here: no other value is at hand",
    ),
    "a transcoder by itself": (lambda: Transcode(True, same(D))(X), "Transcode: needs the value of m beside the one"),
    "another number of modules": (cut({"router_logits": at(1, 2, Force(True, np.ones(3, bool)))}), "for 2 modules"),
    "a decision elsewhere": (cut({"m": at(1, 2, Force(True, True))}), "decisions are forced at router_logits"),
    "no such tap": (lambda: taps.read(run("dense", probes("dense", where=EVERYWHERE))[1], "n"), "there is no n; there"),
}


# "a value of another shape" and "a dictionary of another site" are these.
ALIKE = ("a direction of another width", "features of another site", "a transcoder of another width")


@pytest.mark.parametrize(("wrong", "message"), grid(REFUSALS, *(name for name in REFUSALS if name not in ALIKE)))
def test_what_does_not_fit_is_refused_in_one_line(wrong, message):
    with pytest.raises(ValueError, match=message) as found:
        wrong()
    assert "\n" not in str(found.value)


def test_an_edit_of_another_shape_is_refused():
    cutting = jax.tree_util.Partial(lambda x: x[..., :1])
    with pytest.raises(ValueError, match=re.escape("edits: m: changed from (2, 13, 8) to (2, 13, 1)")):
        rows()({"edits": {"m": cutting}})


# Other ways to execute the same model, each compiled with probes at all sites of packed rows.


def stream(variables):
    """The model over pieces: short ones in place, and a packed one."""
    state, found = model_of("packed").initial_state(BATCH), []
    for first, last in ((0, 5), (5, 10), (10, 13)):
        count = jnp.clip(LENGTHS - first, 0, last - first)
        given = (jnp.pad(TOKENS[:, first:last], ((0, 0), (0, 5 - (last - first)))), count, state)
        (output, state), _ = model_of("packed").apply(variables, *given, method="stream", mutable=["taps"])
        found.append(output.logits[:, : last - first])
    return jnp.concatenate(found, 1)


def one_by_one(variables):
    return model_of("packed").apply(separate(variables), TOKENS, LENGTHS).logits


@pytest.mark.breadth  # the packed and the dense form: one tap serves all
@pytest.mark.parametrize("other", [stream, one_by_one])
def test_other_executions_are_edited_alike(other):
    run_other = jax.jit(other)
    for site in (None, *widths_of("dense")):
        edits = probes("packed", site, 2)
        got = run_other({**variables_of("packed"), "edits": edits})
        assert_close(np.asarray(got)[REAL], run("packed", edits)[0][REAL])


@pytest.mark.breadth  # as above, and that the collection passes through a hypernetwork
@pytest.mark.parametrize("per_example", [False, True])
def test_the_target_of_a_hypernetwork_is_edited_alike(per_example):
    condition = jnp.array([[0.3]] * BATCH) if per_example else jnp.array([0.3])
    spec = hyper.spec(model_of("packed"), TOKENS, LENGTHS, select="**/skip_projection/kernel")
    config = hyper.HyperConfig(hidden=(4,))
    model, shared = (
        hyper.Hyper(model_of("packed"), hyper.HyperNetwork(spec, config), each) for each in (per_example, False)
    )
    made = random_like(jax.eval_shape(shared.init, jax.random.key(0), jnp.array([0.3]), TOKENS, LENGTHS))
    edits = {site: at(2, 2, Steer(True, normal(1, *width), 1.0)) for site, width in widths_of("packed").items()}
    apply = jax.jit(lambda v, edits: model.apply({**v, "edits": edits}, condition, TOKENS, LENGTHS).logits)
    plain = hyper.bind(shared, made, jnp.array([0.3]))
    expected, _ = compiled("packed")({**plain, "edits": taps.write(model_of("packed"), edits)})
    assert_close(np.asarray(apply(made, taps.write(model, edits)))[REAL], np.asarray(expected.logits)[REAL])


@pytest.mark.breadth  # test_an_identical_splice_of_a_layer_changes_nothing
@pytest.mark.parametrize("name", ["packed", "dense", "stream", "no remat"])
def test_an_identical_splice_at_m_changes_nothing(name):
    config = EncoderConfig(PACKED, LAYERS, "none") if name == "no remat" else model_of("packed").config.encoder
    model = model_of("dense") if name == "dense" else LanguageModel(LanguageModelConfig(config, VOCABULARY))
    forward = stream if name == "stream" else lambda variables: model.apply(variables, TOKENS, LENGTHS).logits
    splice = taps.write(model, {"m": each([Splice(True, same(D))] * LAYERS)})
    spliced, plain = (jax.jit(forward)({**variables_of("packed"), **edits}) for edits in ({"edits": splice}, {}))
    np.testing.assert_array_equal(np.asarray(spliced)[REAL], np.asarray(plain)[REAL])


@pytest.mark.breadth  # forward values in every form
def test_gradients_reach_the_edit_of_the_edited_layer_and_no_other():
    variables, model = variables_of("packed"), model_of("packed")

    def value(directions):
        edits = {
            site: each([Steer(layer == 1, own[layer], 1.0) for layer in (0, 1)]) for site, own in directions.items()
        }
        output = model.apply({**variables, "edits": taps.write(model, edits)}, TOKENS, LENGTHS)
        return (output.logits * normal(9, BATCH, LENGTH, VOCABULARY)).sum()

    widths = {site: width for site, width in widths_of("packed").items() if site != "k"}  # where a shift does nothing
    found = jax.jit(jax.grad(value))({site: jnp.zeros((LAYERS, *width)) for site, width in widths.items()})
    for site, gradient in found.items():
        assert not np.asarray(gradient[0]).any(), site
        assert rms(gradient[1]) > 1e-6, site
