"""What every experiment shares. A config is a difference from this one."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(model: str = "classifier") -> ConfigDict:
    """`model` is config.model.name: classifier, retrieval, language_model or mlp."""
    config = ConfigDict()
    config.seed = 0
    # Mesh axes that the devices make: "data", "fsdp=4,fsdp_hidden=2", ..., or "pmap"; None is one device.
    config.mesh = placeholder(str)
    # Prepared tensorflow-datasets; None is TFDS_DATA_DIR or ~/tensorflow_datasets.
    config.data_dir = placeholder(str)
    config.task = ConfigDict()
    config.model = _model(model)
    config.optimizer = optimizer()
    config.train = ConfigDict(
        {
            "steps": 1000,
            "batch_size": 32,
            "accumulate": 1,
            "log_every": 50,
            "evaluate_every": 500,
            "checkpoint_every": 500,
            "keep_checkpoints": 2,
            "activation_penalty": 0.0,
            "tensorboard": True,
        }
    )
    return config


# What a model has besides its encoder's and layers' fields.
_OWN_FIELDS: dict[str, dict] = {
    "mlp": {"hidden": (32, 32)},
    "classifier": {"sinusoid": False, "head": "mlp", "embedding_init": "projection"},
    "retrieval": {"head_size": 256},
    "language_model": {},
}


def _model(name: str) -> ConfigDict:
    """The published layer's defaults; widths are a recipe's own."""
    if name == "mlp":
        return ConfigDict({"name": name, **_OWN_FIELDS[name]})
    fields = ConfigDict(
        {
            "name": name,
            "layers": 2,
            "features": 64,
            "key_size": 32,
            "value_size": 128,
            "state_size": 16,
            "causal": name == "language_model",
            "attention": True,
            "attention_function": "softmax",
            "position": "relative",
            "max_positions": 1024,
            "feed_forward_size": 0,
            "ssm": "ema",
            "ema_method": "auto",
            "norm": "layer",
            "norm_placement": "post",
            "norm_affine": True,
            "norm_counts_padding": False,
            "final_norm_affine": True,
            "activation": "learned",
            "dropout": 0.0,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "form": "packed",
            "block_size": 128,
            "attention_method": "blocks",
            "remat": "selective",
            "dtype": "float32",
            **_OWN_FIELDS[name],
        }
    )
    fields.window_size = placeholder(int)
    fields.window_size = 128
    fields.ssm_truncation = placeholder(int)
    # None is 1 on a CPU and 32 on an accelerator.
    fields.blocks_per_iteration = placeholder(int)
    fields.router = ConfigDict(
        {
            "centered": False,
            "straight_through": False,
            "key_credit": False,
            "credit_share": 1.0,
            "initial_bias": 0.0,
            "temperature_scale": 1.0,
        }
    )
    return fields


def hyper(condition: str) -> ConfigDict:
    """For `config.hypernetwork`: magnitude-invariant parametrizations, every parameter generated."""
    fields = ConfigDict({"condition": condition, "select": ("**",), "exclude": (), "evaluations": 5})
    fields.at = placeholder(tuple)
    fields.network = ConfigDict(
        {
            "hidden": (16, 64, 128),
            "negative_slope": 0.01,
            "head": "full",
            "heads": (),
            "rank": 4,
            "chunk_size": 4096,
            "chunk_embedding": 8,
            "residual": True,
            "init": "fan_out",
            "target_gain": 2.0,
        }
    )
    fields.network.dtype = placeholder(str)
    fields.network.encoding = ConfigDict(
        {"kind": "cos_sin", "inputs": 1, "low": 0.0, "high": 1.0, "size": 8, "tasks": 0, "unit_norm": False}
    )
    return fields


def optimizer() -> ConfigDict:
    fields = ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 4e-3,
            "schedule": "linear",
            "warmup_steps": 100,
            "warmup_start": 1e-7,
            "warmup_power": 1.0,
            "final_learning_rate": 0.0,
            "b1": 0.9,
            "b2": 0.98,
            "epsilon": 1e-8,
            "weight_decay": 0.01,
            "weight_decays": (),
            "learning_rate_scales": (),
        }
    )
    # The greatest norm of all gradients together; None does not clip.
    fields.clip_norm = placeholder(float)
    fields.clip_norm = 1.0
    return fields
