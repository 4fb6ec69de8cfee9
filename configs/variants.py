"""The arms that every recipe has, by config argument: --config=configs/lra/text.py:tiny,no_attention"""

from collections.abc import Callable

from ml_collections import ConfigDict


def apply_variant(config: ConfigDict, names: str, tiny: Callable[[ConfigDict], None]) -> None:
    """Change a recipe by one or several comma-separated names. Raises ValueError for another name.

    paper: nothing. credit_router: centred input, credit and the cost of a window's slot for the router
    (docs/router.md), the SSM's whole kernel.
    tiny: what the recipe says, for minutes on a CPU. full: no window. always: attention everywhere. no_attention: none.
    random, strided: attention at half of all positions, whatever the tokens are. s4d: another SSM.
    """
    changes = {
        "paper": lambda: None,
        "credit_router": lambda: _credit_router(config),
        "tiny": lambda: tiny(config),
        "full": lambda: _full(config),
        "always": lambda: config.model.update(activation="always"),
        "random": lambda: config.model.update(activation="random", activation_rate=0.5),
        "strided": lambda: config.model.update(activation="strided", activation_rate=0.5),
        "no_attention": lambda: config.model.update(activation="never"),
        "s4d": lambda: config.model.update(ssm="s4d"),
    }
    for name in names.split(","):
        if name not in changes:
            raise ValueError(f"unknown variant {name!r}: there are {', '.join(changes)}")
        changes[name]()


def _credit_router(config: ConfigDict) -> None:
    config.model.ssm_truncation = None
    config.model.router.update(centered=True, straight_through=True, key_credit=True, credit_share=0.25)
    config.model.router.eviction_cost = config.model.window_size is not None


def _full(config: ConfigDict) -> None:
    config.model.update(window_size=None, position=_without_slots(config.model.position))
    config.model.router.eviction_cost = False  # nothing is evicted


def _without_slots(position: str) -> str:
    """A table of distances within a window has no meaning without a window."""
    return "relative" if position == "slot" else position
