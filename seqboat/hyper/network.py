"""Hypernetworks for any Flax module: parameters that are a function of a hyper-input.

    theta(z) = theta0 + h(E(z)),    y = target(theta(z), x)

`Hyper` wraps the target. theta0, and every parameter that is not generated, is stored under "target" as the target
alone stores it, so that a checkpoint of one starts the other. Other collections and RNGs pass through untouched.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Num

from seqboat.hyper.encoding import Encoding
from seqboat.hyper.heads import ChunkedHead, FullHead, HyperConfig, LowRankHead, Trunk, initial_mean, initial_variance
from seqboat.hyper.spec import Leaf, Spec, match
from seqboat.modules import Linen, check_module
from seqboat.paths import flatten, unflatten

Condition = Num[Array, "M"]


class HyperNetwork(nn.Module):
    """A hyper-input (M,) -> {path: what is generated}, of `leaf.real_shape`: to add to theta0, or a factor less 1.

    Without residual it has the mean of the leaf's initializer already, and is all of theta.
    """

    spec: Spec
    config: HyperConfig

    @nn.compact
    def __call__(self, condition: Array) -> dict[str, Array]:
        config, encoding = self.config, self.config.encoding
        table = None
        if encoding.kind == "embedding":
            table = self.param(
                "embedding", nn.initializers.normal(encoding.size**-0.5), (encoding.tasks, encoding.size)
            )
        code = encoding(condition, table)
        groups = self.groups()
        hidden: Any = Trunk(config, name="trunk")(code) if set(groups) - {"chunked", "recurrent"} else None
        generated: dict[str, Array] = {}
        for kind, leaves in groups.items():
            made = tuple(map(_factors, leaves)) if kind == "scale" else leaves
            deviations = tuple(initial_variance(leaf, self.spec, config) ** 0.5 for leaf in made)
            kernels = tuple(deviation / encoding.energy**0.5 for deviation in deviations)
            if kind in ("full", "scale"):
                generated |= FullHead(made, kernels, name=kind)(hidden)
            elif kind == "low_rank":
                generated |= LowRankHead(made, kernels, config.rank, name=kind)(hidden)
            else:
                generated |= ChunkedHead(made, deviations, config, kind == "recurrent", name=kind)(code)
        return generated if config.residual else self._around_means(generated, groups)

    def groups(self) -> dict[str, tuple[Leaf, ...]]:
        """The leaves of every head."""
        kind = dict.fromkeys((leaf.path for leaf in self.spec), self.config.head)
        for pattern, head in self.config.heads:
            for path in match(pattern, {leaf.path: leaf for leaf in self.spec}, "heads"):
                kind[path] = head  # type: ignore[assignment]
        for leaf in self.spec:
            if kind[leaf.path] == "low_rank" and (leaf.rank < 2 or leaf.is_complex):
                kind[leaf.path] = "full"
        return {
            name: tuple(leaf for leaf in self.spec if kind[leaf.path] == name) for name in sorted(set(kind.values()))
        }

    def _around_means(self, generated: dict[str, Array], groups: dict[str, tuple[Leaf, ...]]) -> dict[str, Array]:
        """With a learned offset for every number, or, where chunks are to save parameters, a constant."""
        means = {leaf.path: jnp.broadcast_to(initial_mean(leaf, self.config), leaf.real_shape) for leaf in self.spec}
        whole = [leaf.path for kind, leaves in groups.items() for leaf in leaves if kind in ("full", "low_rank")]
        if whole:
            means |= flatten(
                self.param("offset", lambda _: unflatten({path: jnp.array(means[path]) for path in whole}))
            )
        return {path: means[path] + delta for path, delta in generated.items()}


def _factors(leaf: Leaf) -> Leaf:
    """What scales a leaf: one number for every output unit, the last axis, of every layer."""
    layers, own = leaf.shape[: leaf.stacked], leaf.shape[leaf.stacked :]
    shape = (*layers, *[1] * (len(own) - 1), *own[-1:])
    return dataclasses.replace(leaf, shape=shape, role="other", dtype=jnp.float32)


class Hyper(nn.Module):
    """A target whose parameters `network` generates:  Hyper(target, network)(condition, *args)  is the target's result.

    `condition` (M,) for all of a batch. With `per_example` it is (B, M), every example is computed with parameters of
    its own, under `jax.vmap`, and arrays in `args` have examples first; the target's other collections can then be
    read, not changed.

    Raises ValueError for a hyper-input of another width or out of range, and for leaves that the target has not.
    """

    target: Linen
    network: Any  # a HyperNetwork
    per_example: bool = False

    def __post_init__(self):
        check_module(self.target, "target")
        if not isinstance(self.network, HyperNetwork):
            raise ValueError(
                f"network: a HyperNetwork is wanted, as hyper.mip(spec) makes one, not a {type(self.network).__name__}"
            )
        super().__post_init__()

    def __call__(self, condition: Array, *args: Any, **kwargs: Any) -> Any:
        condition = jnp.asarray(condition)
        self._check(condition, 2 if self.per_example else 1)
        leaves, tree = jax.tree.flatten((args, kwargs))
        arrays = [leaf for leaf in leaves if _is_array(leaf)]
        if self.per_example and any(len(array) != len(condition) for array in arrays):
            raise ValueError(f"per_example: {len(condition)} hyper-inputs for arrays {[a.shape for a in arrays]}")
        if not self.per_example or self.is_initializing():  # parameters do not depend on who shares them
            shared = condition[0] if self.per_example else condition
            return self._run(self.target, self.network(shared), *args, **kwargs)
        for name in self.target.variables:
            if name != "params" and self.is_mutable_collection(name):
                raise ValueError(f"per_example: examples cannot share one changed {name!r}; leave it out of mutable")

        def of_one(target, generated, rows):
            own = iter(rows)
            given = [next(own)[None] if _is_array(leaf) else leaf for leaf in leaves]
            args, kwargs = jax.tree.unflatten(tree, given)
            out = self._run(target, generated, *args, **kwargs)
            return jax.tree.map(lambda leaf: leaf[0] if _is_array(leaf) else leaf, out)

        axes: Any = {"intermediates": 0, "taps": 0, True: None}
        network = nn.vmap(
            lambda network, condition: network(condition), variable_axes={"params": None}, split_rngs={"params": False}
        )
        target = nn.vmap(of_one, variable_axes=axes, split_rngs={"params": False, True: True})
        return target(self.target, network(self.network, condition), arrays)

    def generate(self, condition: Condition) -> dict[str, Any]:
        """All parameters of the target at one hyper-input: as a plain target takes them."""
        condition = jnp.asarray(condition)
        self._check(condition, 1)
        return self._combine(self.target.variables.get("params", {}), self.network(condition))

    def _check(self, condition: Array, rank: int) -> None:
        self.network.config.encoding.check(condition)
        if condition.ndim != rank:
            raise ValueError(f"hyper-input of shape {condition.shape}: this wants {rank} axes")

    def _run(self, target: nn.Module, generated: dict[str, Array], *args: Any, **kwargs: Any) -> Any:
        """The target on generated parameters. Where it is created it computes with its own: they are what is stored."""
        creating = self.is_initializing()
        call = nn.map_variables(
            lambda target: target(*args, **kwargs),
            "params",
            trans_in_fn=lambda stored: {"params": self._combine(stored.get("params", {}), generated, creating)},
            trans_out_fn=self._kept,
            init=creating,
            mutable=creating,
        )
        return call(target)

    def _kept(self, stored: dict[str, Any]) -> dict[str, Any]:
        """What of the target's parameters is stored: without residual, those that are not generated."""
        if self.network.config.residual or "params" not in stored:
            return stored
        leaves = flatten(stored["params"])
        return {"params": unflatten({path: leaf for path, leaf in leaves.items() if path in self.network.spec.others})}

    def _combine(self, stored: Any, generated: dict[str, Array], creating: bool = False) -> dict[str, Any]:
        """theta from theta0 and what is generated; while `creating`, theta0 itself where there is one."""
        leaves, config = flatten(nn.meta.unbox(stored)), self.network.config
        scaled = {leaf.path for leaf in self.network.groups().get("scale", ())}
        for leaf in self.network.spec:
            base = leaves.get(leaf.path)
            if config.residual if base is None else base.shape != leaf.shape:
                found = "has none" if base is None else f"has {base.shape}"
                raise ValueError(
                    f"{leaf.path} {leaf.shape} is to be generated; the target {found}: make a new spec of it"
                )
            if creating and base is not None:
                continue
            value = generated[leaf.path]
            if leaf.path in scaled:
                value = leaves[leaf.path] * (1 + value)
            else:
                if leaf.is_complex:
                    value = jax.lax.complex(value[..., 0], value[..., 1])
                value = value if base is None else base + value
            leaves[leaf.path] = value.astype(config.dtype or leaf.dtype)
        return stored if creating and config.residual else self.network.spec.assemble(leaves)


def mip(spec: Spec, inputs: int = 1, **fields: Any) -> HyperNetwork:
    """A hypernetwork with magnitude-invariant parametrizations (Gonzalez Ortiz et al. 2024, arXiv 2304.07645): codes of
    constant norm, added to the target's own parameters, and a fan-out start. `fields` are of `HyperConfig`; with an
    `encoding` among them, that says how many inputs there are."""
    return HyperNetwork(spec, HyperConfig(**{"encoding": Encoding(inputs=inputs), **fields}))


def bind(model: Hyper, variables: dict[str, Any], condition: Condition) -> dict[str, Any]:
    """The variables of the plain target at one hyper-input, to compute many inputs without generating again."""
    params = model.apply(variables, condition, method="generate")
    others = {name: tree["target"] for name, tree in variables.items() if name != "params" and "target" in tree}
    return {"params": params, **others}


def start_from(variables: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
    """The variables of a `Hyper` with residual, its theta0 (and other collections) those of a trained plain target.

    With init="zero" it computes what that target does, bit for bit. Raises ValueError for parameters of another target.
    """
    changed = dict(variables)
    for name, tree in target.items():
        if not tree:
            continue
        own = changed.get(name, {}).get("target")
        if own is None:
            raise ValueError(f"there are no {name} of the target to start: a hypernetwork with residual=True has them")
        plain, given = nn.meta.unbox(own), nn.meta.unbox(tree)
        if difference := _first_difference(flatten(plain), flatten(given)):
            raise ValueError(f"{name} of the target to start from do not fit: {difference}")
        changed[name] = {**changed[name], "target": nn.meta.replace_boxed(own, given)}
    return changed


def _first_difference(own: dict[str, Any], given: dict[str, Any]) -> str | None:
    describe = lambda tree, path: f"{tree[path].dtype}{list(tree[path].shape)}" if path in tree else "nothing"
    for path in sorted({*own, *given}):
        if describe(own, path) != describe(given, path):
            return f"{path} is {describe(given, path)}, not {describe(own, path)}"
    return None


def _is_array(a: Any) -> bool:
    return hasattr(a, "shape") and len(a.shape) > 0
