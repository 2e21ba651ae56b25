"""Device mesh, the one table from logical axis names to mesh axes, and host batch -> global array.

Three mesh axes: `data` (whole replicas), `fsdp` (parameters and optimizer state are cut along
it, and so is the batch) and `tensor` (heads, MLP and vocabulary are cut along it). Left out:
pipeline, expert and sequence parallelism.
"""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdzero_jax.errors import UserError, nearest

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. Parameters first, then activations.
RULES: Mapping[str, tuple[str, ...]] = {
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "norm": (),
    "batch": ("data", "fsdp"),
    "lookup_batch": ("data",),  # while the embedding's width holds fsdp
    "length": (),
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_mlp": ("tensor",),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices stand along each mesh axis; one of them may be -1 and takes what is left."""

    data: Annotated[int, "whole replicas of the model; -1 takes the devices that are left"] = 1
    fsdp: Annotated[int, "parts that parameters and batch are cut into; -1 takes what is left"] = -1
    tensor: Annotated[int, "parts that heads, MLP and vocabulary are cut into; -1 takes what is left"] = 1


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """Returns (data, fsdp, tensor) for this many devices; UserError names the nearest shape that fits."""
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    written = " x ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    if any(size != -1 and size < 1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"mesh {written}: every axis must be at least 1, and at most one may be -1")
    fixed = math.prod(size for size in sizes if size != -1)
    shape = tuple(num_devices // fixed if size == -1 else size for size in sizes)
    if math.prod(shape) != num_devices:
        fit = _nearest_shape(sizes, num_devices)
        offer = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, fit, strict=True))
        raise UserError(f"mesh {written} does not fit {num_devices} devices; the nearest that fits: {offer}")
    return shape


def mesh_preset(num_devices: int) -> MeshConfig:
    """The mesh to begin with, for both families at long rows: 1, 4, 8, 16 -> all fsdp; 64 -> data 4 x fsdp 16.

    Up to 16 devices the state (some 18 bytes per parameter) is what is large, so all of them share it.
    Beyond, a 16th of it is small, and weights gathered within 16 devices only travel less; the rest are
    whole replicas. `tensor` stays 1: with long rows, exchanging activations twice a layer costs more than
    gathering weights. It is what is left to turn where not even one row fits a device.
    """
    fsdp = next((n for n in range(16, num_devices) if num_devices % n == 0), num_devices)
    return MeshConfig(num_devices // fsdp, fsdp, 1)


def refit(config: MeshConfig, num_devices: int) -> MeshConfig:
    """`config` where it fits this many devices, else the preset for them."""
    try:
        return MeshConfig(*mesh_shape(config, num_devices))
    except UserError:
        return mesh_preset(num_devices)


def _nearest_shape(sizes: Sequence[int], num_devices: int) -> tuple[int, int, int]:
    """The factorisation of num_devices whose axes differ least (in log size) from those asked for."""
    divisors = [d for d in range(1, num_devices + 1) if num_devices % d == 0]
    pairs = [(d, f) for d in divisors for f in divisors if num_devices % (d * f) == 0]
    shapes = [(d, f, num_devices // (d * f)) for d, f in pairs]

    def distance(shape: tuple[int, int, int]) -> float:
        pairs = zip(shape, sizes, strict=True)
        return sum(abs(math.log(have / want)) for have, want in pairs if want != -1)

    return min(shapes, key=distance)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh with axes (data, fsdp, tensor) over `devices` (default: all). UserError when it does not fit."""
    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(config, len(devices))
    return jax.make_mesh(shape, MESH_AXES, devices=devices, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def rollout_shape(shape: Sequence[int], kv_heads: int) -> tuple[int, int, int]:
    """Mesh shape for sampling on the devices of a training mesh: no fsdp, whose weights would travel at every step.

    Weights and cache are cut along `tensor` in as many parts as divide the KV heads; the rest are replicas
    with rows of their own.
    """
    data, fsdp, tensor = shape
    parts = math.gcd(fsdp * tensor, kv_heads)
    return data * fsdp * tensor // parts, 1, parts


def rollout_mesh(mesh: Mesh, kv_heads: int) -> Mesh:
    """The devices of a training mesh as `rollout_shape` says."""
    return _reshaped(mesh, mesh.devices, rollout_shape(mesh.devices.shape, kv_heads))


def host_mesh(mesh: Mesh) -> Mesh:
    """This process's devices of a mesh, all along `fsdp`; the mesh itself when there is one process."""
    own = hosts_of(mesh)
    if len(own) == 1:
        return mesh
    devices = own[jax.process_index()]
    return _reshaped(mesh, devices, (1, len(devices), 1))


def hosts_of(mesh: Mesh) -> np.ndarray:
    """The devices of a mesh by process, [hosts, devices of each]."""
    flat = list(mesh.devices.flat)
    numbers = sorted({device.process_index for device in flat})
    return np.array([[device for device in flat if device.process_index == number] for number in numbers])


def _reshaped(mesh: Mesh, devices: np.ndarray, shape: Sequence[int]) -> Mesh:
    return Mesh(devices.reshape(shape), mesh.axis_names, axis_types=mesh.axis_types)


def move(tree: Any, places: Any) -> Any:
    """Puts arrays where `places` (NamedShardings) says.

    From a mesh of several processes to the devices of this one, every process gets the whole of each array;
    then all of them have to call.
    """
    source = jax.tree.leaves(tree)[0].sharding
    if source.is_fully_addressable:
        return jax.device_put(tree, places)
    everyone = hosts_of(source.mesh)

    def to_own(leaf: jax.Array, place: NamedSharding) -> jax.Array:
        local = place.mesh
        grid = Mesh(everyone.reshape(-1, *local.devices.shape), ("host", *local.axis_names))
        copies = jax.device_put(leaf, NamedSharding(grid, place.spec))
        shards = [shard.data for shard in copies.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, place, shards)

    return jax.tree.map(to_own, tree, places)


def fetch(tree: Any) -> Any:
    """Arrays on a mesh as numpy arrays, whole on every host; with several hosts all of them have to call."""
    if all(leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def spec_for(
    axes: Sequence[str | None],
    sizes: Mapping[str, int],
    shape: Sequence[int] | None = None,
    rules: Mapping[str, tuple[str, ...]] = RULES,
) -> P:
    """PartitionSpec of an array with these logical axes on mesh axes of these sizes.

    With `shape`, a dimension that the mesh axes do not divide stays whole (few KV heads, toy
    vocabularies). Raises UserError for an unknown logical axis and ValueError when two
    dimensions claim one mesh axis.
    """
    entries, taken = [], set()
    for position, axis in enumerate(axes):
        if axis is not None and axis not in rules:
            raise UserError(f"unknown logical axis {axis!r}{nearest(axis, rules)}")
        names = tuple(name for name in rules[axis] if name in sizes) if axis is not None else ()
        if shape is not None and names and shape[position] % math.prod(sizes[name] for name in names):
            names = ()
        if taken.intersection(names):
            raise ValueError(f"logical axes {tuple(axes)} put two dimensions on one mesh axis of {names}")
        taken.update(names)
        entries.append(names if len(names) > 1 else names[0] if names else None)
    return P(*entries)


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple) and all(axis is None or isinstance(axis, str) for axis in node)


def shardings_for(mesh: Mesh, axes_tree: Any, shapes_tree: Any = None) -> Any:
    """Tree of NamedSharding for a tree of logical axis tuples.

    `shapes_tree` (arrays or ShapeDtypeStructs, same structure) lets a dimension that does not
    divide stay whole; without it every named dimension must divide.
    """
    sizes = dict(mesh.shape)

    def place(axes: Sequence[str | None], leaf: Any = None) -> NamedSharding:
        return NamedSharding(mesh, spec_for(axes, sizes, None if leaf is None else leaf.shape))

    trees = (axes_tree,) if shapes_tree is None else (axes_tree, shapes_tree)
    return jax.tree.map(place, *trees, is_leaf=_is_axes)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks the compiler to keep x cut as these logical axes say; x itself when no mesh is set.

    The mesh is the one of `jax.set_mesh`. Axes that an enclosing shard_map holds by hand and
    dimensions that do not divide are left alone.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    }
    if not sizes:
        return x
    return jax.lax.with_sharding_constraint(x, spec_for(axes, sizes, x.shape))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose leading axis is the batch: cut over (data, fsdp)."""
    return NamedSharding(mesh, P(RULES["batch"]))


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """Tree of numpy arrays [B, ...] -> global arrays, the leading axis cut over (data, fsdp).

    In a run on several hosts all of them pass the whole batch, and each places its devices' rows.
    UserError when the rows do not divide over the devices.
    """
    sharding = batch_sharding(mesh)
    parts = math.prod(mesh.shape[axis] for axis in RULES["batch"])

    def put(leaf: np.ndarray) -> jax.Array:
        leaf = np.asarray(leaf)
        if leaf.ndim and leaf.shape[0] % parts:
            fit = max(parts, round(leaf.shape[0] / parts) * parts)
            raise UserError(
                f"a batch of {leaf.shape[0]} rows does not divide over data x fsdp = {parts}; nearest: {fit}"
            )
        place = sharding if leaf.ndim else replicated(mesh)
        if place.is_fully_addressable:
            return jax.device_put(leaf, place)
        return jax.make_array_from_callback(leaf.shape, place, lambda index: leaf[index])

    return jax.tree.map(put, batch)


def use(mesh: Mesh | None):
    """Context in which the mesh is the one that `constrain` and the operators see; no-op for None."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def batch_devices(mesh: Mesh) -> int:
    """Number of parts that a batch is cut into."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])
