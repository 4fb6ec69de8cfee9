"""Frames: the convolutional encoder by hand, what clips may depend on, streams, and mistakes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, normal, random_like

from experiments.common.errors import UserError
from experiments.tasks.gliding_digits import Config as GlidingDigits
from experiments.training.models import build_model
from seqboat.layers.block import Block, BlockConfig
from seqboat.layers.mixers import elman
from seqboat.layers.router import no_decisions
from seqboat.layers.seqboat import LayerConfig
from seqboat.models.encoder import EncoderConfig
from seqboat.models.frames import FrameEncoder, Frames, FramesConfig
from seqboat.models.heads import prototypes
from seqboat.parallel.rules import SINGLE_DEVICE, Layout, Rules

WIDTH, CLASSES, BATCH, LENGTH = 6, 3, 3, 7
FRAME, FILTERS = (5, 4, 2), (3, 2)


@dataclasses.dataclass(frozen=True)
class RunningConfig(BlockConfig):
    """A block that compiles in no time, and may split no sequences: y_t = tanh(x_1 + ... + x_t), or tanh(x_t)."""

    features: int = WIDTH
    ordered: bool = True
    causal: bool = True
    norm_placement: str = "post"
    dropout: float = 0.0
    dtype: str = "float32"
    layout: Layout = SINGLE_DEVICE

    def block(self):
        return Running


class Running(Block):
    def initial_state(self, batch):
        if not self.config.causal:
            raise ValueError("causal=False: it looks ahead")
        return jnp.zeros((batch, WIDTH))

    def advance(self, x, valid, train, state, threshold=None):
        x = jnp.where(valid[..., None], x, 0)
        sums = (jnp.cumsum(x, 1) if self.config.ordered else x) + (0 if state is None else state[:, None])
        after = None if state is None else sums[:, -1]
        return jnp.tanh(sums), (no_decisions(valid.sum().astype(jnp.float32)), after)


LAYER = RunningConfig()
CLIP = FramesConfig(EncoderConfig(LAYER, 1, remat="none"), CLASSES, 40, "clip", FRAME, FILTERS)
FRAMEWISE = dataclasses.replace(CLIP, answer="frame")
X = normal(0, BATCH, LENGTH, 40)
LENGTHS = jnp.array([7, 4, 0])
VALID = np.arange(LENGTH) < np.array([7, 4, 0])[:, None]


def variables_of(config):
    return random_like(jax.eval_shape(Frames(config).init, jax.random.key(0), X, LENGTHS))


def convolve(x, kernel, bias):
    """x (H, W, C) with a 3 x 3 kernel (3, 3, C, K) at stride 2, zeros around the image, and a ReLU."""
    sizes = [-(-n // 2) for n in x.shape[:2]]
    before = [max(2 * (out - 1) + 3 - n, 0) // 2 for out, n in zip(sizes, x.shape, strict=False)]
    padded = np.zeros((x.shape[0] + 4, x.shape[1] + 4, x.shape[2]))
    padded[before[0] : before[0] + x.shape[0], before[1] : before[1] + x.shape[1]] = x
    y = np.zeros((*sizes, kernel.shape[-1]))
    for i, j in np.ndindex(*sizes):
        patch = padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        y[i, j] = np.maximum(np.einsum("ijc,ijck->k", patch, kernel) + bias, 0)
    return y


def test_the_frame_encoder_by_hand():
    module = FrameEncoder(FRAME, FILTERS, WIDTH)
    variables = random_like(jax.eval_shape(module.init, jax.random.key(0), X))
    y = jax.jit(module.apply)(variables, X)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    positive = []
    for b, t in ((0, 0), (2, 6)):
        x = np.asarray(X[b, t], np.float64).reshape(FRAME)
        for index in range(len(FILTERS)):
            x = convolve(x, **params[f"convolution_{index}"])
            positive.append(x.ravel() > 0)
        expected = x.ravel() @ params["projection"]["kernel"] + params["projection"]["bias"]
        np.testing.assert_allclose(y[b, t], expected, rtol=1e-4, atol=1e-5)
    assert 0.2 < np.concatenate(positive).mean() < 0.9


@functools.cache
def computed():
    """Everything that is compared, from one compiled program."""
    variables, later = variables_of(CLIP), (np.arange(LENGTH) > 3)[None, :, None]
    cases = {
        "plain": X,
        "padding": jnp.where(VALID[..., None], X, jnp.nan),
        "later": jnp.where(later, normal(1, BATCH, LENGTH, 40), X),
        "mates": X.at[jnp.array([0, 2])].set(normal(2, 2, LENGTH, 40)),
    }
    state = Frames(FRAMEWISE).initial_state(BATCH)

    @jax.jit
    def run(variables, x):
        def clip(params, x):
            return Frames(CLIP).apply({"params": params}, x, LENGTHS).logits

        def case(x):
            whole, pull = jax.vjp(clip, variables["params"], x)
            return whole, pull(jnp.ones_like(whole)), Frames(FRAMEWISE).apply(variables, x, LENGTHS).logits

        def feed(state, piece):
            output, state = Frames(FRAMEWISE).apply(variables, *piece, state, method="stream")
            return state, output.logits

        pieces = (X.reshape(BATCH, LENGTH, 1, 40).swapaxes(0, 1), jnp.asarray(VALID.T, jnp.int32))
        features = FrameEncoder(FRAME, FILTERS, WIDTH).apply({"params": variables["params"]["embedding"]}, X)
        return jax.lax.map(case, x), jax.lax.scan(feed, state, pieces)[1], features

    found, streamed, features = run(variables, jnp.stack(list(cases.values())))
    hidden = np.tanh(np.cumsum(np.where(VALID[..., None], features, 0), 1))
    by_case = {name: jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), found) for i, name in enumerate(cases)}
    return by_case, np.asarray(streamed), hidden, variables


def test_an_answer_is_the_head_of_the_mean_or_of_every_frame():
    cases, _, hidden, variables = computed()
    head = jax.tree.map(np.asarray, variables["params"]["head"])
    clip, _, frames = cases["plain"]
    assert (clip.shape, frames.shape) == ((BATCH, CLASSES), (BATCH, LENGTH, CLASSES))
    mean = np.where(VALID[..., None], hidden, 0).sum(1) / np.maximum(VALID.sum(1), 1)[:, None]
    assert_close(clip, mean @ head["kernel"] + head["bias"])
    assert_close(frames[VALID], (hidden @ head["kernel"] + head["bias"])[VALID])


def test_padding_and_other_clips_change_nothing():
    """Of values and of gradients, whatever is in the padding."""
    cases = computed()[0]
    jax.tree.map(np.testing.assert_array_equal, cases["padding"][:2], cases["plain"][:2])
    assert not cases["plain"][1][1][~VALID].any()
    assert np.isfinite(cases["padding"][2]).all()
    assert_close(cases["mates"][0][1], cases["plain"][0][1])
    assert np.abs(cases["mates"][0][0] - cases["plain"][0][0]).max() > 1e-2


def test_an_answer_per_frame_is_causal_and_streams():
    cases, streamed = computed()[:2]
    frames = cases["plain"][2]
    assert_close(cases["later"][2][:, :4], frames[:, :4])
    assert np.abs(cases["later"][2] - frames)[0, 4:].min() > 0
    assert streamed.shape == (LENGTH, BATCH, 1, CLASSES)
    assert_close(streamed[:, :, 0].swapaxes(0, 1)[VALID], frames[VALID])


@pytest.mark.breadth  # test_elman_without_recurrence_is_a_map_of_every_element
@pytest.mark.parametrize("recurrence", [True, False])
def test_without_recurrence_the_order_of_frames_is_not_seen(recurrence):
    """Through a SeqBoat layer without attention; with recurrence it is seen, and streams equal the whole."""
    mixer = elman.Config(recurrence)
    layer = LayerConfig(WIDTH, 4, 6, mixer=mixer, window_size=3, causal=True, form="dense", activation="never")
    config = dataclasses.replace(FRAMEWISE, encoder=EncoderConfig(layer, 1, remat="none"))
    variables, lengths = variables_of(config), jnp.full(BATCH, LENGTH)
    apply = jax.jit(Frames(config).apply)
    there, back = (np.asarray(apply(variables, x, lengths).logits) for x in (X, X[:, ::-1]))
    difference = np.abs(back[:, ::-1] - there).max()
    assert difference > 1e-2 if recurrence else difference < 1e-5
    stream = jax.jit(lambda *args: Frames(config).apply(variables, *args, method="stream"))
    first, state = stream(X[:, :3], jnp.full(BATCH, 3), Frames(config).initial_state(BATCH))
    second, _ = stream(X[:, 3:], jnp.full(BATCH, 4), state)
    assert_close(np.concatenate([first.logits, second.logits], 1), there)


def test_elman_without_recurrence_is_a_map_of_every_element():
    module = elman.Config(recurrence=False).make(True, SINGLE_DEVICE)
    x, valid = normal(3, 2, 4, 5), jnp.ones((2, 4), bool)
    variables = random_like(jax.eval_shape(module.init, jax.random.key(0), x, valid))
    params = variables["params"]
    assert set(params) == {"kernel", "bias"}
    expected = np.tanh(np.asarray(x) @ np.asarray(params["kernel"]) + np.asarray(params["bias"]))
    assert_close(np.asarray(module.apply(variables, x, valid)), expected)


def test_what_the_frame_encoder_costs():
    config = dataclasses.replace(CLIP, channels=256, frame=(16, 16, 1), filters=(8, 16))
    assert config.sizes() == ((16, 16), (8, 8), (4, 4))
    assert config.multiplications(8, 0.5) == 8 * 8 * 9 * 1 * 8 + 4 * 4 * 9 * 8 * 16 + 4 * 4 * 16 * WIDTH
    assert CLIP.sizes() == ((5, 4), (3, 2), (2, 1))


MODEL = {"name": "frames", "layers": 1, "features": 8, "key_size": 4, "value_size": 8, "window_size": 4}
MODEL |= {"causal": True, "mixer": {"name": "elman"}, "activation": "never"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frame": (8, 8, 1)}, "frame=(8, 8, 1): has 64 numbers, and a frame of this task 256"),
        ({"frame": (16, 16)}, "frame=(16, 16): expected 3 items"),
        ({"frame": (16, -16, -1)}, "frame=(16, -16, -1): must be height, width and colours of at least 1"),
        ({"filters": ()}, "filters=(): must be one or more numbers of at least 1"),
        ({"filters": (4, 0)}, "filters=(4, 0): must be one or more numbers of at least 1"),
        ({"head": "prototype"}, "head='prototype': must be one of linear, mlp, or the group of a head"),
        ({"answer": "frame"}, "answer: not set here, the task decides it"),
    ],
)
def test_mistakes_in_a_model_of_frames(changes, message):
    with pytest.raises(UserError) as caught:
        build_model({**MODEL, **changes}, GlidingDigits())
    assert str(caught.value) == f"config.model.{message}"


def test_what_a_model_of_frames_refuses():
    with pytest.raises(ValueError, match=r"answer='clip' cannot be streamed: it is of a whole clip; take 'frame'"):
        Frames(CLIP).initial_state(1)
    ahead = dataclasses.replace(FRAMEWISE, encoder=EncoderConfig(RunningConfig(causal=False), 1))
    with pytest.raises(ValueError, match="causal=False: it looks ahead"):
        Frames(ahead).initial_state(1)
    head = prototypes.Config(None, LENGTH, 40)
    assert dataclasses.replace(CLIP, head=head).head == head
    split = EncoderConfig(RunningConfig(layout=Layout(Rules(), (("sequence", 2),))), 1)
    for fields in ({"answer": "frame"}, {"encoder": split}):
        with pytest.raises(ValueError, match=r"head: this one reads whole clips, not split by config.mesh"):
            dataclasses.replace(CLIP, head=head, **fields)
    with pytest.raises(ValueError, match=r"answer='frame': reads whole clips; take a config.mesh that does not split"):
        dataclasses.replace(FRAMEWISE, encoder=split)
    for apply, message in (
        (
            lambda: Frames(CLIP).init(jax.random.key(0), X[..., :39], LENGTHS),
            r"expected \(B, L, 40\), frames of \(5, 4",
        ),
        (
            lambda: Frames(FRAMEWISE).init(jax.random.key(0), X[0], LENGTHS, (), method="stream"),
            r"expected frames \(B, L, F\) and lengths \(B,\), not \(7, 40\) and \(3,\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(apply)
