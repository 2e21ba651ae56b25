"""Fetching a named problem set (or reading it from a folder) and writing it as a prepared set.

DATA_DIR/NAME holds the TFDS files and prepared.json: source, the commit that was fetched, a checksum of
every file read, counts, what was skipped and why. A prepared set is written whole or not at all.
Leaves out gated repositories beyond what `hf auth login` gives.
"""

import collections
import hashlib
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from sdzero_jax.data.overlap import find_overlap
from sdzero_jax.data.questions import BadRow, read_rows
from sdzero_jax.data.sets import SETS, NamedSet, Source, convert, named_set
from sdzero_jax.errors import UserError, nearest
from sdzero_jax.examples import Question
from sdzero_jax.files import check_writable, read_json, write_json_atomic

DATA_DIR = "data"
RECORD = "prepared.json"
FORMAT = 1  # of prepared sets; another number is prepared again


def prepare_set(
    name: str,
    *,
    data_dir: str | os.PathLike = DATA_DIR,
    source_dir: str | os.PathLike | None = None,
    revision: str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Prepares one named set. One that is there already is kept: a folder's files are compared by checksum.

    Args:
      name: a key of `sets.SETS`.
      data_dir: where prepared sets live.
      source_dir: a folder with the set's files; None fetches them from the hub, unless the set is there.
      revision: commit (or branch or tag) of the hub's repository (of the first split's, where there are
        several). None is "main"; no commits are known here by heart, so the one that was fetched is recorded.
      force: fetch and rewrite what is there.
    Returns: the record, as in prepared.json, with "directory".
    Raises: UserError for an unknown name, a folder without its files, no network, a wrong checksum, or a
      split without a single question.
    """
    named = named_set(name)
    target = Path(os.path.expanduser(data_dir)) / name
    old = _record(target)
    is_there = old.get("format") == FORMAT and not force
    if is_there and source_dir is None and revision is None:
        return {**old, "directory": str(target)}
    check_writable(target, "give another folder with --to")
    if source_dir is not None:
        source_dir = Path(os.path.expanduser(source_dir))
        files, origin = local_files(named, source_dir), {"folder": str(source_dir)}
    else:
        files, origin = hub_files(named, revision)
    checksums = {
        f"{split}: {path.parent.name}/{path.name}": sha256(path) for split, paths in files.items() for path in paths
    }
    if is_there and old.get("checksums") == checksums and old.get("source") == origin:
        return {**old, "directory": str(target)}
    temporary = target.with_name(f".{name}.{os.getpid()}.tmp")
    try:
        record = _write(named, files, temporary)
        record |= {"source": origin, "licence": named.licence, "checksums": checksums}
        write_json_atomic(temporary / RECORD, record)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {**record, "directory": str(target)}


def open_split(name: str, split: str, *, data_dir: str | os.PathLike = DATA_DIR) -> Sequence[Question]:
    """The questions of a prepared set, read on demand, problems bare of instructions.

    Raises: UserError, which says how to prepare it, for a set or split that is not there or not whole.
    """
    data_dir = Path(os.path.expanduser(data_dir))
    directory = data_dir / named_set(name).name
    command = f"python run.py data prepare {name}"
    if data_dir != Path(DATA_DIR):
        command += f" --to {shlex.quote(str(data_dir))}"
    if not (directory / RECORD).is_file():
        raise UserError(f"problem set {name!r} is not prepared; run: {command}")
    from sdzero_jax.data import tfds_builder

    try:
        counts = dict(_record(directory)["questions"])
        if split in counts:
            return tfds_builder.source(directory, split)
    except Exception as error:  # tfds, protobuf and array_record raise their own
        cause = str(error).split("\n")[0]
        raise UserError(
            f"prepared set {directory} is incomplete ({type(error).__name__}: {cause}); run: {command} --force"
        ) from None
    raise UserError(f"prepared set {name!r} has no split {split!r}{nearest(split, counts)}")


def _record(directory: Path) -> dict[str, Any]:
    """What prepared.json holds; empty where it is missing or broken."""
    try:
        record = read_json(directory / RECORD)
    except UserError:
        return {}
    return record if isinstance(record, dict) else {}


def local_files(named: NamedSet, folder: Path) -> dict[str, list[Path]]:
    """Split -> files found under `folder`, by this project's names or the hub's layout. Raises: UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; wanted one with the files of {named.name}")
    present = sorted(path for path in folder.rglob("*") if path.is_file())
    found = _splits(named, folder, present, lambda source: (*source.local, *source.hub))
    if not any(split in found for split in named.sources):
        patterns = sorted({p for source in named.sources.values() for p in (*source.local, *source.hub)})
        raise UserError(f"{folder}: no files of {named.name}; wanted {' or '.join(patterns)}")
    return found


def _splits(named: NamedSet, folder: Path, present: Sequence[Path], patterns_of) -> dict[str, list[Path]]:
    """The files of each split that has any, and under "companion" those of the companion."""
    sources = named.sources | ({"companion": named.companion} if named.companion else {})
    found = {}
    for split, source in sources.items():
        local = [p for p in patterns_of(source) if p in source.local]
        for patterns in (local, source.hub):  # one spelling or the other, never a mixture
            paths = [path for path in present if any(_matches(path, folder, p) for p in patterns)]
            if paths:
                found[split] = paths
                break
    return found


def _matches(path: Path, folder: Path, pattern: str) -> bool:
    return PurePosixPath(path.relative_to(folder).as_posix()).match(pattern)


def hub_files(named: NamedSet, revision: str | None = None) -> tuple[dict[str, list[Path]], dict[str, Any]]:
    """Fetches a set's files into the hub's cache: split -> files, and {"commits": {repository: commit}}.

    Interrupted downloads go on where they stopped; every file is checked against the hub's checksum.
    """
    sources = named.sources | ({"companion": named.companion} if named.companion else {})
    found: dict[str, list[Path]] = {}
    commits: dict[str, str] = {}
    for split, source in sources.items():
        if not source.hub:
            continue
        own = source.repo == next(iter(named.sources.values())).repo
        wanted = commits.get(source.repo) or (revision if own else None) or "main"  # one commit per repository
        folder, commits[source.repo], files = _fetch(named.name, source, wanted)
        found[split] = [folder / name for name in files]
    return found, {"commits": commits}


def _fetch(name: str, source: Source, revision: str) -> tuple[Path, str, list[str]]:
    import huggingface_hub
    from huggingface_hub import errors

    advice = (
        f"fetch {source.repo} where there is a network (hf download --repo-type dataset {source.repo} "
        f"--local-dir DIR) and run: python run.py data prepare {name} --from DIR"
    )
    try:
        info = huggingface_hub.HfApi().dataset_info(source.repo, revision=revision, files_metadata=True)
        wanted = {
            sibling.rfilename: sibling
            for sibling in info.siblings or ()
            if any(PurePosixPath(sibling.rfilename).match(pattern) for pattern in source.hub)
        }
        if not wanted:
            raise UserError(f"{source.repo}@{info.sha} has none of {', '.join(source.hub)}; give --revision or --from")
        folder = huggingface_hub.snapshot_download(
            source.repo, repo_type="dataset", revision=info.sha, allow_patterns=sorted(wanted)
        )
    except errors.RevisionNotFoundError:
        raise UserError(f"{source.repo} has no revision {revision!r}") from None
    except (errors.GatedRepoError, errors.RepositoryNotFoundError):
        raise UserError(f"{source.repo} is gone or gated; log in with: hf auth login, or {advice}") from None
    except UserError:
        raise
    except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's errors
        raise UserError(f"cannot reach the hub for {source.repo} ({type(error).__name__}); {advice}") from None
    for file, sibling in wanted.items():
        _check_download(Path(folder) / file, sibling, source.repo)
    return Path(folder), info.sha, sorted(wanted)


def _check_download(path: Path, sibling: Any, repo: str) -> None:
    """Compares a file with the hub's checksum: sha256 of large files, git's blob hash of small ones."""
    if sibling.lfs is not None:
        good = sha256(path) == sibling.lfs.sha256
    elif sibling.blob_id is not None:
        data = path.read_bytes()
        good = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == sibling.blob_id
    else:
        good = True
    if not good:
        raise UserError(f"{path}: checksum differs from {repo}'s; remove the file and run the same command again")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _write(named: NamedSet, files: dict[str, list[Path]], directory: Path) -> dict[str, Any]:
    from sdzero_jax.data import tfds_builder

    lent = _companion_rows(files.get("companion", ()))
    reader = _Reader(named, lent)
    splits = {split: paths for split, paths in files.items() if split != "companion"}
    for split, paths in splits.items():
        if next(reader.questions(split, paths), None) is None:
            raise UserError(f"{named.name}, split {split}: no questions in {', '.join(path.name for path in paths)}")
    reader.skipped.clear()
    counts = tfds_builder.write(
        directory,
        {split: (lambda s=split, p=paths: reader.questions(s, p)) for split, paths in splits.items()},
    )
    evaluation = {
        split: tfds_builder.source(directory, split) for split in counts if split not in ("train", "companion")
    }
    shared = find_overlap(tfds_builder.source(directory, "train"), evaluation) if "train" in counts else []
    return {
        "format": FORMAT,
        "name": named.name,
        "questions": counts,
        "skipped": {split: dict(reasons) for split, reasons in reader.skipped.items() if reasons},
        "missing_splits": sorted(named.sources.keys() - counts.keys()),
        "overlap_with_own_train": dict(collections.Counter(pair.evaluation_set for pair in shared)),
    }


class _Reader:
    """Rows of files -> questions, each id once; counts what it leaves out, by reason."""

    def __init__(self, named: NamedSet, lent: dict[str, dict[str, Any]]):
        self._named, self._lent = named, lent
        self.skipped: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)

    def questions(self, split: str, paths: Sequence[Path]) -> Iterator[Question]:
        seen: set[str] = set()
        number = 0
        for path in paths:
            for row in read_rows(path):
                number += 1
                if self._lent and row.get("id") in self._lent:
                    row = {**row, **self._lent[row["id"]]}
                try:
                    question = convert(self._named, row, number, split, path.as_posix())
                except BadRow as error:
                    self.skipped[split][str(error)] += 1
                    continue
                if question is None:
                    continue
                if question.id in seen:
                    self.skipped[split]["repeated id"] += 1
                    continue
                seen.add(question.id)
                yield question


def _companion_rows(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """id -> the fields that only the companion has: tests and how to judge them."""
    names = ("official_tests", "official_tests_complete", "generated_checker", "input_mode")
    return {row["id"]: {n: row[n] for n in names if row.get(n)} for path in paths for row in read_rows(path)}


def known_sets() -> list[str]:
    """Names that `prepare_set` accepts."""
    return sorted(SETS)
