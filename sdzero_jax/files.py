"""Files that survive a crash: JSON written whole or not at all, JSON lines repaired at opening.

Of a run on several hosts the first one writes; on the others writing does nothing. Leaves out locking and
remote file systems.
"""

import errno
import json
import os
import tempfile
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sdzero_jax import hosts
from sdzero_jax.errors import UserError


def check_writable(path: str | os.PathLike, instead: str) -> None:
    """UserError, which ends with `instead`, when no file or folder can be made at `path`. Leaves nothing behind."""
    if not hosts.is_first():
        return
    path = Path(path).expanduser().absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    try:
        if there != path or there.is_dir():
            tempfile.TemporaryFile(dir=there).close()
        elif not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        if error.errno == errno.ENOSPC:  # right place, wrong time
            raise
        raise UserError(f"{path}: cannot be written ({error.strerror}); {instead}") from None


def write_bytes_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Writes `data` under a temporary name, fsyncs and renames: a reader sees the old file or the new one."""
    if not hosts.is_first():
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


def write_json_atomic(path: str | os.PathLike, obj: Any) -> None:
    """Writes `obj` as indented JSON, in the order of its keys, whole or not at all.

    NaN and infinities are written in Python's spelling, so that a diverged number stays visible.
    Raises TypeError for what JSON cannot hold, leaving the old file as it was.
    """
    text = json.dumps(obj, indent=2) + "\n"
    write_bytes_atomic(path, text.encode("ascii"))


def read_json(path: str | os.PathLike) -> Any:
    """The JSON value in the file `path`; UserError names a file that is missing or not JSON."""
    path = Path(path)
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder; wanted a file") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def jsonl(records: Iterable[Mapping[str, Any]]) -> bytes:
    """One line of JSON per record."""
    return "".join(json.dumps(record, sort_keys=True) + "\n" for record in records).encode("ascii")


def append_jsonl(path: str | os.PathLike, records: Iterable[Mapping[str, Any]]) -> None:
    """Appends one JSON line per record in one write, then flushes and fsyncs.

    The file must end with a whole line: call `read_jsonl_repaired` once before the first append.
    """
    data = jsonl(records)
    if not data or not hosts.is_first():
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with open(path, "ab") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    if is_new:
        _sync_directory(path.parent)


def parse_jsonl(data: bytes, name: str) -> tuple[list[dict[str, Any]], int]:
    """Parses JSON lines, leaving out a broken last line.

    Args:
      data: the bytes of a file with one JSON object per line; blank lines are skipped.
      name: what an error calls the file.
    Returns (records, number of bytes up to and including the last whole record).
    Raises UserError for a broken line that is not the last one, with its number.
    """
    records, whole_bytes, position, broken = [], 0, 0, None
    for number, line in enumerate(data.split(b"\n"), start=1):
        position = min(position + len(line) + 1, len(data))
        if not line.strip():
            continue
        if broken is not None:
            raise UserError(f"{name}, line {broken}: not a JSON object; repair or remove this line")
        record = _json_object(line)
        if record is None:
            broken = number
            continue
        records.append(record)
        whole_bytes = position
    return records, whole_bytes


def read_jsonl_repaired(path: str | os.PathLike) -> tuple[list[dict[str, Any]], bool]:
    """Reads JSON lines and truncates away a last line that a crash cut short.

    A last record that is whole but lacks its newline is kept and gets it. A missing file reads as empty.
    Returns (records, whether the file was changed). Raises UserError, naming file and line, for a
    broken line that is not the last one.
    """
    path = Path(path)
    if not path.exists():
        return [], False
    data = path.read_bytes()
    records, whole_bytes = parse_jsonl(data, str(path))
    cut = data[whole_bytes:].strip() != b""
    needs_newline = whole_bytes > 0 and data[whole_bytes - 1 : whole_bytes] != b"\n"
    if cut or needs_newline:
        with open(path, "r+b") as handle:
            handle.truncate(whole_bytes)
            if needs_newline:
                handle.seek(whole_bytes)
                handle.write(b"\n")
            handle.flush()
            os.fsync(handle.fileno())
    return records, cut or needs_newline


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:  # covers JSON and UTF-8 errors
        return None
    return value if isinstance(value, dict) else None


def _sync_directory(directory: Path) -> None:
    """Makes a new name durable; some file systems refuse to open directories, and then it is not."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
