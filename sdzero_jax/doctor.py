"""`python run.py doctor`: versions, devices, and whether a run fits their memory, before anything runs.

The devices may be those of a TPU slice or GPUs that are not attached. The numbers are `memory`'s.
"""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Sequence
from typing import Any

import jax

from sdzero_jax import memory, sharding, topology
from sdzero_jax.config import Config
from sdzero_jax.errors import UserError

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "safetensors",
    "tensorflow-datasets", "pydantic", "numpy",
)  # fmt: skip
GIB = 2**30
NAMES = {"srt": "SRT (phase 1)", "distill": "distillation (phase 2)"}

# Of a GPU's memory, what jax can be told to take; by default it takes three quarters.
GPU_SHARE = 0.92


def examine(
    config: Config,
    path: str,
    overrides: Sequence[str] = (),
    slice_name: str | None = None,
    compile_it: bool = False,
    gpus: str | None = None,
) -> list[str]:
    """Lines to print. UserError when the config's mesh does not fit, or the slice or its compiler is not there.

    Args:
      path, overrides: where `config` came from, for the process that compiles for a slice.
      slice_name: such as v5p:2x2x4; the mesh is refitted to its chips, the batches to a row per part.
      compile_it: compile both train steps and compare; not with `gpus`.
      gpus: such as 1x24, number and GiB of each, in place of a slice.
    """
    if gpus and (slice_name or compile_it):
        raise UserError("GPUs that are not attached are estimated only; leave out --topology and --compile")
    slice_ = topology.parse(slice_name) if slice_name else None
    if slice_:
        devices, limit, where = slice_.chips, slice_.memory, f"{slice_.chips} chips of {slice_name}"
        per_host = slice_.chips_per_host
        if compile_it:
            topology.child_environment(slice_)  # refused here, before anything is estimated
    elif gpus:
        devices, size = topology.parse_gpus(gpus)
        limit, per_host = GPU_SHARE * size, devices
        where = f"{devices} GPUs of {size / GIB:g} GiB, with XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_SHARE}"
    else:
        devices, limit, where = len(jax.devices()), device_memory(jax.devices()), "these devices"
        per_host = jax.local_device_count()
    config = memory.fit_to(config, devices) if slice_ or gpus else config
    mesh = memory.abstract_mesh(config.mesh, devices)
    lines = [*_machine(), "", *_shape(config, mesh, where)]
    estimate = memory.estimate(config, mesh, per_host)
    lines += table(estimate)
    lines.append(_verdict(config, mesh, estimate, limit, per_host))
    slots = config.sampler.slots
    fitting = memory.slots_that_fit(config, mesh, limit, per_host)
    lines.append(f"  sampler: {slots} slots are set; up to {fitting} would fit beside the state of distillation")
    if compile_it:
        lines += [_comparison(config, stage, getattr(estimate, stage), path, overrides, slice_) for stage in NAMES]
    return lines


def table(estimate: memory.Estimate) -> list[str]:
    """One line per part in GiB: each stage's state, then its phases with their own parts; the largest is marked."""
    lines = ["", "GiB per device"]
    for name, title in NAMES.items():
        stage = getattr(estimate, name)
        lines.append(_line(f"{title}, at its peak", stage.peak))
        lines += [_line(f"  {part}", size) for part, size in stage.state.items() if size]
        for phase, parts in stage.phases.items():
            largest = (name, phase) == (estimate.peak_stage, stage.peak_phase)
            lines.append(_line(f"  + {phase}", sum(parts.values()), "   <- the largest" if largest else ""))
            lines += [_line(f"      {part}", size) for part, size in parts.items() if size]
    return lines


def device_memory(devices: Sequence[Any]) -> float:
    """Bytes per device: what the device says, else this machine's memory shared among its devices."""
    stats = devices[0].memory_stats() if hasattr(devices[0], "memory_stats") else None
    limit = (stats or {}).get("bytes_limit")
    return float(limit) if limit else _host_memory() / max(jax.local_device_count(), 1)


def _line(name: str, size: float, mark: str = "") -> str:
    return f"  {name:<44}{size / GIB:>9.3f}{mark}"


def _machine() -> list[str]:
    devices = jax.devices()
    return [
        f"python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"{_host_memory() / GIB:.1f} GiB of memory",
        "packages  " + ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
        f"devices   {len(devices)} x {devices[0].device_kind} ({devices[0].platform}), "
        f"process {jax.process_index() + 1} of {jax.process_count()}, {device_memory(devices) / GIB:.1f} GiB each",
        f"disk      {shutil.disk_usage('.').free / GIB:.0f} GiB free here",
    ]


def _shape(config: Config, mesh, where: str) -> list[str]:
    model, layout, parts = config.model, config.distill.layout, sharding.batch_devices(mesh)
    srt, student, teacher = memory.lengths(config)
    batches = {
        "srt": f"{srt} tokens",
        "distill": f"{layout.max_response} response tokens, {student} of the student, {teacher} of the teacher",
    }
    return [
        f"config {config.name}: {model.num_layers} layers, width {model.hidden_size}, vocabulary {model.vocab_size}, "
        f"remat {model.remat}",
        f"mesh      {', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())} on {where}",
        *(
            f"batch     {NAMES[stage]}: {rows} rows, {rows / parts:g} per part, in "
            f"{getattr(config, stage).microbatches} microbatches; {lengths}"
            for stage, lengths in batches.items()
            for rows in [memory.rows_of(config, stage)]
        ),
    ]


def _verdict(config: Config, mesh, estimate: memory.Estimate, limit: float, per_host: int) -> str:
    total = f"  {'total, of the larger phase':<44}{estimate.peak / GIB:>9.3f} of {limit / GIB:.2f}"
    if estimate.peak <= limit:
        return f"{total}: fits"
    return f"{total}: does not fit; {memory.suggest(config, tuple(mesh.shape.values()), limit, per_host)}"


def _comparison(
    config: Config,
    name: str,
    stage: memory.Stage,
    path: str,
    overrides: Sequence[str],
    slice_: topology.Topology | None,
) -> str:
    """One line: the compiler's count of a stage's train step beside the estimate, or why there is none."""
    title, estimated = f"{NAMES[name].partition(' (')[0]}'s train step", f"estimated {stage.train_step / GIB:.3f}"
    try:
        if slice_:
            counted = memory.count_for(slice_, path, overrides, name)
        else:
            step = memory.train_step(config, sharding.make_mesh(config.mesh), name)
            counted = memory.count(step, memory.batch_of(config, name))
    except UserError as error:
        return f"  {title}: {error}; {estimated}"
    parts = ", ".join(f"{part} {size / GIB:.3f}" for part, size in counted.items() if part != "peak")
    off = stage.train_step / counted["peak"] - 1
    return f"  {f'{title}, by the compiler':<44}{counted['peak'] / GIB:>9.3f} ({parts}); {estimated}, {off:+.1%}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _host_memory() -> float:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError):
        return float("nan")
