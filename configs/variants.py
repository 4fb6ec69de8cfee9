"""The arms that every recipe has, by config argument: --config=configs/lra/text.py:tiny,no_attention"""

from collections.abc import Callable
from functools import partial

from ml_collections import ConfigDict

from configs import base


def apply_variant(config: ConfigDict, names: str, tiny: Callable[[ConfigDict], None]) -> None:
    """Change a recipe by one or several comma-separated names. Raises ValueError for another name.

    paper: nothing. credit_router: centred input, credit and the cost of a window's slot for the router
    (docs/router.md), the SSM's whole kernel.
    tiny: what the recipe says, for minutes on a CPU. full: no window. always: attention everywhere. no_attention: none.
    random, strided: attention at half of all positions, whatever the tokens are. lru, lstm, ...: any file of
    seqboat/layers/mixers in place of the EMA. mega: that block of seqboat/layers in place of the SeqBoat layer.
    guided: by another run, config.objectives.guidance.run.
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
        "guided": lambda: config.update(objectives=base.objective("guidance")),
        "mega": lambda: _block(config, "mega"),
        **{name: partial(_mixer, config, name) for name in base.mixers()},
    }
    for name in names.split(","):
        if name not in changes:
            raise ValueError(f"unknown variant {name!r}: there are {', '.join(changes)}")
        changes[name]()


def _block(config: ConfigDict, name: str) -> None:
    config.model = base.block(config.model, name)


def _mixer(config: ConfigDict, name: str) -> None:
    """Another mixer with its own defaults; S4D has the EMA's fields, and keeps the recipe's values."""
    old = config.model.mixer
    config.model.mixer = base.mixer(name)
    if (old.name, name) == ("ema", "s4d"):
        config.model.mixer.update(state_size=old.state_size, truncation=old.truncation)


def _credit_router(config: ConfigDict) -> None:
    if "truncation" in config.model.mixer:
        config.model.mixer.truncation = None
    config.model.router.update(centered=True, straight_through=True, key_credit=True, credit_share=0.25)
    config.model.router.eviction_cost = config.model.window_size is not None


def _full(config: ConfigDict) -> None:
    config.model.update(window_size=None, position=_without_slots(config.model.position))
    config.model.router.eviction_cost = False  # nothing is evicted


def _without_slots(position: str) -> str:
    """A table of distances within a window has no meaning without a window."""
    return "relative" if position == "slot" else position
