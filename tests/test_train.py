"""The training loop on a toy: what it does between two steps, on a signal, and with what it starts from."""

import jax
import jax.numpy as jnp
import pytest

from sdzero_jax.checkpoint import CheckpointConfig, Checkpointer
from sdzero_jax.errors import Stopped
from sdzero_jax.metrics import FILE_NAME, read_metrics
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
