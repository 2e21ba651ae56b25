"""Low-rank adapters on the parameter tree (LoRA, Hu et al., arXiv:2106.09685): W + alpha / rank * A B.

Pure functions: the base is an argument, so that student and teacher share one. `attach` is for training:
the model applies x A B beside x W, and gradients are taken with respect to the adapters alone; `merge` is
for what samples and what is exported. Left out: embeddings, norms and biases, dropout on the input.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from sdzero_jax.errors import UserError, nearest
from sdzero_jax.models.decoder import LORA

# Matrix -> how many of its axes are the input's; the first axis of a leaf repeats the layer group.
_INPUT_AXES = {"query": 1, "key": 1, "value": 1, "out": 2, "gate": 1, "up": 1, "down": 1}
TARGETS = tuple(_INPUT_AXES)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which matrices are adapted, and by how much."""

    rank: Annotated[int, "rank of every adapter; 0: none, all parameters are trained"] = 16
    alpha: Annotated[float, "scale: A B is multiplied by alpha / rank"] = 32.0
    targets: Annotated[tuple[str, ...], "matrices: query, key, value, out, gate, up, down"] = TARGETS

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 0:
            raise UserError(f"LoRA rank={self.rank}; wanted at least 1, or 0 for none")
        if not self.targets:
            raise UserError(f"LoRA needs at least one target{nearest('', TARGETS)}")
        for target in self.targets:
            if target not in TARGETS:
                raise UserError(f"LoRA target {target!r} is not known{nearest(target, TARGETS)}")


def init(key: jax.Array, params: Mapping[str, Any], config: LoraConfig) -> dict[str, Any]:
    """Adapters of a parameter tree (arrays or shapes), float32: A normal(1 / sqrt(input width)), B zero.

    A leaf [G, *input, *output] gives {"a": [G, *input, rank], "b": [G, rank, *output]}, at the same place
    of a tree that holds the targets only. Under jit with `out_shardings` they are made in their shards.
    """
    place = itertools.count()

    def adapter(path: tuple[str, ...], leaf: Any) -> dict[str, jax.Array]:
        cut = 1 + _INPUT_AXES[path[-1]]
        a_shape = (*leaf.shape[:cut], config.rank)
        scale = math.prod(leaf.shape[1:cut]) ** -0.5
        a = scale * jax.random.normal(jax.random.fold_in(key, next(place)), a_shape, jnp.float32)
        return {"a": a, "b": jnp.zeros((leaf.shape[0], config.rank, *leaf.shape[cut:]), jnp.float32)}

    return _on_targets(adapter, params, config)


def axes(param_axes: Mapping[str, Any], config: LoraConfig) -> dict[str, Any]:
    """Logical axes of the adapters, from the model's (`model.param_axes()`): the rank is never cut."""

    def adapter(path: tuple[str, ...], names: tuple[str, ...]) -> dict[str, tuple[str | None, ...]]:
        cut = 1 + _INPUT_AXES[path[-1]]
        return {"a": (*names[:cut], None), "b": (names[0], None, *names[cut:])}

    return _on_targets(adapter, param_axes, config)


def attach(params: Mapping[str, Any], lora: Mapping[str, Any], config: LoraConfig) -> dict[str, Any]:
    """The parameters beside their adapters, for `model.apply`: those of `merge`, but the sum is never made."""
    scale = config.alpha / config.rank

    def scaled(tree: Mapping[str, Any]) -> dict[str, Any]:
        if set(tree) == {"a", "b"}:
            return {"a": tree["a"], "b": scale * tree["b"]}
        return {name: scaled(inner) for name, inner in tree.items()}

    return {**params, LORA: scaled(lora)}


def merge(params: Mapping[str, Any], lora: Mapping[str, Any], config: LoraConfig) -> dict[str, Any]:
    """The parameters with their adapters added: same tree, shapes, dtypes and shardings.

    The sum is float32 and then rounded to the leaf's dtype; leaves without an adapter are the same objects.
    """
    if set(lora) == {"a", "b"}:

        def added(group):  # one repetition of the layers at a time: the float32 sum is large
            leaf, a, b = group  # [*input, *output], [*input, R], [R, *output]
            delta = jnp.tensordot(a, b, axes=1, preferred_element_type=jnp.float32)
            return (leaf.astype(jnp.float32) + config.alpha / config.rank * delta).astype(leaf.dtype)

        return jax.lax.map(added, (params, lora["a"], lora["b"]))
    return {name: merge(leaf, lora[name], config) if name in lora else leaf for name, leaf in params.items()}


def _on_targets(make, tree: Mapping[str, Any], config: LoraConfig, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Applies make(path, leaf) to the target leaves of the layers, leaving everything else out."""
    out = {}
    for name in sorted(tree):
        here = (*path, name)
        if isinstance(tree[name], Mapping):
            if inner := _on_targets(make, tree[name], config, here):
                out[name] = inner
        elif name in config.targets and here[0] == "layers":
            out[name] = make(here, tree[name])
    return out
