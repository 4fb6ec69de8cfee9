"""What is benchmarked: our layer in its forms, the published PyTorch layer, a transformer layer of equal width.

Each is wrapped as a `Runner`: a forward and backward pass, with gradients for the parameters and x.
"""

import contextlib
import functools
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.cases import Case, Data, router_biases, with_router_bias
from experiments.common.errors import UserError
from seqboat.interop.published import convert_classifier, convert_ema, convert_layer
from seqboat.layers.mixers import ema
from seqboat.layers.seqboat import SeqBoatLayer
from seqboat.models.classifier import Classifier, ClassifierConfig
from seqboat.models.encoder import EncoderConfig
from seqboat.ops.ema import EMAParams
from seqboat.paths import flatten

Tree = Any
NORMS = {"layer": "layernorm", "batch": "batchnorm"}
ACTIVATIONS: dict[str, Any] = {"sparse": "learned", "always active": "always", "no attention": "never"}


@dataclass(frozen=True)
class Runner:
    """`run()` computes output and gradients once and blocks until they are ready; `results()` returns them, as (y, d
    parameters, d x), computed with full float32 products where the dtype is float32."""

    run: Callable[[], object]
    results: Callable[[], tuple[Any, Tree, Any]]
    compile_seconds: float | None = None


class Gradient:
    """A function (variables, x) -> y with its gradients on this data, compiled once for all variables of its shapes."""

    def __init__(self, apply: Callable[[Tree, Any], Any], data: Data):
        def loss(params, rest, x):
            y = apply({**rest, "params": params}, x)
            return (y.astype(jnp.float32) * data.cotangent.astype(jnp.float32)).sum(), y

        self._function = jax.jit(jax.grad(loss, argnums=(0, 2), has_aux=True))
        self._program: Callable[..., Any] | None = None
        self._exact: Callable[..., Any] | None = None
        self._data, self._seconds = data, 0.0

    def runner(self, variables: Tree) -> Runner:
        rest = {name: tree for name, tree in variables.items() if name != "params"}
        arguments = (variables["params"], rest, self._data.x)
        if self._program is None:
            began = time.perf_counter()
            self._program = self._function.lower(*arguments).compile()
            self._seconds = time.perf_counter() - began
        run = functools.partial(wait, self._program, *arguments)

        def results():
            (d_params, d_x), y = wait(self._exact_program(arguments), *arguments)
            return y, d_params, d_x

        return Runner(run, results, self._seconds)

    def _exact_program(self, arguments: tuple) -> Callable[..., Any]:
        """With full float32 products, as they are on a CPU anyway; TF32 would flip decisions of the router."""
        if self._exact is None and jax.default_backend() == "cpu":
            self._exact = self._program
        if self._exact is None:
            with jax.default_matmul_precision("highest"):
                self._exact = self._function.lower(*arguments).compile()
        return self._exact


def wait(program: Callable[..., Any], *arguments: Any) -> Any:
    """Run a compiled program until its result is ready."""
    return jax.block_until_ready(program(*arguments))


def ours(case: Case, data: Data, form: str = "sparse") -> Gradient:
    """Our layer in one of the forms of ACTIVATIONS; its variables are those of the sparse form."""
    layer = SeqBoatLayer(replace(case.layer, activation=ACTIVATIONS[form]))

    def apply(variables, x):
        return layer.apply(variables, x, data.valid, True, mutable=["batch_stats"])[0][0]

    return Gradient(apply, data)


def float32(case: Case, data: Data) -> tuple[Case, Data]:
    """The same in float32, in which implementations are compared: with 16-bit operands rounding flips decisions of the
    router, and the smallest gradients are noise."""
    return replace(case, layer=replace(case.layer, dtype="float32")), replace(data, x=data.x.astype(jnp.float32))


def reference(case: Case, data: Data) -> Gradient:
    """Our layer over all rows, masked, with the kernel applied by FFT."""
    mixer = replace(cast(ema.Config, case.layer.mixer), method="fft")
    return ours(
        replace(case, layer=replace(case.layer, form="dense", attention_method="blocks", mixer=mixer)),
        data,
    )


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)): softmax over the whole length, heads of 64, MLP of 4 D."""

    features: int
    causal: bool

    @nn.compact
    def __call__(self, x):
        heads = max(1, self.features // 64)
        normed = nn.LayerNorm()(x)
        q, k, v = (nn.Dense(self.features)(normed).reshape(*x.shape[:2], heads, -1) for _ in range(3))
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal).reshape(x.shape)
        x = x + nn.Dense(self.features)(attended)
        return x + nn.Dense(self.features)(nn.gelu(nn.Dense(4 * self.features)(nn.LayerNorm()(x))))


def transformer(case: Case, data: Data) -> Runner:
    """The usual alternative: a transformer layer with L x L scores."""
    layer = TransformerLayer(case.layer.features, case.layer.causal)
    variables = jax.jit(layer.init)(jax.random.key(0), data.x[:1, :8])
    return Gradient(layer.apply, data).runner(variables)


class Published:
    """The published PyTorch layer, imported from its authors' standalone file at the user's path; the file is
    executed. It runs where jax runs: on the CPU, or by CUDA with TF32 products, as jax's."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise UserError(f"--published: there is no file {path}")
        try:
            import torch
        except ImportError as error:
            raise UserError("--published needs PyTorch and einops: pip install torch einops") from error
        self.torch = torch
        self.device = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend())
        if self.device is None or (self.device == "cuda" and not torch.cuda.is_available()):
            raise UserError(f"--published: this PyTorch does not run on jax's {jax.default_backend()}; leave it out")
        self.set_precision("high")
        spec = importlib.util.spec_from_file_location("published", path)
        if spec is None or spec.loader is None:
            raise UserError(f"--published: {path} is not a Python file")
        self.module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(self.module)
            self.layer_class = self.module.SeqBoatLayer
        except (ImportError, AttributeError, SyntaxError) as error:
            raise UserError(f"--published: {path} is not the standalone file of renll/SeqBoat ({error})") from error

    def layer(self, case: Case, seed: int = 0) -> Any:
        """A freshly initialised layer of the case."""
        config = case.layer
        self.torch.manual_seed(seed)
        return self.layer_class(
            config.features,
            config.key_size,
            config.value_size,
            cast(ema.Config, config.mixer).state_size,
            attention_activation=config.attention_function,
            bidirectional=not config.causal,
            window_size=config.window_size,
            truncation=cast(ema.Config, config.mixer).truncation,
            norm_type=NORMS[config.norm],
            prenorm=config.norm_placement == "pre",
            rel_pos_bias="rotary" if config.position == "rotary" else "simple",
            max_positions=config.max_positions,
            local_pos=config.position == "slot",
            init_temp_scale=config.router.temperature_scale,
        )

    def variables(self, case: Case, layer: Any) -> Tree:
        """Its parameters converted to our layer's variables."""
        return jax.tree.map(jnp.array, convert_layer(self.state(layer), case.layer))

    def runner(self, case: Case, data: Data, layer: Any, bias: float) -> Runner:
        """A runner of a layer; `bias` is added to the activation logit."""
        convert = lambda state: convert_layer(state, case.layer)["params"]
        return self._runner(layer, data, convert, [(layer.hx_proj.bias, bias)])

    def ema(self, params: EMAParams, data: Data) -> Runner:
        """A runner of the bidirectional EMA with these parameters."""
        width, states = data.x.shape[2], params.gamma.shape[1]
        module = self.module.MultiHeadEMA(width, ndim=states, bidirectional=True)
        with self.torch.no_grad():
            for name, value in params._asdict().items():
                own = getattr(module, name)
                own.copy_(self.tensor(value).reshape(own.shape))
        convert = lambda state: EMAParams(**convert_ema(state, width, states, causal=False)["params"])
        return self._runner(module, data, convert, [])

    def stack(self, case: Case, depth: int, classes: int, seed: int = 0) -> Any:
        """A freshly initialised model of `depth` layers of the case on numbers (B, L, 1)."""
        config = case.layer
        self.torch.manual_seed(seed)
        return self.module.SeqBoatModel(
            1,
            d_output=classes,
            d_model=config.features,
            n_layers=depth,
            dropout=0.0,
            prenorm=config.norm_placement == "pre",
            max_positions=config.max_positions,
            d_qk=config.key_size,
            d_ema=cast(ema.Config, config.mixer).state_size,
            mem_size=config.window_size,
            bidirectional=True,
            norm_type=NORMS[config.norm],
            attention_activation=config.attention_function,
        )

    def stack_runner(self, module: Any, data: Data, biases: np.ndarray, convert: Callable[[dict], Tree]) -> Runner:
        pairs = [(layer.hx_proj.bias, bias) for layer, bias in zip(module.seq_layers, biases, strict=True)]
        return self._runner(module, data, convert, pairs, time_first=False)

    def state(self, module: Any) -> dict[str, np.ndarray]:
        return {name: tensor.detach().cpu().numpy() for name, tensor in module.state_dict().items()}

    def tensor(self, array: Any) -> Any:
        return self.torch.from_numpy(np.array(array, np.float32)).to(self.device)

    @contextlib.contextmanager
    def exact(self) -> Iterator[None]:
        """Full float32 products."""
        self.set_precision("highest")
        yield
        self.set_precision("high")

    def set_precision(self, name: str) -> None:
        """Of float32 products on a GPU; "high" is TF32."""
        if self.device == "cuda":
            self.torch.set_float32_matmul_precision(name)

    def _runner(self, module, data: Data, convert, biases, time_first: bool = True) -> Runner:
        """A runner of a module that takes time-major or batch-major inputs. `biases` are pairs of a bias over two
        logits and the amount added to its second entry during the run. `convert` maps a state dict to our
        parameters."""
        torch, module = self.torch, module.to(self.device)
        last: dict[str, Any] = {}
        turn = (lambda a: a.swapaxes(0, 1)) if time_first else (lambda a: a)
        x, cotangent = self.tensor(turn(data.x)).requires_grad_(True), self.tensor(turn(data.cotangent))
        narrow = torch.autocast(self.device, torch.bfloat16, enabled=data.x.dtype == jnp.bfloat16)
        original = [bias[1].item() for bias, _ in biases]

        def set_biases(values):
            with torch.no_grad():
                for (bias, _), value in zip(biases, values, strict=True):
                    bias[1] = value

        def run():
            set_biases([value + change for value, (_, change) in zip(original, biases, strict=True)])
            module.zero_grad(set_to_none=True)
            x.grad = None
            with narrow:
                last["y"] = module(x)
            (last["y"] * cotangent).sum().backward()
            set_biases(original)
            if self.device == "cuda":
                torch.cuda.synchronize()

        def results():
            with self.exact():
                run()
            parameters = dict(module.named_parameters())
            gradients = {}
            for name, value in module.state_dict().items():
                grad = parameters[name].grad if name in parameters else None
                gradients[name] = np.zeros(tuple(value.shape), np.float32) if grad is None else grad.cpu().numpy()
            return turn(last["y"].detach().float().cpu().numpy()), convert(gradients), turn(x.grad.cpu().numpy())

        return Runner(run, results)


class Stack:
    """A classifier of `depth` layers of a case on numbers: ours and, if given, the published one."""

    CLASSES = 10

    def __init__(self, case: Case, depth: int, theirs: Published | None):
        encoder = EncoderConfig(case.layer, depth, remat="selective")
        self.config = ClassifierConfig(encoder, self.CLASSES, head="linear")
        self.depth, self.theirs, self.model = depth, theirs, Classifier(self.config)
        rng = np.random.default_rng(0)
        normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
        valid = jnp.ones((case.batch, case.length), bool)
        self.data = Data(normal(case.batch, case.length, 1), normal(case.batch, self.CLASSES), valid)
        self.lengths = jnp.full(case.batch, case.length)
        self._gradient = Gradient(self._apply, self.data)
        if theirs:
            self.module = theirs.stack(case, depth, self.CLASSES)
            self.variables = jax.tree.map(jnp.array, convert_classifier(theirs.state(self.module), self.config, 1))
        else:
            init = jax.jit(self.model.init)
            self.variables = init(jax.random.key(0), self.data.x[:1, :8], jnp.full(1, 8))

    def router_biases(self, rate: float) -> np.ndarray:
        """One bias per layer (`cases.router_biases`)."""
        return router_biases(self._router_logits, self.variables, self.depth, rate)

    @functools.cached_property
    def _router_logits(self) -> Callable[[Tree], jax.Array]:
        """Of every layer, as a function of the variables."""

        @jax.jit
        def logits(variables):
            changed = self.model.apply(variables, self.data.x, self.lengths, True, mutable=["taps", "batch_stats"])[1]
            return changed["taps"]["encoder"]["layers"]["sparse"]["configurator"]["router_logits"]

        return logits

    def ours(self, biases: np.ndarray) -> Runner:
        return self._gradient.runner(with_router_bias(self.variables, biases))

    def _apply(self, variables: Tree, x: Any) -> Any:
        return self.model.apply(variables, x, self.lengths, True, mutable=["batch_stats"])[0].logits

    def published(self, biases: np.ndarray) -> Runner:
        assert self.theirs is not None
        convert = lambda state: convert_classifier(state, self.config, 1)["params"]
        return self.theirs.stack_runner(self.module, self.data, biases, convert)


def disagreement(found: tuple[Any, Tree, Any], expected: tuple[Any, Tree, Any]) -> tuple[str, float]:
    """The leaf that differs most, and by what relative RMS: the output "y", the gradient of x, of any parameter."""
    named = [flatten({"y": y, "dx": d_x, "d": d_params}) for y, d_params, d_x in (found, expected)]
    differences = {str(name): relative(leaf, named[1][name]) for name, leaf in named[0].items()}
    return max(differences.items(), key=lambda item: np.inf if np.isnan(item[1]) else item[1])


def relative(found: Any, expected: Any) -> float:
    """RMS difference over RMS; 0 where both are zero, as gradients of what nothing activates."""
    a, b = (np.asarray(leaf, np.float64) for leaf in (found, expected))
    norm, difference = np.linalg.norm(b), np.linalg.norm(a - b)
    return float(difference / norm) if norm else 0.0 if difference == 0 else np.inf
