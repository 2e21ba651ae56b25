"""Checkpoints: state, teacher, iterators and metadata of one step, saved together by Orbax.

Saves are asynchronous and atomic (Orbax writes a temporary folder and renames it). Restoring
takes the newest step whose bytes are the ones written, and says so when it had to go back.
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping
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
    """Saves and restores (state, iterator state, metadata) under `directory`/STEP."""

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
            restored, reason = None, None
            try:
                restored = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(abstract_state), record=ocp.args.JsonRestore()
                    ),
                )
            except (MemoryError, jax.errors.JaxRuntimeError):  # of the devices, or of a process that is gone
                raise
            except Exception as error:
                lines = str(error).strip().splitlines()
                reason = lines[0][:200] if lines else type(error).__name__
                # On a store it may be the store, and a checkpoint there could only be removed, not renamed.
                unread = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
                if unread or stores.is_url(self._directory):
                    raise Fault(
                        f"checkpoint {self._directory / str(step)} cannot be read ({reason}); try again, or remove it "
                        "to go on from the one before"
                    ) from error
            # All hosts take the same checkpoint: one that a single host cannot read is nobody's.
            reason = next(filter(None, hosts.gather(reason)), None)
            if reason is None:
                record = restored["record"]
                if fingerprint(restored["state"]) == record["fingerprint"]:
                    return step, restored["state"], record["iterator"], record["metadata"]
                reason = "its arrays are not those that were saved"
            self._set_aside(step, reason)
        return None

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def _set_aside(self, step: int, reason: str) -> None:
        say(f"checkpoint {self._directory / str(step)} is damaged ({reason}); going back to the one before")
        if hosts.is_first():
            damaged = self._directory / str(step)
            if stores.is_url(damaged):
                damaged.rmtree()  # a store cannot rename
            else:
                shutil.rmtree(f"{damaged}.damaged", ignore_errors=True)
                damaged.rename(f"{damaged}.damaged")
        hosts.barrier(f"set aside {step}")
        self._manager.reload()

    def wait(self) -> None:
        """Returns when every save has reached the disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def save_params(directory: pathlib.Path, params, metadata: Mapping) -> None:
    """Writes a stage's final parameters, atomically, with what they were trained to read."""
    checkpointer = Checkpointer(directory, CheckpointConfig(keep_latest=1))
    checkpointer.save(0, {"params": params}, {}, metadata)
    checkpointer.close()


def load_params(directory: pathlib.Path, abstract_params) -> tuple[Any, dict]:
    """Reads what `save_params` wrote; UserError when it is missing or damaged."""
    restored = None
    if stores.remote(directory).is_dir():
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
