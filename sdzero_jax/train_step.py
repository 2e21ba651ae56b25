"""The one train step: loss, gradient, update and teacher, in one jitted, sharded, donated program.

Every method runs through `make_train_step`; what differs is the loss function and the batch.
Leaves out where batches come from, synchronising a teacher between steps and checkpoints.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from sdzero_jax import objectives, sharding
from sdzero_jax.models import LanguageModel, lora
from sdzero_jax.objectives import Metrics
from sdzero_jax.teacher import TeacherConfig, after_update, initial_teacher, teacher_for_loss

# (params, teacher, batch) -> (loss, metrics)
LossFn = Callable[[Any, Any, Any], tuple[jax.Array, Metrics]]
# (params, teacher, batch) -> ((loss, metrics), gradients)
GradientFn = Callable[[Any, Any, Any], tuple[tuple[jax.Array, Metrics], Any]]

NO_LORA = lora.LoraConfig(rank=0)


def value_and_gradient(loss_fn: LossFn) -> GradientFn:
    """The gradient of a whole batch at once."""
    return jax.value_and_grad(loss_fn, has_aux=True)


class TrainState(flax.struct.PyTreeNode):
    """Everything a step reads and writes; `teacher` is None for objectives without one.

    With LoRA `params` and `teacher` are adapters; the model that both share is the step's own (`TrainStep.frozen`).
    """

    step: jax.Array  # [] int32, completed steps
    params: Any
    opt_state: Any
    teacher: Any = None


def trained_shapes(model: LanguageModel, adapters: lora.LoraConfig = NO_LORA) -> Any:
    """What is trained, as ShapeDtypeStructs: the model's parameters or their adapters."""
    shapes = model.param_shapes()
    return jax.eval_shape(lambda: lora.init(jax.random.key(0), shapes, adapters)) if adapters.rank else shapes


def trained_shardings(model: LanguageModel, mesh, adapters: lora.LoraConfig = NO_LORA) -> Any:
    """Where what is trained lies on the mesh."""
    axes = lora.axes(model.param_axes(), adapters) if adapters.rank else model.param_axes()
    return sharding.shardings_for(mesh, axes, trained_shapes(model, adapters))


def state_shardings(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    mesh,
    has_teacher: bool,
    adapters: lora.LoraConfig = NO_LORA,
):
    """A TrainState of NamedShardings: moments and teacher lie as the parameters do, scalars everywhere."""
    params = trained_shardings(model, mesh, adapters)
    everywhere = sharding.replicated(mesh)
    shapes = jax.eval_shape(optimizer.init, trained_shapes(model, adapters))
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
    adapters: lora.LoraConfig = NO_LORA,
) -> TrainState:
    """A state at step 0, placed on the mesh; `params` are copied because the step donates its state.

    With `adapters` both `params` and `reviser_params` are adapters, see `lora.init`.
    """
    teacher = None
    if teacher_config is not None:
        teacher_config.validate()
        teacher = initial_teacher(teacher_config, reviser_params, _teacher_dtype(model, adapters))
    shardings = state_shardings(model, optimizer, mesh, teacher is not None, adapters)

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
    adapters: lora.LoraConfig = NO_LORA,
) -> TrainState:
    """The state of `init_state` as ShapeDtypeStructs with their shardings; nothing is computed."""

    def build(params):
        dtype = _teacher_dtype(model, adapters)
        teacher = None if teacher_config is None else initial_teacher(teacher_config, params, dtype)
        return TrainState(jnp.int32(0), params, optimizer.init(params), teacher)

    shapes = jax.eval_shape(build, trained_shapes(model, adapters))
    places = state_shardings(model, optimizer, mesh, shapes.teacher is not None, adapters)
    return _placed(shapes, places)


def abstract_frozen(model: LanguageModel, mesh, adapters: lora.LoraConfig) -> Any:
    """The parameters that are not trained, as ShapeDtypeStructs with their shardings; None when all are."""
    return _placed(model.param_shapes(), trained_shardings(model, mesh)) if adapters.rank else None


def _placed(shapes, places):
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places
    )


def _teacher_dtype(model: LanguageModel, adapters: lora.LoraConfig):
    """Adapters are small and stay exact, so that a synchronised teacher is the student to the bit."""
    return jnp.float32 if adapters.rank else model.config.compute_dtype


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """step(state, batch) -> (state, metrics); `lower` gives the same program without running it."""

    jitted: Any  # (state, frozen parameters, batch on the mesh) -> (state, metrics), the state donated
    state: TrainState  # abstract
    mesh: Any
    merge: Any  # (frozen parameters, adapters) -> parameters; None without adapters
    frozen: Any = None  # with adapters: the parameters that they belong to

    def __call__(self, state: TrainState, batch) -> tuple[TrainState, Metrics]:
        with sharding.use(self.mesh):
            return self.jitted(state, self.frozen, sharding.shard_batch(self.mesh, batch))

    def parameters(self, trained) -> Any:
        """The model of a state's `params`: themselves, or the frozen ones with these adapters merged."""
        if self.merge is None:
            return trained
        with sharding.use(self.mesh):
            return self.merge(self.frozen, trained)

    def lower(self, batch) -> jax.stages.Lowered:
        """The program for a batch of this shape (arrays or anything else with shape and dtype)."""
        place = sharding.batch_sharding(self.mesh)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), batch)
        with sharding.use(self.mesh):
            return self.jitted.lower(self.state, self.frozen, shapes)


def make_train_step(
    loss_fn: LossFn,
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    mesh,
    *,
    teacher_config: TeacherConfig | None = None,
    schedule: optax.Schedule | None = None,
    differentiate: Callable[[LossFn], GradientFn] = value_and_gradient,
    adapters: lora.LoraConfig = NO_LORA,
    frozen: Any = None,
) -> TrainStep:
    """Returns step(state, batch) -> (state, metrics): compiled for the mesh, its state donated.

    `differentiate` is what `in_parts` makes. With `adapters` they alone are trained, on
    top of the `frozen` parameters, which teacher and student share. Metrics are (sum, count) pairs; "nonfinite"
    counts steps whose loss or gradient was NaN or infinite. Such a step changes nothing, so that a checkpoint
    never holds its result.
    """
    has_teacher = teacher_config is not None and teacher_config.schedule != "live"

    def step_fn(state: TrainState, frozen, batch):
        def whole(trained):
            return lora.attach(frozen, trained, adapters) if adapters.rank and trained is not None else trained

        def loss_of_trained(trained, teacher, batch):
            return loss_fn(whole(trained), whole(teacher), batch)

        teacher = teacher_for_loss(teacher_config, state.teacher, state.params) if teacher_config else None
        (loss, metrics), grads = differentiate(loss_of_trained)(state.params, teacher, batch)
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

    shardings = state_shardings(model, optimizer, mesh, has_teacher, adapters)
    places = trained_shardings(model, mesh) if adapters.rank else None
    jitted = jax.jit(
        step_fn,
        in_shardings=(shardings, places, None),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    merge = jax.jit(functools.partial(lora.merge, config=adapters), out_shardings=places) if adapters.rank else None
    state = abstract_state(model, optimizer, mesh, teacher_config=teacher_config, adapters=adapters)
    return TrainStep(jitted, state, mesh, merge, frozen)


def in_parts(parts: int, terms: Sequence[objectives.Term]) -> Callable[[LossFn], GradientFn]:
    """`make_train_step`'s `differentiate` for the loss of these terms: of a whole batch, or in `parts` of its rows."""
    return value_and_gradient if parts == 1 else functools.partial(_accumulated, terms=terms, parts=parts)


def _accumulated(loss_fn: LossFn, terms: Sequence[objectives.Term], parts: int) -> GradientFn:
    """The gradient of `loss_fn` over named batches, computed in `parts` of their rows.

    Rows are dealt out so that a device's stay on it. Every part gets the denominators of the whole batch and the
    number of parts as well, so the result is that of one large batch. Gradients are added in float32. Metrics add
    up too, so logprob_diff_max becomes the mean of the parts' maxima. Every batch's rows must divide by `parts`.
    """

    def gradient(params, teacher, batches):
        whole = objectives.denominators(terms, batches) | {"parts": jnp.float32(parts)}
        split = jax.tree.map(lambda leaf: leaf.reshape(-1, parts, *leaf.shape[1:]).swapaxes(0, 1), batches)

        def one(part):
            return jax.value_and_grad(loss_fn, has_aux=True)(params, teacher, part | whole)

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
