"""Hugging Face checkpoints <-> parameters, by a table, one tensor at a time, without torch.

A checkpoint is a folder with config.json and safetensors files, with or without an index file.
Every leaf is assembled shard by shard straight into its place on the mesh; neither direction
holds a second copy of the model. Left out: where the folder comes from (hub.py), and quantised weights.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sdzero_jax.errors import UserError, nearest
from sdzero_jax.files import check_writable
from sdzero_jax.models import hub
from sdzero_jax.models.decoder import LanguageModel
from sdzero_jax.models.families import FAMILIES, family, from_config, to_hf_config
from sdzero_jax.sharding import MESH_AXES, shardings_for

_INDEX_FILE = "model.safetensors.index.json"
_FILE_BYTES = 4 << 30
_EXPORT_FILE = "sdzero_export.json"  # marks a folder as written here, so that it may be replaced
_DTYPES = ("float32", "bfloat16", "float16")
_FLOATS = ("F64", "F32", "BF16", "F16")
_ALIGNMENT = 64  # bytes; a CPU device takes a host array so aligned as it is, without a copy
_TILE = 256  # rows and columns; a transposed copy in tiles stays in the cache
_ROPE_BUFFER = "rotary_emb.inv_freq"


# ------------------------------------------------------------------------------------------ table


class Entry(NamedTuple):
    """One HF tensor and where it lies in our tree."""

    name: str  # HF tensor name
    path: tuple[str, ...]  # leaf of the parameter tree
    group: int | None  # index on the leaf's leading axis; None when the leaf is not stacked
    shape: tuple[int, ...]  # of the part of the leaf
    in_axes: int  # 0: same order; n: a matrix [out, in] whose `in` is the leaf's first n axes

    @property
    def hf_shape(self) -> tuple[int, ...]:
        if self.in_axes:
            return math.prod(self.shape[self.in_axes :]), math.prod(self.shape[: self.in_axes])
        vector = self.path[-1] not in ("embedding", "unembedding")
        return (math.prod(self.shape),) if vector else self.shape

    def hf_index(self, index: tuple[slice, ...]) -> tuple[slice, ...] | None:
        """The block of the HF tensor that is the block `index` of the part; None when that is no block."""
        if self.in_axes:
            axes = (range(self.in_axes, len(self.shape)), range(self.in_axes))
        elif len(self.hf_shape) == 1:
            axes = (range(len(self.shape)),)
        else:
            axes = tuple((axis,) for axis in range(len(self.shape)))
        block = []
        for first, *rest in axes:
            if any(index[axis].indices(self.shape[axis]) != (0, self.shape[axis], 1) for axis in rest):
                return None
            start, stop, _ = index[first].indices(self.shape[first])
            inner = math.prod(self.shape[axis] for axis in rest)
            block.append(slice(start * inner, stop * inner))
        return tuple(block)

    def read(self, tensor: Any, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Copies the block `index` of the part from its HF tensor (sliced lazily) into `out`, in out's dtype."""
        hf_index = self.hf_index(index)
        block = tensor[hf_index or ...]
        if hf_index is None:
            out[...] = (block.T if self.in_axes else block).reshape(self.shape)[index]
        elif not self.in_axes:
            out[...] = block.reshape(out.shape)
        else:
            matrix = out.reshape(block.shape[::-1])  # a view: `out` is contiguous
            for i in range(0, matrix.shape[0], _TILE):
                for j in range(0, matrix.shape[1], _TILE):
                    matrix[i : i + _TILE, j : j + _TILE] = block[j : j + _TILE, i : i + _TILE].T

    def to_hf(self, part: np.ndarray) -> np.ndarray:
        flat = part.reshape(self.hf_shape[::-1] if self.in_axes else self.hf_shape)
        return np.ascontiguousarray(flat.T if self.in_axes else flat)


# Leaf inside a block -> (HF tensor inside model.layers.N, in_axes).
_LAYER_NAMES = {
    ("attention", "query"): ("self_attn.q_proj.weight", 1),
    ("attention", "key"): ("self_attn.k_proj.weight", 1),
    ("attention", "value"): ("self_attn.v_proj.weight", 1),
    ("attention", "out"): ("self_attn.o_proj.weight", 2),
    ("attention", "query_bias"): ("self_attn.q_proj.bias", 0),
    ("attention", "key_bias"): ("self_attn.k_proj.bias", 0),
    ("attention", "value_bias"): ("self_attn.v_proj.bias", 0),
    ("attention", "out_bias"): ("self_attn.o_proj.bias", 0),
    ("attention", "query_norm"): ("self_attn.q_norm.weight", 0),
    ("attention", "key_norm"): ("self_attn.k_norm.weight", 0),
    ("mlp", "gate"): ("mlp.gate_proj.weight", 1),
    ("mlp", "up"): ("mlp.up_proj.weight", 1),
    ("mlp", "down"): ("mlp.down_proj.weight", 1),
}
_TOP_NAMES = {
    ("embedding",): "model.embed_tokens.weight",
    ("final_norm",): "model.norm.weight",
    ("unembedding",): "lm_head.weight",
}


def conversion_table(model: LanguageModel) -> list[Entry]:
    """Every HF tensor of a model, in layer order."""
    norms = {(ours,): (theirs, 0) for ours, theirs in FAMILIES[family(model.config)].NORM_NAMES.items()}
    layer_names = {**_LAYER_NAMES, **norms}
    period = len(model.config.layer_pattern)
    top, layers = [], []
    for path, leaf in _leaves(model.param_shapes()):
        if path[0] != "layers":
            top.append(Entry(_TOP_NAMES[path], path, None, leaf.shape, 0))
            continue
        place, (name, in_axes) = int(path[1].removeprefix("block_")), layer_names[path[2:]]
        for group in range(model.config.num_groups):
            full_name = f"model.layers.{group * period + place}.{name}"
            layers.append((group * period + place, Entry(full_name, path, group, leaf.shape[1:], in_axes)))
    return top + [entry for _, entry in sorted(layers, key=lambda pair: pair[0])]


def _leaves(tree: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield tuple(str(key.key) for key in path), leaf


# ------------------------------------------------------------------------------------------- load


def load_pretrained(
    path: str | os.PathLike, *, mesh: Mesh | None = None, dtype: Any = "float32", **dials: Any
) -> tuple[LanguageModel, dict[str, Any]]:
    """Reads a Hugging Face model: (model, params), params in `dtype` (None: as stored).

    `path` is a folder, a remote folder (gs://...) or a hub id (org/name@revision), see hub.resolve.
    With a mesh, parameters are built directly in their shards: the host holds one shard of one
    leaf at a time beside what its own devices hold. `dials` set DecoderConfig fields
    (compute_dtype, remat, ...). UserError, in one line, for whatever cannot be read, with every
    unmapped, doubled, missing and misshapen tensor at once.
    """
    dtype = None if dtype is None else float_dtype(dtype)
    _check_mesh(mesh)
    folder = hub.resolve(path).folder
    model = _model_of(folder, dials)
    shapes = model.param_shapes()
    shardings = None if mesh is None else dict(_leaves(shardings_for(mesh, model.param_axes(), shapes)))
    by_path: dict[tuple[str, ...], list[Entry]] = {}
    for entry in conversion_table(model):
        by_path.setdefault(entry.path, []).append(entry)
    stored = _list_tensors(folder)
    _check(conversion_table(model), stored, model, folder)
    params = {}
    for leaf_path, leaf in _leaves(shapes):
        entries = by_path[leaf_path]
        kind = dtype or functools.reduce(jnp.promote_types, {stored[entry.name].dtype for entry in entries})
        with _slices(stored, entries) as slices:
            read = functools.partial(_read_block, entries, slices, leaf.shape, kind)
            _insert(params, leaf_path, _place(read, leaf.shape, shardings and shardings[leaf_path]))
    return model, params


def read_model(path: str | os.PathLike, **dials: Any) -> LanguageModel:
    """The model that a path's config.json describes; no weights are read. Arguments and errors as `load_pretrained`."""
    return _model_of(hub.resolve(path, weights=False).folder, dials)


def float_dtype(dtype: Any) -> np.dtype:
    """The dtype that a name or dtype means; UserError unless parameters may have it."""
    try:
        named = jnp.dtype(dtype)
    except TypeError:
        named = None
    if named is None or named.name not in _DTYPES:
        name = dtype if isinstance(dtype, str) else getattr(named, "name", repr(dtype))
        raise UserError(f"dtype {name!r} is not one for parameters{nearest(str(name), _DTYPES)}")
    return named


def _check_mesh(mesh: Any) -> None:
    if mesh is None:
        return
    if not isinstance(mesh, Mesh):
        raise UserError(f"mesh is a {type(mesh).__name__}; wanted a jax.sharding.Mesh, as sharding.make_mesh gives")
    for axis in mesh.axis_names:
        if axis not in MESH_AXES:
            raise UserError(f"mesh axis {axis!r} is not known{nearest(str(axis), MESH_AXES)}")


def _model_of(folder: Path, dials: Mapping[str, Any]) -> LanguageModel:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    try:
        text = config_file.read_text(encoding="utf-8")
        hf_config = json.loads(text)
    except ValueError as error:  # JSON and UTF-8 errors
        raise UserError(f"{config_file} is not valid JSON: {error}") from None
    return dataclasses.replace(from_config(hf_config, **dials), hf_config=text)


def _place(read: Callable, shape: tuple[int, ...], sharding: Any) -> jax.Array:
    """The array whose blocks `read` gives, each read once and handed to every device that holds it."""
    if sharding is None:
        return jax.block_until_ready(jax.device_put(read(tuple(slice(0, size) for size in shape))))
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, holders in devices.items():
        block = read(tuple(slice(*bound) for bound in bounds))
        arrays += jax.block_until_ready([jax.device_put(block, device) for device in holders])
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _read_block(
    entries: list[Entry], slices: Mapping[str, Any], shape: tuple[int, ...], dtype: np.dtype, index: tuple[slice, ...]
) -> np.ndarray:
    """The block `index` (one slice per axis) of a leaf."""
    out = _aligned_empty(tuple(part.stop - part.start for part in index), dtype)
    if entries[0].group is None:
        entries[0].read(slices[entries[0].name], index, out)
    else:
        for place, group in enumerate(range(shape[0])[index[0]]):
            entries[group].read(slices[entries[group].name], index[1:], out[place])
    return out


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _insert(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf


class _Stored(NamedTuple):
    """Where a tensor lies and what it is; `also_in` are further files that have one of its name."""

    file: Path
    shape: tuple[int, ...]
    code: str  # safetensors' name of its dtype: F32, BF16, ...
    also_in: tuple[Path, ...] = ()

    @property
    def dtype(self) -> np.dtype:
        return jnp.dtype({"BF16": "bfloat16"}.get(self.code, self.code.replace("F", "float")))


@contextlib.contextmanager
def _slices(stored: Mapping[str, _Stored], entries: list[Entry]) -> Iterator[dict[str, Any]]:
    """Tensor name -> lazy slice. The files are mapped for one leaf only: their pages do not pile up."""
    with contextlib.ExitStack() as stack:
        files = sorted({stored[entry.name].file for entry in entries})
        handles = {file: stack.enter_context(safe_open(file, framework="numpy")) for file in files}
        yield {entry.name: handles[stored[entry.name].file].get_slice(entry.name) for entry in entries}


def _list_tensors(folder: Path) -> dict[str, _Stored]:
    index_file = folder / _INDEX_FILE
    if index_file.is_file():
        try:
            listed = set(json.loads(index_file.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{index_file} is not a safetensors index") from None
        files = [folder / name for name in sorted(listed)]
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    else:
        files = sorted(folder.glob("*.safetensors"))
    absent = [file.name for file in files if not file.is_file()]
    if absent or not files:
        raise UserError(f"{folder} lacks {', '.join(absent) if absent else 'safetensors files'}")
    found: dict[str, _Stored] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as handle:
                slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
                here = {name: _Stored(file, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is not a whole safetensors file: {_why(file, error)}") from None
        for name, tensor in here.items():
            if name in found:
                tensor = found[name]._replace(also_in=(*found[name].also_in, file))
            found[name] = tensor
    return found


def _why(file: Path, error: Exception) -> str:
    with contextlib.suppress(OSError), open(file, "rb") as handle:
        if handle.read(19) == b"version https://git":
            return "it is a git-lfs pointer; run `git lfs pull`"
    return str(error)


def _check(table: list[Entry], stored: Mapping[str, _Stored], model: LanguageModel, folder: Path) -> None:
    """Raises one UserError with everything that does not fit."""
    wanted = {entry.name: entry for entry in table}
    present = {name: stored[name] for name in wanted if name in stored}
    # A tied checkpoint may repeat the table as lm_head; old ones keep a buffer of RoPE frequencies.
    spare = {"lm_head.weight"} if model.config.tie_embeddings else set()
    problems = {
        "unmapped": [n for n in stored if n not in wanted and n not in spare and _ROPE_BUFFER not in n],
        "doubled": sorted(name for name, tensor in stored.items() if tensor.also_in),
        "missing": [name for name in wanted if name not in stored],
        "misshapen": [
            f"{name} {tensor.shape}, wanted {wanted[name].hf_shape}"
            for name, tensor in present.items()
            if tensor.shape != wanted[name].hf_shape
        ],
        "not in a floating-point type": [
            f"{name} {tensor.code}" for name, tensor in present.items() if tensor.code not in _FLOATS
        ],
    }
    _report(f"the tensors of {folder} do not fit its config.json", problems)


def _report(what: str, problems: Mapping[str, list[str]]) -> None:
    found = [f"{kind}: {_some(names)}" for kind, names in problems.items() if names]
    if found:
        raise UserError(f"{what}; {'; '.join(found)}")


def _some(names: list[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


# ------------------------------------------------------------------------------------------- save


def save_pretrained(
    path: str | os.PathLike,
    model: LanguageModel,
    params: Mapping[str, Any],
    *,
    dtype: Any = None,
    tokenizer_from: str | os.PathLike | None = None,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Writes a Hugging Face folder (config.json, safetensors), in the params' dtype unless given.

    `tokenizer_from` is a folder (or whatever hub.resolve takes) whose tokenizer files and
    generation_config.json are copied along; `record` (plain values, e.g. where the weights came
    from) is kept in sdzero_export.json. The folder is written beside its place and renamed. In a
    multi-host run every process must call this; the first one writes. UserError when params do
    not belong to the model, or when `path` holds files that were not exported here.
    """
    folder = Path(path).expanduser()
    dtype = None if dtype is None else float_dtype(dtype)
    _check_params(model, params)
    check_replaceable(folder)
    sides = [] if tokenizer_from is None else side_files(hub.resolve(tokenizer_from, weights=False).folder)
    leaves = dict(_leaves(params))
    table = conversion_table(model)
    sizes = {entry.name: math.prod(entry.shape) * (dtype or leaves[entry.path].dtype).itemsize for entry in table}
    files = _split(table, sizes)
    writes = jax.process_index() == 0
    temporary = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    try:
        if writes:
            temporary.mkdir(parents=True)
            (temporary / "config.json").write_text(_config_text(model, dtype or leaves[("embedding",)].dtype))
        weight_map = {}
        for number, entries in enumerate(files, 1):
            single = len(files) == 1
            name = "model.safetensors" if single else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            tensors = {entry.name: _hf_tensor(leaves[entry.path], entry, dtype) for entry in entries}
            weight_map.update(dict.fromkeys(tensors, name))
            if writes:
                save_file(tensors, temporary / name, metadata={"format": "pt"})
                shutil.copymode(temporary / "config.json", temporary / name)  # safetensors lets nobody else read it
        if writes:
            if len(files) > 1:
                index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
                (temporary / _INDEX_FILE).write_text(json.dumps(index, indent=2))
            for file in sides:
                shutil.copyfile(file, temporary / file.name)
            (temporary / _EXPORT_FILE).write_text(json.dumps(dict(record or {}), indent=2) + "\n")
            _replace(folder, temporary)
    finally:
        if writes:
            shutil.rmtree(temporary, ignore_errors=True)


def side_files(folder: Path) -> list[Path]:
    """Tokenizer and generation files of a folder; UserError when it has no tokenizer."""
    found = [folder / name for name in hub.SIDE_FILES if (folder / name).is_file()]
    if not any(file.name in hub.TOKENIZER_FILES for file in found):
        raise UserError(f"{folder} has no tokenizer files ({hub.TOKENIZER_FILES[0]}, ...)")
    return found


def _config_text(model: LanguageModel, dtype: np.dtype) -> str:
    config = to_hf_config(model)
    # Readers take the weights in the type that the config names: it must be the one they are stored in.
    field = "dtype" if "dtype" in config else "torch_dtype"
    # Byte for byte what was read, while it still says the same.
    if model.hf_config and json.loads(model.hf_config) == config and config.get(field) == dtype.name:
        return model.hf_config
    return json.dumps({**config, field: dtype.name}, indent=2) + "\n"


def _hf_tensor(leaf: Any, entry: Entry, dtype: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and [device.platform for device in leaf.devices()] == ["cpu"]:
        leaf = np.asarray(leaf)  # the very memory: no copy, and no program to cut it
    part = leaf if entry.group is None else leaf[entry.group]
    if isinstance(part, jax.Array) and not part.is_fully_addressable:
        from jax.experimental import multihost_utils

        part = multihost_utils.process_allgather(part, tiled=True)
    part = np.asarray(part)
    return entry.to_hf(part if dtype is None else part.astype(jnp.dtype(dtype)))


def _split(table: list[Entry], sizes: Mapping[str, int]) -> list[list[Entry]]:
    """Cuts the table into files of at most _FILE_BYTES (a larger tensor stands alone)."""
    files: list[list[Entry]] = [[]]
    filled = 0
    for entry in table:
        if files[-1] and filled + sizes[entry.name] > _FILE_BYTES:
            files.append([])
            filled = 0
        files[-1].append(entry)
        filled += sizes[entry.name]
    return files


def _check_params(model: LanguageModel, params: Mapping[str, Any]) -> None:
    have, want = dict(_leaves(params)), dict(_leaves(model.param_shapes()))
    problems = {
        "unknown": ["/".join(path) for path in have if path not in want],
        "missing": ["/".join(path) for path in want if path not in have],
        "misshapen": [
            f"{'/'.join(path)} {tuple(have[path].shape)}, wanted {leaf.shape}"
            for path, leaf in want.items()
            if path in have and tuple(have[path].shape) != leaf.shape
        ],
    }
    _report("these parameters do not belong to this model", problems)


def check_replaceable(folder: Path) -> None:
    """UserError unless `folder` is new, empty or an export of this program and nothing else."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder")
    present = sorted(file.name for file in folder.glob("*"))
    known = {"config.json", _INDEX_FILE, _EXPORT_FILE, *hub.SIDE_FILES}
    others = [name for name in present if name not in known and not name.endswith(".safetensors")]
    if others or (present and _EXPORT_FILE not in present):
        names = _some(others or present, 3)
        raise UserError(f"{folder} holds files that were not exported here ({names}); give a new folder")
    check_writable(folder, "give another folder")


def _replace(folder: Path, temporary: Path) -> None:
    """Puts `temporary` in the place of `folder`; an old folder is moved aside first, then deleted."""
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
