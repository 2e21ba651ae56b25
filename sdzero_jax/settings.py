"""Settings as frozen dataclasses: overrides `a.b=c`, type checks, help, differences and hashes.

Dataclasses stay plain (their modules need no library for them); pydantic checks and parses the
values, and the text in `Annotated[type, "meaning"]` is the help.
"""

import dataclasses
import hashlib
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import pydantic

from sdzero_jax.errors import UserError, nearest

C = TypeVar("C")


def field_types(cls: type) -> dict[str, Any]:
    """Field name -> its annotation, Annotated text included."""
    return typing.get_type_hints(cls, include_extras=True)


def override(config: C, assignments: Sequence[str]) -> C:
    """Returns `config` with every "a.b=c" applied; unknown names and ill-typed values are refused."""
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator or not path:
            raise UserError(f"override {assignment!r} is not of the form a.b=c")
        config = _set(config, path.split("."), text, path)
    return config


def _set(config: Any, names: Sequence[str], text: str, path: str) -> Any:
    fields = [field.name for field in dataclasses.fields(config)]
    name = names[0]
    where = path.rsplit(".".join(names), 1)[0]
    if name not in fields:
        known = [f"{where}{field}" for field in fields]
        raise UserError(f"unknown setting {path!r}{nearest(f'{where}{name}', known)}")
    value = getattr(config, name)
    if dataclasses.is_dataclass(value):
        if len(names) == 1:
            inner = ", ".join(f"{path}.{field.name}" for field in dataclasses.fields(value))
            raise UserError(f"setting {path!r} is a group; set one of {inner}")
        return dataclasses.replace(config, **{name: _set(value, names[1:], text, path)})
    if len(names) > 1:
        raise UserError(f"setting {path!r}: {where}{name} is a single value, it has no field {names[1]!r}")
    return dataclasses.replace(config, **{name: parse(field_types(type(config))[name], text, path)})


def parse(annotation: Any, text: str, path: str) -> Any:
    """The value that `text` spells for this type: as on a command line, or as JSON."""
    adapter = pydantic.TypeAdapter(annotation)
    try:
        return adapter.validate_strings(text)
    except pydantic.ValidationError as first:
        try:
            return adapter.validate_json(text)
        except pydantic.ValidationError:
            listed = first.errors()[0]["type"] in ("tuple_type", "list_type")
            form = f"; a list is written as '{path}={_as_list(annotation, text)}'" if listed and "[" not in text else ""
            raise UserError(f"setting {path}={text}: {_reason(first)}{form}") from None


def _as_list(annotation: Any, text: str) -> str:
    """The JSON list that `text`, items between commas or blanks, was probably meant to be."""
    items = [item for item in re.split(r"[,\s]+", text) if item]
    quoted = str in typing.get_args(annotation)
    # As numbers are written in JSON, where .5 is none.
    number = lambda item: re.sub(r"^([-+]?)\.", r"\g<1>0.", item).removeprefix("+")  # noqa: E731
    return f"[{', '.join(json.dumps(item) if quoted else number(item) for item in items)}]"


def check(config: Any, path: str = "") -> None:
    """Refuses a config whose values do not have the declared types (a config file can hold anything)."""
    for name, annotation in field_types(type(config)).items():
        value, here = getattr(config, name), f"{path}{name}"
        if dataclasses.is_dataclass(value):
            check(value, f"{here}.")
            continue
        try:
            pydantic.TypeAdapter(annotation).validate_python(value, strict=not isinstance(value, int))
        except pydantic.ValidationError as error:
            raise UserError(f"setting {here}={value!r}: {_reason(error)}") from None


def _reason(error: pydantic.ValidationError) -> str:
    message = error.errors()[0]["msg"]
    return message[0].lower() + message[1:]


def flatten(config: Any) -> dict[str, Any]:
    """{"a.b": value} for a dataclass or a nested dict of plain values."""
    tree = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config
    return dict(_leaves(json.loads(json.dumps(tree)), ""))


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def differences(old: Any, new: Any, ignore: Sequence[str] = ()) -> list[str]:
    """Lines "a.b: old -> new" for every setting that differs, but for those in `ignore`."""
    old, new = flatten(old), flatten(new)
    names = sorted((old.keys() | new.keys()) - set(ignore))
    absent = "(absent)"
    return [
        f"{name}: {old.get(name, absent)} -> {new.get(name, absent)}"
        for name in names
        if old.get(name, absent) != new.get(name, absent)
    ]


def digest(*parts: Any) -> str:
    """A short hash of configs and plain values, equal wherever their JSON is."""
    plain = [dataclasses.asdict(part) if dataclasses.is_dataclass(part) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def describe(config: Any, prefix: str = "") -> list[str]:
    """Help: one line "a.b = default    meaning" per field of a config and its groups."""
    lines = []
    for name, annotation in field_types(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            lines += describe(value, f"{prefix}{name}.")
            continue
        meaning = next((m for m in getattr(annotation, "__metadata__", ()) if isinstance(m, str)), "")
        choices = _choices(annotation)
        lines.append(f"  {prefix}{name}={json.dumps(value)}\n        {meaning}{choices}")
    return lines


def _choices(annotation: Any) -> str:
    inner = typing.get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation
    if typing.get_origin(inner) is typing.Literal:
        return f" [{' | '.join(map(str, typing.get_args(inner)))}]"
    return ""
