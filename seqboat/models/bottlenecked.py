"""Codebooks in any model with layers, trained with it: `Bottlenecked(target, config)` is called as its target is.

    y = target(x), where every value at the config's sites is the sum of its nearest codes (`seqboat.interp.codebooks`)

After training they are edits of the plain model, whatever computes it: `bind`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from seqboat.interp.codebooks import Codebook, decode, nearest
from seqboat.interp.edits import Force
from seqboat.layers import taps
from seqboat.layers.terms import term
from seqboat.modules import Linen, check_module


@dataclasses.dataclass(frozen=True)
class CodebookConfig:
    """A codebook in every layer at each of the `sites` (`seqboat.layers.taps`): `codes` vectors for each of `groups`
    groups of channels, of which a value is the sum of the `k` nearest.

    The model gets its gradient through the codes unchanged. Codes get that of the loss, and of `weight` times the mean
    squared distance |x - x^|^2 of a value to its codes.
    """

    sites: tuple[str, ...] = ("m",)
    codes: int = 2048
    k: int = 1
    groups: int = 1
    weight: float = 1.0

    def __post_init__(self):
        if not self.sites or len(set(self.sites)) < len(self.sites):
            raise ValueError(f"sites={self.sites}: must be at least one, each once")
        for field in ("codes", "groups"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 1")
        if not 1 <= self.k <= self.codes:
            raise ValueError(f"k={self.k}: must be in 1..{self.codes}, the codes")
        if not self.weight >= 0:
            raise ValueError(f"weight={self.weight}: must not be negative")


class Bottlenecked(nn.Module):
    """A target with an `Encoder`, with codebooks. Parameters: `target`, in the target's own layout, and `codebooks`,
    {site: (layers, G, C, W / G)}, normal at first (k-means of a trained model's values is a better start).

    In training every site states two terms: SITE_distance, the mean of |x - x^|^2 over the elements that are not
    padding and, within a sparse module, active; and SITE_codes_in_use, the share of codes that a batch takes, in the
    mean over layers, which adds nothing to the loss.

    Raises ValueError as `widths`.
    """

    target: Linen
    config: CodebookConfig

    def __post_init__(self):
        check_module(self.target, "target")
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: Array, lengths: Array, train: bool = False) -> Any:
        if self.is_initializing():
            out = self.target(inputs, lengths, train)
            found = widths(self.target.clone(parent=None), self.config, inputs, lengths)
            self.param("codebooks", self._create, found)
            return out
        return self._run("__call__", inputs, lengths, train)

    @nn.nowrap
    def initial_state(self, batch: int) -> Any:
        """The initial state of N streams. Raises ValueError for a target that cannot be streamed."""
        if not hasattr(self.target, "initial_state"):
            raise ValueError(f"a {type(self.target).__name__} has no streams")
        return self.target.initial_state(batch)

    def stream(self, inputs: Array, lengths: Array, state: Any, train: bool = False) -> Any:
        """As the target's."""
        return self._run("stream", inputs, lengths, state, train)

    def _create(self, key: Array, found: Mapping[str, tuple[int, int]]) -> dict[str, Array]:
        groups, codes = self.config.groups, self.config.codes
        keys = jax.random.split(key, len(found))
        return {
            site: jax.random.normal(key, (layers, groups, codes, width // groups)) / self.config.k
            for key, (site, (layers, width)) in zip(keys, found.items(), strict=True)
        }

    def _run(self, method: str, *args: Any) -> Any:
        """A method of the target with its values quantized; changed collections become this module's."""
        tables: Any = self.get_variable("params", "codebooks")
        unbound = self.target.clone(parent=None)
        variables = {**self.target.variables, "edits": edits(unbound, tables, self.config)}
        stating = self.is_mutable_collection("terms")
        kept = [name for name in ("batch_stats", "terms", "taps") if self.is_mutable_collection(name)]
        mutable = list({*kept, "taps"} if stating else kept)
        rngs = {"dropout": self.make_rng("dropout")} if self.has_rng("dropout") else {}
        out, changed = unbound.apply(variables, *args, method=method, mutable=mutable, rngs=rngs)
        for name in kept:
            if name in changed:
                self.put_variable(name, "target", changed[name])
        if stating:
            self._add_terms(changed["taps"], tables, args[1])
        return out

    def _add_terms(self, found: Mapping[str, Any], tables: Mapping[str, Array], lengths: Array) -> None:
        layer = self.target.config.encoder.layer
        for site in self.config.sites:
            x, there = taps.read(found, site), taps.computed(found, layer, site, lengths)
            x = jax.lax.stop_gradient(x).astype(jnp.float32)
            there = there.reshape(*there.shape, *[1] * (x.ndim - there.ndim - 1))
            there = jnp.broadcast_to(there, x.shape[:-1])
            total, used = jax.vmap(self._count)(x, there, tables[site])
            elements = there.sum().astype(jnp.float32)
            term(self, f"{site}_distance", self.config.weight, total.sum(), elements)
            term(self, f"{site}_codes_in_use", 0.0, used.sum(), jnp.float32(used.size))

    def _count(self, x: Array, there: Array, table: Array) -> tuple[Float[Array, ""], Float[Array, "G C"]]:
        """One layer's sum of squared distances, and 1 for every code that is taken."""
        ids = nearest(x, jax.lax.stop_gradient(table), self.config.k)
        distances = jnp.square(x - decode(table, ids)).sum(-1)
        groups = jnp.broadcast_to(jnp.arange(len(table))[:, None], ids.shape)
        marks = jnp.broadcast_to(there[..., None, None], ids.shape).astype(jnp.float32)
        used = jnp.zeros(table.shape[:2]).at[groups.reshape(-1), ids.reshape(-1)].max(marks.reshape(-1))
        return jnp.where(there, distances, 0.0).sum(), used


def edits(target: Any, tables: Mapping[str, Array], config: CodebookConfig) -> dict[str, Any]:
    """The collection "edits" of a plain model with codebooks {site: (layers, G, C, W / G)}."""
    everywhere = lambda table: jnp.ones(len(table), bool)
    return taps.write(target, {site: Codebook(everywhere(table), table, config.k) for site, table in tables.items()})


def bind(model: Bottlenecked, variables: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The plain target and its variables, whose `edits` are the codebooks: for all that reads a model, and to force
    codes (`seqboat.interp.edits.Force`)."""
    others = {name: tree["target"] for name, tree in variables.items() if name != "edits" and "target" in tree}
    return model.target, {**others, "edits": edits(model.target, variables["params"]["codebooks"], model.config)}


def force(
    model: Any, variables: Mapping[str, Any], site: str, choices: Mapping[int, Any], where: Any = True
) -> dict[str, Any]:
    """The variables of a plain model (`bind`) that takes, in some layers, from 1, given codes at a site.

    A choice is one code, codes (G, k) or, if `where` is (B, L) and not True, (B, L, G, k). Raises ValueError for a site
    without codebooks, and for layers and codes that there are not.
    """
    found = taps.written(variables.get("edits", {}))
    book = found.get(site)
    if not isinstance(book, Codebook):
        raise ValueError(f"there are no codebooks at {site!r}, but at {', '.join(found) or 'no site'}")
    layers, groups, codes, _ = book.table.shape
    shape = (*np.shape(where), groups, book.k)
    chosen, on = np.zeros((layers, *shape), np.int32), np.zeros((layers, *np.shape(where)), bool)
    for layer, choice in choices.items():
        if not 1 <= layer <= layers:
            raise ValueError(f"layer {layer}: layers are numbered from 1 to {layers}")
        if np.min(choice) < 0 or np.max(choice) >= codes:
            raise ValueError(f"codes {np.min(choice)}..{np.max(choice)}: a codebook has the codes 0..{codes - 1}")
        chosen[layer - 1], on[layer - 1] = np.broadcast_to(choice, shape), where
    return {**variables, "edits": taps.write(model, {**found, site: Force(on, chosen, book)})}


def widths(target: Any, config: CodebookConfig, *args: Any) -> dict[str, tuple[int, int]]:
    """The number of layers and the width W of the values at every site of a config, for a target that is called with
    `args`. Raises ValueError, beginning with a field, for a target without layers, a site that it lacks, and groups
    that do not divide a width."""
    encoder = getattr(target.config, "encoder", None)
    if encoder is None:
        raise ValueError(f"sites={config.sites}: a {type(target).__name__} has no layers")

    def look() -> dict[str, Any]:
        collections = target.apply(target.init(jax.random.key(0), *args), *args, mutable=["taps"])[1]
        owned = {site for sites in encoder.layer.sites().values() for site in sites}
        names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(collections["taps"])} & owned
        if missing := [site for site in config.sites if site not in names]:
            there = ", ".join(sorted(names))
            raise ValueError(f"sites={config.sites}: no {missing[0]!r} in this model; there are {there}")
        return {site: taps.read(collections["taps"], site) for site in config.sites}

    found = {site: (len(value), value.shape[-1]) for site, value in jax.eval_shape(look).items()}
    for site, (_, width) in found.items():
        if width % config.groups:
            raise ValueError(f"groups={config.groups}: must divide {width}, the width of {site}")
    return found
