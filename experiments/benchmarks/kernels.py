"""Operations alone: the attention kernel against the reference, the forms of the EMA, and a plain matrix product."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import cases, contenders
from experiments.benchmarks.cases import Case
from experiments.benchmarks.settings import Row, Settings, agree, tolerance
from experiments.common.errors import UserError
from seqboat.layers.mixers import ema as ema_layer
from seqboat.ops import ema
from seqboat.ops.blocks import Blocks
from seqboat.ops.packing import Packing, RowInfo, compress, extract, pack, row_info
from seqboat.ops.window_attention import attend, attend_packed, kernel_unsupported_reason

Arrays = tuple[Any, ...]
LEAVES = ("y", "dtable", "dq", "dk", "dv")
# Arrays that a forward and a backward pass move at least: x and y, then x and both cotangents; a copy moves two.
EMA_ARRAYS, COPY_ARRAYS = 5, 2


def attention(settings: Settings) -> Iterator[Row]:
    """`attend_packed`, forward and backward, with random rows active: differences from `attend` over all rows in
    float32, leaf by leaf, then milliseconds and useful TFLOP/s (`useful_flops`)."""
    for name, case in settings.cases.items():
        if reason := kernel_unsupported_reason(case.layer.make_window()):
            yield {"case": name, "skipped": reason}
            continue
        problem = Attention(case)
        peak, peak_flops = product(case.layer.dtype)
        for rate in settings.rates:
            active = random_rows(case, rate)
            packed = problem.packed(active)
            differences = problem.check(f"{name} at {rate}", active, packed)
            race = settings.race({"kernel": packed.run, "peak": peak})
            flops = useful_flops(case, np.asarray(active).sum(1))
            row = {"case": name, "dtype": case.layer.dtype, "rate": rate, **race.row("kernel")}
            row["tflops"] = flops / race.ms("kernel") / 1e9
            row["share_of_peak"] = row["tflops"] / (peak_flops / race.ms("peak") / 1e9)
            yield row | {"compile_seconds": problem.compile_seconds, **differences}


def random_rows(case: Case, rate: float, seed: int = 0) -> jax.Array:
    """(B, L): exactly this fraction of the batch's rows."""
    active = np.zeros(case.batch * case.length, bool)
    active[np.random.default_rng(seed).permutation(active.size)[: round(rate * active.size)]] = True
    return jnp.asarray(active.reshape(case.batch, case.length))


def useful_flops(case: Case, active: np.ndarray) -> int:
    """FLOPs of the products needed for sequences of N active rows, forward and twice that backward: Z for the score and
    E for the value of every pair that is seen; nothing recomputed or masked."""
    layer, pairs = case.layer, 0
    for count in active.tolist():
        rank = np.arange(count)
        reach = count if layer.window_size is None else layer.window_size
        pairs += int(np.minimum(rank, reach).sum() * (1 if layer.causal else 2) + count)
    return 3 * 2 * pairs * (layer.key_size + layer.value_size)


class Attention:
    """A case's attention on random q, k and v: by the kernel over packed rows, and by `attend` in float32."""

    def __init__(self, case: Case, seed: int = 0):
        self.case, self.window = case, case.layer.make_window()
        rng, rows = np.random.default_rng(seed), case.batch * case.length
        normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), case.layer.dtype)
        shapes = jax.eval_shape(lambda: cases.init_layer(case))["params"]["gau"]
        table = normal(*shapes["position_bias"].shape) if "position_bias" in shapes else None
        widths = (case.layer.key_size, case.layer.key_size, case.layer.value_size)
        self.inputs: Arrays = (table, *(normal(rows, width) for width in widths))
        self.cotangent = normal(rows, case.layer.value_size)
        self.left, self.right = self.window.halo(case.length)
        self.compile_seconds = 0.0
        self._kernel: Callable[..., Arrays] | None = None
        self._exact = jax.jit(self._reference)

    def packed(self, active: jax.Array) -> "Packed":
        """The kernel on these rows; it is compiled once for all."""
        table, *rows = self.inputs
        packing = pack(active, self.case.layer.block_size, left=self.left, right=self.right)
        info, inputs, cotangent = compress((row_info(active), tuple(rows), self.cotangent), packing)
        arguments = ((table, *inputs), cotangent, info, packing.filled)
        if self._kernel is None:
            began = time.perf_counter()
            self._kernel = jax.jit(self._forward_and_backward).lower(*arguments).compile()
            self.compile_seconds = time.perf_counter() - began
        return Packed(self._kernel, arguments, packing)

    def check(self, what: str, active: jax.Array, packed: "Packed") -> dict[str, float]:
        """The relative RMS difference of every leaf. Raises UserError above `tolerance`."""
        with jax.default_matmul_precision("highest"):
            expected = self._exact(active, self.inputs, self.cotangent)
        found = packed.results()
        pairs = {leaf: (a, b) for leaf, a, b in zip(LEAVES, found, expected, strict=True) if b is not None}
        differences = {leaf: contenders.relative(*pair) for leaf, pair in pairs.items()}
        largest = tolerance(self.case.layer.dtype)
        if not all(value <= largest for value in differences.values()):  # also true for NaN
            listed = ", ".join(f"{leaf} {value:.1e}" for leaf, value in differences.items())
            raise UserError(f"{what}: the kernel differs from attend by {listed}; at most {largest:.0e} may differ")
        return differences

    def _forward_and_backward(self, inputs: Arrays, cotangent, rows: RowInfo, count) -> Arrays:
        blocks = Blocks(count, self.case.layer.block_size, self.left, self.right)
        run = functools.partial(attend_packed, rows=rows, blocks=blocks)
        y, transpose = jax.vjp(functools.partial(run, self.window), *inputs)
        return y, *transpose(cotangent)

    def _reference(self, active: jax.Array, inputs: Arrays, cotangent: jax.Array) -> Arrays:
        """`attend` over all rows of one sequence after the other."""
        info, shape = row_info(active), (self.case.batch, self.case.length)
        split = lambda tree: jax.tree.map(lambda a: a.reshape(*shape, *a.shape[1:]), tree)
        inputs, cotangent = jax.tree.map(lambda a: a.astype(jnp.float32), (inputs, cotangent))

        def form(table, *rows):
            @jax.checkpoint
            def one(sequence):
                q, k, v, own = sequence
                return attend(self.window, table, q, k, v, own, own)

            y = jax.lax.map(one, split((*rows, info))).reshape(active.size, -1)
            return jnp.where(info.active[:, None], y, 0)

        y, transpose = jax.vjp(form, *inputs)
        return y, *transpose(cotangent)


class Packed:
    """A compiled forward and backward pass on packed rows."""

    def __init__(self, program: Callable[..., Arrays], arguments: Arrays, packing: Packing):
        self._program, self._arguments, self._packing = program, arguments, packing

    def run(self) -> Arrays:
        return jax.block_until_ready(self._program(*self._arguments))

    def results(self) -> Arrays:
        """y, and the gradients of table, q, k and v, by row of the batch."""
        y, d_table, *d_rows = self.run()
        y, d_rows = extract((y, d_rows), self._packing)
        return y, d_table, *d_rows


def ema_methods(settings: Settings) -> Iterator[Row]:
    """The EMA of a case by each method, forward and backward, whole and cut at the case's lags: differences from the
    FFT, leaf by leaf, and milliseconds beside those of a copy. `share_of_copy` is the share of the copy's bandwidth at
    which a pass would move EMA_ARRAYS arrays."""
    for name, case in settings.cases.items():
        layer, data = case.layer, signal(case.batch, case.length, case.layer.features, case.layer.dtype)
        width, average = layer.features, cast(ema_layer.Config, layer.mixer)
        params = ema_params(width, width if layer.causal else 2 * width, average.state_size)
        copy = functools.partial(contenders.wait, jax.jit(lambda x: x + 1).lower(data.x).compile(), data.x)
        cut = average.truncation if (average.truncation or case.length) < case.length else None
        for lags in dict.fromkeys((cut, None)):
            runners: dict[str, contenders.Runner] = {}
            for method in ("fft", "chunked"):
                try:
                    runners[method] = ema_runner(params, data, lags, method)
                except ValueError as error:
                    yield {"case": name, "method": method, "lags": lags, "skipped": str(error)}
            race = settings.race({"copy": copy, **{method: runner.run for method, runner in runners.items()}})
            for method, runner in runners.items():
                row = {"case": name, "method": method, "lags": lags or case.length, **race.row(method)}
                row["share_of_copy"] = EMA_ARRAYS / COPY_ARRAYS * race.ms("copy") / race.ms(method)
                row |= race.ratio("over_copy", method, "copy")
                yield row if method == "fft" else row | agree(f"EMA of {name}", runner, runners["fft"])


def ema_runner(params: ema.EMAParams, data: cases.Data, lags: int | None, method: Any) -> contenders.Runner:
    """A runner of the EMA by one method. Raises ValueError for a method that has no such form."""
    run = lambda v, x: ema.convolve(ema.EMAParams(*v["params"]), x, truncation=lags, method=method)
    return contenders.Gradient(run, data).runner({"params": params})


def ema_params(width: int, rows: int, states: int, seed: int = 0) -> ema.EMAParams:
    """Random parameters as the layer initialises them; twice as many rows as the width look both ways."""
    rng = np.random.default_rng(seed)
    normal = lambda scale, *shape: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)
    sign = jnp.where(np.arange(states) % 2, -1.0, 1.0)
    return ema.EMAParams(
        delta=normal(0.2, rows, states),
        alpha=normal(0.2, rows, states),
        beta=normal(0.02, rows, states) + sign[None],
        gamma=normal(1, rows, states),
        omega=normal(1, width),
    )


def signal(batch: int, length: int, width: int, dtype: str = "float32", seed: int = 1) -> cases.Data:
    """A random input (B, L, D) and a random cotangent."""
    rng = np.random.default_rng(seed)
    x, cotangent = (jnp.asarray(rng.standard_normal((batch, length, width)), dtype) for _ in range(2))
    return cases.Data(x, cotangent, jnp.ones((batch, length), bool))


def product(dtype: str) -> tuple[Callable[[], object], int]:
    """A square product of random matrices, the machine's peak, and its FLOPs; large enough to fill an accelerator."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    return functools.partial(contenders.wait, jax.jit(lambda a: a @ a).lower(a).compile(), a), 2 * size**3
