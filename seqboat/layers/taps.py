"""Named values inside a layer, to read and to change.

    model.apply(variables, ..., mutable=["taps"])                     also returns them; `read` takes one out
    model.apply({**variables, "edits": write(model, edits)}, ...)     computes with changed ones

The names are interface. Shapes for one layer (M modules to choose from, here the GAU and a feed-forward network of
hidden width F):

    pre_norm (B, L, D)          the SSM's input
    ssm_out (B, L, D)           the SSM's output
    m (B, L, D)                 silu(ssm_out), after dropout: what the router, the skip path and the modules read
    skip (B, L, D)              the always-on path
    router_logits (B, L, M, 2)  active, confidence (B, L, M)
    q, k (B, L, Z)              v, gate, attended (B, L, E)
    gated (B, L, E)             attended * gate, what W_o reads
    gau_out (B, L, D)           before its confidence
    feed_forward_hidden (B, L, F), feed_forward_out (B, L, D)
    resid (B, L, D)             the layer's output

A MEGA block has all but `skip` and those of a router; its gate is elementwise, and `gau_out` enters a SiLU. A
transformer block has `m`, its input, `resid`, and those of a router; the rows q, k, v and attended of its H heads,
(B, L, H, Z); those of a feed-forward network; and

    unit_out (B, L, D)          what it adds, before its confidence

Values of packed rows are scattered back to their elements, zero where inactive. A tap that is neither requested nor
edited costs nothing.

An edit is a pytree with `edit(value) -> value`, of the same shape (`seqboat.interp.edits`); one with a field `reads`
also gets the value of that name, at `feed_forward_out` alone. It lies in the collection
"edits" under the value's name, at the path of the module that taps it, its leaves with a leading axis of layers. What
is published is the value before its own edit. `active` and `confidence` are only published: they follow from
`router_logits`. Values within a sparse module are rows (T, ...) in any order, so an edit that is `located` at elements
(B, L) needs form="dense" there, whose rows are those of (B L, ...).
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array

Sites = dict[str, tuple[str, ...]]
# Names by the module that taps them: what a block's `sites` is made of.
ROUTER: Sites = {"sparse/configurator": ("router_logits",)}
GAU: Sites = {"gau": ("q", "k", "v", "gate", "attended", "gated", "gau_out")}
FEED_FORWARD: Sites = {"feed_forward": ("feed_forward_hidden", "feed_forward_out")}
UNIT: Sites = {"unit": ("q", "k", "v", "attended", "feed_forward_hidden", "feed_forward_out", "unit_out")}
# Which module's decisions say where values within it are computed, if it is activated.
MODULES = {"gau": 0, "unit": 0, "feed_forward": -1}


def tap(module: nn.Module, name: str, value: Array, beside: Mapping[str, Array] | None = None) -> Array:
    """Publish a value under a name, if the caller requested taps, and return it as the caller's edit of that name
    changes it. `beside` has the values, by name, that each row is a function of, for an edit that `reads` one
    (`seqboat.interp.edits.Transcode`). Raises ValueError for an edit that changes its shape, or reads another value."""
    publish(module, name, value)
    edit: Any = module.get_variable("edits", name)
    if edit is None:
        return value
    changed = edit(value, *_read(name, edit, beside or {}))
    if changed.shape != value.shape:
        raise ValueError(f"edits: {name}: changed from {value.shape} to {changed.shape}; an edit keeps the shape")
    return changed.astype(value.dtype)


def _read(name: str, edit: Any, beside: Mapping[str, Array]) -> tuple[Array, ...]:
    reads = getattr(edit, "reads", None)
    if reads is None:
        return ()
    if reads not in beside:
        known = f"its rows are a function of {', '.join(sorted(beside))}" if beside else "no other value is at hand"
        raise ValueError(f"edits: {name}: cannot be computed from {reads} here: {known}")
    return (beside[reads],)


def publish(module: nn.Module, name: str, value: Array) -> None:
    """Publish a value that cannot be edited: one that follows from others, or that another module tapped."""
    if not module.is_initializing():
        module.sow("taps", name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)


def read(taps: Mapping[str, Any], site: str) -> Any:
    """The values of a site in every layer, (layers, B, L, ...), from a model's collection "taps".

    Raises ValueError for a site that it lacks.
    """
    found = {path[-1].key: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(taps)}
    if site not in found:
        raise ValueError(f"taps: there is no {site}; there are {', '.join(sorted(found))}")
    value = found[site]
    # Rows of a feed-forward network outside of a sparse module are (layers, B L, ...).
    return value if value.ndim > 3 else value.reshape(*found["resid"].shape[:3], -1)


def computed(taps: Mapping[str, Any], layer: Any, site: str, lengths: Array) -> Any:
    """Where the values of a site are computed, (layers, B, L): at elements that are not padding and, within a module
    that a router of `layer`, a block's config, activates, active."""
    owner = next(owner for owner, sites in layer.sites().items() if site in sites)
    resid = read(taps, "resid")
    there = jax.numpy.arange(resid.shape[2])[None] < lengths.reshape(-1, 1)
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(taps)}
    if owner in MODULES and "active" in names:
        return read(taps, "active")[..., MODULES[owner]]
    return jax.numpy.broadcast_to(there, resid.shape[:3])


def write(model: Any, edits: Mapping[str, Any]) -> dict[str, Any]:
    """The collection "edits" of a model with an `Encoder`, or of a hypernetwork around it, from an edit per site.

    Every leaf of an edit has a leading axis of layers (`seqboat.interp.edits.at`, `each`). Raises ValueError for a site
    that the model lacks, and for another number of layers.
    """
    target = getattr(model, "target", model)
    config = target.config.encoder
    owners = {site: owner for owner, sites in config.layer.sites().items() for site in sites}
    layers: dict[str, Any] = {}
    for site, edit in edits.items():
        if site not in owners:
            raise ValueError(f"edits: there is no site {site!r} in this model; it has {', '.join(sorted(owners))}")
        sizes = {jax.numpy.shape(leaf)[:1] for leaf in jax.tree.leaves(edit)}
        if sizes != {(config.layers,)}:
            raise ValueError(
                f"edits: {site}: the leaves of an edit need a leading axis of the model's {config.layers} layers: "
                "use interp.edits.at or each"
            )
        inner = layers
        for name in filter(None, owners[site].split("/")):
            inner = inner.setdefault(name, {})
        inner[site] = edit
    collection = {"encoder": {"layers": layers}}
    return collection if target is model else {"target": collection}


def written(edits: Mapping[str, Any]) -> dict[str, Any]:
    """The edit of every site of a collection that `write` made."""
    found: dict[str, Any] = {}
    for name, edit in edits.items():
        found |= written(edit) if isinstance(edit, Mapping) else {name: edit}
    return found


def edited(model: Any, variables: Mapping[str, Any], edits: Mapping[str, Any]) -> dict[str, Any]:
    """The variables with one more edit for each of some sites, as `write` makes it. Raises ValueError as `write`, and
    for a site that is edited already."""
    own = written(variables.get("edits", {}))
    if both := sorted(set(own) & set(edits)):
        raise ValueError(f"edits: {both[0]} is edited already, by a {type(own[both[0]]).__name__}")
    return {**variables, "edits": write(model, {**own, **edits})}


def refuse_located(edits: Mapping[str, Any]) -> None:
    """Raise ValueError for an edit, of values of packed rows, that is located at elements."""
    for site, edit in edits.items():
        if isinstance(edit, Mapping):
            refuse_located(edit)
        elif getattr(edit, "located", False):
            raise ValueError(f'edits: {site}: packed rows are not located at elements; use a layer of form="dense"')
