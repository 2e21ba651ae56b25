"""Bytes per device of a run's two training stages: estimated before anything is compiled, and as compilers count them.

The state and the residuals of the layers are exact (from shardings, and from what jax would keep for the
backward pass); the workspace of one layer and of one tile of logits is counted by hand and checked against
compiled programs. A stage's peak is that of its largest phase, a run's that of its larger stage. As a program
(`python -m sdzero_jax.memory CONFIG TOPOLOGY STAGE [a.b=c ...]`, started by `count_for`) it compiles for a TPU
slice that is not attached.
Left out: collecting and evaluating, which sample as distillation does, but beside the parameters alone; the
localisation, which reads no more rows at once than a train step; what the first compilation and the loading of
a checkpoint need; the embedded task's base model and the stage `train`.
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
from sdzero_jax.batches import ScoredSequence, distill_batch, sequence_batch
from sdzero_jax.config import (
    Config,
    DistillConfig,
    SrtConfig,
    load_config,
    microbatches_that_fit,
    override,
    rows_per_step,
)
from sdzero_jax.errors import UserError
from sdzero_jax.examples import Question, Rollout, Verdict
from sdzero_jax.models import DecoderConfig, LanguageModel, cache_bytes
from sdzero_jax.ops.linear_divergence import default_tile
from sdzero_jax.optimizer import learning_rate_schedule, make_optimizer
from sdzero_jax.prompts import control_phrases
from sdzero_jax.train_step import (
    TrainStep,
    abstract_frozen,
    abstract_state,
    in_parts,
    make_train_step,
)

STAGES = ("srt", "distill")
# Phases that are programs of their own, beside the train step.
_BESIDE = ("held-out loss", "sampling")

# Copies of one layer's activations [rows, tokens, width] that exist at once, in the compute dtype. Counted in
# the programs that the TPU compiler makes for both families.
_FORWARD = {"mlp": 3.0, "heads": 3.0, "hidden": 4.0}
_BACKWARD = {"mlp": 5.0, "heads": 6.0, "hidden": 6.0}
# What each further block of the layer pattern adds: the blocks share a loop body, where the compiler keeps
# the recomputed activations of all of them, with or without barriers between them.
_FURTHER_BLOCK = {"mlp": 3.0, "heads": 2.0, "hidden": 2.0}
# Tiles of float32 logits at once: the student's, its log-probs and the gradient; the teacher's and its log-probs.
_TILES = {"srt": 3.0, "distill": 5.0}


@dataclasses.dataclass(frozen=True)
class Stage:
    """Bytes per device of a training stage. `state` is there all along, of the phases one after the other."""

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
        phases = [sum(parts.values()) for name, parts in self.phases.items() if name not in _BESIDE]
        return sum(self.state.values()) + max(phases)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Self-revision training (phase 1) and distillation with its sampling (phase 2)."""

    srt: Stage
    distill: Stage

    @property
    def peak_stage(self) -> str:
        return max(STAGES, key=lambda name: getattr(self, name).peak)

    @property
    def peak(self) -> float:
        return max(self.srt.peak, self.distill.peak)


# ------------------------------------------------------------------------------------- the train step


def train_step(config: Config, mesh, stage: str) -> TrainStep:
    """The train step of this config's SRT or distillation, on this mesh."""
    model, own = LanguageModel(config.model), _own(config, stage)
    objective = {"srt": objectives.cross_entropy, "distill": objectives.self_distillation}[stage]
    terms = (objectives.Term(1.0, stage, objective, own.objective),)
    optimizer, schedule = make_optimizer(own.optimizer, 100), learning_rate_schedule(own.optimizer, 100)
    return make_train_step(
        functools.partial(objectives.combined, terms, model), model, optimizer, mesh,
        teacher_config=_teacher(config, stage), schedule=schedule,
        differentiate=in_parts(own.microbatches, terms),
        adapters=own.lora, frozen=abstract_frozen(model, mesh, own.lora),
    )  # fmt: skip


def _own(config: Config, stage: str) -> SrtConfig | DistillConfig:
    return {"srt": config.srt, "distill": config.distill}[stage]


def _teacher(config: Config, stage: str):
    return config.distill.teacher if stage == "distill" else None


def phrase_tokens(config: Config) -> int:
    """Tokens of the longest control phrase, at most: no tokenizer makes more of them than there are bytes."""
    phrases = control_phrases(config.phrases)
    return max(len(phrases.text(reward).encode()) for reward in (0.0, 1.0))


def rows_of(config: Config, stage: str) -> int:
    """Rows of a batch."""
    return rows_per_step(_own(config, stage))


def batch_of(config: Config, stage: str) -> dict[str, dict[str, np.ndarray]]:
    """A batch of the shapes that the run has, for `train_step`: made by the functions that make the run's."""
    rows = rows_of(config, stage)
    if stage == "srt":
        return {stage: sequence_batch([ScoredSequence((0,), (0.0,))] * rows, config.srt.data.max_length)}
    rollout = Rollout(
        Question("", "", ("",), ""), (0,), (0,), (0.0,), "length", Verdict.of("wrong"), sampling_logprobs=(0.0,)
    )
    phrase = (0,) * phrase_tokens(config)
    return {stage: distill_batch([rollout] * rows, lambda reward: phrase, (), config.distill.layout)[0]}


def lengths(config: Config) -> tuple[int, int, int]:
    """Tokens of a row of SRT, of the student's and of the teacher's in distillation."""
    layout = config.distill.layout
    student = layout.max_prompt + layout.max_response
    return config.srt.data.max_length, student, layout.rev_length(phrase_tokens(config))


# ---------------------------------------------------------------------------------------- the estimate


def estimate(config: Config, mesh, per_host: int = 0) -> Estimate:
    """What a run needs on each device of `mesh`, which may be abstract.

    `per_host` devices belong to one host (0: all of them), and sample with a copy of the weights of their own.
    """
    srt, student, teacher = lengths(config)
    local = local_model(config.model, mesh.shape["tensor"])

    def forward(stage: str, length: int) -> dict[str, float]:
        return {"one layer's activations": _workspace(local, _rows_at_once(config, mesh, stage), _FORWARD) * length}

    frozen = abstract_frozen(LanguageModel(config.model), mesh, config.srt.lora)
    merged = {"parameters with the adapters merged": _bytes(frozen)}
    # One device of the compute dtype samples with the merged parameters themselves.
    shared = config.model.param_dtype == config.model.compute_dtype and mesh.size == 1
    beside = merged if config.distill.lora.rank and not shared else {}
    return Estimate(
        srt=_stage(config, mesh, "srt", srt, srt - 1, {}, {"held-out loss": merged | forward("srt", srt)}),
        distill=_stage(
            config, mesh, "distill", student, config.distill.layout.max_response,
            {"teacher's forward pass": forward("distill", teacher)},
            {"sampling": beside | _sampling(config, mesh, per_host)},
        ),
    )  # fmt: skip


def _stage(config: Config, mesh, stage: str, length: int, targets: int, before: dict, beside: dict) -> Stage:
    """A stage whose forward and backward pass reads rows of `length` tokens and scores `targets` of each.

    `before` are further phases of the train step, `beside` those of other programs.
    """
    model, own = LanguageModel(config.model), _own(config, stage)
    optimizer, teacher = make_optimizer(own.optimizer, 100), _teacher(config, stage)
    whole = abstract_state(model, optimizer, mesh, teacher_config=teacher, adapters=own.lora)
    frozen = abstract_frozen(model, mesh, own.lora)
    rows = _rows_at_once(config, mesh, stage)
    local = local_model(config.model, mesh.shape["tensor"])
    state = {
        "parameters": _bytes(frozen) + _bytes(whole.params),
        "optimizer state": _bytes(whole.opt_state),
        "teacher": _bytes(whole.teacher),
    }
    gradients = _bytes(whole.params)
    summed = _bytes(_in_float32(whole.params)) if own.microbatches > 1 else 0.0
    further = _workspace(local, rows, _FURTHER_BLOCK) * (len(local.layer_pattern) - 1)
    backward = _workspace(local, rows, _BACKWARD) + (further if local.remat != "none" else 0.0)
    kept = {
        "activations kept": residuals(local, rows, length),
        "weights in the compute dtype": _compute_copies(frozen or whole.params, config.model),
        "sum of the parts' gradients (float32)": summed,
    }
    phases = {
        **before,
        "logits": _vocabulary(config, local, stage, rows * targets, mesh),
        "layers' backward pass": {"gradients": gradients, "one layer's activations": backward * length},
    }
    return Stage(state, {name: kept | parts for name, parts in phases.items()} | beside)


def _rows_at_once(config: Config, mesh, stage: str) -> int:
    """Rows that a device's forward and backward pass hold together."""
    return -(-rows_of(config, stage) // _own(config, stage).microbatches // sharding.batch_devices(mesh))


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


@functools.lru_cache(maxsize=256)
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


def _vocabulary(config: Config, local: DecoderConfig, stage: str, tokens: int, mesh) -> dict[str, float]:
    """Unembeddings, tiles of logits and the accumulator of the unembedding's gradient."""
    item = jnp.dtype(local.compute_dtype).itemsize
    table = local.vocab_size * local.hidden_size
    models = {"srt": 1, "distill": 2}[stage]
    return {
        "hidden states of the targets": 3 * tokens * local.hidden_size * item,
        "gathered unembeddings": models * table * item if sharding.batch_devices(mesh) > 1 else 0.0,
        "unembedding's gradient (float32)": 0.0 if _own(config, stage).lora.rank else table * 4.0,
        "logit tiles": _TILES[stage] * default_tile(tokens, local.vocab_size) * local.vocab_size * 4,
    }


def _sampling(config: Config, mesh, per_host: int) -> dict[str, float]:
    """Cache, prompts being read and weights of the larger of the two samplers that run beside the state.

    Every sampler of a run has at most the configured slots, and each slot room for a revision. Hosts share
    the slots, and each holds all weights on devices of its own.
    """
    distill, sampler, model = config.distill, config.sampler, config.model
    hosts, shape = _sampling_mesh(config, mesh, per_host)
    parts, local = shape[0] * shape[1], local_model(model, shape[2])
    slots = -(-sampler.slots // (hosts * parts))
    longest = max(
        distill.sampling.max_new_tokens, *(2 * c.sampling.max_new_tokens for c in (config.collect, config.evaluate))
    )
    length = distill.layout.max_prompt + longest + phrase_tokens(config)
    prompts = max(-(-sampler.prefill_tokens // parts), distill.layout.max_prompt)  # a whole prompt per part
    item = jnp.dtype(model.compute_dtype).itemsize
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(LanguageModel(local).param_shapes()))
    return {
        "KV cache": cache_bytes(local, slots, length, sampler.cache_dtype or None, sampler.block),
        "prompts being read": cache_bytes(local, 1, 0, None, prompts),
        "weights in the compute dtype": float(item * parameters / shape[1]),
    }


def _sampling_mesh(config: Config, mesh, per_host: int) -> tuple[int, tuple[int, int, int]]:
    """(hosts, mesh shape of each), as `Run.sampler` makes them."""
    shape = tuple(mesh.shape.values())
    hosts = math.prod(shape) // per_host if 0 < per_host < math.prod(shape) else 1
    if hosts > 1:
        shape = (1, per_host, 1)  # as in sharding.host_mesh
    if config.sampler.weights == "tensor":
        shape = sharding.rollout_shape(shape, config.model.num_kv_heads)
    return hosts, shape


def _bytes(tree: Any) -> float:
    """Bytes on one device of a tree of ShapeDtypeStructs with shardings."""
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))


def _in_float32(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding), tree)


def _compute_copies(params: Any, model: DecoderConfig) -> float:
    """The layers' weights in the compute dtype: the compiler casts them once, before the loop over layers."""
    if model.param_dtype == model.compute_dtype:
        return 0.0
    item = jnp.dtype(model.compute_dtype).itemsize
    return sum(_bytes(leaf) / leaf.dtype.itemsize * item for leaf in jax.tree.leaves(params["layers"]))


# ------------------------------------------------------------------------------- what to change, if it does not fit


def slots_that_fit(config: Config, mesh, limit: float, per_host: int = 0) -> int:
    """Slots of the sampler that fit beside the state of distillation: 0 when not one per part does."""
    now = estimate(config, mesh, per_host).distill
    hosts, shape = _sampling_mesh(config, mesh, per_host)
    parts = hosts * shape[0] * shape[1]
    per_part = -(-config.sampler.slots // parts)
    one_more = override(config, [f"sampler.slots={(per_part + 1) * parts}"])
    per_slot = _sampling(one_more, mesh, per_host)["KV cache"] - now.phases["sampling"]["KV cache"]
    free = limit - sum(now.state.values()) - sum(now.phases["sampling"].values())
    return max(per_part + int(free // per_slot), 0) * parts


_ADAPTERS = ("model.param_dtype=bfloat16", "srt.lora.rank=32", "distill.lora.rank=32")  # on frozen parameters


def suggest(config: Config, mesh_shape: Sequence[int], limit: float, per_host: int = 0) -> str:
    """The smallest change of settings with which the estimate is at most `limit` bytes, as one line.

    Tried in the order of what they cost, one alone and then all up to it, less those that are not needed: the
    settings that change no result first. Where none helps: how many devices would do.
    """
    devices = math.prod(mesh_shape)
    if changes := _enough(config, mesh_shape, limit, per_host):
        return f"set {' '.join(changes)}{_cost(changes)}"
    adapters, said = override(config, _ADAPTERS), ""
    if not config.distill.lora.rank and (changes := _enough(adapters, mesh_shape, limit, per_host)) is not None:
        said = f" adapters would do: set {' '.join([*_ADAPTERS, *changes])}{_cost(changes)};"
    for count in (devices * 2**doubling for doubling in range(1, 11)):
        whole = override(config, ["distill.microbatches=1", "srt.microbatches=1"])
        bigger = fit_to(dataclasses.replace(whole, mesh=sharding.mesh_preset(count)), count)
        changes = _enough(bigger, sharding.mesh_shape(bigger.mesh, count), limit, per_host)
        if changes is not None:
            return f"no setting is enough on {devices};{said} {count} such devices would do" + (
                f", with {' '.join(changes)}{_cost(changes)}" if changes else ""
            )
    return f"no setting and no number of such devices is enough;{said} lower distill.layout.max_response"


def _enough(config: Config, mesh_shape: Sequence[int], limit: float, per_host: int) -> list[str] | None:
    """The first changes with which the estimate fits, none of them to spare; None when all are not enough."""

    def fits(changes: Sequence[str]) -> bool:
        changed = override(config, " ".join(changes).split())
        return estimate(changed, abstract_mesh(changed.mesh, math.prod(mesh_shape)), per_host).peak <= limit

    options = list(_options(config, mesh_shape))
    for changes in [[], *([o] for o in options), *(options[:count] for count in range(2, len(options) + 1))]:
        if fits(changes):
            for change in list(changes):
                rest = [other for other in changes if other != change]
                changes = rest if fits(rest) else changes
            return changes
    return None


def _cost(changes: Sequence[str]) -> str:
    """What the last resort takes."""
    shorter = any(change.startswith("srt.data.max_length") for change in changes)
    return " (longer traces are dropped and counted)" if shorter else ""


def _options(config: Config, mesh_shape: Sequence[int]) -> Iterator[str]:
    """Settings that save memory, cheapest first."""
    data, fsdp, tensor = mesh_shape
    parts = data * fsdp
    if config.model.remat == "none":
        yield "model.remat=dots"
    if config.sampler.slots > max(config.distill.batch_size, parts):
        yield f"sampler.slots={max(config.distill.batch_size, parts)}"
    if config.model.remat in ("none", "dots"):
        yield "model.remat=full"
    for stage in STAGES:
        if rows_of(config, stage) > parts * _own(config, stage).microbatches:
            yield _row_by_row(config, stage, parts)
    if data > 1:
        yield f"mesh.data=1 mesh.fsdp={parts}"
    if config.model.remat != "offload":
        yield "model.remat=offload"
    if parts % 2 == 0 and config.model.num_kv_heads % (2 * tensor) == 0:
        rows = " ".join(_row_by_row(config, stage, parts // 2) for stage in STAGES)
        yield f"mesh.data=1 mesh.fsdp={parts // 2} mesh.tensor={2 * tensor} {rows}"
    for stage in STAGES:
        if _own(config, stage).optimizer.mu_dtype == "float32" and config.model.compute_dtype == "bfloat16":
            yield f"{stage}.optimizer.mu_dtype=bfloat16"
    if not config.sampler.cache_dtype:
        yield "sampler.cache_dtype=int8"
    srt, student, _ = lengths(config)
    if srt > student:
        yield f"srt.data.max_length={student}"


def _row_by_row(config: Config, stage: str, parts: int) -> str:
    return f"{stage}.microbatches={max(rows_of(config, stage) // parts, 1)}"


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


def count_for(slice_: topology.Topology, path: str, overrides: Sequence[str], stage: str) -> dict[str, float]:
    """`count` of a config file's train step for a TPU slice that is not attached, in a process of its own."""
    arguments = ["-m", "sdzero_jax.memory", os.path.abspath(path), slice_.name, stage, *overrides]
    return topology.run_for(slice_, arguments)


def abstract_mesh(config: sharding.MeshConfig, num_devices: int) -> jax.sharding.AbstractMesh:
    """A mesh of no particular devices; UserError when it does not fit their number."""
    shape = sharding.mesh_shape(config, num_devices)
    return jax.sharding.AbstractMesh(shape, sharding.MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))


def fit_to(config: Config, num_devices: int) -> Config:
    """The config on this many devices: its mesh refitted, its batches rounded up to a row per part.

    Microbatches become as many as still fill the devices.
    """
    mesh = sharding.refit(config.mesh, num_devices)
    parts = mesh.data * mesh.fsdp

    def up(stage):
        stage = dataclasses.replace(stage, batch_size=-(-stage.batch_size // parts) * parts)
        fits = microbatches_that_fit(rows_per_step(stage), parts, stage.microbatches)
        return dataclasses.replace(stage, microbatches=fits)

    return dataclasses.replace(config, mesh=mesh, srt=up(config.srt), distill=up(config.distill))


def main(path: str, name: str, stage: str, *overrides: str) -> None:
    """The child: prints the compiler's count for a slice as a line of JSON."""
    slice_ = topology.parse(name)
    config = fit_to(override(load_config(path), overrides), slice_.chips)
    mesh = sharding.make_mesh(config.mesh, topology.devices(slice_))
    try:
        print(json.dumps(count(train_step(config, mesh, stage), batch_of(config, stage))))
    except UserError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main(*sys.argv[1:])
