"""Checkpoints: state, teacher, iterators and metadata of one step, saved together by Orbax.

Saves are asynchronous and atomic (Orbax writes a temporary folder and renames it; on an object store a file
that it writes last says that a checkpoint is whole). Restoring takes the newest step whose bytes are the ones
written, and says so when it had to go back.
"""

import contextlib
import dataclasses
import logging
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from sdzero_jax import hosts, stores
from sdzero_jax.errors import Fault, UserError
from sdzero_jax.progress import say


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every: Annotated[int, "steps between saves"] = 50
    keep_latest: Annotated[int, "newest checkpoints kept"] = 2
    keep_best: Annotated[int, "best checkpoints kept, by validation accuracy"] = 1


class Checkpointer:
    """Saves and restores (state, iterator state, metadata) under `directory`/STEP.

    Every call may raise Fault when `directory` lies on an object store that fails.
    """

    def __init__(self, directory: pathlib.Path, config: CheckpointConfig, best_metric: str | None = None):
        policies: list = [preservation_policy.LatestN(config.keep_latest)]
        if best_metric and config.keep_best:
            policies.append(
                preservation_policy.BestN(
                    get_metric_fn=lambda metrics: metrics[best_metric],
                    n=config.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._directory = stores.remote(directory)
        self._best_metric = best_metric
        with _faults_of_a_store(self._directory):
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                    enable_async_checkpointing=True,
                    create=True,
                ),
            )

    def save(self, step: int, state, iterator: Mapping, metadata: Mapping, metrics: Mapping | None = None) -> None:
        """Starts a save; a step already there is left alone."""
        if step in self._manager.all_steps():
            return
        record = {"fingerprint": fingerprint(state), "iterator": dict(iterator), "metadata": dict(metadata)}
        with _faults_of_a_store(self._directory):
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)),
                metrics=dict(metrics) if metrics else None,
                force=True,
            )

    def restore(self, abstract_state) -> tuple[int, Any, dict, dict] | None:
        """The newest whole checkpoint as (step, state, iterator, metadata); None when there is none.

        A checkpoint whose files do not parse or whose arrays changed since they were written is set
        aside (renamed to STEP.damaged; on an object store removed) with a line that says so, and the one
        before is taken. Fault when the disk or the store cannot be read: nothing is wrong with the checkpoint then.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            restored, reason, unread = None, None, False
            try:
                restored = self._read(step, abstract_state)
            except (MemoryError, jax.errors.JaxRuntimeError):  # of the devices, or of a process that is gone
                raise
            except Exception as error:
                reason = _first_line(error)
                # On a store it may be the store, and a checkpoint there could only be removed, not renamed.
                of_disk = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
                unread = of_disk or stores.is_url(self._directory)
            # All hosts take the same checkpoint, or stop together: one that a single host cannot read is nobody's.
            said = [outcome for outcome in hosts.gather([reason, unread]) if outcome[0] is not None]
            if faults := [why for why, fault in said if fault]:
                raise Fault(
                    f"checkpoint {self._directory / str(step)} cannot be read ({faults[0]}); try again, or remove it "
                    "to go on from the one before"
                )
            if not said:
                state, record = restored
                if fingerprint(state) == record["fingerprint"]:
                    return step, state, record["iterator"], record["metadata"]
                said = [["its arrays are not those that were saved", False]]
            self._set_aside(step, said[0][0])
        return None

    def _read(self, step: int, abstract_state) -> tuple[Any, dict]:
        """(state, record) of a step. Not by the manager: hosts wait for each other in it, one that fails for ever."""
        place = self._directory / str(step)
        state = ocp.StandardCheckpointHandler().restore(place / "state", args=ocp.args.StandardRestore(abstract_state))
        return state, ocp.JsonCheckpointHandler().restore(place / "record", args=ocp.args.JsonRestore())

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def _set_aside(self, step: int, reason: str) -> None:
        say(f"checkpoint {self._directory / str(step)} is damaged ({reason}); set aside")
        if hosts.is_first():
            damaged = self._directory / str(step)
            if stores.is_url(damaged):
                with _faults_of_a_store(damaged):
                    damaged.rmtree()  # a store cannot rename
            else:
                shutil.rmtree(f"{damaged}.damaged", ignore_errors=True)
                damaged.rename(f"{damaged}.damaged")
        hosts.barrier(f"set aside {step}")
        with _faults_of_a_store(self._directory):
            self._manager.reload()

    def wait(self) -> None:
        """Returns when every save has reached the disk."""
        with _faults_of_a_store(self._directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        with _faults_of_a_store(self._directory):
            self._manager.close()


@contextlib.contextmanager
def _faults_of_a_store(place: Any) -> Iterator[None]:
    """Turns what Orbax raises about an object store into a Fault; errors about a local place pass."""
    try:
        yield
    except (Fault, MemoryError, jax.errors.JaxRuntimeError):  # the latter of devices, or of a process that is gone
        raise
    except Exception as error:  # each store has errors of its own
        if not stores.is_url(place):
            raise
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax's other threads log the same, with tracebacks
        raise Fault(
            f"{place}: the store failed with a checkpoint ({_first_line(error)}); what was saved before is whole, "
            "and the same command goes on from there"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def save_params(directory: pathlib.Path, params, metadata: Mapping) -> None:
    """Writes a stage's final parameters, atomically, with what they were trained to read."""
    checkpointer = Checkpointer(directory, CheckpointConfig(keep_latest=1))
    checkpointer.save(0, {"params": params}, {}, metadata)
    checkpointer.close()


def load_params(directory: pathlib.Path, abstract_params) -> tuple[Any, dict]:
    """Reads what `save_params` wrote; UserError when it is missing or damaged, Fault as in `Checkpointer`."""
    restored, place = None, stores.remote(directory)
    with _faults_of_a_store(place):
        there = place.exists()  # is_dir() says no where a store refuses to answer
    if there:
        checkpointer = Checkpointer(directory, CheckpointConfig(keep_latest=1))
        restored = checkpointer.restore({"params": abstract_params})
        checkpointer.close()
    if restored is None:
        stage = directory.parent
        raise UserError(
            f"no readable parameters in {directory}; remove {stage / 'done.json'} and run again: "
            "the stage writes them anew from its last checkpoint"
        )
    return restored[1]["params"], restored[3]


def fingerprint(tree) -> str:
    """A sum of the raw bits of every leaf: cheap, on device, and any flipped bit changes it."""
    sums = [int(_bit_sum(leaf)) if isinstance(leaf, jax.Array | np.ndarray) else 0 for leaf in jax.tree.leaves(tree)]
    return "-".join(f"{value:08x}" for value in sums)


@jax.jit
def _bit_sum(leaf: jax.Array) -> jax.Array:
    width = leaf.dtype.itemsize * 8
    bits = (
        leaf
        if jnp.issubdtype(leaf.dtype, jnp.integer)
        else jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{width}"))
    )
    return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)


def abstract_like(state):
    """Shapes, dtypes and shardings of `state`, to restore into."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
