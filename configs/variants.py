"""The arms that every recipe has, by config argument: --config=configs/lra/text.py:tiny,no_attention"""

from collections.abc import Callable
from functools import partial

from ml_collections import ConfigDict

from configs import base


def apply_variant(config: ConfigDict, names: str, tiny: Callable[[ConfigDict], None]) -> None:
    """Change a recipe by one or several comma-separated names. Raises ValueError for another name.

    paper: nothing. credit_router: centred input, credit and the cost of a window's slot for the router
    (docs/router.md), the SSM's whole kernel.
    tiny: what the recipe says, for minutes on a CPU; before all others. full: no window. always: attention everywhere.
    no_attention: none. random, strided: attention at half of all positions, whatever the tokens are. mod: the router
    activates an eighth of every sequence (Mixture-of-Depths; seqboat/layers/capacity.py). lru, lstm, ...: any file of
    seqboat/layers/mixers in place of the EMA.
    transformer, mega, ...: any block, a file of seqboat/layers with a `LayerConfig`, in place of the SeqBoat layer; its
    fields of the same name keep the recipe's values. transformer sees everything, sliding is one with the recipe's
    window, and sma_transformer a sliding one whose blocks the router activates; transformer,mod is Mixture-of-Depths.
    guided: by another run, config.objectives.guidance.run. codebook: codebooks at m of every layer, whose rate is three
    times that of the model; a good start is --init_from a run without them.
    """
    changes: dict[str, Callable[[], None]] = {
        "paper": lambda: None,
        "credit_router": lambda: _credit_router(config),
        "tiny": lambda: tiny(config),
        "full": lambda: _full(config),
        "always": lambda: config.model.update(activation="always"),
        "random": lambda: config.model.update(activation="random", activation_rate=0.5),
        "strided": lambda: config.model.update(activation="strided", activation_rate=0.5),
        "no_attention": lambda: config.model.update(activation="never"),
        "mod": lambda: _mod(config),
        "guided": lambda: config.update(objectives=base.objective("guidance")),
        "codebook": lambda: _codebook(config),
        **{name: partial(_mixer, config, name) for name in base.mixers()},
        **{name: partial(_block, config, name) for name in base.blocks()},
        "transformer": lambda: _transformer(config, "always", None),
        "sliding": lambda: _transformer(config, "always", config.model.window_size),
        "sma_transformer": lambda: _transformer(config, "learned", config.model.window_size),
    }
    chosen = names.split(",")
    for name in chosen:
        if name not in changes:
            raise ValueError(f"unknown variant {name!r}: there are {', '.join(changes)}")
    for name in sorted(chosen, key=lambda name: name != "tiny"):  # it says the sizes that others keep
        block = config.model.get("block")
        try:
            changes[name]()
        except AttributeError as error:
            raise ValueError(f"variant {name!r} changes what config.model.block={block!r} does not have") from error


def _block(config: ConfigDict, name: str) -> None:
    config.model = base.block(config.model, name)


def _mixer(config: ConfigDict, name: str) -> None:
    """Another mixer with its own defaults; S4D has the EMA's fields, and keeps the recipe's values."""
    old = config.model.mixer
    config.model.mixer = base.mixer(name)
    if (old.name, name) == ("ema", "s4d"):
        config.model.mixer.update(state_size=old.state_size, truncation=old.truncation)


def _transformer(config: ConfigDict, activation: str, window_size: int | None) -> None:
    """Two heads or more, about as wide as the recipe's keys, and of an even width, as rotary positions need."""
    width, key_size = config.model.features, config.model.get("key_size")
    _block(config, "transformer")
    config.model.update(activation=activation, window_size=window_size)
    if key_size is not None:
        heads = [count for count in range(2, width // 2 + 1) if width % (2 * count) == 0]
        config.model.heads = min(heads, key=lambda count: abs(width / count - key_size), default=1)


def _mod(config: ConfigDict) -> None:
    config.model.update(activation="learned")
    config.model.router.update(rule="capacity", temperature_scale=1.0, target_rate=None)


def _credit_router(config: ConfigDict) -> None:
    if "truncation" in config.model.get("mixer", {}):
        config.model.mixer.truncation = None
    config.model.router.update(centered=True, straight_through=True, key_credit=True, credit_share=0.25)
    config.model.router.eviction_cost = config.model.window_size is not None


def _codebook(config: ConfigDict) -> None:
    config.codebook = base.codebook()
    config.optimizer.learning_rate_scales = (("codebooks/", 3.0),)


def _full(config: ConfigDict) -> None:
    config.model.window_size = None
    if config.model.get("position") == "slot":  # a table of distances within a window has no meaning without one
        config.model.position = "relative"
    config.model.router.eviction_cost = False  # nothing is evicted
