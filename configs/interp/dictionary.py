"""A sparse dictionary of the activations of another run: at config.task.site of config.task.layer, the first is 1.

    python -m experiments.train --config=configs/interp/dictionary.py --config.task.run=runs/fsm --workdir=runs/fsm_m1

config.model.select is the rule of sparsity: top_k, batch_top_k, norm (top-AFA), or relu with a config.model.sparsity.
"""

from configs import base


def get_config():
    config = base.get_config(model="dictionary")
    config.task.update(name="activations", run=base.placeholder(str), step=base.placeholder(int), site="m", layer=1)
    config.task.update(target_site=base.placeholder(str), rows=base.placeholder(str), chunk=32, evaluation_batches=16)
    config.optimizer.update(learning_rate=3e-3, b2=0.999, weight_decay=0.0, schedule="cosine", warmup_steps=50)
    config.optimizer.final_learning_rate = 1e-4
    config.train.update(steps=1000, batch_size=1024, log_every=100, evaluate_every=500, checkpoint_every=500)
    return config
