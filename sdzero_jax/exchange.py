"""Weights from one form to the other: Hugging Face folders and Orbax parameter checkpoints (`run.py convert`).

An Orbax checkpoint written here records its model (DecoderConfig), the config.json it came from and the
source's commit, and carries the tokenizer's files, so that it converts back to the very same tensors. One
that a run wrote takes its model from the run's config.json, or from --config. Left out: optimizer state,
and writing to remote places.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from sdzero_jax.checkpoint import load_params, save_params
from sdzero_jax.errors import UserError, nearest
from sdzero_jax.files import check_writable, read_json
from sdzero_jax.models import (
    DecoderConfig,
    LanguageModel,
    check_replaceable,
    float_dtype,
    load_pretrained,
    resolve,
    save_pretrained,
)
from sdzero_jax.models.convert import side_files

FORMS = ("hf", "orbax")
SIDE_FOLDER = "hf_files"  # tokenizer and generation files inside an Orbax checkpoint
_RECORD = "convert.json"


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a conversion wrote."""

    form: str
    path: pathlib.Path
    parameters: int
    dtype: str
    source: Mapping[str, Any]  # name as given, revision (the hub's commit)


def convert(
    source: str,
    target: str,
    *,
    to: str | None = None,
    dtype: str | None = None,
    config: DecoderConfig | None = None,
    tokenizer: str | None = None,
) -> Converted:
    """Reads weights in one form and writes them in another, in the stored dtype unless `dtype` is given.

    Args:
      source: a Hugging Face folder, hub id or remote folder, or an Orbax parameter checkpoint (written here,
        or RUN/STAGE/params of a run).
      target: a new folder, or one that an earlier conversion wrote.
      to: "hf" or "orbax"; None is the other form than the source's.
      config: the model of an Orbax checkpoint that does not say it itself.
      tokenizer: a folder (or hub id) whose tokenizer and generation files go along; None takes the source's.
    Raises: UserError, before anything is written, for what does not fit.
    """
    if to is not None and to not in FORMS:
        raise UserError(f"--to {to!r} is not known{nearest(to, FORMS)}")
    cast = None if dtype is None else float_dtype(dtype)
    checkpoint = _orbax_checkpoint(pathlib.Path(source).expanduser())
    to = to or ("orbax" if checkpoint is None else "hf")
    place = pathlib.Path(target).expanduser()
    if "://" in target:
        raise UserError(f"{target}: conversions are written to a local folder; copy it there afterwards")
    if place.resolve() == pathlib.Path(source).expanduser().resolve():
        raise UserError(f"{target} is the source itself; give another folder")
    (check_replaceable if to == "hf" else _check_replaceable_orbax)(place)
    sides = None if tokenizer is None else resolve(tokenizer, weights=False).folder
    if sides:
        side_files(sides)  # refuses one without a tokenizer
    if checkpoint is None:
        found = resolve(source)
        model, params = load_pretrained(found.folder, dtype=cast)
        record = dataclasses.replace(found, name=source).record()
        sides = sides or _with_tokenizer(found.folder)
    else:
        model, params, record = _load_orbax(checkpoint, config)
        sides = sides or _with_tokenizer(checkpoint / SIDE_FOLDER)
    if to == "hf":
        save_pretrained(place, model, params, dtype=cast, tokenizer_from=sides, record={"source": record})
    else:
        params = params if cast is None else jax.tree.map(lambda leaf: leaf.astype(cast), params)
        _save_orbax(place, model, params, record, sides)
    written = cast or params["embedding"].dtype
    return Converted(to, place, sum(leaf.size for leaf in jax.tree.leaves(params)), written.name, record)


def _with_tokenizer(folder: pathlib.Path) -> pathlib.Path | None:
    return folder if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file() else None


# ------------------------------------------------------------------------------------------ orbax


def _orbax_checkpoint(path: pathlib.Path) -> pathlib.Path | None:
    """The folder whose subfolders are steps, `path` or `path`/params; None when `path` is no checkpoint."""
    for folder in (path, path / "params"):
        if any(step.name.isdigit() and (step / "state").is_dir() for step in folder.glob("*")):
            return folder
    return None


def _load_orbax(
    folder: pathlib.Path, config: DecoderConfig | None
) -> tuple[LanguageModel, dict[str, Any], dict[str, Any]]:
    model, record = _model_of(folder, config)
    stored = _stored(folder)
    shapes = model.param_shapes()
    problems = _differences(stored, shapes)
    if problems:
        raise UserError(f"{folder} does not hold the parameters of its model: {'; '.join(problems[:4])}")
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf, have: jax.ShapeDtypeStruct(leaf.shape, have.dtype, sharding=place), shapes, stored
    )
    params, _ = load_params(folder, abstract)
    return model, params, record


def _model_of(folder: pathlib.Path, given: DecoderConfig | None) -> tuple[LanguageModel, dict[str, Any]]:
    """The model of a checkpoint: as given, as recorded in it, or as the run around it has it."""
    recorded = folder / _RECORD
    record = read_json(recorded) if recorded.is_file() else {}
    source = record.get("source") or {"name": str(folder), "revision": None}
    if given is not None:
        return LanguageModel(given, record.get("hf_config", "")), source
    if "model" in record:
        return LanguageModel(_decoder_config(record["model"], recorded), record.get("hf_config", "")), source
    for parent in folder.resolve().parents[:3]:
        run = parent / "config.json"
        fields = read_json(run).get("model") if run.is_file() else None
        if isinstance(fields, Mapping):
            return LanguageModel(_decoder_config(fields, run)), source
    raise UserError(f"{folder} does not say which model it is; add --config configs/NAME.py, the config of its run")


def _decoder_config(fields: Mapping[str, Any], where: pathlib.Path) -> DecoderConfig:
    known = {field.name for field in dataclasses.fields(DecoderConfig)}
    unknown = sorted(fields.keys() - known)
    if unknown:
        raise UserError(f"{where}: unknown model setting {unknown[0]!r}{nearest(unknown[0], known)}")
    try:
        return DecoderConfig(**fields)
    except TypeError as error:
        raise UserError(f"{where} does not describe a model: {error}") from None


def _stored(folder: pathlib.Path) -> dict[str, Any]:
    """Shapes and dtypes of the newest step's parameters, from Orbax's own metadata."""
    step = max((step for step in folder.glob("*") if step.name.isdigit()), key=lambda step: int(step.name))
    try:
        metadata = ocp.PyTreeCheckpointHandler().metadata((step / "state").absolute())
        return dict(getattr(metadata, "tree", metadata))["params"]
    except Exception as error:  # whatever Orbax says of a damaged or foreign checkpoint
        reason = str(error).strip().splitlines()[:1]
        raise UserError(f"{folder} cannot be read as parameters: {''.join(reason)[:200]}") from None


def _differences(stored: Any, shapes: Any) -> list[str]:
    """Every leaf that is missing, unknown or of another shape."""
    have, want = (
        {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(t)} for t in (stored, shapes)
    )
    problems = [f"missing {name}" for name in want if name not in have]
    problems += [f"unknown {name}" for name in have if name not in want]
    return problems + [
        f"{name} is {tuple(have[name].shape)}, wanted {leaf.shape}"
        for name, leaf in want.items()
        if name in have and tuple(have[name].shape) != leaf.shape
    ]


def _path(path: Any) -> str:
    return "/".join(str(getattr(key, "key", key)) for key in path)


def _check_replaceable_orbax(place: pathlib.Path) -> None:
    """UserError unless `place` is new, empty or a checkpoint that was written here."""
    if place.exists() and not place.is_dir():
        raise UserError(f"{place} is a file; give a folder")
    present = sorted(file.name for file in place.glob("*"))
    if present and _RECORD not in present:
        raise UserError(
            f"{place} holds files that were not converted here ({', '.join(present[:3])}); give a new folder"
        )
    check_writable(place, "give another folder")


def _save_orbax(
    place: pathlib.Path, model: LanguageModel, params: Any, source: Mapping[str, Any], sides: pathlib.Path | None
) -> None:
    """Writes the checkpoint beside its place and renames it."""
    record = {"model": dataclasses.asdict(model.config), "hf_config": model.hf_config, "source": dict(source)}
    temporary = place.with_name(f".{place.name}.writing-{os.getpid()}")
    old = place.with_name(f".{place.name}.old-{os.getpid()}")
    try:
        save_params(temporary, params, record)
        (temporary / _RECORD).write_text(json.dumps(record, indent=2) + "\n")
        for file in side_files(sides) if sides else ():
            (temporary / SIDE_FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(file, temporary / SIDE_FOLDER / file.name)
        if place.exists():
            place.rename(old)
        temporary.rename(place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
