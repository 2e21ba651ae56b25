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
from sdzero_jax.checkpoint import Checkpointer, abstract_like
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
    state: TrainState,
    step_fn: TrainStep,
    source: BatchSource,
    total_steps: int,
    checkpointer: Checkpointer,
    save_every: int,
    metadata: Mapping[str, Any],
    hooks: Hooks = Hooks(),
) -> TrainState:
    """Runs `step_fn` until `total_steps`, from the newest good checkpoint if there is one.

    Returns the state after the last step, which is also saved; a source that raises StopIteration ends
    early. Raises HealthStop on NaN, infinity or a failed check, Stopped when a signal asked for it (after a
    save).
    """
    restored = checkpointer.restore(abstract_like(state))
    done = 0
    if restored is not None:
        done, state, iterator, _ = restored
        source.set_state(iterator)
        if done < total_steps:
            say(f"{name}: continuing after step {done} of {total_steps}")
    writer = MetricWriter(directory, resume_step=done)

    def save(step: int, figures: Mapping[str, float]) -> None:
        validation = {name: value for name, value in figures.items() if name.startswith("validation_")}
        stores.push(directory)  # first: the metrics have to reach at least as far as the checkpoint
        checkpointer.save(step, state, source.get_state(), metadata, validation or None)

    try:
        with Progress(name, total_steps, initial=done, unit="step") as bar:
            for step in range(done + 1, total_steps + 1):
                try:
                    state, figures = _one_step(state, step_fn, source, step, total_steps, hooks)
                except StopIteration:  # the source has spent its budget
                    bar.advance_to(step - 1, step - 1, {})
                    save(step - 1, {})
                    break
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
                    checkpointer.wait()
                    raise Stopped(stop, f"{name} saved at step {step} of {total_steps}")
        checkpointer.wait()
        return state
    finally:
        writer.close()


def _one_step(state, step_fn, source, step: int, total_steps: int, hooks: Hooks):
    """One batch, one update and what follows it; figures as plain floats."""
    batch, figures = source.next(step_fn.parameters(state.params))
    state, metrics = step_fn(state, batch)
    figures = dict(figures) | finalise(jax.device_get(metrics))
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
