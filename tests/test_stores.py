"""Run directories on object stores: parts and manifest, failing calls, machines that take over, a whole run."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import urllib.parse
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from sdzero_jax import stores
from sdzero_jax.errors import Fault, UserError
from sdzero_jax.files import append_jsonl, read_jsonl_repaired
from tests.object_store import FakeStore

ROOT = pathlib.Path(__file__).parents[1]


class ObjectStore(MemoryFileSystem):
    """Objects whole: no append, no rename, no handle to write through; the next `failing` calls fail."""

    protocol = "objects"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    failing = 0

    def _open(self, path, mode="rb", **kwargs):
        assert mode in ("rb", "wb"), f"an object store cannot open with mode {mode}"
        if ObjectStore.failing:
            ObjectStore.failing -= 1
            raise OSError("the store is not there")
        return super()._open(path, mode, **kwargs)

    def mv(self, *_, **__):
        raise NotImplementedError("an object store cannot rename")

    cp_file = mv


fsspec.register_implementation("objects", ObjectStore, clobber=True)
PLACE = "objects://bucket/run/"  # how the names of its objects begin


@pytest.fixture
def url(monkeypatch):
    ObjectStore.store.clear()
    ObjectStore.failing = 0
    monkeypatch.setattr(stores, "WAITS", (0.0,) * 5)
    return "objects://bucket/run"


def names():
    return sorted(name.removeprefix(PLACE) for name in ObjectStore.store)


def test_lines_go_up_as_numbered_parts_and_come_back_in_order(url, tmp_path):
    mirror = stores.Mirror(url, tmp_path / "one")
    mirror.pull()
    lines = tmp_path / "one" / "collect" / "traces.jsonl"
    for number in range(3):
        append_jsonl(lines, [{"number": number, "kind": kind} for kind in "ab"])
        mirror.push(lines)
    parts = [name for name in names() if "traces.jsonl." in name]
    assert [part.rsplit("-", 1)[0] for part in parts] == [f"collect/traces.jsonl.0000{n}" for n in range(3)]
    assert all(len(ObjectStore.store[PLACE + part].getvalue().splitlines()) == 2 for part in parts)
    other = stores.Mirror(url, tmp_path / "two")
    other.pull()
    assert (tmp_path / "two" / "collect" / "traces.jsonl").read_bytes() == lines.read_bytes()
    # The machine that took over goes on with the next part.
    append_jsonl(tmp_path / "two" / "collect" / "traces.jsonl", [{"number": 3}])
    other.push(tmp_path / "two")
    mirror.pull()
    assert [line["number"] for line in read_jsonl_repaired(lines)[0]] == [0, 0, 1, 1, 2, 2, 3]
    assert len([name for name in names() if "traces.jsonl." in name]) == 4


def test_a_rewritten_file_replaces_its_parts(url, tmp_path):
    mirror = stores.Mirror(url, tmp_path)
    lines = tmp_path / "metrics.jsonl"
    append_jsonl(lines, [{"step": 1}])
    mirror.push(tmp_path)
    append_jsonl(lines, [{"step": 2}])
    mirror.push(tmp_path)
    lines.write_text('{"step": 1}\n{"step": 5}\n')  # what a resumed run does with rows after its checkpoint
    mirror.push(tmp_path)
    assert len(names()) == 2, names()  # one part and the manifest
    lines.unlink()
    mirror.pull()
    assert lines.read_text() == '{"step": 1}\n{"step": 5}\n'


def test_what_was_not_uploaded_is_gone_after_a_crash_and_what_was_is_whole(url, tmp_path):
    mirror = stores.Mirror(url, tmp_path)
    (tmp_path / "done.json").write_text("{}")
    mirror.push(tmp_path)
    (tmp_path / "done.json").write_text("[]")
    (tmp_path / "later.json").write_text("{}")
    (tmp_path / ".lock").write_text("")
    stores.Mirror(url, tmp_path).pull()
    assert (tmp_path / "done.json").read_text() == "{}"
    assert not (tmp_path / "later.json").exists() and (tmp_path / ".lock").exists()


def test_parts_that_no_manifest_names_do_not_count(url, tmp_path, monkeypatch):
    mirror = stores.Mirror(url, tmp_path / "one")
    lines = tmp_path / "one" / "a.jsonl"
    append_jsonl(lines, [{"n": 0}])
    mirror.push(lines)
    append_jsonl(lines, [{"n": 1}])
    write = mirror._write

    def crash_at_the_manifest(name, data):
        if name == stores.MANIFEST:
            raise KeyboardInterrupt
        write(name, data)

    monkeypatch.setattr(mirror, "_write", crash_at_the_manifest)
    with pytest.raises(KeyboardInterrupt):
        mirror.push(lines)
    other = stores.Mirror(url, tmp_path / "two")
    other.pull()
    assert (tmp_path / "two" / "a.jsonl").read_text() == '{"n": 0}\n'


@pytest.mark.parametrize("then", ["[2]", "[1]"])
def test_a_manifest_that_was_not_written_is_written_by_the_next_push(url, tmp_path, monkeypatch, then):
    mirror = stores.Mirror(url, tmp_path / "one")
    file = tmp_path / "one" / "a.json"
    file.parent.mkdir()
    file.write_text("[1]")
    mirror.push(file)
    file.write_text("[2]")
    write = mirror._write

    def fail_at_the_manifest(name, data):
        if name == stores.MANIFEST:
            raise Fault("the store is not there")
        write(name, data)

    with monkeypatch.context() as patch, pytest.raises(Fault):
        patch.setattr(mirror, "_write", fail_at_the_manifest)
        mirror.push(file)
    file.write_text(then)  # the same again, or as it was before
    mirror.push(file)
    stores.Mirror(url, tmp_path / "two").pull()
    assert (tmp_path / "two" / "a.json").read_text() == then


def test_three_failing_calls_are_repeated(url, tmp_path, capsys):
    mirror = stores.Mirror(url, tmp_path)
    (tmp_path / "a.json").write_text("{}")
    ObjectStore.failing = 3
    mirror.push(tmp_path)
    assert capsys.readouterr().err.count("the store is not there") == 3
    assert len(names()) == 2


def test_a_store_that_stays_away_is_one_line(url, tmp_path):
    mirror = stores.Mirror(url, tmp_path)
    (tmp_path / "a.json").write_text("{}")
    ObjectStore.failing = 100
    with pytest.raises(Fault, match=r"cannot write a.json.* after 6 calls .*the same command goes on"):
        mirror.push(tmp_path)
    ObjectStore.failing = 0
    mirror.push(tmp_path)
    assert len(names()) == 2


def test_a_changed_byte_on_the_store_is_noticed(url, tmp_path):
    mirror = stores.Mirror(url, tmp_path)
    (tmp_path / "a.json").write_text("[1]")
    mirror.push(tmp_path)
    part = next(name for name in ObjectStore.store if "a.json" in name)
    MemoryFileSystem.pipe_file(mirror._store, part, b"[2]")
    (tmp_path / "a.json").unlink()
    with pytest.raises(Fault, match=r"a\.json: what the store holds is not what was written"):
        mirror.pull()


def test_an_emptied_store_does_not_delete_the_mirror(url, tmp_path):
    mirror = stores.Mirror(url, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a.json").write_text("[1]")
    mirror.push(tmp_path / "run")
    ObjectStore.store.clear()
    stores.Mirror(url, tmp_path / "run").pull()
    assert (tmp_path / "run.aside" / "a.json").read_text() == "[1]" and not (tmp_path / "run").exists()


def test_a_mirror_belongs_to_one_process(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stores, "SCHEMES", ("objects",))
    monkeypatch.setattr(stores, "_mirrors", {})
    with contextlib.ExitStack() as held, contextlib.ExitStack() as held_by_another:
        monkeypatch.setattr(stores, "_held", held)
        folder = stores.local(url)
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("not uploaded yet")
        assert stores.local(url) == folder
        monkeypatch.setattr(stores, "_mirrors", {})
        monkeypatch.setattr(stores, "_held", held_by_another)
        with pytest.raises(UserError, match=f"another process is running in {url}"):
            stores.local(url)
        assert (folder / "metrics.jsonl").exists()


def test_local_places_are_left_alone(tmp_path):
    assert stores.local("runs/demo") == pathlib.Path("runs/demo")
    assert stores.local("~/demo") == pathlib.Path.home() / "demo"
    assert stores.remote(tmp_path / "a") == tmp_path / "a"
    stores.push(tmp_path)


@pytest.mark.parametrize("place", ["ftp://host/run", "gs://", "gs:///", "s3://bucket/run"])
def test_unknown_stores_are_refused(place):
    with pytest.raises(UserError, match=r"no place for a run; wanted a folder or gs://\.\.\."):
        stores.local(place)


@pytest.mark.parametrize("scheme, writes", [("gs", True), ("s3", False)])
def test_the_stores_that_are_taken_are_those_that_orbax_writes_arrays_to(scheme, writes):
    from orbax.checkpoint._src.serialization import tensorstore_utils

    assert (scheme in stores.SCHEMES) == writes
    with contextlib.nullcontext() if writes else pytest.raises(ValueError, match="should be absolute"):
        tensorstore_utils.build_kvstore_tspec(f"{scheme}://one-bucket/run/1/state", name="w")


# ---------------------------------------------------------------------------------------- checkpoints

SAVES = """
import jax.numpy as jnp
import run
from sdzero_jax import stores
from sdzero_jax.checkpoint import CheckpointConfig, Checkpointer, abstract_like, load_params

def saves(argv):
    folder, state = stores.local("gs://one-bucket/run"), {"w": jnp.ones(4)}
    if argv == ["load"]:
        return load_params(folder / "checkpoints", abstract_like(state["w"]))
    checkpointer = Checkpointer(folder / "checkpoints", CheckpointConfig())
    restored = checkpointer.restore(abstract_like(state))
    print("from step", restored and restored[0])
    try:
        for step in (10, 20, 30):
            checkpointer.save(step, state, {}, {})
    finally:
        checkpointer.close()
    return 0

run.dispatch = saves
raise SystemExit(run.main(__import__("sys").argv[1:]))
"""


class RefusingStore(FakeStore):
    """Answers calls of these methods with 403 where they name a checkpoint from this step on."""

    methods, first = (), 0

    def answer(self, method, path, query, headers, data):
        named = " ".join([path, *query.values(), data[:500].decode("latin1")])
        match = re.search(r"checkpoints/(\d*)", urllib.parse.unquote(named))
        if method in self.methods and match and int(match[1] or self.first) >= self.first:
            return 403, {"error": {"message": "not allowed"}}, {}
        return super().answer(method, path, query, headers, data)


def test_a_store_that_refuses_checkpoints_ends_with_one_line_and_the_last_save(tmp_path):
    pytest.importorskip("gcsfs")
    store = RefusingStore()
    environment = os.environ | store.environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}

    def command(*words):
        command = [sys.executable, "-c", SAVES, *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    def is_one_line(done):
        lines = [line for line in done.stderr.splitlines() if "stopped: " in line]  # Orbax's threads print more
        assert done.returncode == 1 and len(lines) == 1, done.stderr
        assert "gs://one-bucket/run/checkpoints: the store failed" in lines[0]
        assert "the same command goes on from there" in lines[0]

    store.methods, store.first = ("POST", "PUT"), 20
    is_one_line(command())
    store.methods = ("GET",)
    is_one_line(command("load"))  # not "no parameters"
    store.methods = ()
    assert command().stdout == "from step 10\n"
    assert ("one-bucket", "run/checkpoints/30/commit_success.txt") in store.objects


# ---------------------------------------------------------------------------------------- a whole run


def run(store, directory, bucket):
    """The smoke run on the store, from this machine's own folder of mirrors."""
    command = [sys.executable, str(ROOT / "run.py"), str(ROOT / "configs/smoke.py"), "srt.checkpoint.every=2"]
    command += [f"run_dir=gs://{bucket}/runs/one", f"base.cache_dir=gs://{bucket}/cache"]
    environment = os.environ | store.environment | {"JAX_PLATFORMS": "cpu"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(directory.parent / "programs")
    directory.mkdir(exist_ok=True)
    with open(directory / "log", "a") as log:
        return subprocess.Popen(command, cwd=directory, stdout=log, stderr=log, env=environment)


def log_of(directory):
    return (directory / "log").read_text()


def of_the_run(store, bucket):
    """What the store holds of a run: lines, checkpointed bytes' fingerprints, figures."""
    objects = {name: store.objects[bucket, name][0] for name in store.names(bucket)}
    files = {}
    for root in ("runs/one", "cache"):
        for name, record in json.loads(objects[f"{root}/{stores.MANIFEST}"]).items():
            files[f"{root}/{name}"] = b"".join(objects[f"{root}/{part}"] for part in record["parts"])
    lines = {name: data for name, data in files.items() if name.endswith(".jsonl")}
    prints = {
        name: json.loads(data)["fingerprint"]
        for name, data in objects.items()
        if name.endswith("/params/0/record/metadata")
    }
    summary = json.loads(files["runs/one/summary.json"])
    del summary["seconds"]
    return lines, prints, summary, files


@pytest.mark.slow
def test_a_whole_run_on_an_object_store(tmp_path):
    """Killed on one machine and finished on another, with calls that fail: equal to one that was left alone."""
    pytest.importorskip("gcsfs")
    store = FakeStore()
    assert run(store, tmp_path / "quiet", "quiet-bucket").wait() == 0, log_of(tmp_path / "quiet")
    lines, prints, summary, files = of_the_run(store, "quiet-bucket")
    assert len(prints) >= 3 and "runs/one/report/report.html" in files and "runs/one/collect/traces.jsonl" in lines
    parts = [name for name in store.names("quiet-bucket") if "collect/traces.jsonl." in name]
    assert len(parts) > 1, "the traces came in one piece"
    assert not any("cop" in path or "rewrite" in path for _, path in store.calls)

    process = run(store, tmp_path / "first", "other-bucket")
    while "== srt" not in log_of(tmp_path / "first") and process.poll() is None:
        time.sleep(0.05)
    while not any("srt/checkpoints/2/" in name for name in store.names("other-bucket")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    store.failing = 3
    assert run(store, tmp_path / "second", "other-bucket").wait() == 0, log_of(tmp_path / "second")
    assert store.failing == 0
    assert "== collect" not in log_of(tmp_path / "second"), "collection was finished before the kill"
    assert of_the_run(store, "other-bucket")[:3] == (lines, prints, summary)
