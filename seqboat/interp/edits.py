"""Edits: what changes a named value while a model computes (`seqboat.layers.taps`).

    edits = taps.write(model, {"m": at(2, layers, Steer(True, direction, 3.0))})
    model.apply({**variables, "edits": edits}, ...)

`where` is True or False, or (B, L) booleans that locate an edit at elements. A value x is (B, L, ...), or rows
(T, ...) within a sparse module; in a dense layer those are (B L, ...), and can be located too. Edits are pytrees: their
numbers can be traced, mapped and differentiated. Everything that does not fit raises ValueError.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


class Edit(flax.struct.PyTreeNode):
    """x -> `change(x)` where `where` is True, and x elsewhere."""

    where: Any

    @property
    def located(self) -> bool:
        """Whether it distinguishes elements."""
        return jnp.ndim(self.where) > 0

    def change(self, x: Array) -> Array:
        raise NotImplementedError

    def __call__(self, x: Array) -> Array:
        where = self._beside(jnp.asarray(self.where), x) if self.located else self.where
        return jnp.where(where, self.change(x).astype(x.dtype), x)

    def _beside(self, value: Array, x: Array) -> Array:
        """A value (B, L, ...) of elements against x: (B, L, ...), or (B L, ...) if x is rows, with axes of size 1 for
        those that it lacks. Raises ValueError if x has other elements."""
        batch, length, *rest = value.shape
        lead = (batch, length) if x.shape[:2] == (batch, length) else (batch * length,)
        if x.shape[: len(lead)] != lead:
            raise ValueError(
                f"{type(self).__name__}: located at {batch} x {length} elements, and the value is {x.shape}: an edit "
                'within a sparse module can be located in a layer of form="dense", of whole sequences'
            )
        return value.reshape(*lead, *[1] * (x.ndim - len(lead) - len(rest)), *rest)


class Replace(Edit):
    """x -> value: anything that broadcasts to x, or, if it is located, (B, L, ...)."""

    value: Any

    def change(self, x: Array) -> Array:
        value = jnp.asarray(self.value)
        if self.located and value.shape[:2] == jnp.shape(self.where) and value.ndim > 1:
            value = self._beside(value, x)
        if value.ndim > x.ndim or any(a not in (1, b) for a, b in zip(value.shape[::-1], x.shape[::-1], strict=False)):
            raise ValueError(f"Replace: a value of shape {value.shape} does not broadcast to {x.shape}")
        return jnp.broadcast_to(value, x.shape)


class Splice(Edit):
    """x -> decode(encode(x)): what a dictionary's reconstruction of x does to a model.

    `atoms` is a pytree as `seqboat.interp.dictionaries.Atoms`.
    """

    atoms: Any

    def change(self, x: Array) -> Array:
        _check_widths(self, x, self.atoms.encoder.shape[-2], self.atoms.decoder.shape[-1])
        return self.atoms.decode(self.atoms.encode(x))


class Transcode(Edit):
    """x -> decode(encode(z)): a transcoder in the place of what computes x from z, for instance a feed-forward network.

    z is the value of the site that the edit `reads`; the layer supplies it (`seqboat.layers.taps.tap`). `atoms` is a
    pytree as `seqboat.interp.dictionaries.Atoms`.
    """

    atoms: Any
    reads: str = flax.struct.field(pytree_node=False, default="m")

    def __call__(self, x: Array, z: Array | None = None) -> Array:
        if z is None:
            raise ValueError(f"Transcode: needs the value of {self.reads} beside the one that it changes")
        _check_widths(self, x, self.atoms.encoder.shape[-2], self.atoms.decoder.shape[-1], z.shape[-1])
        return Replace(self.where, self.atoms.decode(self.atoms.encode(z)))(x)


class Without(Edit):
    """x -> x - sum_{i in which} f_i d_i: features of a dictionary are taken away, and its error stays.

    `which` is one number of a feature, or several (n,).
    """

    atoms: Any
    which: Any

    def change(self, x: Array) -> Array:
        _check_widths(self, x, self.atoms.encoder.shape[-2], self.atoms.decoder.shape[-1])
        which = jnp.atleast_1d(self.which)
        return x - self.atoms.encode(x)[..., which] @ self.atoms.decoder[which]


class Steer(Edit):
    """x -> x + amount * direction: `direction` (W,), or (M, 2) at `router_logits`; `amount` () or, located, (B, L)."""

    direction: Any
    amount: Any

    def change(self, x: Array) -> Array:
        direction, amount = jnp.asarray(self.direction), jnp.asarray(self.amount)
        if direction.shape != x.shape[x.ndim - direction.ndim :]:
            raise ValueError(f"Steer: a direction of shape {direction.shape} for a value of shape {x.shape}")
        return x + (self._beside(amount, x) if amount.ndim else amount) * _last(direction, x)


class Force(Edit):
    """Makes a discrete choice. Without a `codebook`, at `router_logits`:

        u -> (u_0, u_0 + |u_1 - u_0|), which activates, or (u_0, u_0 - |u_1 - u_0|), which does not.

    A decision that is already so keeps its logits. One that changes keeps the size of its margin, and so, without a
    capacity rule, its confidence. `choice` is True or False, or one for each of the M modules, (M,). Padding stays
    inactive.

    With a `codebook` (`seqboat.interp.codebooks.Codebook`) x takes the codes `choice`, (G, k) or, located,
    (B, L, G, k), and elsewhere its own.
    """

    choice: Any
    codebook: Any = None

    def __call__(self, x: Array) -> Array:
        return super().__call__(x if self.codebook is None else self.codebook(x))

    def change(self, x: Array) -> Array:
        return self._decide(x) if self.codebook is None else self._take(x)

    def _decide(self, x: Array) -> Array:
        if x.ndim != 4 or x.shape[-1] != 2:
            raise ValueError(f"Force: decisions are forced at router_logits, (B, L, M, 2), not at a value {x.shape}")
        if jnp.shape(self.choice) not in ((), x.shape[2:3]):
            raise ValueError(f"Force: a choice of shape {jnp.shape(self.choice)} for {x.shape[2]} modules")
        u_0, u_1 = x[..., 0], x[..., 1]
        active = _last(jnp.asarray(self.choice), u_0)
        # A margin of zero would not activate: at least one that u_0 does not absorb.
        least = jnp.finfo(x.dtype).eps * jnp.abs(u_0) + jnp.finfo(x.dtype).tiny
        size = jnp.maximum(jnp.abs(u_1 - u_0), least)
        forced = u_0 + jnp.where(active, size, -size)
        return jnp.stack([u_0, jnp.where((u_1 > u_0) == active, u_1, forced)], axis=-1)

    def _take(self, x: Array) -> Array:
        ids, wanted = jnp.asarray(self.choice), (len(self.codebook.table), self.codebook.k)
        if ids.shape[-2:] != wanted or ids.ndim not in (2, 4):
            raise ValueError(f"Force: codes of shape {ids.shape}, expected {wanted}, the groups and k, or (B, L, G, k)")
        value = self.codebook.decode(ids)
        return jnp.broadcast_to(self._beside(value, x) if value.ndim > 1 else value, x.shape)


SomeEdit = TypeVar("SomeEdit", bound=Edit)


def at(layer: int, layers: int, edit: SomeEdit) -> SomeEdit:
    """An edit of one layer, from 1 to `layers`, for `taps.write`; it is off in the others."""
    if not 1 <= layer <= layers:
        raise ValueError(f"layer={layer}: layers are numbered from 1 to {layers}")
    stacked = each([edit] * layers)
    here = np.arange(1, layers + 1) == layer
    return stacked.replace(where=stacked.where & here.reshape(-1, *[1] * jnp.ndim(edit.where)))


def each(edits: Sequence[SomeEdit]) -> SomeEdit:
    """One edit for every layer, all of one kind and of the same shapes, for `taps.write`."""
    kinds = {jax.tree.structure(edit) for edit in edits}
    shapes = {tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(edit)) for edit in edits}
    if len(kinds) != 1 or len(shapes) != 1:
        raise ValueError("each: the edits of the layers must be of one kind and of the same shapes")
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *edits)


def _last(value: Array, x: Array) -> Array:
    """A value of the last axes of x, with axes of size 1 for those before."""
    return value.reshape(*[1] * (x.ndim - value.ndim), *value.shape)


def _check_widths(edit: Edit, x: Array, read: int, written: int, source: int | None = None) -> None:
    """`source` is the width of another value that is read."""
    if (read, written) != (x.shape[-1] if source is None else source, x.shape[-1]):
        beside = "" if source is None else f", which reads one of {source}"
        raise ValueError(
            f"{type(edit).__name__}: a dictionary from {read} to {written} channels at a value of {x.shape[-1]}{beside}"
        )
