"""Where the teacher comes from: schedules that say what T is at each step.

frozen: the reviser as it was when distillation began (paper); ema: T <- (1 - u) T + u S inside
the train step; sync_every: T := S every n steps, on the host between two steps; sync_on_plateau: T := S when
accuracy on validation questions has stopped rising; live: T = stop_gradient(S).
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from sdzero_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """Teacher schedule."""

    schedule: Annotated[
        Literal["frozen", "ema", "sync_every", "sync_on_plateau", "live"], "where the teacher comes from"
    ] = "frozen"
    ema_rate: Annotated[float, "u of T <- (1 - u) T + u S"] = 0.01
    sync_steps: Annotated[int, "steps between synchronisations of sync_every"] = 0
    patience: Annotated[int, "validations without a new best before sync_on_plateau synchronises"] = 2

    def validate(self) -> None:
        if self.schedule == "sync_every" and self.sync_steps < 1:
            raise UserError(f"teacher.sync_steps is {self.sync_steps}; schedule sync_every needs at least 1")
        if self.schedule == "sync_on_plateau" and self.patience < 1:
            raise UserError(f"teacher.patience is {self.patience}; schedule sync_on_plateau needs at least 1")
        if self.schedule == "ema" and not 0.0 < self.ema_rate <= 1.0:
            raise UserError(f"teacher.ema_rate is {self.ema_rate}; wanted 0 < ema_rate <= 1")


def initial_teacher(config: TeacherConfig, reviser_params, compute_dtype):
    """The teacher at step 0, a copy with buffers of its own; None when the schedule keeps none.

    An EMA teacher is float32: in bfloat16 a step of u (S - T) is rounded away. Others are stored in
    `compute_dtype`, which the model casts to anyhow; but the norms' scales, which it does not, stay
    as they are, so that the teacher's outputs are the reviser's to the bit.
    """
    if config.schedule == "live":
        return None

    def copy(path, leaf):
        kept = jnp.float32 if config.schedule == "ema" else leaf.dtype if "norm" in path[-1].key else compute_dtype
        return jnp.array(leaf, dtype=kept, copy=True)

    return jax.tree_util.tree_map_with_path(copy, reviser_params)


def teacher_for_loss(config: TeacherConfig, teacher, params):
    """The parameters that play T in this step."""
    return params if config.schedule == "live" else teacher


def after_update(config: TeacherConfig, teacher, params):
    """The teacher after an optimiser step; only ema moves it."""
    if config.schedule != "ema":
        return teacher
    rate = config.ema_rate
    return jax.tree.map(lambda old, new: (1.0 - rate) * old + rate * new.astype(old.dtype), teacher, params)


def sync_due(config: TeacherConfig, step: int, accuracies: Sequence[float] = ()) -> bool:
    """True when the teacher becomes the student after `step` completed steps.

    `accuracies`: those on validation questions since the last synchronisation, oldest first; given only
    after a step that was validated.
    """
    if config.schedule == "sync_every":
        return step % config.sync_steps == 0
    if config.schedule != "sync_on_plateau" or len(accuracies) <= config.patience:
        return False
    return max(accuracies[-config.patience :]) <= max(accuracies[: -config.patience])
