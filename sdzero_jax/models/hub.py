"""Where a model's files lie: a folder, a remote folder (gs://...), or a repository of the Hugging Face hub.

All three become a local folder. The libraries are imported when they are needed. Left out: logging in
(`hf auth login`), writing to remote places, and every file a model of these families does not need.
"""

import contextlib
import dataclasses
import hashlib
import os
import re
import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from sdzero_jax.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# Files of a model folder beside config.json and the weights.
SIDE_FILES = ("generation_config.json", *TOKENIZER_FILES)
_LIGHT = ("config.json", *SIDE_FILES)
_WANTED = (*_LIGHT, "*.safetensors", "*.safetensors.index.json")
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")


@dataclasses.dataclass(frozen=True)
class Source:
    """A model's files, on this machine."""

    name: str  # as given
    folder: Path
    revision: str | None  # hub: the commit; remote: a hash of the listing; None for a plain folder

    def record(self) -> dict[str, str | None]:
        """What to write down with anything made from it."""
        return {"name": self.name, "revision": self.revision}


def resolve(path: str | os.PathLike, *, weights: bool = True) -> Source:
    """Finds (and fetches, where it is not here) the folder that `path` names; `weights` False fetches no safetensors.

    An existing folder wins. SCHEME://... is copied once to the cache (SDZERO_CACHE, default
    ~/.cache/sdzero_jax); org/name and org/name@revision is a repository of the hub, kept in the hub's own cache, where
    an interrupted download goes on. org/name without a revision is not looked up when org/ is a folder
    here. UserError in one line when there is nothing to be had.
    """
    name, wanted = os.fspath(path), _WANTED if weights else _LIGHT
    if "://" in name:
        return _remote(name, wanted)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Source(name, folder, _commit_of(folder))
    if folder.exists():
        raise UserError(f"{name} is a file; give the folder that holds it")
    match = _HUB_ID.fullmatch(name) if isinstance(path, str) else None
    if match is None:
        raise UserError(
            f"{name}: no such folder, and not a hub id (org/name or org/name@revision) or a remote folder (gs://...)"
        )
    parent = PurePosixPath(name).parts[0]
    if match["revision"] is None and Path(parent).is_dir():
        raise UserError(f"{name}: no such folder, though {parent}/ is one; for the hub's repository write {name}@main")
    return _hub(name, match["repo"], match["revision"] or "main", wanted)


# -------------------------------------------------------------------------------------------- hub


def _commit_of(folder: Path) -> str | None:
    """The commit of a folder in the hub's cache: models--ORG--NAME/snapshots/COMMIT."""
    parts = folder.resolve().parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-1]
    return None


def _hub(name: str, repo: str, revision: str, wanted: Sequence[str]) -> Source:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise UserError(f"{name}: the hub needs `pip install huggingface_hub`; or give a folder") from None
    at = "" if revision == "main" else f" --revision {revision}"
    advice = f"where there is a network run `hf download {repo}{at} --local-dir DIR`, then give DIR"
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=list(wanted), ignore_patterns=["*/*"]
            )
        )
    except errors.RevisionNotFoundError:
        raise UserError(f"{repo} has no revision {revision!r} on the hub") from None
    except errors.RepositoryNotFoundError:  # covers gated ones
        raise UserError(
            f"{repo} is no folder here, and on the hub it is missing, private or gated: "
            "check the name, or log in with `hf auth login`"
        ) from None
    except errors.IncompleteSnapshotError:
        raise UserError(f"{repo} is here in part only and the hub cannot be reached; {advice}") from None
    except Exception as error:  # the client's own, its HTTP library's and the system's errors
        reason = _first_line(error)
        raise UserError(f"{repo} is no folder here and cannot be had from the hub ({reason}); {advice}") from None
    return Source(name, folder, _commit_of(folder))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


# ----------------------------------------------------------------------------------------- remote


def _remote(url: str, patterns: Sequence[str]) -> Source:
    """Copies a remote model folder to the cache, once for each state of its files."""
    try:
        import fsspec
    except ImportError:
        raise UserError(f"{url}: remote folders need `pip install fsspec` (gs:// also gcsfs)") from None
    with _said_in_one_line(url):
        files, root = fsspec.core.url_to_fs(url)
        listing = [entry for entry in files.ls(root, detail=True) if entry["type"] == "file"]
    wanted = {PurePosixPath(entry["name"]).name: entry for entry in listing}
    wanted = {name: entry for name, entry in wanted.items() if any(PurePosixPath(name).match(p) for p in patterns)}
    if "config.json" not in wanted:
        raise UserError(f"{url} is not a model folder: it has no config.json")
    state = _hash_of_listing(url, wanted)
    target = _cache() / f"{PurePosixPath(root).name or 'model'}-{state}"
    if not target.is_dir():
        with _said_in_one_line(url):
            _copy(files, list(wanted.items()), target)
    return Source(url, target, state)


def _cache() -> Path:
    given = os.environ.get("SDZERO_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "sdzero_jax"


def _hash_of_listing(url: str, wanted: dict[str, dict[str, Any]]) -> str:
    """Changes when any file does, as far as the file system says: by checksum, generation or time."""
    marks = ("size", "generation", "etag", "ETag", "md5Hash", "mtime", "updated", "LastModified", "created")
    rows = [(name, *(str(entry.get(mark)) for mark in marks)) for name, entry in sorted(wanted.items())]
    return hashlib.sha256(repr((url, rows)).encode()).hexdigest()[:16]


def _copy(files: Any, wanted: Sequence[tuple[str, dict[str, Any]]], target: Path) -> None:
    """Copies into a folder beside `target` and renames it; leftovers of dead processes are removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    size, free = sum(entry["size"] for _, entry in wanted), shutil.disk_usage(target.parent).free
    if size > free:
        raise UserError(
            f"{target.parent} has {free / 1e9:.1f} GB free, the model needs {size / 1e9:.1f}; set SDZERO_CACHE"
        )
    prefix = f".{target.name}.{socket.gethostname()}."
    for left in target.parent.glob(f"{prefix}*"):
        if not _is_alive(left.name.removeprefix(prefix)):
            shutil.rmtree(left, ignore_errors=True)
    temporary = target.with_name(f"{prefix}{os.getpid()}")
    try:
        temporary.mkdir(exist_ok=True)
        for name, entry in wanted:
            files.get_file(entry["name"], str(temporary / name))
            copied = (temporary / name).stat().st_size
            if copied != entry["size"]:
                raise OSError(f"{name} arrived with {copied} bytes of {entry['size']}")
        with contextlib.suppress(OSError):  # another process was faster: its copy is as good
            temporary.rename(target)
        if not target.is_dir():
            raise OSError(f"cannot write {target}")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def _said_in_one_line(url: str) -> Iterator[None]:
    """Turns whatever a remote file system raises into one line."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{url}: no such remote folder") from None
    except ImportError as error:
        scheme = url.partition("://")[0]
        package = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs"}.get(scheme)
        hint = f"`pip install {package}`" if package else _first_line(error)
        raise UserError(f"{url}: reading {scheme}:// needs {hint}; or copy the folder here and give its path") from None
    except Exception as error:
        raise UserError(
            f"{url} cannot be read ({_first_line(error)}); or copy the folder here and give its path"
        ) from None
