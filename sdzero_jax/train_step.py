"""The one train step: loss, gradient, update and teacher, in one jitted, sharded, donated program.

Every method runs through `make_train_step`; what differs is the loss function and the batch.
Leaves out where batches come from, synchronising a teacher between steps and checkpoints.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from sdzero_jax import sharding
from sdzero_jax.models import LanguageModel
from sdzero_jax.objectives import Metrics
from sdzero_jax.teacher import TeacherConfig, after_update, initial_teacher, teacher_for_loss

# (params, teacher, batch) -> (loss, metrics)
LossFn = Callable[[Any, Any, Any], tuple[jax.Array, Metrics]]
# (params, teacher, batch) -> ((loss, metrics), gradients)
GradientFn = Callable[[Any, Any, Any], tuple[tuple[jax.Array, Metrics], Any]]


class TrainState(flax.struct.PyTreeNode):
    """Everything a step reads and writes; `teacher` is None for objectives without one."""

    step: jax.Array  # [] int32, completed steps
    params: Any
    opt_state: Any
    teacher: Any = None


def state_shardings(model: LanguageModel, optimizer: optax.GradientTransformation, mesh, has_teacher: bool):
    """A TrainState of NamedShardings: moments and teacher lie as the parameters do, scalars everywhere."""
    params = sharding.shardings_for(mesh, model.param_axes(), model.param_shapes())
    everywhere = sharding.replicated(mesh)
    shapes = jax.eval_shape(optimizer.init, model.param_shapes())
    opt_state = optax.tree.map_params(
        optimizer, lambda _, spec: spec, shapes, params, transform_non_params=lambda _: everywhere
    )
    return TrainState(step=everywhere, params=params, opt_state=opt_state, teacher=params if has_teacher else None)


def init_state(
    model: LanguageModel,
    params,
    optimizer: optax.GradientTransformation,
    mesh,
    *,
    teacher_config: TeacherConfig | None = None,
    reviser_params=None,
) -> TrainState:
    """A state at step 0, placed on the mesh; `params` are copied because the step donates its state."""
    teacher = None
    if teacher_config is not None:
        teacher_config.validate()
        teacher = initial_teacher(teacher_config, reviser_params, model.config.compute_dtype)
    shardings = state_shardings(model, optimizer, mesh, teacher is not None)

    def build(params, teacher):
        return TrainState(jnp.int32(0), params, optimizer.init(params), teacher)

    copied = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)
    with sharding.use(mesh):
        return jax.jit(build, out_shardings=shardings)(copied, teacher)


def abstract_state(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    mesh,
    *,
    teacher_config: TeacherConfig | None = None,
) -> TrainState:
    """The state of `init_state` as ShapeDtypeStructs with their shardings; nothing is computed."""

    def build(params):
        dtype = model.config.compute_dtype
        teacher = None if teacher_config is None else initial_teacher(teacher_config, params, dtype)
        return TrainState(jnp.int32(0), params, optimizer.init(params), teacher)

    shapes = jax.eval_shape(build, model.param_shapes())
    places = state_shardings(model, optimizer, mesh, shapes.teacher is not None)
    placed = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)  # noqa: E731
    return jax.tree.map(placed, shapes, places)


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """step(state, batch) -> (state, metrics); `lower` gives the same program without running it."""

    jitted: Any  # (state, batch on the mesh) -> (state, metrics), the state donated
    state: TrainState  # abstract
    mesh: Any

    def __call__(self, state: TrainState, batch) -> tuple[TrainState, Metrics]:
        with sharding.use(self.mesh):
            return self.jitted(state, sharding.shard_batch(self.mesh, batch))

    def lower(self, batch) -> jax.stages.Lowered:
        """The program for a batch of this shape (arrays or anything else with shape and dtype)."""
        place = sharding.batch_sharding(self.mesh)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), batch)
        with sharding.use(self.mesh):
            return self.jitted.lower(self.state, shapes)


def make_train_step(
    loss_fn: LossFn,
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    mesh,
    *,
    teacher_config: TeacherConfig | None = None,
    schedule: optax.Schedule | None = None,
    gradient: GradientFn | None = None,
) -> TrainStep:
    """Returns step(state, batch) -> (state, metrics): compiled for the mesh, its state donated.

    `gradient` takes the place of plain `jax.value_and_grad(loss_fn)`, see `accumulated`. Metrics are
    (sum, count) pairs; "nonfinite" counts steps whose loss or gradient was NaN or infinite. Such a step
    changes nothing, so that a checkpoint never holds its result.
    """
    has_teacher = teacher_config is not None and teacher_config.schedule != "live"
    gradient = gradient or jax.value_and_grad(loss_fn, has_aux=True)

    def step_fn(state: TrainState, batch):
        teacher = teacher_for_loss(teacher_config, state.teacher, state.params) if teacher_config else None
        (loss, metrics), grads = gradient(state.params, teacher, batch)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = TrainState(
            state.step + 1,
            params,
            opt_state,
            after_update(teacher_config, state.teacher, params) if teacher_config else None,
        )
        kept = state.replace(step=state.step + 1)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, kept)
        one = jnp.float32(1.0)
        metrics = metrics | {
            "loss": (loss, one),
            "grad_norm": (norm, one),
            "nonfinite": (1.0 - finite.astype(jnp.float32), one),
        }
        if schedule is not None:
            metrics["learning_rate"] = (jnp.float32(schedule(state.step)), one)
        return new, metrics

    shardings = state_shardings(model, optimizer, mesh, has_teacher)
    jitted = jax.jit(
        step_fn,
        in_shardings=(shardings, None),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    return TrainStep(jitted, abstract_state(model, optimizer, mesh, teacher_config=teacher_config), mesh)


def accumulated(loss_fn: LossFn, denominators: Callable[[Any], tuple[jax.Array, ...]], parts: int) -> GradientFn:
    """The gradient of `loss_fn` over a batch of named batches, computed `parts` rows at a time.

    Rows are dealt out so that a device's stay on it. Denominators are taken over the whole batch first, so the
    result is that of one large batch; gradients are added in float32. Metrics add up too, so logprob_diff_max
    becomes the mean of the parts' maxima. Every batch's rows must divide by `parts`.
    """

    def gradient(params, teacher, batches):
        shared = denominators(batches)
        split = jax.tree.map(lambda leaf: leaf.reshape(-1, parts, *leaf.shape[1:]).swapaxes(0, 1), batches)

        def one(part):
            return jax.value_and_grad(loss_fn, has_aux=True)(params, teacher, part | {"denominators": shared})

        def add(total, part):
            new = one(part)
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, new), None

        shapes = jax.eval_shape(one, jax.tree.map(lambda leaf: leaf[0], split))
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)
        (loss_and_metrics, grads), _ = jax.lax.scan(add, zero, split)
        return loss_and_metrics, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)

    return gradient


def synchronise(state: TrainState) -> TrainState:
    """T := S, in buffers of their own (the next step donates both)."""
    teacher = jax.tree.map(
        lambda leaf, old: jax.device_put(jnp.array(leaf, dtype=old.dtype, copy=True), old.sharding),
        state.params,
        state.teacher,
    )
    return state.replace(teacher=teacher)
