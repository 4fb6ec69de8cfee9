"""A quantized autoencoder (QLAE) of short waves whose factors are known: is every latent of one factor?

    python -m experiments.train --config=configs/interp/factors.py --workdir=runs/factors

config.model.quantized=False is a plain autoencoder, config.optimizer.weight_decay=0.0 leaves the decay out.
"""

from configs import base


def get_config():
    config = base.get_config(model="autoencoder")
    config.task.update(name="factors", length=32, values=5)
    config.optimizer.update(learning_rate=1e-3, final_learning_rate=1e-3, warmup_steps=0, b2=0.999, weight_decay=0.1)
    config.train.update(steps=5000, batch_size=256, log_every=500, evaluate_every=1000, checkpoint_every=1000)
    return config
