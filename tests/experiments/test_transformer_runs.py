"""Transformers by a variant's name: trained, evaluated, generated from, or refused in one line."""

import re

import numpy as np
import pytest

from configs.lm import bytes as recipe
from experiments.common.errors import UserError
from experiments.evaluation.evaluator import measure_run
from experiments.evaluation.sampling import Sampling, generate
from experiments.reports.writer import write_report
from experiments.training.experiment import build
from experiments.training.loop import train
from experiments.training.restore import load


@pytest.mark.breadth  # test_mega.py, test_transformer.py: the block; test_generate.py: the program
@pytest.mark.parametrize("variant", ["sliding", pytest.param("transformer", marks=pytest.mark.slow)])
def test_a_transformer_trains_is_evaluated_and_generates_if_it_has_a_window(variant, tmp_path):
    (tmp_path / "text").write_bytes(np.random.default_rng(0).integers(97, 105, 400).astype(np.uint8).tobytes())
    config = recipe.get_config(f"tiny,{variant}")
    config.update_from_flattened_dict(
        {
            "model.layers": 1,
            "model.features": 8,
            "model.heads": 2,
            "model.block_size": 16,
            "task.length": 16,
            "task.context": 8,
            "task.files": (str(tmp_path / "text"),),
            "task.carry_state": variant == "sliding",
            "train.steps": 2,
            "train.batch_size": 2,
            "train.evaluate_every": 2,
            "train.checkpoint_every": 2,
        }
    )
    train(build(config.to_dict()), tmp_path / "run")
    assert 6 < measure_run(tmp_path / "run")["bits_per_byte"] < 10
    run = load(tmp_path / "run")
    samples = lambda: list(generate(run.model, run.variables, b"abc", Sampling(), batch=2, count=3))
    if variant == "sliding":
        assert np.stack(samples()).shape == (3, 2)
    else:
        with pytest.raises(UserError, match="this model cannot generate: window_size=None cannot be streamed: it must"):
            samples()
        config.task.carry_state = True
        with pytest.raises(UserError, match=re.escape("config.model.window_size=None cannot be streamed")):
            build(config.to_dict())
    with pytest.raises(UserError, match=r"has config.model.block='transformer': reports show SeqBoat layers alone"):
        write_report(tmp_path / "run")
