"""The study of pretraining: which encoder each arm has, what a probe sees, and probes of the inputs themselves."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from configs.pretrain import digits
from experiments.studies import pretraining, pretraining_digits, pretraining_text
from experiments.studies.pretraining import Runs
from seqboat.models.classifier import Classifier, ClassifierConfig
from tests.helpers import assert_close, normal
from tests.models.test_context_autoencoder import CONFIG, LENGTH, WIDTH


def test_every_arm_has_its_own_encoder(monkeypatch):
    class Fake:
        def __init__(self, values, seeds):
            self.values, self.seeds = values, seeds

        def start(self, encoders=None):
            return [SimpleNamespace(params=params) for params in encoders or ["random"] * len(self.seeds)]

        def train(self, encoders=None):
            model = self.values["model"]
            pretrained = (
                f"align {model['align']}, {model['regressor_layers']} layers" if "align" in model else "trained"
            )
            starts = [pretrained] * len(self.seeds)
            if encoders is not None:
                starts = [f"{pretrained} from {encoder}" for encoder in encoders]
            return [SimpleNamespace(params=params) for params in starts]

        def probe(self, params):
            seen.append(("probe", params and one(params)))
            return [0.5, 0.75]

        def accuracies(self, states):
            seen.append(("whole", one([state.params for state in states])))
            return [1.0, 1.0]

    def one(values):
        (value,) = set(values)
        return value

    monkeypatch.setattr(pretraining, "Runs", Fake)
    seen: list = []
    tables: list = []
    save = lambda found: tables.append(dict(found))
    pretraining_digits.study(save, seeds=range(2))
    cae = "align 2.0, 2 layers"
    assert [params for _, params in seen] == ["random", None, cae, "align 0.0, 0 layers", "align 0.0, 2 layers"]
    assert {kind for kind, _ in seen} == {"probe"}
    assert [len(table) for table in tables] == [1, 2, 3, 4, 5]
    found = tables[-1]["cae"]
    score = {"mean": 0.625, "standard_deviation": 0.125 * 2**0.5, "standard_error": 0.125}
    assert found["metrics"]["accuracy"] == {"values": [0.5, 0.75], **score}
    assert found["seeds"] == [0, 1]
    assert found["config"]["model"]["align"] == 2.0

    seen.clear()
    pretraining_text.study(save, seeds=range(1))
    probes = [("probe", params) for params in (None, "random", cae)]
    assert seen == [*probes[:2], ("whole", "trained"), probes[2], ("whole", f"trained from {cae}")]


def test_a_probe_sees_the_mean_of_the_encoders_outputs():
    """Of x + mean x, that is twice the mean of the embeddings within the length."""
    config = ClassifierConfig(CONFIG.encoder, classes=3, head="linear")
    embedding = {"projection": {"kernel": normal(3, 2, WIDTH), "bias": normal(4, WIDTH)}}
    x, lengths = normal(5, 2, LENGTH, 2), jnp.array([LENGTH, 3])
    params = {"embedding": embedding, "head": {"kernel": jnp.ones((WIDTH, 3)), "bias": jnp.ones(3)}}
    found = jax.jit(lambda: pretraining.encode(Classifier(config), params, x, lengths))()
    means = np.stack([np.asarray(x[0]).mean(0), np.asarray(x[1, :3]).mean(0)])
    expected = 2 * (means @ np.asarray(embedding["projection"]["kernel"]) + np.asarray(embedding["projection"]["bias"]))
    assert_close(found, expected)


def test_the_probe_of_raw_digits_knows_most_of_them():
    """From 50 labels, on 200 test pictures; other seeds have other labels."""
    runs = Runs(digits.get_config("fine_tune").to_dict(), range(2))
    first, second = runs.probe(None)
    assert 0.75 < first < 0.95
    assert 0.75 < second < 0.95
    assert first != second
