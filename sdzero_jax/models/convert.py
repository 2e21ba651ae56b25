"""Hugging Face checkpoints <-> parameters, by a table, one tensor at a time, without torch.

A checkpoint is a folder with config.json and safetensors files, with or without an index file.
Every leaf is assembled shard by shard straight into its place on the mesh; neither direction
holds a second copy of the model. Left out: downloads, and tokenizer and generation files.
"""

import contextlib
import dataclasses
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
from sdzero_jax.models import olmo3, qwen3
from sdzero_jax.models.decoder import DecoderConfig, LanguageModel
from sdzero_jax.sharding import shardings_for

FAMILIES = {qwen3.MODEL_TYPE: qwen3, olmo3.MODEL_TYPE: olmo3}
PRESETS: Mapping[str, Callable[..., DecoderConfig]] = {
    "qwen3_4b_instruct_2507": qwen3.qwen3_4b_instruct_2507,
    "olmo3_7b_instruct": olmo3.olmo3_7b_instruct,
}
# Dials of how a model runs, not of what it is: no config.json mentions them.
_RUNTIME_FIELDS = ("param_dtype", "compute_dtype", "remat", "attention")
_INDEX_FILE = "model.safetensors.index.json"
_FILE_BYTES = 4 << 30
_ROPE_BUFFER = "rotary_emb.inv_freq"


# ----------------------------------------------------------------------------------------- config


def from_config(hf_config: Mapping[str, Any], **dials: Any) -> LanguageModel:
    """The model that a config.json (already parsed) describes; `dials` set DecoderConfig fields.

    Raises UserError for another model_type and for every setting that is not supported.
    """
    model_type = hf_config.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(f"model_type {model_type!r} is not supported{nearest(str(model_type), FAMILIES)}")
    config = FAMILIES[model_type].from_hf(hf_config, **dials)
    return LanguageModel(config, json.dumps(hf_config, indent=2))


def to_hf_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model: the one it was read from while that still describes it."""
    if model.hf_config:
        read = json.loads(model.hf_config)
        same = {name: getattr(model.config, name) for name in _RUNTIME_FIELDS}
        if from_config(read, **same).config == model.config:
            return read
    return FAMILIES[family(model.config)].to_hf(model.config)


def family(config: DecoderConfig) -> str:
    """The model_type that a decoder can be written as; UserError when there is none."""
    dials = (config.norm_position, config.qk_norm)
    families = {("pre", "head"): qwen3.MODEL_TYPE, ("post", "projection"): olmo3.MODEL_TYPE}
    if dials not in families:
        raise UserError(
            f"norm_position={dials[0]!r} with qk_norm={dials[1]!r} has no Hugging Face form; "
            "pre with head is qwen3, post with projection is olmo3"
        )
    return families[dials]


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

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        return (tensor.T if self.in_axes else tensor).reshape(self.shape)

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
    """Reads a Hugging Face folder: (model, params), params in `dtype` (None: as stored).

    With a mesh, parameters are built directly in their shards. `dials` set DecoderConfig fields
    (compute_dtype, remat, ...). UserError names every unmapped, doubled, missing and misshapen
    tensor at once.
    """
    folder = Path(path)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    try:
        hf_config = json.loads(config_file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{config_file} is not valid JSON: {error}") from None
    model = dataclasses.replace(from_config(hf_config, **dials), hf_config=config_file.read_text())
    shapes = model.param_shapes()
    shardings = None if mesh is None else dict(_leaves(shardings_for(mesh, model.param_axes(), shapes)))
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(folder, stack)
        _check(conversion_table(model), tensors, model, folder)
        by_path: dict[tuple[str, ...], list[Entry]] = {}
        for entry in conversion_table(model):
            by_path.setdefault(entry.path, []).append(entry)
        params = {}
        for leaf_path, leaf in _leaves(shapes):
            read = _reader(by_path[leaf_path], tensors, leaf.shape, dtype)
            if shardings is None:
                array = jax.device_put(read((slice(None),) * len(leaf.shape)))
            else:
                array = jax.make_array_from_callback(leaf.shape, shardings[leaf_path], read)
            _insert(params, leaf_path, jax.block_until_ready(array))
    return model, params


def _reader(entries: list[Entry], tensors: Mapping[str, Any], shape: tuple[int, ...], dtype: Any) -> Callable:
    """A function: index (one slice per axis) -> that block of the leaf as numpy."""

    def part(entry: Entry, index: tuple[slice, ...]) -> np.ndarray:
        tensor = tensors[entry.name][...]
        block = entry.to_ours(tensor)[index]
        return block if dtype is None else block.astype(jnp.dtype(dtype))

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if entries[0].group is None:
            return np.ascontiguousarray(part(entries[0], index))
        groups = range(*index[0].indices(shape[0]))
        return np.stack([part(entries[group], index[1:]) for group in groups])

    return read


def _insert(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf


class _Tensors(dict):
    """Tensor name -> lazy slice; names found in more than one file are kept aside."""

    def __init__(self):
        super().__init__()
        self.doubled: set[str] = set()


def _open_tensors(folder: Path, stack: contextlib.ExitStack) -> _Tensors:
    index_file = folder / _INDEX_FILE
    if index_file.is_file():
        try:
            listed = set(json.loads(index_file.read_text())["weight_map"].values())
        except (json.JSONDecodeError, KeyError, AttributeError):
            raise UserError(f"{index_file} is not a safetensors index") from None
        files = [folder / name for name in sorted(listed)]
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    else:
        files = sorted(folder.glob("*.safetensors"))
    absent = [file.name for file in files if not file.is_file()]
    if absent or not files:
        raise UserError(f"{folder} lacks {', '.join(absent) if absent else 'safetensors files'}")
    tensors = _Tensors()
    for file in files:
        try:
            handle = stack.enter_context(safe_open(file, framework="numpy"))
        except SafetensorError as error:
            raise UserError(f"{file} is not a whole safetensors file: {error}") from None
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            if name in tensors:
                tensors.doubled.add(name)
            tensors[name] = handle.get_slice(name)
    return tensors


def _check(table: list[Entry], tensors: _Tensors, model: LanguageModel, folder: Path) -> None:
    """Raises one UserError with everything that does not fit."""
    wanted = {entry.name: entry for entry in table}
    # A tied checkpoint may repeat the table as lm_head; old ones keep a buffer of RoPE frequencies.
    spare = {"lm_head.weight"} if model.config.tie_embeddings else set()
    problems = {
        "unmapped": [n for n in tensors if n not in wanted and n not in spare and _ROPE_BUFFER not in n],
        "doubled": sorted(tensors.doubled),
        "missing": [name for name in wanted if name not in tensors],
        "misshapen": [
            f"{name} {tuple(tensors[name].get_shape())}, wanted {entry.hf_shape}"
            for name, entry in wanted.items()
            if name in tensors and tuple(tensors[name].get_shape()) != entry.hf_shape
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
    path: str | os.PathLike, model: LanguageModel, params: Mapping[str, Any], *, dtype: Any = None
) -> None:
    """Writes a Hugging Face folder (config.json, safetensors), in the params' dtype unless given.

    The folder is written beside its place and renamed. In a multi-host run every process must
    call this; the first one writes. UserError when params do not belong to the model, or when
    `path` holds files that are not those of an exported model.
    """
    folder = Path(path)
    _check_params(model, params)
    _check_replaceable(folder)
    leaves = dict(_leaves(params))
    table = conversion_table(model)
    sizes = {
        entry.name: math.prod(entry.shape) * jnp.dtype(dtype or leaves[entry.path].dtype).itemsize for entry in table
    }
    files = _split(table, sizes)
    writes = jax.process_index() == 0
    temporary = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    try:
        if writes:
            temporary.mkdir(parents=True)
        weight_map = {}
        for number, entries in enumerate(files, 1):
            single = len(files) == 1
            name = "model.safetensors" if single else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            tensors = {entry.name: _hf_tensor(leaves[entry.path], entry, dtype) for entry in entries}
            weight_map.update(dict.fromkeys(tensors, name))
            if writes:
                save_file(tensors, temporary / name, metadata={"format": "pt"})
        if writes:
            if len(files) > 1:
                index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
                (temporary / _INDEX_FILE).write_text(json.dumps(index, indent=2))
            (temporary / "config.json").write_text(_config_text(model))
            _replace(folder, temporary)
    finally:
        if writes:
            shutil.rmtree(temporary, ignore_errors=True)


def _config_text(model: LanguageModel) -> str:
    config = to_hf_config(model)
    # Byte for byte what was read, while it still says the same.
    if model.hf_config and json.loads(model.hf_config) == config:
        return model.hf_config
    return json.dumps(config, indent=2) + "\n"


def _hf_tensor(leaf: Any, entry: Entry, dtype: Any) -> np.ndarray:
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


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder")
    ours = ("config.json", _INDEX_FILE)
    others = [f.name for f in folder.glob("*") if f.name not in ours and f.suffix != ".safetensors"]
    if others:
        raise UserError(f"{folder} holds other files ({_some(sorted(others), 3)}); give a new folder")


def _replace(folder: Path, temporary: Path) -> None:
    """Puts `temporary` in the place of `folder`; an old folder is moved aside first, then deleted."""
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
