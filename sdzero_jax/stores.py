"""Run directories on object stores (gs://), which know neither append nor rename.

A run works in a local mirror. `push` uploads what changed in it: JSON lines as numbered parts, other files whole,
and at last the manifest, which names all parts that make up the run; what it does not name does not exist. `pull`
makes the mirror what the manifest says, on whichever machine goes on. Checkpoints do not pass through the mirror:
Orbax writes them to the place that `remote` gives. A store has no lock: one run at a time is the user's to keep.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from sdzero_jax import hosts
from sdzero_jax.errors import Fault, UserError
from sdzero_jax.locks import exclusive
from sdzero_jax.progress import say

T = TypeVar("T")

SCHEMES = ("gs",)  # those that Orbax writes to: it takes an s3:// place for a local folder
MANIFEST = "manifest.json"
MIRRORS = pathlib.Path("runs/.mirrors")
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each repeated call

_mirrors: dict[pathlib.Path, "Mirror"] = {}  # of this process, by local folder
_held = contextlib.ExitStack()  # their locks


def is_url(place: str | os.PathLike) -> bool:
    return "://" in str(place)


def local(place: str | os.PathLike) -> pathlib.Path:
    """The folder to work in: the place itself, or the mirror of an object store's, filled with what is there.

    A mirror belongs to one process, until that ends. UserError when another one has it, when the kind of store
    is unknown or its package is missing, Fault when the store does not answer.
    """
    if not is_url(place):
        return pathlib.Path(place).expanduser()
    url = str(place).rstrip("/")
    scheme, _, path = url.partition("://")
    if scheme not in SCHEMES or not path:
        raise UserError(f"{place}: no place for a run; wanted a folder or {' or '.join(f'{s}://...' for s in SCHEMES)}")
    # One flat name each: no mirror lies in another.
    folder = (MIRRORS / f"{path.replace('/', '-')}-{_digest(url.encode())[:8]}").absolute()
    if folder not in _mirrors:
        mirror = Mirror(url, folder)
        _held.enter_context(exclusive(folder.with_name(f"{folder.name}.lock"), url))
        hosts.from_first(mirror.pull)
        _mirrors[folder] = mirror
    return folder


def push(path: pathlib.Path) -> None:
    """Uploads what changed under `path`, when it lies in a mirror; on the first host. Fault when the store fails."""
    mirror = _mirror_of(path)
    if mirror and hosts.is_first():
        mirror.push(path.absolute())


def remote(path: pathlib.Path) -> Any:
    """The path itself, or the epath.Path of its place on the store when it lies in a mirror."""
    mirror = _mirror_of(path)
    if mirror is None:
        return pathlib.Path(path).absolute()
    from etils import epath

    return epath.Path(mirror.url) / path.absolute().relative_to(mirror.folder).as_posix()


def _mirror_of(path: pathlib.Path) -> "Mirror | None":
    path = pathlib.Path(path).absolute()
    return next((_mirrors[folder] for folder in (path, *path.parents) if folder in _mirrors), None)


@dataclasses.dataclass
class Record:
    """A file in the manifest: its length, the digest of its bytes and the objects that hold them, in order."""

    size: int
    digest: str
    parts: list[str]


class Mirror:
    """A local folder and its place on a store, reached through fsspec."""

    def __init__(self, url: str, folder: pathlib.Path):
        import fsspec

        self.url, self.folder = url, folder
        try:
            self._store, self._root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise UserError(f"{url}: {error}") from None
        self._files: dict[str, Record] = {}
        self._manifest: dict[str, dict[str, Any]] = {}  # what the store's says
        self._stamps: dict[str, tuple[int, int]] = {}  # (size, time of change) when a file was last looked at

    def pull(self) -> None:
        """Makes the mirror what the manifest says; files that it does not name are removed."""
        manifest = self._read(MANIFEST)
        self._manifest = json.loads(manifest or b"{}")
        self._files = {name: Record(**fields) for name, fields in self._manifest.items()}
        unknown = [path for path in self._present() if path.relative_to(self.folder).as_posix() not in self._files]
        if unknown and manifest is None:
            aside = self.folder.with_name(f"{self.folder.name}.aside")
            shutil.rmtree(aside, ignore_errors=True)
            self.folder.rename(aside)
            say(f"{self.url} is empty, but {len(unknown)} files of a run there are on this machine: moved to {aside}")
            unknown = []
        for path in unknown:  # written, but not uploaded before the run was cut
            path.unlink()
        for name, record in self._files.items():
            path = self.folder / name
            if path.is_file() and _digest(path.read_bytes()) == record.digest:
                continue
            data = b"".join(self._read(part) or b"" for part in record.parts)
            if _digest(data) != record.digest:
                raise Fault(f"{self.url}/{name}: what the store holds is not what was written ({len(data)} bytes)")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def push(self, under: pathlib.Path) -> None:
        """Uploads the files under a folder (or one file) that changed, then the manifest."""
        for path in self._present(under):
            name, stat = path.relative_to(self.folder).as_posix(), path.stat()
            if self._stamps.get(name) == (stamp := (stat.st_size, stat.st_mtime_ns)):
                continue
            data, old = path.read_bytes(), self._files.get(name)
            if old is None or old.digest != _digest(data):
                self._files[name] = self._upload(name, data, old)
            self._stamps[name] = stamp
        fields = {name: dataclasses.asdict(record) for name, record in sorted(self._files.items())}
        if fields == self._manifest:
            return
        self._write(MANIFEST, json.dumps(fields, indent=1).encode())
        unused = _parts(self._manifest) - _parts(fields)
        self._manifest = fields
        for part in sorted(unused):
            self._remove(part)

    def _upload(self, name: str, data: bytes, old: Record | None) -> Record:
        """Writes a file's new part, or the whole when it is no longer what was uploaded and more."""
        grown = name.endswith(".jsonl") and old and _digest(data[: old.size]) == old.digest
        parts, start = (old.parts, old.size) if grown else ([], 0)
        digest = _digest(data)
        # Named by content: a manifest that was not replaced in time still finds the parts of before.
        part = f"{name}.{len(parts):05d}-{digest[:8]}"
        self._write(part, data[start:])
        return Record(len(data), digest, [*parts, part])

    def _present(self, under: pathlib.Path | None = None) -> list[pathlib.Path]:
        """The mirror's files: not hidden ones, nor half written ones."""
        under = under or self.folder
        paths = [under] if under.is_file() else sorted(under.rglob("*"))
        return [
            path
            for path in paths
            if path.is_file()
            and path.suffix != ".tmp"
            and not any(part.startswith(".") for part in path.relative_to(self.folder).parts)
        ]

    def _read(self, name: str) -> bytes | None:
        try:
            return self._patiently(f"read {name}", lambda: self._store.cat_file(f"{self._root}/{name}"))
        except FileNotFoundError:
            return None

    def _write(self, name: str, data: bytes) -> None:
        self._patiently(f"write {name}", lambda: self._store.pipe_file(f"{self._root}/{name}", data))

    def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._patiently(f"remove {name}", lambda: self._store.rm_file(f"{self._root}/{name}"))

    def _patiently(self, what: str, call: Callable[[], T]) -> T:
        """Repeats a call that fails, with growing waits."""
        for wait in (*WAITS, None):
            try:
                return call()
            except FileNotFoundError:
                raise
            except Exception as error:  # each store has errors of its own
                reason = f"{type(error).__name__}: {error}"
                if wait is None:
                    raise Fault(
                        f"{self.url}: cannot {what} after {len(WAITS) + 1} calls ({reason[:200]}); what was uploaded "
                        "before is whole, and the same command goes on from there"
                    ) from error
            say(f"{self.url}: cannot {what} ({reason[:100]}); again in {wait:g} s")
            time.sleep(wait)
        raise AssertionError("the last wait is None")


def _parts(manifest: Mapping[str, Mapping[str, Any]]) -> set[str]:
    return {part for fields in manifest.values() for part in fields["parts"]}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
