"""A VAE with a graph of channels (StackVAE-G) on a series of 24 channels in 4 groups, with anomalies in its test part.

    python -m experiments.train --config=configs/synthetic/coupled_series.py:tiny --workdir=runs/series
    python -m experiments.evaluate --workdir=runs/series

config.model.share=0.0 is one plain VAE for all channels; with it, config.model.vae="per_channel" is one for every
channel and "joint" one of whole windows. config.model.graph=0.0 leaves the graph's term out. The sizes are the
published ones; :tiny has smaller ones, for a minute on a CPU.
"""

from configs import base


def get_config(variant: str = "paper"):
    config = base.get_config(model="stackvae")
    config.task.update(name="coupled_series", channels=24, groups=4, length=32, coupling=0.7, data_seed=0)
    config.task.update(train_elements=8192, validation_elements=2048, test_elements=4096)
    config.task.update(anomalies=32, span=16, shift=2.0)
    config.optimizer.update(learning_rate=4e-3, schedule="cosine", final_learning_rate=1e-4, b2=0.999, weight_decay=0.0)
    config.train.update(steps=4000, batch_size=64, log_every=200, evaluate_every=1000, checkpoint_every=1000)
    if variant not in ("paper", "tiny"):
        raise ValueError(f"unknown variant {variant!r}: there are paper, tiny")
    if variant == "tiny":
        config.model.update(hidden=(64, 64), latents=8)
        config.train.update(steps=1000, evaluate_every=500, checkpoint_every=500)
    return config
