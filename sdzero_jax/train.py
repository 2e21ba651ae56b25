"""The one training loop: draw a batch, step, log, validate, save; resume bit for bit.

Objective and batches come from outside (`methods`); so does everything that may happen between
two steps (`Hooks`). A step's effects depend only on the restored state, the iterator state and
the step number, so a killed run that goes on equals one that was never stopped.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from sdzero_jax import signals, stores
from sdzero_jax.checkpoint import Checkpointer
from sdzero_jax.errors import HealthStop, Stopped
from sdzero_jax.metrics import MetricWriter, finalise
from sdzero_jax.progress import Progress, say
from sdzero_jax.train_step import TrainState, TrainStep


class BatchSource(Protocol):
    """Batches for the step, drawn with the current parameters (on-policy) or without them."""

    def next(self, params: Any) -> tuple[Mapping[str, Any], Mapping[str, float]]:
        """A batch of arrays, and figures of its own to log (reward, length, counts); StopIteration at its end."""
        ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What a stage adds to the loop.

    after_step: (completed steps, state, figures) -> (state, figures), e.g. a teacher synchronisation; the
      figures it is given hold those of a validation after this step.
    validate: (parameters, completed steps) -> figures, every `validate_every` steps and after the last,
      which a source that ends early does not have.
    check: figures of a step -> None, or a reason to stop.
    """

    after_step: Callable[[int, TrainState, Mapping[str, float]], tuple[TrainState, dict[str, float]]] | None = None
    validate: Callable[[Any, int], dict[str, float]] | None = None
    validate_every: int = 0
    check: Callable[[Mapping[str, float]], str | None] | None = None


def fit(
    name: str,
    directory: pathlib.Path,
    start: Callable[[], TrainState],
    step_fn: TrainStep,
    source: BatchSource,
    total_steps: int,
    checkpointer: Checkpointer,
    save_every: int,
    metadata: Mapping[str, Any],
    hooks: Hooks = Hooks(),
    *,
    given: Any = None,
) -> TrainState:
    """Runs `step_fn` until `total_steps`, from the newest good checkpoint, or from `start()` where there is none.

    Returns the state after the last step, which is also saved; a source that raises StopIteration ends early.
    Raises HealthStop on NaN, infinity or a failed check; Stopped when a signal asked for it, after a save (in the
    middle of a validation or a gate without one, as their step is not written yet).

    given: what `start` reads. Its arrays are deleted before the first step, whether they were read or a
      checkpoint took their place: a state may leave no room for them.
    """
    restored = checkpointer.restore(step_fn.state)
    if restored is not None:
        done, state, iterator, _ = restored
        source.set_state(iterator)
        if done < total_steps:
            say(f"{name}: continuing after step {done} of {total_steps}")
    else:
        done, state = 0, start()
    jax.tree.map(lambda leaf: leaf.delete(), given)
    writer = MetricWriter(directory, resume_step=done)

    def save(step: int, figures: Mapping[str, float]) -> None:
        validation = {name: value for name, value in figures.items() if name.startswith("validation_")}
        stores.push(directory)  # first: the metrics have to reach at least as far as the checkpoint
        checkpointer.save(step, state, source.get_state(), metadata, validation or None)

    def stopped(signum: int, step: int) -> Stopped:
        checkpointer.wait()
        return Stopped(signum, f"{name} saved at step {step} of {total_steps}")

    try:
        with Progress(name, total_steps, initial=done, unit="step") as bar:
            for step in range(done + 1, total_steps + 1):
                try:
                    batch, figures = source.next(step_fn.parameters(state.params))
                except StopIteration:  # the source has spent its budget
                    bar.advance_to(step - 1, step - 1, {})
                    save(step - 1, {})
                    break
                except Stopped as stop:  # while it sampled: nothing of this step is done
                    if step - 1 > done:  # else it is what this process began with
                        save(step - 1, {})
                    raise stopped(stop.signum, step - 1) from None
                state, metrics = step_fn(state, batch)
                figures = dict(figures) | finalise(jax.device_get(metrics))
                try:
                    state, figures = _after(state, figures, step_fn, step, total_steps, hooks)
                except Stopped as stop:
                    raise stopped(stop.signum, checkpointer.latest_step() or 0) from None
                reason = _unhealthy(figures) or (hooks.check(figures) if hooks.check else None)
                if reason:
                    checkpointer.wait()
                    raise HealthStop(
                        f"{name} stopped at step {step}: {reason}; the last good checkpoint is step "
                        f"{checkpointer.latest_step() or 0} in {directory}"
                    )
                writer.write(step, figures)
                stop = signals.requested()
                if step % save_every == 0 or step == total_steps or stop:
                    save(step, figures)
                bar.update(1, _headline(figures))
                if stop and step < total_steps:
                    raise stopped(stop, step)
        checkpointer.wait()
        return state
    finally:
        writer.close()


def _after(state, figures: dict[str, float], step_fn, step: int, total_steps: int, hooks: Hooks):
    """What follows an update, a validation and a hook: the state and all figures of the step."""
    due = hooks.validate_every and (step % hooks.validate_every == 0 or step == total_steps)
    if hooks.validate and due:
        figures |= {f"validation_{k}": v for k, v in hooks.validate(step_fn.parameters(state.params), step).items()}
    if hooks.after_step:
        state, extra = hooks.after_step(step, state, figures)
        figures |= extra
    return state, figures


def _unhealthy(figures: Mapping[str, float]) -> str | None:
    if figures.get("nonfinite", 0.0) > 0 or not math.isfinite(figures.get("loss", 0.0)):
        return f"loss {figures.get('loss'):.4g} with gradient norm {figures.get('grad_norm'):.4g} is not finite"
    return None


def _headline(figures: Mapping[str, float]) -> dict[str, float]:
    wanted = ("loss", "reward", "mean_tokens", "divergence", "logprob_diff_mean", "validation_accuracy")
    return {name: figures[name] for name in wanted if name in figures}
