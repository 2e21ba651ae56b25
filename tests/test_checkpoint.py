"""Checkpoints: exact round trips, what is kept, and falling back from damage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdzero_jax.checkpoint import CheckpointConfig, Checkpointer, abstract_like, fingerprint, load_params, save_params
from sdzero_jax.errors import Fault, UserError


def state(seed=0):
    key = jax.random.key(seed)
    return {
        "step": jnp.int32(seed),
        "params": {"w": jax.random.normal(key, (40, 30)), "half": jax.random.normal(key, (16,), jnp.bfloat16)},
    }


def saved(directory, steps, config=CheckpointConfig(), **metrics):
    checkpointer = Checkpointer(directory, config, best_metric="accuracy" if metrics else None)
    for step in steps:
        figures = {"accuracy": metrics["accuracy"][step]} if metrics else None
        checkpointer.save(step, state(step), {"position": step}, {"phrases": "p"}, figures)
    checkpointer.wait()
    return checkpointer


def test_round_trip_is_exact(tmp_path):
    checkpointer = saved(tmp_path, [3])
    step, restored, iterator, metadata = checkpointer.restore(abstract_like(state()))
    assert (step, iterator, metadata) == (3, {"position": 3}, {"phrases": "p"})
    jax.tree.map(np.testing.assert_array_equal, restored, state(3))
    assert restored["params"]["half"].dtype == jnp.bfloat16


def test_nothing_saved_restores_nothing(tmp_path):
    assert Checkpointer(tmp_path, CheckpointConfig()).restore(abstract_like(state())) is None


def test_the_latest_and_the_best_are_kept(tmp_path):
    accuracy = {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.2, 5: 0.25}
    saved(tmp_path, accuracy, CheckpointConfig(keep_latest=2, keep_best=1), accuracy=accuracy).close()
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == [2, 4, 5]


def largest_file(directory):
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def damage(directory, how):
    if how == "no record":
        next(directory.rglob("record/metadata")).unlink()
        return
    path = largest_file(directory)
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "flipped byte":
        data[len(data) // 2] ^= 0x10
    else:
        path.unlink()
        return
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("how", ["truncated", "flipped byte", "deleted", "no record"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path, how, capsys):
    saved(tmp_path, [1, 2]).close()
    damage(tmp_path / "2", how)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    step, restored, _, _ = checkpointer.restore(abstract_like(state()))
    assert step == 1
    jax.tree.map(np.testing.assert_array_equal, restored, state(1))
    assert "is damaged" in capsys.readouterr().err
    assert (tmp_path / "2.damaged").exists()
    checkpointer.save(2, state(2), {}, {})
    checkpointer.wait()
    assert checkpointer.latest_step() == 2


@pytest.mark.parametrize(
    "error, raised",
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), jax.errors.JaxRuntimeError),
        (MemoryError(), MemoryError),
        (OSError(24, "Too many open files"), Fault),
    ],
)
def test_what_is_no_fault_of_the_checkpoint_leaves_it_alone(tmp_path, error, raised, monkeypatch):
    saved(tmp_path, [1, 2]).close()
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())

    def fails(*_, **__):
        raise error

    with monkeypatch.context() as patch, pytest.raises(raised):
        patch.setattr(checkpointer, "_read", fails)
        checkpointer.restore(abstract_like(state()))
    assert not list(tmp_path.glob("*.damaged"))
    assert checkpointer.restore(abstract_like(state()))[0] == 2


@pytest.mark.parametrize("unread", [True, False])
def test_what_one_host_cannot_read_is_nobodys(tmp_path, unread, monkeypatch):
    """This host reads step 2, another one does not: it stops with that one, or goes back with it."""
    saved(tmp_path, [1, 2]).close()
    checkpointer, others = Checkpointer(tmp_path, CheckpointConfig()), iter([["Input/output error", unread]])
    monkeypatch.setattr("sdzero_jax.hosts.gather", lambda own: [own, next(others, [None, False])])
    if unread:
        with pytest.raises(Fault, match=r"2 cannot be read \(Input/output error\)"):
            checkpointer.restore(abstract_like(state()))
    else:
        assert checkpointer.restore(abstract_like(state()))[0] == 1
    assert (tmp_path / "2.damaged").exists() != unread


def test_a_host_that_cannot_read_a_checkpoint_tells_the_others_before_it_stops(tmp_path, monkeypatch):
    saved(tmp_path, [1]).close()
    checkpointer, told = Checkpointer(tmp_path, CheckpointConfig()), []

    def fails(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpointer, "_read", fails)
    monkeypatch.setattr("sdzero_jax.hosts.gather", lambda own: told.append(own) or [own])
    with pytest.raises(Fault):
        checkpointer.restore(abstract_like(state()))
    assert told == [["[Errno 5] Input/output error", True]]


def test_an_unfinished_save_is_not_seen(tmp_path):
    saved(tmp_path, [1]).close()
    (tmp_path / "2.orbax-checkpoint-tmp-123").mkdir()
    assert Checkpointer(tmp_path, CheckpointConfig()).restore(abstract_like(state()))[0] == 1


@pytest.mark.parametrize("leaf", ["w", "half"])
def test_the_fingerprint_notices_one_bit(leaf):
    tree = state()
    before = fingerprint(tree)
    width = tree["params"][leaf].dtype.itemsize * 8
    bits = jax.lax.bitcast_convert_type(tree["params"][leaf], f"uint{width}")
    flipped = bits.at[(0,) * bits.ndim].set(bits[(0,) * bits.ndim] ^ 1)
    tree["params"][leaf] = jax.lax.bitcast_convert_type(flipped, tree["params"][leaf].dtype)
    assert fingerprint(tree) != before
    assert fingerprint(state()) == before


def test_final_parameters_come_back_with_their_metadata(tmp_path):
    params = state()["params"]
    save_params(tmp_path / "params", params, {"phrases": {"wrong": "<wrong>"}})
    loaded, metadata = load_params(tmp_path / "params", abstract_like(params))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert metadata == {"phrases": {"wrong": "<wrong>"}}
    with pytest.raises(UserError, match="no readable parameters"):
        load_params(tmp_path / "none", abstract_like(params))
