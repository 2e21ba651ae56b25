"""Bytes per device of a distillation run: estimated before anything is compiled, and as the compiler counts them.

The state and the residuals of the layers are exact (from shardings, and from what jax would keep for the
backward pass); the workspace of one layer and of one tile of logits is counted by hand and checked against
compiled programs. A run's peak is that of its largest phase. As a program (`python -m sdzero_jax.memory
CONFIG TOPOLOGY [a.b=c ...]`, started by `of_compiler`) it compiles for a TPU slice that is not attached.
Left out: what the first compilation and the loading of a checkpoint need, and the embedded task's own stages.
"""

import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdzero_jax import objectives, sharding, topology
from sdzero_jax.batches import distill_batch
from sdzero_jax.config import Config, load_config, override
from sdzero_jax.errors import UserError
from sdzero_jax.examples import Question, Rollout, Verdict
from sdzero_jax.models import DecoderConfig, LanguageModel, cache_bytes
from sdzero_jax.ops.linear_divergence import default_tile
from sdzero_jax.optimizer import learning_rate_schedule, make_optimizer
from sdzero_jax.prompts import control_phrases
from sdzero_jax.train_step import TrainStep, abstract_frozen, abstract_state, make_train_step

# Copies of one layer's activations [rows, tokens, width] that exist at once, in the compute dtype. Counted in
# the programs that the TPU compiler makes for both families.
_FORWARD = {"mlp": 3.0, "heads": 3.0, "hidden": 4.0}
_BACKWARD = {"mlp": 5.0, "heads": 6.0, "hidden": 6.0}
# What each further block of the layer pattern adds: the blocks share a loop body, where the compiler keeps
# the recomputed activations of all of them, with or without barriers between them.
_FURTHER_BLOCK = {"mlp": 3.0, "heads": 2.0, "hidden": 2.0}
# Tiles of float32 logits at once: student, teacher, their log-probs and the gradient.
_TILES = 5.0


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes per device. `state` is there all along, of the phases one after the other."""

    state: dict[str, float]
    phases: dict[str, dict[str, float]]

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> float:
        return sum(self.state.values()) + sum(self.phases[self.peak_phase].values())

    @property
    def train_step(self) -> float:
        """Peak of the train step alone: what the compiler counts."""
        phases = [sum(parts.values()) for name, parts in self.phases.items() if name != "sampling"]
        return sum(self.state.values()) + max(phases)


# ------------------------------------------------------------------------------------- the train step


def train_step(config: Config, mesh) -> TrainStep:
    """Phase 2's train step of this config, on this mesh."""
    model, distill = LanguageModel(config.model), config.distill
    loss_fn = functools.partial(objectives.self_distillation, distill.objective, model)
    optimizer, schedule = make_optimizer(distill.optimizer, 100), learning_rate_schedule(distill.optimizer, 100)
    return make_train_step(
        loss_fn, model, optimizer, mesh, teacher_config=distill.teacher, schedule=schedule,
        adapters=distill.lora, frozen=abstract_frozen(model, mesh, distill.lora),
    )  # fmt: skip


def phrase_tokens(config: Config) -> int:
    """Tokens of the longest control phrase, at most: no tokenizer makes more of them than there are bytes."""
    phrases = control_phrases(config.phrases)
    return max(len(phrases.text(reward).encode()) for reward in (0.0, 1.0))


def rows_at_once(config: Config) -> int:
    """Responses that phase 2's forward and backward pass hold together."""
    return config.distill.batch_size * config.distill.samples // config.distill.microbatches


def batch_of(config: Config) -> dict[str, np.ndarray]:
    """A batch of the shapes that the run has: made by the function that makes the run's."""
    rollout = Rollout(Question("", "", ("",), ""), (0,), (0,), (0.0,), "length", Verdict.of("wrong"))
    phrase = (0,) * phrase_tokens(config)
    distill = config.distill
    batch, _ = distill_batch([rollout] * rows_at_once(config), lambda reward: phrase, (), distill.layout)
    return batch


def lengths(config: Config) -> tuple[int, int]:
    """Tokens of a student's and of a teacher's row."""
    layout = config.distill.layout
    return layout.max_prompt + layout.max_response, layout.rev_length(phrase_tokens(config))


# ---------------------------------------------------------------------------------------- the estimate


def estimate(config: Config, mesh) -> Estimate:
    """What a distillation run needs on each device of `mesh`, which may be abstract."""
    model, adapters = LanguageModel(config.model), config.distill.lora
    optimizer = make_optimizer(config.distill.optimizer, 100)
    whole = abstract_state(model, optimizer, mesh, teacher_config=config.distill.teacher, adapters=adapters)
    frozen = abstract_frozen(model, mesh, adapters)
    rows = -(-rows_at_once(config) // sharding.batch_devices(mesh))
    student, teacher = lengths(config)
    local = local_model(config.model, mesh.shape["tensor"])
    state = {
        "parameters": _bytes(frozen) + _bytes(whole.params),
        "optimizer state": _bytes(whole.opt_state),
        "teacher": _bytes(whole.teacher),
    }
    gradients = _bytes(whole.params)
    copies = _compute_copies(frozen or whole.params, config.model)
    kept = residuals(local, rows, student)
    vocabulary = _vocabulary(config, local, rows, mesh)
    forward = _workspace(local, rows, _FORWARD)
    further = _workspace(local, rows, _FURTHER_BLOCK) * (len(local.layer_pattern) - 1)
    backward = _workspace(local, rows, _BACKWARD) + (further if local.remat != "none" else 0.0)
    own = {"activations kept": kept, "weights in the compute dtype": copies}
    return Estimate(
        state,
        {
            "teacher's forward pass": own | {"one layer's activations": forward * teacher},
            "logits": own | vocabulary,
            "layers' backward pass": own | {"gradients": gradients, "one layer's activations": backward * student},
            "sampling": _sampling(config, mesh),
        },
    )


def local_model(model: DecoderConfig, tensor: int) -> DecoderConfig:
    """The share of one device along `tensor`: what does not divide stays whole."""
    cut = lambda size: size // tensor if size % tensor == 0 else size  # noqa: E731
    heads, kv_heads = cut(model.num_heads), cut(model.num_kv_heads)
    return dataclasses.replace(
        model,
        vocab_size=cut(model.vocab_size),
        num_heads=heads,
        num_kv_heads=kv_heads if heads % kv_heads == 0 else heads,
        intermediate_size=cut(model.intermediate_size),
    )


def residuals(model: DecoderConfig, rows: int, length: int) -> float:
    """Bytes that the layers keep for the backward pass of [rows, length] tokens, by jax's own account.

    Weights and their casts are not counted. What `offload` keeps lies in the host's memory.
    """
    if model.remat == "offload":
        return 0.0
    # What two repetitions of the pattern keep beyond one: the rest is shared or outside of the layers.
    one, two = (_kept(_repeated(model, groups), rows, length) for groups in (1, 2))
    return (two - one) * model.num_groups


def _repeated(model: DecoderConfig, groups: int) -> LanguageModel:
    return LanguageModel(dataclasses.replace(model, num_layers=groups * len(model.layer_pattern)))


def _kept(model: LanguageModel, rows: int, length: int) -> float:
    """Bytes of all that `jax.vjp` keeps, but for arrays of the shape of a parameter."""
    shapes = model.param_shapes()
    weights = {leaf.shape for leaf in jax.tree.leaves(shapes)}

    def keep(params, tokens):
        return jax.vjp(lambda params: model.apply(params, tokens)[0], params)[1]

    leaves = jax.tree.leaves(jax.eval_shape(keep, shapes, jax.ShapeDtypeStruct((rows, length), jnp.int32)))
    return float(sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves if leaf.shape not in weights))


def _workspace(model: DecoderConfig, rows: int, copies: dict[str, float]) -> float:
    """Bytes of one layer's activations per token of a row."""
    widths = {
        "mlp": model.intermediate_size,
        "heads": (model.num_heads + model.num_kv_heads) * model.head_dim,
        "hidden": model.hidden_size,
    }
    item = jnp.dtype(model.compute_dtype).itemsize
    return rows * item * sum(copies[name] * width for name, width in widths.items())


def _vocabulary(config: Config, local: DecoderConfig, rows: int, mesh) -> dict[str, float]:
    """Unembeddings, tiles of logits and the accumulator of the unembedding's gradient."""
    item = jnp.dtype(local.compute_dtype).itemsize
    tokens = rows * config.distill.layout.max_response
    table = local.vocab_size * local.hidden_size
    gathered = 2 * table * item if sharding.batch_devices(mesh) > 1 else 0.0
    return {
        "hidden states of the response": 3 * tokens * local.hidden_size * item,
        "gathered unembeddings": gathered,
        "unembedding's gradient (float32)": 0.0 if config.distill.lora.rank else table * 4.0,
        "logit tiles": _TILES * default_tile(tokens, local.vocab_size) * local.vocab_size * 4,
    }


def _sampling(config: Config, mesh) -> dict[str, float]:
    """Cache, prompts being read and weights of the larger of the two samplers that run beside the state.

    Every sampler of a run has at most the configured slots, and each slot room for a revision.
    """
    distill, sampler, model = config.distill, config.sampler, config.model
    shape = tuple(mesh.shape.values())
    if sampler.weights == "tensor":
        shape = sharding.rollout_shape(shape, model.num_kv_heads)
    parts, local = shape[0] * shape[1], local_model(model, shape[2])
    slots = -(-sampler.slots // parts)
    longest = max(
        distill.sampling.max_new_tokens, *(2 * c.sampling.max_new_tokens for c in (config.collect, config.evaluate))
    )
    length = distill.layout.max_prompt + longest + phrase_tokens(config)
    prompts = -(-max(sampler.prefill_tokens, distill.layout.max_prompt) // parts)
    item = jnp.dtype(model.compute_dtype).itemsize
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(LanguageModel(local).param_shapes()))
    return {
        "KV cache": cache_bytes(local, slots, length, sampler.cache_dtype or None, sampler.block),
        "prompts being read": cache_bytes(local, 1, 0, None, prompts),
        "weights in the compute dtype": float(item * parameters / shape[1]),
    }


def _bytes(tree: Any) -> float:
    """Bytes on one device of a tree of ShapeDtypeStructs with shardings."""
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))


def _compute_copies(params: Any, model: DecoderConfig) -> float:
    """The layers' weights in the compute dtype: the compiler casts them once, before the loop over layers."""
    if model.param_dtype == model.compute_dtype:
        return 0.0
    item = jnp.dtype(model.compute_dtype).itemsize
    return sum(_bytes(leaf) / leaf.dtype.itemsize * item for leaf in jax.tree.leaves(params["layers"]))


# ------------------------------------------------------------------------------- what to change, if it does not fit


def slots_that_fit(config: Config, mesh, limit: float) -> int:
    """Slots of the sampler that fit beside the state of a distillation run: 0 when not one per part does."""
    now = estimate(config, mesh)
    shape = tuple(mesh.shape.values())
    if config.sampler.weights == "tensor":
        shape = sharding.rollout_shape(shape, config.model.num_kv_heads)
    parts = shape[0] * shape[1]
    per_part = -(-config.sampler.slots // parts)
    one_more = override(config, [f"sampler.slots={(per_part + 1) * parts}"])
    per_slot = _sampling(one_more, mesh)["KV cache"] - now.phases["sampling"]["KV cache"]
    free = limit - sum(now.state.values()) - sum(now.phases["sampling"].values())
    return max(per_part + int(free // per_slot), 0) * parts


def suggest(config: Config, mesh_shape: Sequence[int], limit: float) -> str:
    """The smallest change of settings with which the estimate is at most `limit` bytes, as one line.

    Tried in the order of what they cost, one alone and then all up to it: the settings that change no
    result first. Where none helps: how many devices would do.
    """
    options = list(_options(config, mesh_shape))
    tried = [[option] for option in options] + [options[:count] for count in range(2, len(options) + 1)]
    for changes in tried:
        changed = override(config, " ".join(changes).split())
        if estimate(changed, abstract_mesh(changed.mesh, math.prod(mesh_shape))).peak <= limit:
            return f"set {' '.join(changes)}"
    devices = math.prod(mesh_shape)
    for count in (devices * 2**doubling for doubling in range(1, 11)):
        rows = -(-config.distill.batch_size // count) * count
        bigger = override(config, [f"distill.batch_size={rows}", "distill.microbatches=1"])
        bigger = dataclasses.replace(bigger, mesh=sharding.mesh_preset(count))
        options = " ".join(_options(bigger, sharding.mesh_shape(bigger.mesh, count)))
        if estimate(override(bigger, options.split()), abstract_mesh(bigger.mesh, count)).peak <= limit:
            return f"no setting is enough on {devices}; {count} such devices would do" + (
                f", with {options}" if options else ""
            )
    return "no setting and no number of such devices is enough; lower distill.layout.max_response"


def _options(config: Config, mesh_shape: Sequence[int]) -> Iterator[str]:
    """Settings that save memory, cheapest first."""
    data, fsdp, _ = mesh_shape
    parts = data * fsdp
    if config.model.remat == "none":
        yield "model.remat=dots"
    if config.sampler.slots > max(config.distill.batch_size, parts):
        yield f"sampler.slots={max(config.distill.batch_size, parts)}"
    if config.model.remat in ("none", "dots"):
        yield "model.remat=full"
    rows = config.distill.batch_size * config.distill.samples
    if rows_at_once(config) > parts and rows % parts == 0:
        yield f"distill.microbatches={rows // parts}"
    if data > 1:
        yield f"mesh.data=1 mesh.fsdp={parts}"
    if config.distill.optimizer.mu_dtype == "float32" and config.model.compute_dtype == "bfloat16":
        yield "distill.optimizer.mu_dtype=bfloat16"
    if not config.sampler.cache_dtype:
        yield "sampler.cache_dtype=int8"
    if config.model.remat != "offload":
        yield "model.remat=offload"


# ------------------------------------------------------------------------------------------- the compiler's count


def count(step: TrainStep, batch: Any) -> dict[str, float]:
    """Compiles a train step for this batch and returns the compiler's bytes per device.

    peak is arguments + outputs + temporaries - aliased, but for a TPU what its compiler reserves: there
    the temporaries are more than that (a program of 37 GiB by the sum compiles for a chip of 32).
    UserError, in the compiler's words, when the program does not fit.
    """
    try:
        stats = step.lower(batch).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"the train step does not compile: {str(error).splitlines()[0]}") from None
    out = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
    }
    total = out["arguments"] + out["outputs"] + out["temporaries"] - out["aliased"]
    on_tpu = step.mesh.devices.flat[0].platform == "tpu"
    return out | {"peak": stats.peak_memory_in_bytes if on_tpu else total}


def count_for(slice_: topology.Topology, path: str, overrides: Sequence[str]) -> dict[str, float]:
    """`count` of a config file's train step for a TPU slice that is not attached, in a process of its own."""
    arguments = ["-m", "sdzero_jax.memory", os.path.abspath(path), slice_.name, *overrides]
    return topology.run_for(slice_, arguments)


def abstract_mesh(config: sharding.MeshConfig, num_devices: int) -> jax.sharding.AbstractMesh:
    """A mesh of no particular devices; UserError when it does not fit their number."""
    shape = sharding.mesh_shape(config, num_devices)
    return jax.sharding.AbstractMesh(shape, sharding.MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))


def fit_to(config: Config, num_devices: int) -> Config:
    """The config on this many devices: its mesh refitted, its batch rounded up to a row per part."""
    mesh = sharding.refit(config.mesh, num_devices)
    parts = mesh.data * mesh.fsdp
    rows = -(-config.distill.batch_size // parts) * parts
    return dataclasses.replace(config, mesh=mesh, distill=dataclasses.replace(config.distill, batch_size=rows))


def main(path: str, name: str, *overrides: str) -> None:
    """The child: prints the compiler's count for a slice as a line of JSON."""
    slice_ = topology.parse(name)
    config = fit_to(override(load_config(path), overrides), slice_.chips)
    mesh = sharding.make_mesh(config.mesh, topology.devices(slice_))
    try:
        print(json.dumps(count(train_step(config, mesh), batch_of(config))))
    except UserError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main(*sys.argv[1:])
