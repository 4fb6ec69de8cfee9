"""What is benchmarked: our layer in its forms, the published PyTorch layer, a transformer layer of equal width.

Each is wrapped as a `Runner`: a forward and backward pass, with gradients for the parameters and x.
"""

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.cases import Case, Data, threshold, with_router_bias
from experiments.common.errors import UserError
from seqboat.interop.published import convert_classifier, convert_ema, convert_layer
from seqboat.layers.seqboat import SeqBoatLayer
from seqboat.models.classifier import Classifier, ClassifierConfig
from seqboat.models.encoder import EncoderConfig
from seqboat.ops.ema import EMAParams

Tree = Any
NORMS = {"layer": "layernorm", "batch": "batchnorm"}
ACTIVATIONS: dict[str, Any] = {"sparse": "learned", "always active": "always", "no attention": "never"}


@dataclass(frozen=True)
class Runner:
    """`run()` computes output and gradients once and blocks until they are ready; `results()` also returns them, as
    (y, d parameters, d x)."""

    run: Callable[[], object]
    results: Callable[[], tuple[Any, Tree, Any]]
    compile_seconds: float | None = None


def jax_runner(apply: Callable[[Tree, Any], Any], variables: Tree, data: Data) -> Runner:
    """A runner of a function (variables, x) -> y, already compiled."""

    def loss(params, x):
        y = apply({**variables, "params": params}, x)
        return (y.astype(jnp.float32) * data.cotangent.astype(jnp.float32)).sum(), y

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    began = time.perf_counter()
    program = gradient.lower(variables["params"], data.x).compile()
    seconds = time.perf_counter() - began
    run = lambda: jax.block_until_ready(program(variables["params"], data.x))

    def results():
        (d_params, d_x), y = run()
        return y, d_params, d_x

    return Runner(run, results, seconds)


def ours(case: Case, variables: Tree, data: Data, form: str = "sparse") -> Runner:
    """Our layer in one of the forms of ACTIVATIONS; `variables` are those of the sparse form."""
    layer = SeqBoatLayer(replace(case.layer, activation=ACTIVATIONS[form]))

    def apply(variables, x):
        return layer.apply(variables, x, data.valid, True, mutable=["batch_stats"])[0][0]

    return jax_runner(apply, variables, data)


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
    return jax_runner(layer.apply, variables, data)


class Published:
    """The published PyTorch layer, imported from its authors' standalone file at the user's path; the file is
    executed."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise UserError(f"--published: there is no file {path}")
        try:
            import torch
        except ImportError as error:
            raise UserError("--published needs PyTorch and einops: pip install torch einops") from error
        spec = importlib.util.spec_from_file_location("published", path)
        if spec is None or spec.loader is None:
            raise UserError(f"--published: {path} is not a Python file")
        self.torch = torch
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
            config.state_size,
            attention_activation=config.attention_function,
            bidirectional=not config.causal,
            window_size=config.window_size,
            truncation=config.ssm_truncation,
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

    def runner(self, case: Case, layer: Any, data: Data, bias: float) -> Runner:
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
                own.copy_(self.torch.from_numpy(np.array(value)).reshape(own.shape))
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
            d_ema=config.state_size,
            mem_size=config.window_size,
            bidirectional=True,
            norm_type=NORMS[config.norm],
            attention_activation=config.attention_function,
        )

    def stack_runner(self, module: Any, data: Data, biases: np.ndarray, convert: Callable[[dict], Tree]) -> Runner:
        pairs = [(layer.hx_proj.bias, bias) for layer, bias in zip(module.seq_layers, biases, strict=True)]
        return self._runner(module, data, convert, pairs, time_first=False)

    def state(self, module: Any) -> dict[str, np.ndarray]:
        return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}

    def _runner(self, module, data: Data, convert, biases, time_first: bool = True) -> Runner:
        """A runner of a module that takes time-major or batch-major inputs. `biases` are pairs of a bias over two
        logits and the amount added to its second entry during the run. `convert` maps a state dict to our
        parameters."""
        torch = self.torch
        last: dict[str, Any] = {}
        turn = (lambda a: a.swapaxes(0, 1)) if time_first else (lambda a: a)
        tensor = lambda a: torch.from_numpy(np.array(turn(a)))
        x, cotangent = tensor(data.x).requires_grad_(True), tensor(data.cotangent)
        original = [bias[1].item() for bias, _ in biases]

        def set_biases(values):
            with torch.no_grad():
                for (bias, _), value in zip(biases, values, strict=True):
                    bias[1] = value

        def run():
            set_biases([value + change for value, (_, change) in zip(original, biases, strict=True)])
            module.zero_grad(set_to_none=True)
            x.grad = None
            last["y"] = module(x)
            (last["y"] * cotangent).sum().backward()
            set_biases(original)

        def results():
            run()
            parameters = dict(module.named_parameters())
            gradients = {}
            for name, value in module.state_dict().items():
                grad = parameters[name].grad if name in parameters else None
                gradients[name] = np.zeros(tuple(value.shape), np.float32) if grad is None else grad.numpy()
            return turn(last["y"].detach().numpy()), convert(gradients), turn(x.grad.numpy())

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
        if theirs:
            self.module = theirs.stack(case, depth, self.CLASSES)
            self.variables = jax.tree.map(jnp.array, convert_classifier(theirs.state(self.module), self.config, 1))
        else:
            init = jax.jit(self.model.init)
            self.variables = init(jax.random.key(0), self.data.x[:1, :8], jnp.full(1, 8))

    def router_biases(self, rate: float) -> np.ndarray:
        """One bias per layer; each depends on the biases of the previous layers."""
        biases = np.zeros(self.depth)

        @jax.jit
        def logits(variables):
            changed = self.model.apply(variables, self.data.x, self.lengths, True, mutable=["taps", "batch_stats"])[1]
            return changed["taps"]["encoder"]["layers"]["sparse"]["configurator"]["router_logits"]

        for layer in range(self.depth):
            u = logits(with_router_bias(self.variables, biases))
            biases[layer] = threshold(np.asarray(u[layer]), rate)
        return biases

    def ours(self, biases: np.ndarray) -> Runner:
        def apply(variables, x):
            return self.model.apply(variables, x, self.lengths, True, mutable=["batch_stats"])[0].logits

        return jax_runner(apply, with_router_bias(self.variables, biases), self.data)

    def published(self, biases: np.ndarray) -> Runner:
        assert self.theirs is not None
        convert = lambda state: convert_classifier(state, self.config, 1)["params"]
        return self.theirs.stack_runner(self.module, self.data, biases, convert)


def disagreement(found: tuple[Any, Tree, Any], expected: tuple[Any, Tree, Any]) -> float:
    """The largest relative RMS difference among the output, all parameter gradients together, and the gradient of x."""
    flat = lambda tree: np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(tree)])
    pairs = [(flat(a), flat(b)) for a, b in zip(found, expected, strict=True)]
    # np.max, because the built-in max ignores a NaN that is not first.
    return float(np.max([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]))
