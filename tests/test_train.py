"""The training loop on a toy: what it does between two steps, on a signal, and with what it starts from."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from sdzero_jax import training
from sdzero_jax.checkpoint import CheckpointConfig, Checkpointer
from sdzero_jax.errors import Stopped
from sdzero_jax.health import HealthConfig
from sdzero_jax.methods import find_method
from sdzero_jax.metrics import FILE_NAME, MetricWriter, read_metrics
from sdzero_jax.teacher import TeacherConfig, sync_due
from sdzero_jax.train import Hooks, fit
from sdzero_jax.train_step import TrainState


class Sum:
    """A step that adds the batch to the one parameter."""

    at = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    weight = jax.ShapeDtypeStruct((), jnp.float32, sharding=at)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=at), {"w": weight}, ())

    def __call__(self, state, batch):
        w = state.params["w"] + batch
        return state.replace(step=state.step + 1, params={"w": w}), {"loss": (w, jnp.float32(1.0))}

    def parameters(self, trained):
        return trained


class Numbers:
    """Hands out 1, 2, 3, ...; a signal comes while it draws number `cut`."""

    def __init__(self, cut=0):
        self.drawn, self.cut = 0, cut

    def next(self, params):
        if self.drawn + 1 == self.cut:
            raise Stopped(15, "sampling was cut short")
        self.drawn += 1
        return float(self.drawn), {}

    def get_state(self):
        return {"drawn": self.drawn}

    def set_state(self, state):
        self.drawn = state["drawn"]


def run(folder, source, hooks=Hooks(), given=None, every=2):
    start = lambda: TrainState(jnp.int32(0), {"w": jnp.float32(0.0)}, ())  # noqa: E731
    checkpointer = Checkpointer(folder / "checkpoints", CheckpointConfig(every))
    try:
        state = fit("toy", folder, start, Sum(), source, 5, checkpointer, every, {}, hooks, given=given)
    finally:
        checkpointer.close()
    return float(state.params["w"])


@pytest.mark.parametrize("cut", [1, 3, 4])
def test_a_signal_while_a_batch_is_sampled_saves_the_step_before(tmp_path, cut):
    with pytest.raises(Stopped, match=f"toy saved at step {cut - 1} of 5"):
        run(tmp_path, Numbers(cut))
    assert len(read_metrics(tmp_path / FILE_NAME)) == cut - 1
    assert (tmp_path / "checkpoints" / str(cut - 1)).exists() == (cut > 1), "an untrained state is not worth a save"
    again = Numbers()
    assert run(tmp_path, again) == 15.0 and again.drawn == 5
    assert [row["loss"] for row in read_metrics(tmp_path / FILE_NAME)] == [1, 3, 6, 10, 15]


def test_a_signal_in_a_validation_goes_back_to_the_last_save(tmp_path):
    """The step is done, but its figures are not: it is made again."""

    def cut(params, step):
        if step == 3:
            raise Stopped(15, "sampling was cut short")
        return {"accuracy": 1.0}

    with pytest.raises(Stopped, match="toy saved at step 2 of 5"):
        run(tmp_path, Numbers(), Hooks(validate=cut, validate_every=1))
    assert run(tmp_path, Numbers()) == 15.0
    assert [row["loss"] for row in read_metrics(tmp_path / FILE_NAME)] == [1, 3, 6, 10, 15]


def test_what_training_starts_from_is_freed_whether_it_was_read_or_not(tmp_path):
    """A state of full size must not stand beside the parameters that it was made of."""
    for stage in ("fresh", "resumed"):
        given = {"w": jnp.ones(3)}
        if stage == "fresh":
            with pytest.raises(Stopped):
                run(tmp_path, Numbers(cut=4), given=given)
        else:
            run(tmp_path, Numbers(), given=given)
        assert given["w"].is_deleted(), stage


def test_a_plateau_synchronises_after_as_many_validations_without_a_best():
    config = TeacherConfig(schedule="sync_on_plateau", patience=2)
    assert not sync_due(config, 10)
    assert not sync_due(config, 10, [0.5, 0.6, 0.7])
    assert not sync_due(config, 10, [0.5, 0.6, 0.55])
    assert sync_due(config, 10, [0.5, 0.6, 0.55, 0.6])
    assert not sync_due(config, 10, [0.5, 0.6, 0.55, 0.61])
    assert [step for step in range(1, 9) if sync_due(TeacherConfig("sync_every", sync_steps=4), step)] == [4, 8]


def drive_hooks(folder, monkeypatch, teacher):
    """after_step of a run whose keep rate is fine, as (step, figures) -> what it logs."""
    monkeypatch.setattr(training, "measure_keep_rate", lambda *_: 1.0)
    monkeypatch.setattr(training, "synchronise", lambda state: state)
    run = SimpleNamespace(
        problems=SimpleNamespace(questions=lambda *_: []), config=SimpleNamespace(health=HealthConfig())
    )
    step_fn = SimpleNamespace(parameters=lambda params: params)
    config = SimpleNamespace(teacher=teacher, validation_questions=0, validate_every=1)
    hooks = training.on_policy_hooks(run, "train", folder, config, find_method("sdzero"), 1, step_fn)
    return lambda step, figures: hooks.after_step(step, SimpleNamespace(params=None), figures)[1]


def test_a_resumed_plateau_counts_only_what_the_checkpoint_knows(tmp_path, monkeypatch):
    teacher = TeacherConfig(schedule="sync_on_plateau", patience=2)
    accuracies = [0.5, 0.6, 0.55, 0.6, 0.65, 0.7, 0.68, 0.7]
    whole = drive_hooks(tmp_path / "none", monkeypatch, teacher)
    wanted = [whole(step, {"validation_accuracy": value}) for step, value in enumerate(accuracies, 1)]
    assert [step for step, logged in enumerate(wanted, 1) if logged] == [4, 8]
    # Killed after step 6, whose checkpoint is that of step 3: the loop drops rows 4 to 6 after the hooks are made.
    with MetricWriter(tmp_path) as writer:
        for step, (value, logged) in enumerate(zip(accuracies[:6], wanted), 1):
            writer.write(step, {"validation_accuracy": value} | logged)
    resumed = drive_hooks(tmp_path, monkeypatch, teacher)
    MetricWriter(tmp_path, resume_step=3).close()
    assert [resumed(step, {"validation_accuracy": accuracies[step - 1]}) for step in range(4, 9)] == wanted[3:]
