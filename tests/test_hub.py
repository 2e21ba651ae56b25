"""Where a model comes from: folders, remote folders through fsspec, and a hub on this machine.

The hub is a local HTTP server that speaks the part of the hub's interface that a download uses; the client
is huggingface_hub itself, in a process of its own (it reads its settings when it is imported).
"""

import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading
import types

import fsspec
import pytest
from twins import DATA, same_bits

from sdzero_jax.errors import UserError
from sdzero_jax.models import hub, load_pretrained, resolve

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = DATA / "goldens" / "qwen3_tied"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty working folder and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDZERO_CACHE", str(tmp_path / "cache"))


def model_files():
    files = {name: (GOLDEN / name).read_bytes() for name in ("config.json", "model.safetensors")}
    return files | {"tokenizer.json": b"{}", "README.md": b"no", "pytorch_model.bin": b"no", "onnx/config.json": b"no"}


# -------------------------------------------------------------------------------------------- folders


def test_an_existing_folder_wins(tmp_path):
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    assert resolve("org/name") == hub.Source("org/name", pathlib.Path("org/name"), None)
    assert resolve(folder).folder == folder
    revised = tmp_path / "org" / "name@main"
    revised.mkdir()
    assert resolve("org/name@main").folder == pathlib.Path("org/name@main")


def test_a_folder_of_the_hubs_cache_knows_its_commit(tmp_path):
    folder = tmp_path / "models--org--name" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    assert resolve(folder).record() == {"name": str(folder), "revision": COMMIT}


@pytest.mark.parametrize(
    "path, message",
    [
        ("./org/name", "no such folder, and not a hub id"),
        ("/nowhere/name", "no such folder, and not a hub id"),
        ("~/nowhere", "no such folder, and not a hub id"),
        ("name", r"no such folder, and not a hub id \(org/name or org/name@revision\)"),
        ("org/name/", "no such folder"),
        ("a/b/c", "no such folder"),
        ("", "no such folder|is a folder|no config"),
        (pathlib.Path("org/name"), "no such folder, and not a hub id"),
        ("runs/export", "runs/export: no such folder, though runs/ is one; for the hub.*write runs/export@main"),
        ("runs/file", "is a file; give the folder that holds it"),
    ],
)
def test_what_looks_like_a_missing_folder_is_not_looked_up(tmp_path, monkeypatch, path, message):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("the hub was asked"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "file").write_text("")
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(path)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------- remote


@pytest.fixture
def remote():
    """A model folder in fsspec's memory file system."""
    files = fsspec.filesystem("memory")
    for name, data in model_files().items():
        files.pipe(f"/bucket/model/{name}", data)
    yield files
    files.rm("/bucket", recursive=True)


def test_a_remote_folder_is_copied_once_and_again_when_it_changes(remote, tmp_path, monkeypatch):
    _, want = load_pretrained(GOLDEN)
    _, got = load_pretrained("memory://bucket/model")
    assert same_bits(got, want)
    source = resolve("memory://bucket/model")
    assert sorted(file.name for file in source.folder.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert source.folder.parent == tmp_path / "cache" and source.revision in source.folder.name
    fetched = []
    original = type(remote).get_file
    monkeypatch.setattr(type(remote), "get_file", lambda self, *a, **k: fetched.append(a) or original(self, *a, **k))
    assert resolve("memory://bucket/model") == source and not fetched
    remote.pipe("/bucket/model/tokenizer.json", b'{"new": 1}')
    changed = resolve("memory://bucket/model")
    assert len(fetched) == 3 and changed.revision != source.revision
    assert (changed.folder / "tokenizer.json").read_text() == '{"new": 1}'


def test_a_url_of_a_local_folder_works_too(tmp_path):
    _, want = load_pretrained(GOLDEN)
    assert same_bits(load_pretrained(f"file://{GOLDEN}")[1], want)


def test_a_copy_that_breaks_off_leaves_nothing_and_the_next_one_works(remote, tmp_path, monkeypatch):
    original = type(remote).get_file

    def breaks(self, path, local, **kwargs):
        original(self, path, local, **kwargs)
        if path.endswith(".safetensors"):
            pathlib.Path(local).write_bytes(b"half")

    monkeypatch.setattr(type(remote), "get_file", breaks)
    with pytest.raises(UserError, match=r"cannot be read \(OSError: model\.safetensors arrived with 4 bytes of"):
        resolve("memory://bucket/model")
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(type(remote), "get_file", original)
    name = resolve("memory://bucket/model").folder.name
    # What a killed process left is removed by the next copy; what a living one writes is not.
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    host = hub.socket.gethostname()
    leftovers = [tmp_path / "cache" / f".{name}.{host}.{pid}" for pid in (int(dead.stdout), os.getppid())]
    for folder in leftovers:
        folder.mkdir()
    hub.shutil.rmtree(tmp_path / "cache" / name)
    assert resolve("memory://bucket/model").folder.is_dir()
    assert [folder.exists() for folder in leftovers] == [False, True]


def test_a_copy_made_meanwhile_by_another_process_is_taken(remote, monkeypatch):
    source = resolve("memory://bucket/model")
    hub._copy(remote, [("tokenizer.json", remote.info("/bucket/model/tokenizer.json"))], source.folder)
    assert len(list(source.folder.iterdir())) == 3
    assert list(source.folder.parent.iterdir()) == [source.folder]


@pytest.mark.parametrize(
    "url, message",
    [
        ("memory://bucket/other", "no such remote folder"),
        ("memory://bucket", "is not a model folder: it has no config.json"),
        ("carrier-pigeon://coop/model", "cannot be read.*copy the folder here"),
    ],
)
def test_remote_folders_that_are_no_models(remote, url, message):
    with pytest.raises(UserError, match=message) as caught:
        resolve(url)
    assert "\n" not in str(caught.value)


def test_a_scheme_whose_package_is_missing_names_it(monkeypatch):
    def missing(url):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match="reading gs:// needs `pip install gcsfs`; or copy the folder here"):
        resolve("gs://bucket/model")


def test_a_cache_without_room_is_refused_before_the_copy(remote, monkeypatch):
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10))
    with pytest.raises(UserError, match=r"has 0\.0 GB free, the model needs 0\.0; set SDZERO_CACHE"):
        resolve("memory://bucket/model")


# ------------------------------------------------------------------------------------------------ hub


class FakeHub(http.server.BaseHTTPRequestHandler):
    """One repository, org/name: commit COMMIT is main."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    asked: list[tuple[str, str]]

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        type(self).asked.append((self.command, path))
        if path == "/api/models/org/name/revision/main" or path == "/api/models/org/name":
            siblings = [{"rfilename": name} for name in self.files]
            return self.json({"id": "org/name", "sha": COMMIT, "siblings": siblings, "private": False})
        if path == f"/api/models/org/name/tree/{COMMIT}":
            return self.json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in self.files.items()
                ]
            )
        if path.startswith("/api/models/org/name/"):
            return self.error(404, "RevisionNotFound")
        start = f"/org/name/resolve/{COMMIT}/"
        if path.startswith(start) and path.removeprefix(start) in self.files:
            return self.file(self.files[path.removeprefix(start)])
        return self.error(401 if "/api/models/" in path else 404, "RepoNotFound")

    def json(self, value):
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def error(self, status, code):
        self.reply(status, b"{}", {"X-Error-Code": code})

    def file(self, data):
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        part = self.headers.get("Range")
        first = int(part.removeprefix("bytes=").split("-")[0]) if part else 0
        status = 206 if part else 200
        if part:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        self.reply(status, data[first:], headers)

    def reply(self, status, body, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture(scope="module")
def server():
    handler = type("Handler", (FakeHub,), {"files": model_files(), "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.handler = handler
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


FETCH = """
import json, sys
from sdzero_jax.errors import UserError
from sdzero_jax.models import hub
for name in sys.argv[1:]:
    try:
        source = hub.resolve(name)
        print(json.dumps([source.record(), str(source.folder), sorted(p.name for p in source.folder.rglob("*"))]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def fetch(tmp_path, endpoint, *names, **environment):
    """Resolves names in a process whose hub is `endpoint` and whose cache is under tmp_path."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT), **environment}
    settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", FETCH, *names],
        env=os.environ | settings, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_hub_is_fetched_pinned_and_then_needs_no_network(server, tmp_path):
    endpoint = f"http://127.0.0.1:{server.server_port}"
    names = ("org/name", "org/name@main", f"org/name@{COMMIT}", "org/name@v9", "org/missing")
    first, second, third, revision, missing = fetch(tmp_path, endpoint, *names)
    for got, name in ((first, names[0]), (second, names[1]), (third, names[2])):
        record, _, files = got
        assert record == {"name": name, "revision": COMMIT}
        assert files == ["config.json", "model.safetensors", "tokenizer.json"]  # and nothing of a subfolder
    assert revision == "org/name has no revision 'v9' on the hub"
    assert "org/missing is no folder here, and on the hub it is missing, private or gated" in missing
    asked = [path for method, path in server.handler.asked if method == "GET" and "/resolve/" in path]
    assert sorted(path.rpartition("/")[2] for path in asked) == ["config.json", "model.safetensors", "tokenizer.json"]
    _, want = load_pretrained(GOLDEN)
    assert same_bits(load_pretrained(first[1])[1], want)
    # The same cache without a network: what is there is there, what is not is one line of advice.
    dead = "http://127.0.0.1:9"
    for setting in ({}, {"HF_HUB_OFFLINE": "1"}):
        again, other = fetch(tmp_path, dead, "org/name", "org/other@v2", **setting)
        assert again[0] == {"name": "org/name", "revision": COMMIT}
        assert "org/other is no folder here and cannot be had from the hub" in other
        assert "run `hf download org/other --revision v2 --local-dir DIR`, then give DIR" in other
        assert "\n" not in other


def test_only_what_a_model_needs_is_asked_for(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(repo, **arguments):
        asked.update(arguments, repo=repo)
        return str(tmp_path / "models--org--name" / "snapshots" / COMMIT)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve("org/name@v1.0").revision == COMMIT
    assert (asked["repo"], asked["revision"], asked["ignore_patterns"]) == ("org/name", "v1.0", ["*/*"])
    assert not any("bin" in pattern or pattern == "*" for pattern in asked["allow_patterns"])


def test_whatever_the_client_raises_is_one_line(monkeypatch):
    def fails(*arguments, **keywords):
        raise OSError(28, "No space left on device\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(UserError, match="No space left") as caught:
        resolve("org/name")
    assert "\n" not in str(caught.value)


def test_names_do_not_reach_the_hub_library(tmp_path):
    """Folders need neither huggingface_hub nor fsspec."""
    code = "import sys; from sdzero_jax.models import load_pretrained; load_pretrained(sys.argv[1]); " \
           "print([m for m in ('huggingface_hub', 'fsspec', 'transformers', 'torch') if m in sys.modules])"  # fmt: skip
    out = subprocess.run(
        [sys.executable, "-c", code, str(GOLDEN)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = out.stdout.strip()
    assert "huggingface_hub" not in loaded and "transformers" not in loaded and "torch" not in loaded, loaded
