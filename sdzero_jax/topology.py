"""Devices that are not attached: TPU slices by name, memory per chip, devices to compile for; GPUs by number and size.

libtpu's compiler works without a TPU, given a description of the slice. It wants its own process with
its settings in the environment before jax is imported: `run_for` starts one. Left out: what to compile.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from sdzero_jax.errors import UserError, nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Generation:
    """A TPU generation: memory per chip as the compiler counts it, its name in accelerator types."""

    memory: float  # bytes per chip
    accelerator: str
    cores: int  # per chip, in the accelerator type's count
    dimensions: int  # of a slice
    example: str


# Memory: of a chip's HBM (16, 95 and 32 GiB), what libtpu's compiler takes to be available.
GENERATIONS = {
    "v5e": Generation(15.75 * GIB, "v5litepod", 1, 2, "v5e:4x4"),
    "v5p": Generation(95 * GIB, "v5p", 2, 3, "v5p:2x2x4"),
    "v6e": Generation(31.25 * GIB, "v6e", 1, 2, "v6e:4x4"),
}
# As in libtpu's descriptions of slices. A v5e or v6e of 8 chips may also come as a single host.
CHIPS_PER_HOST = 4


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice such as v5p:2x2x4."""

    name: str
    generation: str
    chips: int

    @property
    def memory(self) -> float:
        """Bytes per chip."""
        return GENERATIONS[self.generation].memory

    @property
    def chips_per_host(self) -> int:
        return min(self.chips, CHIPS_PER_HOST)

    @property
    def accelerator_type(self) -> str:
        generation = GENERATIONS[self.generation]
        return f"{generation.accelerator}-{self.chips * generation.cores}"


def parse(name: str) -> Topology:
    """'v5p:2x2x4' -> Topology; UserError names the form and the nearest known generation."""
    generation, _, shape = name.partition(":")
    examples = ", ".join(known.example for known in GENERATIONS.values())
    if generation not in GENERATIONS:
        raise UserError(f"unknown TPU in topology {name!r}{nearest(generation, GENERATIONS)}, as in {examples}")
    want = GENERATIONS[generation].dimensions
    sides = [int(side) for side in shape.split("x")] if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) else []
    if len(sides) != want:
        raise UserError(f"topology {name!r} needs {want} sides, as in {GENERATIONS[generation].example}")
    if any(side > 2 and side % 4 for side in sides):
        near = "x".join(str(side if side <= 2 else max(1, round(side / 4)) * 4) for side in sides)
        raise UserError(f"topology {name!r}: sides are 1, 2 or multiples of 4; nearest: {generation}:{near}")
    chips = 1
    for side in sides:
        chips *= side
    return Topology(name, generation, chips)


def parse_gpus(name: str) -> tuple[int, float]:
    """'8x80' -> (number of GPUs, bytes of each); UserError names the form."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
    if not match:
        raise UserError(f"GPUs {name!r}; wanted their number and the GiB of each, such as 1x24 or 8x80")
    return int(match[1]), int(match[2]) * GIB


def libtpu_requirement() -> str:
    """The libtpu that the installed jax names, as a pip requirement."""
    for line in importlib.metadata.requires("jax") or ():
        if line.startswith("libtpu"):
            return line.partition(";")[0].strip()
    return "libtpu"


def libtpu_path() -> pathlib.Path | None:
    """libtpu.so from TPU_LIBRARY_PATH or the environment's own folder (`make tpu-compiler`); None if absent.

    A folder of its own, because a libtpu among the packages makes every start of jax look for a TPU.
    """
    given = os.environ.get("TPU_LIBRARY_PATH")
    path = pathlib.Path(given) if given else pathlib.Path(sys.prefix) / "libtpu" / "libtpu" / "libtpu.so"
    return path if path.exists() else None


def child_environment(topology: Topology) -> dict[str, str]:
    """Environment of a process that compiles for `topology`. UserError when libtpu is not there."""
    library = libtpu_path()
    if library is None:
        raise UserError(
            f"compiling for {topology.name} needs libtpu in a folder of its own: run `make tpu-compiler`, or set "
            "TPU_LIBRARY_PATH to a libtpu.so"
        )
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": topology.accelerator_type,
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_LIBRARY_PATH": str(library),
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def run_for(topology: Topology, arguments: Sequence[str], timeout: float | None = None) -> Any:
    """Runs `python ARGUMENTS` in a process that can compile for `topology`; its last line of output is JSON.

    Returns the decoded line. UserError carries the child's last line of errors, the compiler's own words
    when a program does not fit a chip.
    """
    child = subprocess.run(
        [sys.executable, *arguments],
        env=child_environment(topology),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=pathlib.Path(__file__).resolve().parents[1],
    )
    if child.returncode:
        words = (child.stderr.strip() or child.stdout.strip() or "no message").splitlines()
        raise UserError(f"compiling for {topology.name} failed: {words[-1][:400]}")
    return json.loads(child.stdout.strip().splitlines()[-1])


def devices(topology: Topology) -> list[Any]:
    """Descriptions of the slice's chips, for a mesh to compile on; only in a process of `run_for`."""
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(topology_name=topology.name, platform="tpu").devices)
