"""`python run.py doctor`: versions, devices, memory and what would run where, before anything is compiled."""

import importlib.metadata
import os
import platform
import shutil
from typing import Any

import jax
import numpy as np

from sdzero_jax import sharding
from sdzero_jax.config import Config
from sdzero_jax.models import LanguageModel

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "safetensors",
    "tensorflow-datasets", "pydantic", "numpy",
)  # fmt: skip
GIB = 2**30


def examine(config: Config) -> list[str]:
    """Lines to print. Raises UserError when the config's mesh does not fit the devices."""
    devices = jax.devices()
    mesh = sharding.make_mesh(config.mesh)
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    lines = [
        f"python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"{_host_memory():.1f} GiB of memory",
        "packages  " + ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
        f"devices   {len(devices)} x {devices[0].device_kind} ({devices[0].platform}), "
        f"process {jax.process_index() + 1} of {jax.process_count()}{_device_memory(devices[0])}",
        f"disk      {shutil.disk_usage('.').free / GIB:.0f} GiB free here",
        f"mesh      {sizes}",
        "",
        f"config {config.name}: {config.model.num_layers} layers, width {config.model.hidden_size}, "
        f"vocabulary {config.model.vocab_size}",
    ]
    return lines + [f"  {name:<26}{size / 2**20:>10.1f} MiB per device" for name, size in memory(config, mesh).items()]


def memory(config: Config, mesh) -> dict[str, float]:
    """Bytes per device of what lives through a distillation step; activations are not counted."""
    model = LanguageModel(config.model)
    shapes = model.param_shapes()
    places = sharding.shardings_for(mesh, model.param_axes(), shapes)
    params = sum(
        np.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, place in zip(jax.tree.leaves(shapes), jax.tree.leaves(places))
    )
    parts = sharding.batch_devices(mesh)
    cache = jax.eval_shape(lambda: model.init_cache(1, config.model.max_position))
    row = sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    parts_of = {
        "parameters": params,
        "optimizer moments": 2 * params,
        "gradients": params,
        "teacher": 0.0 if config.distill.teacher.schedule == "live" else params,
        "KV cache (all slots, full)": row * config.sampler.slots / parts,
    }
    return parts_of | {"total": sum(parts_of.values())}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _host_memory() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    except (ValueError, OSError):
        return float("nan")


def _device_memory(device: Any) -> str:
    stats = device.memory_stats() if hasattr(device, "memory_stats") else None
    limit = (stats or {}).get("bytes_limit")
    return f", {limit / GIB:.1f} GiB each" if limit else ""
