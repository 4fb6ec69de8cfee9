"""Sparse modular activation: every element decides, for each of a list of modules, whether to activate it.

(Ren et al. 2023, arXiv 2306.11197.) A latent configurator maps an element's representation m_t to two logits u for each
module i; the module is computed for t iff u_1 > u_0, and its result is multiplied by the confidence
c = max softmax(u / tau):

    y_t = sum_i  a_{t,i} c_{t,i} f_i(m_t; the other elements that activated i)

The decision a carries no gradient, the confidence does. A module is any Flax module from rows (T, D) to rows (T, D), or
a `WindowedModule`, whose rows also see their neighbours among the activated rows. It holds only parameters. Methods
that take `train`, `training` or `deterministic` (`modules.MODES`) are passed it. All RNG streams of the caller are
available, with separate keys for every block of rows; "dropout" only in training, so `has_rng("dropout")` works too.
"""

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from seqboat.layers import execution, streaming
from seqboat.layers.credit import Gate, credit
from seqboat.layers.execution import Form, How, Program
from seqboat.layers.router import Activation, ActivationStats, RouterConfig, count, make_router
from seqboat.layers.streaming import MAX_IN_PLACE_LENGTH, WorkingMemory
from seqboat.layers.taps import publish, refuse_located
from seqboat.layers.windowed import WindowedModule
from seqboat.modules import Modules, check_modules
from seqboat.ops import neighbours
from seqboat.parallel.rules import SINGLE_DEVICE, Layout

Rows = Float[Array, "B L D"]
Valid = Bool[Array, "B L"]
Memories = tuple[WorkingMemory | None, ...]  # one per module of a list, None if it is not windowed


class SparseModularActivation(nn.Module):
    """m (B, L, D) -> sum_i a_i c_i f_i(m) (B, L, D) over the `modules`, and the stats of the decisions.

    `form`, `block_size`, `blocks_per_iteration`, `layout`: `execution.How`. Every `activation` but "learned" is a
    `router.FixedPattern`, at `activation_rate`, without a configurator. Without elements the result is empty. `advance`
    resumes from earlier elements. Raises ValueError for a module that is not a Flax linen module, cannot be called with
    rows only, returns anything but rows (T, D) of floating point numbers, or has collections other than parameters.
    """

    # Flax: modules passed in keep their given names.
    preserve_adopted_names: ClassVar[bool] = True

    modules: Modules
    router: RouterConfig = RouterConfig()
    activation: Activation = "learned"
    activation_rate: float | None = None
    form: Form = "packed"
    block_size: int = 128
    blocks_per_iteration: int = 1
    layout: Layout = SINGLE_DEVICE

    def __post_init__(self):
        check_modules(self.modules)
        How(self.form, self.block_size, self.blocks_per_iteration)
        super().__post_init__()

    def __call__(self, m: Rows, valid: Valid, train: bool = False) -> tuple[Rows, ActivationStats]:
        return self.advance(m, valid, train, None)[:2]

    @nn.nowrap
    def initial_state(self, batch: int, row: jax.ShapeDtypeStruct) -> Memories:
        """The initial memory of each windowed module (`streaming.empty`); `row` (1, D) is an example of their input."""
        return tuple(streaming.empty(m, batch, row) if isinstance(m, WindowedModule) else None for m in self.modules)

    @nn.compact
    def advance(
        self, m: Rows, valid: Valid, train: bool, memories: Memories | None, threshold: Array | None = None
    ) -> tuple[Rows, ActivationStats, Memories | None]:
        """`__call__` for pieces of streams, valid elements first, and the memories after them; None: full sequences.

        Pieces of up to MAX_IN_PLACE_LENGTH elements are computed in place, skipping modules that no stream activates.
        """
        number, how = len(self.modules), How(self.form, self.block_size, self.blocks_per_iteration, self.layout)
        start = lambda memory: memory.now[:, None] if memory else self.layout.start(m.shape[1])
        activation = (self.activation if number else "always", self.activation_rate)
        decide = make_router(number, *activation, self.router, self.layout.data)
        decision = decide(m, valid, train, threshold, start(next(filter(None, memories or ()), None)))
        publish(self, "active", decision.active)
        publish(self, "confidence", decision.confidence)
        y, after = jnp.zeros_like(m), []
        for i, (module, memory) in enumerate(zip(self.modules, memories or (None,) * number, strict=True)):
            active, probability, confidence = (value[..., i] for value in decision[:3])
            # Here an inactive element's gradient is dropped.
            gate = Gate(valid, active, probability, jnp.where(active, confidence, 0))
            if self.is_initializing():
                execution.create(module, m, active, self.block_size, train)
            if self.is_initializing() or not m.size:  # nothing to compute or remember
                after.append(memory)
                continue
            stretch = neighbours.own(m, active, start(memory))
            if memories and self.form != "dense" and m.shape[1] <= MAX_IN_PLACE_LENGTH and not train:
                result, taps, new = execution.run_in_place(self._program(module, False), m, active, memory)
            else:
                result, taps, new = execution.run(self._program(module, train), stretch, how, memory)
            for name, value in taps.items():
                publish(self, name, value)
            # On rows, because the gate's gradient sums products of (1, L, D) arrays, slow on a CPU (layers/norm.py).
            rows = checkpoint_name(result, "result").reshape(-1, m.shape[-1])
            y += (gate.chosen.reshape(-1, 1).astype(m.dtype) * rows).reshape(m.shape)
            if train and self.activation == "learned" and self.router.has_credit:
                frozen, key = self._program(module, False).frozen(), functools.partial(self.make_rng, "dropout")
                run = functools.partial(execution.run, frozen, how=how)
                y += credit(run, memory, stretch, gate, self.router, key)
            after.append(new and new._replace(now=new.now + valid.sum(1)))
        return y, count(decision, valid), None if memories is None else tuple(after)

    def _program(self, module: nn.Module, train: bool) -> Program:
        """The module as a pure function, with keys for all RNG streams that it may draw from."""
        if self.form != "dense":
            refuse_located(module.variables.get("edits", {}))
        scope: Any = self.scope
        keys = {name: self.make_rng(name) for name in sorted(scope.rngs) if train or name != "dropout"}
        return execution.functional(module, keys, train, tapping=self.is_mutable_collection("taps"))
