"""Sparse modular activation: every element decides, for each of a list of modules, whether to wake it.

(Ren et al. 2023, arXiv 2306.11197.) A latent configurator reads an element's representation m_t and gives, for module
i, two logits u; the module is computed for t iff u_1 > u_0, and its result is multiplied by the confidence
c = max softmax(u / tau):

    y_t = sum_i  a_{t,i} c_{t,i} f_i(m_t; the other elements that activated i)

The decision a carries no gradient, the confidence does. A module is any Flax module from rows (T, D) to rows (T, D), or
a `WindowedModule`, whose rows also see their neighbours among the activated rows. It holds parameters only.

Whether this is training reaches methods that take `train`, `training` or `deterministic` (`modules.MODES`). All RNG
streams that the caller gave arrive, with keys of their own for every block of rows; but "dropout" in training alone, so
that a module may also ask `has_rng("dropout")`.
"""

import dataclasses
import functools
import math
import zlib
from typing import Any, ClassVar, Literal, NamedTuple

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from seqboat.layers.initializers import truncated_normal
from seqboat.layers.streaming import SHORT, Memory, in_place
from seqboat.layers.taps import tap
from seqboat.modules import Modules, check_modules, check_rows, describe_module, modes
from seqboat.ops.packing import Rows, compress, describe, extract, map_blocks, pack
from seqboat.parallel import sequence
from seqboat.parallel.rules import ALONE, Layout

Form = Literal["packed", "dense"]

# How many times the module's halo credit looks over, where computed but inactive rows stand between the active ones.
REACH = 2
# A length that no sequence has.
LONGEST = 2**31 - 1
# A windowed module's projection has no halo to pay for: so many blocks at once cost 5 to 8 % less of a layer on a CPU.
PROJECTED_BLOCKS = 4
# The most rows that a tile of any attention kernel has.
TILE = 128


class WindowedModule(nn.Module):
    """A module whose rows see their neighbours among the activated rows. Subclasses define:

    `halo(length) -> (left, right)`: how many packed rows on each side a row may see, in sequences of this length;
    `project(x, rows) -> halo`: row-wise, from (T, D) rows to a tree of rows: what a row's neighbours may see of it;
    `mix(x, halo, rows, halo_rows) -> y`: own rows and the halo around them to (T, D). The halo holds other sequences'
    rows too: `rows` and `halo_rows` (`ops.packing.Rows`) say which may be seen.

    One whose `has_kernel()` is True also defines mix in three parts, the middle one over all packed rows at once, of
    which `count` are filled (`ops.packing.map_blocks`):
    `ask(x, rows) -> q`, row-wise;
    `mix_packed(q, halo, rows, count, left, right) -> mixed`;
    `finish(x, mixed) -> y`, row-wise.
    """

    def has_kernel(self) -> bool:
        return False

    def halo(self, length: int) -> tuple[int, int]:
        raise NotImplementedError

    def project(self, x: Array, rows: Rows) -> dict:
        raise NotImplementedError

    def mix(self, x: Array, halo: dict, rows: Rows, halo_rows: Rows) -> Array:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """What trains the configurator. The defaults are the published router, whose inactive elements send it no gradient.

    `centered`: subtract a running mean over training steps from its input. `straight_through`: in training, pay an
    inactive element's probability for what the element's result would have been worth, at a random `credit_share` of
    them. `key_credit`: pay a computed element's probability for being read by others. `initial_bias`: added to the
    logit of activating. `temperature_scale`: tau starts at this times sqrt(D).
    """

    centered: bool = False
    straight_through: bool = False
    key_credit: bool = False
    credit_share: float = 1.0
    initial_bias: float = 0.0
    temperature_scale: float = 1.0

    def __post_init__(self):
        if not 0 < self.credit_share <= 1:
            raise ValueError(f"credit_share={self.credit_share}: must be above 0 and at most 1")
        if not self.temperature_scale > 0:
            raise ValueError(f"temperature_scale={self.temperature_scale}: must be positive")


# Of each of a list of modules, if it is windowed.
Memories = tuple[Memory | None, ...]


class Decision(NamedTuple):
    """For M modules: `active` (B, L, M) bool, `probability` of activating and `confidence` in the decision (B, L, M),
    `temperature` (M,)."""

    active: Array
    probability: Array
    confidence: Array
    temperature: Array


class ActivationStats(NamedTuple):
    """Sums over a batch's real elements, so that means are exact: `active`, `confidence` (of active elements),
    `probability`, each (M,); `elements` (); and the `temperature` (M,)."""

    active: Array
    confidence: Array
    probability: Array
    elements: Array
    temperature: Array


class LatentConfigurator(nn.Module):
    """m (B, L, D) -> for each of M modules the decision  a = u_1 > u_0,  p = softmax(u / tau)_1,  in float32.

    `axes` names the mesh axes over which the elements are split.
    """

    modules: int
    router: RouterConfig
    axes: tuple[str, ...] = ()

    # The share of the newest batch in the running mean, once there are enough batches.
    MOMENTUM = 0.01

    @nn.compact
    def __call__(self, m: Float[Array, "B L D"], valid: Bool[Array, "B L"], train: bool) -> Decision:
        width = m.shape[-1]
        if self.router.centered:
            m = m - self._running_mean(m, valid, train).astype(m.dtype)[None, None]
        bias = lambda key, shape, dtype: jnp.zeros(shape, dtype).at[1::2].set(self.router.initial_bias)
        u = nn.Dense(2 * self.modules, kernel_init=truncated_normal(), bias_init=bias, dtype=m.dtype, name="logits")(m)
        u = u.reshape(*m.shape[:2], self.modules, 2).astype(jnp.float32)
        start = math.log(self.router.temperature_scale * math.sqrt(width))
        temperature = jnp.exp(self.param("log_temperature", nn.initializers.constant(start), (self.modules,)))
        margin = u[..., 1] - u[..., 0]
        active = (margin > 0) & valid[..., None]
        probability = jax.nn.sigmoid(margin / temperature[None, None])
        tap(self, "router_logits", u)
        return Decision(active, probability, jnp.maximum(probability, 1 - probability), temperature)

    def _running_mean(self, m: Array, valid: Array, train: bool) -> Array:
        """The mean of previous training batches: causal, and independent of batch mates."""
        mean = self.variable("batch_stats", "mean", jnp.zeros, m.shape[-1:], jnp.float32)
        batches = self.variable("batch_stats", "batches", jnp.zeros, (), jnp.float32)
        before = mean.value
        if train and not self.is_initializing():
            total = jax.lax.stop_gradient(jnp.where(valid[..., None], m.astype(jnp.float32), 0).sum((0, 1)))
            count = valid.sum()
            total, count = jax.lax.psum((total, count), self.axes) if self.axes else (total, count)
            batch = total / jnp.maximum(count, 1)
            batches.value += 1
            mean.value += jnp.maximum(self.MOMENTUM, 1 / batches.value) * (batch - before)
        return before


class SparseModularActivation(nn.Module):
    """m (B, L, D) -> sum_i a_i c_i f_i(m) (B, L, D) over the `modules`, and what was decided.

    `form` "packed" computes active rows alone, in blocks whose number follows the activation; "dense" computes all rows
    and masks: the reference. `always` activates every module everywhere with confidence 1 and has no configurator.
    `blocks_per_trip`: how many blocks are computed at once (`ops.packing.map_blocks`). Neither asks for more rows than
    there are, but for what fills the last tile of 128. Of no element the result is empty. `layout`: how the sequences
    are split over devices; each computes its own elements. `advance` goes on from what earlier elements left.

    Raises ValueError, by its name, for a module that is not a Flax linen module, that cannot be called with rows alone,
    whose results are not rows (T, D) of floating point numbers, or that holds other collections than parameters.
    """

    # Flax: modules passed in keep the names they were given.
    preserve_adopted_names: ClassVar[bool] = True

    modules: Modules
    router: RouterConfig = RouterConfig()
    always: bool = False
    form: Form = "packed"
    block_size: int = 128
    blocks_per_trip: int = 1
    layout: Layout = ALONE

    def __post_init__(self):
        check_modules(self.modules)
        for field in ("block_size", "blocks_per_trip"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 1")
        super().__post_init__()

    def __call__(
        self, m: Float[Array, "B L D"], valid: Bool[Array, "B L"], train: bool = False
    ) -> tuple[Float[Array, "B L D"], ActivationStats]:
        return self.advance(m, valid, train, None)[:2]

    @nn.nowrap
    def initial_state(self, batch: int, row: jax.ShapeDtypeStruct) -> Memories:
        """The memory of each module that is windowed, in streams that begin; `row` (1, D) is what they are fed.

        Raises ValueError for one that reads ahead, or rows without limit.
        """
        return tuple(_empty(m, batch, row) if isinstance(m, WindowedModule) else None for m in self.modules)

    @nn.compact
    def advance(
        self, m: Float[Array, "B L D"], valid: Bool[Array, "B L"], train: bool, memories: Memories | None
    ) -> tuple[Float[Array, "B L D"], ActivationStats, Memories | None]:
        """`__call__` for pieces of streams that `memories` are of, if any, and the memories after them.

        Valid elements come first. Pieces of up to SHORT elements are computed in their places, and a module not at all
        where no stream activates it.
        """
        count = len(self.modules)
        if self.always:
            one = jnp.ones((*m.shape[:2], count), jnp.float32)
            decision = Decision(one * valid[..., None] > 0, one, one, jnp.ones(count))
        elif count:
            configurator = LatentConfigurator(count, self.router, self.layout.data, name="configurator")
            decision = configurator(m, valid, train)
        else:
            empty = jnp.zeros((*m.shape[:2], 0), jnp.float32)
            decision = Decision(empty > 0, empty, empty, jnp.zeros(0))
        active, gate = decision.active, decision.confidence
        for name, value in (("active", active), ("confidence", gate)):
            tap(self, name, value)

        y, after = jnp.zeros_like(m), []
        for i, module in enumerate(self.modules):
            memory = memories[i] if memories else None
            if self.is_initializing():
                self._create(module, m, active[..., i], train)
                continue
            if not m.size:  # no element: nothing to compute, nothing to remember
                after.append(memory)
                continue
            chosen = jnp.where(active[..., i], gate[..., i], 0)
            if memories and self.form == "packed" and m.shape[1] <= SHORT and not train:
                result, taps, new = self._compute_in_place(module, m, active[..., i], memory)
            else:
                rows = self._describe(active[..., i], memory)
                result, taps, new = self._compute(module, m, active[..., i], rows, train, memory)
            after.append(new and new._replace(now=new.now + valid.sum(1)))
            result = checkpoint_name(result, "result")
            for name, value in taps.items():
                tap(self, name, value)
            # On rows: sums of products of (1, L, D) arrays, the gate's gradient, are slow on a CPU (layers/norm.py).
            gated = chosen.reshape(-1, 1).astype(m.dtype) * result.reshape(-1, m.shape[-1])
            y += gated.reshape(m.shape)
            if train and not self.always and (self.router.straight_through or self.router.key_credit):
                y += self._credit(module, m, valid, active[..., i], decision.probability[..., i], chosen, memory)
        on = active.astype(jnp.float32)
        sums = {"active": on, "confidence": on * gate, "probability": decision.probability}
        stats = ActivationStats(
            **{name: (value * valid[..., None]).sum((0, 1)) for name, value in sums.items()},
            elements=valid.sum().astype(jnp.float32),
            temperature=decision.temperature,
        )
        return y, stats, None if memories is None else tuple(after)

    def _compute(self, module, m, computed, rows, train, memory=None, frozen=False, reach=1):
        """The module at the `computed` elements of m, and what it tapped, zero, or anything, elsewhere; and the memory
        with what it projected, if there is one.

        `rows` describes all elements. `frozen` lets no gradient into parameters and m. In the packed form a row sees
        `reach` times the module's halo of computed rows; those that `rows.active` leaves out have their place in it.
        """
        params, apply = self._functional(module, train)
        if frozen:
            params, m = jax.lax.stop_gradient((params, m))
        own, windowed = slice(None), isinstance(module, WindowedModule)
        if windowed and (memory or self.layout.length):
            m, computed, rows, own = self._with_neighbours(module, m, computed, rows, reach, memory)
        flat = m.reshape(-1, m.shape[-1])
        if self.form == "dense":
            places = jnp.where(computed, np.arange(computed.size, dtype=np.int32).reshape(computed.shape), -1)
            y, taps, seen = _dense(module, flat, rows, params, apply, _recall(memory, places))
        else:
            left, right = (reach * side for side in (module.halo(m.shape[1]) if windowed else (0, 0)))
            # Blocks no larger than all rows, in whole tiles of any kernel.
            block_size = min(self.block_size, -(-flat.shape[0] // TILE) * TILE)
            blocks = -(-flat.shape[0] // block_size)
            trip = min(self.blocks_per_trip, blocks)
            # One by one they are projected by more; else by as many as a trip has, so that no capacity is wasted.
            projected = min(PROJECTED_BLOCKS, blocks) if windowed and trip == 1 else trip
            packing = pack(computed, projected * block_size, left=left, right=right)
            rows, flat = compress((rows, flat), packing)
            places = packing.slot.reshape(computed.shape)
            wanted = None if memory is None else compress(computed.at[:, : own.start].set(False).reshape(-1), packing)
            each: Any = functools.partial(
                map_blocks,
                params=params,
                count=packing.filled,
                block_size=block_size,
                left=left,
                right=right,
                blocks_per_trip=trip,
                wanted=wanted,
            )
            if windowed:
                project = functools.partial(each, block_size=projected * block_size, blocks_per_trip=1)
                # Credit reads keys with weights, which kernels do not know.
                kernel = module.has_kernel() and rows.weight is None
                compute = _packed_kernel if kernel else _packed_windowed
                y, taps, seen = compute(rows, flat, apply, project, each, _recall(memory, places))
            else:
                y, taps = _packed(rows, flat, apply, each)
            y, taps = extract((y, taps), packing)
        if memory is not None:  # of every stream the last rows: places grow with the position, and -1 comes first
            places = jnp.sort(places[:, own], axis=1)[:, -memory.window :]
            new = jax.tree.map(lambda leaf: leaf[jnp.maximum(places, 0)], (seen, rows.position))
            memory = memory.push(*new, places >= 0)
        back = lambda a: a.reshape(*m.shape[:2], *a.shape[1:])[:, own]
        return back(y), jax.tree.map(back, taps), memory

    def _compute_in_place(self, module, m, active, memory):
        """`_compute` for short pieces of streams, every row in its place: new rows are first pushed to the memory,
        which has slots to spare, and then read it."""
        params, apply = self._functional(module, False)

        def where_needed(method, *args):
            streams = np.arange(len(m), dtype=np.int32)[:, None]
            each = functools.partial(jax.vmap(lambda slot, *args: apply(params, slot, method, *args)), streams)
            nothing = lambda *args: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(each, *args))
            return jax.lax.cond(active.any(), each, nothing, *args)

        if memory is None:
            y, taps = where_needed("__call__", m)
        else:
            position = memory.now[:, None] + np.arange(m.shape[1], dtype=np.int32)[None]
            seen, taps = where_needed("project", m, in_place(memory, position, active)[0])
            memory = memory.push(seen, position, active)
            y, more = where_needed("mix", m, memory.rows, *in_place(memory, position, active))
            taps |= more
        hide = lambda leaf: jnp.where(active.reshape(*active.shape, *[1] * (leaf.ndim - 2)), leaf, 0)
        return y, jax.tree.map(hide, taps), memory

    def _describe(self, active: Bool[Array, "B L"], memory: Memory | None = None) -> Rows:
        rows = describe(active)
        start: Any = self.layout.start(active.shape[1])
        if memory is not None:
            start = jnp.broadcast_to(memory.now[:, None], active.shape).reshape(-1)
        return rows._replace(position=rows.position + start)

    def _with_neighbours(self, module: WindowedModule, m: Array, computed: Array, rows: Rows, reach: int, memory):
        """Of streams, or of sequences split over devices: m, computed and rows together with the computed elements
        before and after that these may see, and where their own are among them. Of remembered rows m is zero."""
        axis, length = str(self.layout.length), m.shape[1]
        shaped = jax.tree.map(lambda leaf: leaf.reshape(m.shape[:2]), rows)
        seen = {"m": m, "position": shaped.position, "active": shaped.active, "weight": shaped.weight}
        parts = [(seen, computed)]
        left, right = (reach * side for side in module.halo(length * self.layout.pieces))
        if memory is not None:
            (left, right), (remembered, there) = (memory.window, 0), memory.ordered()
            before = {
                "m": jnp.zeros((*there.shape, m.shape[-1]), m.dtype),
                "position": remembered.position,
                "active": there,
                "weight": None if rows.weight is None else jnp.ones(there.shape, rows.weight.dtype),
            }
            parts.insert(0, (before, there))
        elif left:
            parts.insert(0, sequence.last_active(seen, computed, left, axis))
        if right:
            parts.append(sequence.last_active(seen, computed, right, axis, reverse=True))
        join = lambda *leaves: jnp.concatenate(leaves, axis=1)
        seen, computed = jax.tree.map(join, *parts)
        read = seen["active"] & computed
        if rows.weight is None:
            rows = describe(read)
        else:  # windows count the active elements alone: those whose weight is 1, not 0
            rows = describe(read & (seen["weight"] > 0.5))
            rows = rows._replace(active=read.reshape(-1), weight=seen["weight"].reshape(-1))
        rows = rows._replace(position=seen["position"].reshape(-1))
        return seen["m"], computed, rows, slice(left, left + length)

    def _credit(self, module, m, valid, active, probability, chosen, memory):
        """Zeros (B, L, D) whose gradient pays the router for what elements are, or would be, worth.

        A random `credit_share` of the inactive elements is computed beside the active ones: such an element's result
        enters with weight p (`straight_through`), and every computed element is read as a key with weight
        w = p + stop_gradient(a - p)  (`key_credit`). The gradient reaches p alone, divided by the share for inactive
        elements, so that its mean is that of a share of 1.

        In the packed form credit is local: it sees REACH times the window of *computed* rows, so where few are active
        it leaves out far neighbours that the exact value, and the dense form, have.
        """
        share = self.router.credit_share
        sampled = valid & ~active
        if not self.router.straight_through:
            sampled &= False
        elif share < 1:
            sampled &= jax.random.bernoulli(self.make_rng("dropout"), share, sampled.shape)
        scale = jnp.where(active, 1, 1 / share)
        probability = scale * probability
        rows = self._describe(active, memory)
        if self.router.key_credit:  # inactive keys have weight 0, and earn credit
            weight = _straight_through(active, probability)
            rows = rows._replace(active=(active | sampled).reshape(-1), weight=weight.reshape(-1))
        result, *_ = self._compute(module, m, active | sampled, rows, False, memory, frozen=True, reach=REACH)
        kept, chosen, probability = active[..., None], chosen[..., None], jnp.where(sampled, probability, 0)[..., None]
        stop = jax.lax.stop_gradient
        worth = jnp.where(kept, stop(chosen) * result, probability * stop(result))
        return (worth - stop(worth)).astype(m.dtype)

    def _functional(self, module: nn.Module, train: bool):
        """The module as a pure function of its parameters, for `map_blocks`: (params, apply).

        `apply(params, slot, method, x, *args)` returns the method's result and what it tapped, {name: rows}. RNGs are
        keys folded with the block's first slot.
        """
        unbound, tapping = module.clone(parent=None), self.is_mutable_collection("taps")
        scope: Any = self.scope
        keys = {name: self.make_rng(name) for name in sorted(scope.rngs) if train or name != "dropout"}
        kinds = {name: jax.random.key_impl(key) for name, key in keys.items()}
        params = {"params": module.variables.get("params", {}), "keys": jax.tree.map(jax.random.key_data, keys)}

        def key(name, data, method, slot):
            key = jax.random.fold_in(jax.random.wrap_key_data(data, impl=kinds[name]), slot[0])
            # Dropout is drawn below the names of submodules: it differs between methods as it is.
            return key if name == "dropout" else jax.random.fold_in(key, zlib.crc32(method.encode()))

        def apply(params, slot, method, *args):
            rngs = {name: key(name, data, method, slot) for name, data in params["keys"].items()}
            options = modes(unbound, method, len(args), train)
            try:
                result, sown = unbound.apply(
                    {"params": params["params"]},
                    *args,
                    method=method,
                    rngs=rngs,
                    mutable=["taps"] if tapping else [],
                    **options,
                )
            except flax.errors.InvalidRngError as error:
                raise ValueError(
                    f"{describe_module(module)} draws from an RNG that is not there; there are {sorted(rngs)}, and "
                    f'"dropout" in training alone: {error}'
                ) from error
            return _checked(unbound, method, args[0], result), dict(sown.get("taps", {}))

        return params, apply

    def _create(self, module: nn.Module, m: Array, active: Array, train: bool) -> None:
        """Create the module's parameters, from a few rows; from one of zeros, if there are none."""
        if not m.size:
            m, active = jnp.zeros((1, 1, m.shape[-1]), m.dtype), jnp.zeros((1, 1), bool)
        count = min(m.shape[0] * m.shape[1], self.block_size)
        rows = jax.tree.map(lambda leaf: leaf[:count], describe(active))
        x = m.reshape(-1, m.shape[-1])[:count]

        def run(method, *args):
            options = modes(module, method, len(args), train)
            return _checked(module, method, x, getattr(module, method)(*args, **options))

        if isinstance(module, WindowedModule):
            run("mix", x, run("project", x, rows), rows, rows)
        else:
            run("__call__", x)
        other = set(module.variables) - {"params", "taps"}
        if other:
            raise ValueError(f"a sparsely activated module may hold parameters only; {module.name} has {sorted(other)}")


# The methods that return rows (T, D); others return trees of T rows.
FINAL = ("__call__", "mix", "finish")


def _checked(module: nn.Module, method: str, x: Array, result: Any) -> Any:
    """A method's result for the rows x (T, D), in their dtype where it is what the module returns."""
    rows, width = x.shape[0], x.shape[1] if method in FINAL else None
    check_rows(module, method, result, rows, width)
    return result if width is None else result.astype(x.dtype)


def _packed(rows: Rows, x: Array, apply, each):
    """A row-wise module over packed rows; `each` is `map_blocks` but for the function and its rows."""
    own = {"x": x, "slot": jnp.arange(x.shape[0], dtype=jnp.int32)}
    return each(lambda params, own, _: apply(params, own["slot"], "__call__", own["x"]), own=own, halo=None)


def _packed_windowed(rows: Rows, x: Array, apply, each_projected, each, recall):
    """A windowed module over packed rows, projected in other blocks than mixed; also what its rows showed."""

    def mix(params, own, halo):
        return apply(params, own["slot"], "mix", own["x"], halo["seen"], own["rows"], halo["rows"])

    own, seen, taps = _project(rows, x, apply, each_projected)
    seen = recall(seen)
    y, more = each(mix, own=own, halo={"seen": seen, "rows": rows})
    return y, {**taps, **more}, seen


def _packed_kernel(rows: Rows, x: Array, apply, each_projected, each, recall):
    """`_packed_windowed` for a module whose middle part takes all packed rows at once."""
    own, seen, taps = _project(rows, x, apply, each_projected)
    seen = recall(seen)
    q, asked = each_projected(lambda p, own, _: apply(p, own["slot"], "ask", own["x"], own["rows"]), own=own, halo=None)
    where = [each.keywords[name] for name in ("count", "left", "right")]
    mixed, read = apply(each.keywords["params"], own["slot"], "mix_packed", q, seen, rows, *where)
    finish = lambda p, own, _: apply(p, own["slot"], "finish", own["x"], own["mixed"])
    y, finished = each_projected(finish, own={**own, "mixed": mixed}, halo=None)
    return y, {**taps, **asked, **read, **finished}, seen


def _project(rows: Rows, x: Array, apply, each):
    """The own part of all packed rows, what their neighbours may see, and taps."""
    own = {"x": x, "rows": rows, "slot": jnp.arange(x.shape[0], dtype=jnp.int32)}
    project = lambda params, own, _: apply(params, own["slot"], "project", own["x"], own["rows"])
    return own, *each(project, own=own, halo=None)


def _dense(module: nn.Module, x: Array, rows: Rows, params, apply, recall):
    """A module over all rows at once, of which only those with `rows.active` are read by others: the reference."""
    start = jnp.zeros(1, jnp.int32)
    if not isinstance(module, WindowedModule):
        return *apply(params, start, "__call__", x), None
    seen, taps = apply(params, start, "project", x, rows)
    seen = recall(seen)
    y, more = apply(params, start, "mix", x, seen, rows, rows)
    return y, {**taps, **more}, seen


def _recall(memory: Memory | None, places: Int[Array, "B L"]):
    """Put what the first rows of each stream, the remembered ones, once showed in their places; -1 is no place."""
    if memory is None:
        return lambda seen: seen
    rows = memory.ordered()[0].rows
    places = places[:, : memory.window]

    def put(leaf, old):
        return leaf.at[jnp.where(places < 0, leaf.shape[0], places)].set(old.astype(leaf.dtype), mode="drop")

    return lambda seen: jax.tree.map(put, seen, rows)


def _empty(module: WindowedModule, batch: int, row: jax.ShapeDtypeStruct) -> Memory:
    """The memory of a module that has seen nothing."""
    module = module.clone(parent=None)
    left, right = module.halo(LONGEST)
    if right:
        raise ValueError(f"{module.name} reads {right} rows ahead: only what reads earlier rows alone can be streamed")
    if left > LONGEST // 2:
        raise ValueError(f"{module.name} reads all earlier rows: to be streamed it needs a halo(length) with a bound")
    init = functools.partial(module.init_with_output, method="project")
    shown, _ = jax.eval_shape(init, jax.random.key(0), row, describe(jnp.ones((1, 1), bool)))
    rows = jax.tree.map(lambda s: jnp.zeros((batch, left + SHORT, *s.shape[1:]), s.dtype), shown)
    now, pushed = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32)  # two: who donates a state, donates both
    return Memory(rows, jnp.zeros((batch, left + SHORT), jnp.int32), now, pushed)


def _straight_through(value: Array, surrogate: Array) -> Array:
    """The value, with the gradient of the surrogate."""
    return surrogate + jax.lax.stop_gradient(value.astype(surrogate.dtype) - surrogate)
