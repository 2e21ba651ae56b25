"""Several processes as one run: who is first, shares of work, values that all must agree on.

Every process runs the same program; devices of all of them form one mesh. What is sampled and verified
is shared out and gathered again, so that all hosts go on with equal data; files are the first host's. With
one process every function here is free. The functions that gather must be called by all hosts, in one order.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from sdzero_jax.errors import Fault, UserError, causes

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """How the processes of a run find each other; Cloud TPU, Slurm, Open MPI and Kubernetes may need nothing here."""

    coordinator: Annotated[str, "address:port of the first process; empty: found by jax, or a single process"] = ""
    count: Annotated[int, "number of processes; 0: found by jax"] = 0
    index: Annotated[int, "number of this process, from 0; -1: found by jax"] = -1


# What says how many processes were started: srun and mpirun set these, a batch script alone has them not.
_CLUSTERS = {"Slurm": "SLURM_STEP_NUM_TASKS", "Open MPI": "OMPI_COMM_WORLD_SIZE"}


def initialize(config: HostsConfig) -> None:
    """Joins the processes of the run, before anything else uses a device; no-op for a single process.

    On TPU hosts jax asks the machine for the others. UserError when the settings are incomplete or the
    others do not come.
    """
    import jax

    given = (bool(config.coordinator), config.count > 0, config.index >= 0)
    if any(given) and not all(given):
        raise UserError(
            f"hosts.coordinator={config.coordinator!r}, hosts.count={config.count}, hosts.index={config.index}: "
            "set all three, or none where jax finds them by itself"
        )
    host, _, port = config.coordinator.rpartition(":")
    if config.coordinator and not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(
            f"hosts.coordinator={config.coordinator!r}; wanted ADDRESS:PORT of the first process, such as "
            f"{config.coordinator.partition(':')[0] or 'localhost'}:8476"
        )
    if all(given) and config.index >= config.count:
        raise UserError(f"hosts.index={config.index} of hosts.count={config.count}; wanted 0 to {config.count - 1}")
    found = [name for name, variable in _CLUSTERS.items() if int(os.environ.get(variable) or 1) > 1]
    found += ["Cloud TPU"] if _on_tpu() else []
    found += ["Kubernetes"] if _in_indexed_job(os.environ) else []
    if not (any(given) or found) or jax.distributed.is_initialized():
        return
    where: dict[str, Any] = {}
    if gpus := _gpus_of_the_only_process(os.environ):
        where["local_device_ids"] = gpus
    if all(given):
        where |= {"coordinator_address": config.coordinator, "num_processes": config.count, "process_id": config.index}
    try:
        jax.distributed.initialize(**where)
    except Exception as error:  # jax asks the cluster, by packages with errors of their own
        asked = f"hosts.coordinator={config.coordinator}" if all(given) else found[0]
        alone = "hosts.coordinator=localhost:8476 hosts.count=1 hosts.index=0"
        hint = "" if all(given) else f"; to run this process alone: {alone}"
        raise UserError(f"the processes of this run ({asked}) did not find each other: {error}{hint}") from None


def _gpus_of_the_only_process(environ: Mapping[str, str]) -> list[int]:
    """All GPUs of this host where Slurm or Open MPI started one process on it, else none.

    jax takes it that these start a process per GPU, and would give the only one the first GPU alone.
    """
    of_slurm = re.fullmatch(r"1(\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if not (of_slurm or environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1") or "JAX_LOCAL_DEVICE_IDS" in environ:
        return []
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(range(len(list(pathlib.Path("/dev").glob("nvidia[0-9]*")))))
    return list(range(len([name for name in visible.split(",") if name])))


def _place() -> tuple[int, int]:
    """(number of this process, of how many). Asks no jax that is not there yet: workers that grade load none."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return 0, 1
    return jax.process_index(), jax.process_count()


def _on_tpu() -> bool:
    """Whether this machine has TPU chips that jax may use."""
    chips = [*pathlib.Path("/dev").glob("accel[0-9]*"), *pathlib.Path("/dev/vfio").glob("[0-9]*")]
    allowed = os.environ.get("JAX_PLATFORMS", "")
    return bool(chips) and ("tpu" in allowed if allowed else importlib.util.find_spec("libtpu") is not None)


def _in_indexed_job(environ: Mapping[str, str]) -> bool:
    """Whether this is a pod of an indexed Job, and the package is there by which jax asks Kubernetes for the others."""
    named = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= set(environ)
    return named and importlib.util.find_spec("kubernetes") is not None


def count() -> int:
    """Number of processes."""
    return _place()[1]


def is_first() -> bool:
    """Whether this process writes the run's files."""
    return _place()[0] == 0


def share(items: Sequence[T]) -> list[T]:
    """This host's part of the items: every n-th of them."""
    index, total = _place()
    return list(items[index::total])


def gather(value: Any) -> list[Any]:
    """The JSON value of every host, in the order of the hosts."""
    if count() == 1:
        return [value]
    import numpy as np
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size)).ravel()
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)  # few lengths: each is a program
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


def from_first(read: Callable[[], T]) -> T:
    """What `read` returns on the first host, a JSON value, on all of them; its errors too."""
    if count() == 1:
        return read()
    outcome = {}
    if is_first():
        try:
            outcome = {"value": read()}
        except Exception as error:  # the others wait for an answer
            gather({"error": str(error), "of_user": isinstance(error, UserError)})
            raise
    outcome = gather(outcome)[0]
    if "error" in outcome:
        raise (UserError if outcome["of_user"] else Fault)(outcome["error"])
    return outcome["value"]


def barrier(name: str) -> None:
    """Returns when all hosts have come here."""
    if count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


# What gloo, jax's coordination service and NCCL say of a process that is not there any more.
_LOST = ("closed by peer", "reset by peer", "heartbeat", "remote process")


def lost(error: BaseException) -> bool:
    """Whether an error of jax says that another process of the run is gone."""
    if count() == 1:
        return False
    import jax

    return any(isinstance(e, jax.errors.JaxRuntimeError) and any(s in str(e) for s in _LOST) for e in causes(error))


def leave(status: int) -> int:
    """The exit status; with several processes this one ends here, as the others would wait for it in vain.

    Ending as usual waits for all processes to do so, and those may be waiting for what this one sends. Not at
    once: they may be about to say the same, and end when the first process does.
    """
    if count() > 1:
        time.sleep(1.0)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def show(text: str) -> None:
    """Prints a result, on the first host."""
    if is_first():
        print(text)
