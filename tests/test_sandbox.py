"""The sandbox against hostile programs, as root and as an ordinary user, with and without bubblewrap."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from sdzero_jax.errors import UserError
from sdzero_jax.verifiers import cgroups, sandbox
from tests import hostile

ROOT = Path(__file__).parents[1]
NOBODY = 65534
LINUX = sys.platform == "linux" and shutil.which("prlimit")
needs_bwrap = pytest.mark.skipif(
    not (LINUX and sandbox.find_sandbox()), reason="bubblewrap is not installed or not allowed here"
)
needs_cpp = pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
USES_CPP = {name for name, (response, _, _) in hostile.PROGRAMS.items() if "```c++" in response}


def as_user(user: str) -> list[str]:
    """The command prefix that runs Python as root or as an ordinary user; skips where it cannot."""
    if user == "root":
        if os.getuid() != 0:
            pytest.skip("not running as root")
        return [sys.executable]
    if os.getuid() != 0:
        return [sys.executable]
    prefix = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups", "--"]
    for python in (sys.executable, "/usr/local/bin/python3", "/usr/bin/python3"):
        read = [*prefix, python, "-B", str(ROOT / "tests/hostile.py")]
        try:
            if subprocess.run(read, input="", capture_output=True, text=True, cwd="/").stderr.count("JSONDecodeError"):
                return [*prefix, python, "-B"]
        except OSError:
            continue
    pytest.skip("no Python that an ordinary user may run on this checkout")


# Those that run into a time limit or compile for long.
LONG = (
    *("output_flood", "fork_bomb", "ignores_sigterm", "include_device", "memory_by_children", "stops_itself"),
    *("silent_sleeper", "hangs_in_function", "cpp_redefines_assert", "never_reads"),
)


@functools.cache
def judged(user: str, unsafe: bool, long: bool, folder: str) -> dict:
    """Judges all programs of a kind in one process of that user."""
    names = [n for n in hostile.PROGRAMS if not unsafe or n in hostile.COVERED_WITHOUT_SANDBOX]
    names = [n for n in names if (n in LONG) == long and (shutil.which("g++") or n not in USES_CPP)]
    Path(folder, "kept").write_text("kept")
    os.chmod(folder, 0o777)
    os.chmod(Path(folder, "kept"), 0o666)
    command = [*as_user(user), str(ROOT / "tests/hostile.py"), *(["unsafe"] if unsafe else [])]
    # From the start: what a process adds to its environment later does not show in /proc.
    environment = {**os.environ, "TOKEN": "SECRET"}
    done = subprocess.run(
        command, input=json.dumps(names), capture_output=True, text=True, cwd=folder, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout) | {"stderr": done.stderr}


def programs(names) -> list:
    return [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in names]


@pytest.fixture(scope="module")
def folder():
    # A folder below /tmp itself: pytest's own is closed to other users.
    with tempfile.TemporaryDirectory(prefix="sdzero-canary-") as name:
        yield name


def check(report: dict, name: str) -> None:
    got = report["verdicts"][name]
    wanted = hostile.PROGRAMS[name][2]
    assert wanted in (got["outcome"], got["detail"]), got
    if wanted not in ("correct", "gold_unparseable"):
        assert got["outcome"] == "wrong", got
    assert got["left"] == []
    assert got["unchanged"]
    assert got["next"] == "correct"


@needs_bwrap
@pytest.mark.parametrize("user", ["root", "ordinary"])
@pytest.mark.parametrize("name", programs(hostile.PROGRAMS))
def test_hostile_program(user, name, folder):
    if name in USES_CPP and not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    report = judged(user, False, name in LONG, folder)
    check(report, name)
    if name == "include_passwd":  # not that the file is no C++
        assert "No such file" in report["verdicts"][name]["message"]


@needs_bwrap
@pytest.mark.parametrize("user", ["root", "ordinary"])
def test_the_judge_stays_small_and_the_controls_work(user, folder):
    report = judged(user, False, False, folder)
    assert (report["uid"] == 0) == (user == "root")
    assert report["control"] >= 1, "the search for left processes must see running ones"
    assert report["grown_kib"] < 96 << 10, "kibibytes that the judge grew by over all programs"


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="limits need Linux and prlimit")
@pytest.mark.parametrize("user", ["root", "ordinary"])
@pytest.mark.parametrize("name", programs(hostile.COVERED_WITHOUT_SANDBOX))
def test_limits_alone_stop_what_they_can(user, name, folder):
    if name in USES_CPP and not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    report = judged(user, True, name in LONG, folder)
    check(report, name)
    assert (report["uid"] == 0) == (user == "root")
    assert "not protected" in report["stderr"]


@pytest.mark.skipif(not LINUX, reason="limits need Linux and prlimit")
def test_a_fork_bomb_leaves_room_for_the_next_program(monkeypatch):
    """Without namespaces its dead count until the system's first process has collected them."""
    monkeypatch.setattr(sandbox, "_VARIANTS", ())
    sandbox.find_sandbox.cache_clear()
    try:
        used = sandbox.get_sandbox(unsafe=True)
    finally:
        monkeypatch.undo()
        sandbox.find_sandbox.cache_clear()
    bomb = "import os\nwhile True:\n try: os.fork()\n except OSError: pass"
    assert used.options is None
    assert used.run([used.python, "-I", "-c", bomb], bounds(cpu_s=1, wall_s=2)).stop == "time_limit"
    assert used.run(["/bin/sh", "-c", "/bin/echo one; /bin/echo two"], bounds()).stdout == b"one\ntwo\n"


def test_what_needs_the_sandbox_is_documented():
    text = (ROOT / "docs/VERIFIERS.md").read_text()
    assert hostile.NEEDS_SANDBOX.keys() <= hostile.PROGRAMS.keys()
    for name, reason in hostile.NEEDS_SANDBOX.items():
        assert f"| `{name}` | {reason} |" in text


def test_without_bubblewrap_the_judge_refuses(monkeypatch):
    monkeypatch.setattr(sandbox, "find_sandbox", lambda python="": None)
    with pytest.raises(UserError, match="install bubblewrap") as refusal:
        sandbox.get_sandbox()
    assert "\n" not in str(refusal.value)


def bounds(**changes) -> sandbox.Bounds:
    usual = sandbox.Bounds(2, 4, 256, processes=16, open_files=64, output_bytes=100000, file_bytes=1 << 20)
    return dataclasses.replace(usual, **changes)


@needs_bwrap
def test_a_run_returns_what_the_program_did():
    run = sandbox.get_sandbox().run
    done = run(["/bin/sh", "-c", "cat; echo oops >&2; exit 7"], bounds(), stdin=b"hello")
    assert (done.stdout, done.stderr, done.returncode, done.stop) == (b"hello", b"oops\n", 7, "")
    assert run(["/bin/sh", "-c", "exit 1"], bounds()).returncode == 1
    assert run(["/bin/cat", "/box/a"], bounds(), files={"a": b"\x00\xff"}).stdout == b"\x00\xff"


@needs_bwrap
def test_each_bound_binds():
    run = sandbox.get_sandbox().run
    spin = ["/bin/sh", "-c", "while :; do :; done"]
    assert run(spin, bounds(cpu_s=1)).stop == "time_limit"
    done = run(["/bin/sleep", "9"], bounds(wall_s=0.5))
    assert (done.stop, done.wall_s < 1.5, done.cpu_s < 0.3) == ("time_limit", True, True)
    assert run(["/usr/bin/yes"], bounds()).stop == "output_limit"
    assert len(run(["/usr/bin/yes"], bounds()).stdout) < 300000
    write = ["/bin/sh", "-c", "head -c 3000000 /dev/zero > big; ls -s big >&2; test $(wc -c < big) = 3000000"]
    assert run(write, bounds()).returncode == 1
    assert run(write, bounds(file_bytes=8 << 20)).returncode == 0
    openers = ["/bin/sh", "-c", "ulimit -n; ulimit -v"]
    assert run(openers, bounds(open_files=33, memory_mb=200)).stdout.split() == [
        b"33",
        str(328 << 10).encode(),
    ]


@needs_bwrap
def test_memory_is_watched_where_no_control_group_is(monkeypatch):
    monkeypatch.setattr("sdzero_jax.verifiers.cgroups.writable_groups", dict)
    found = sandbox.get_sandbox()
    code = "import os, time\nfor i in range(6):\n if not os.fork(): x = b'x' * (60 << 20); time.sleep(9)\ntime.sleep(9)"
    command = [found.python, "-I", "-c", code]
    assert found.run(command, bounds(wall_s=6)).stop == "memory"
    assert found.run(command, bounds(memory_mb=1000, wall_s=2)).stop == "time_limit"


@needs_bwrap
def test_the_environment_is_a_list_of_ours(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    printed = sandbox.get_sandbox().run(["/usr/bin/env"], bounds()).stdout.decode()
    assert {line.partition("=")[0] for line in printed.splitlines()} <= {
        *sandbox.ENVIRONMENT,
        "PWD",
        "SHLVL",
        "_",
    }


@needs_bwrap
def test_no_descriptor_of_the_judge_is_left_open():
    run = sandbox.get_sandbox().run
    run(["/bin/true"], bounds())
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        run(["/bin/echo", "x"], bounds(), stdin=b"x", files={"f": b"y"})
        run(["/usr/bin/yes"], bounds())
    assert len(os.listdir("/proc/self/fd")) == before


@needs_bwrap
def test_a_judge_that_is_killed_leaves_no_program_running():
    """Its control groups, which it cannot remove itself, are removed by the next judge."""
    mark = f"mark-{os.getpid()}"
    code = (
        "import threading, time; from sdzero_jax.verifiers import sandbox as s; "
        f"s.ENVIRONMENT['MARK'] = {mark!r}; b = s.Bounds(60, 60, 256, 16, 64, 1000, 1000); "
        "threading.Thread(target=s.get_sandbox().run, args=(['/bin/sleep', '60'], b)).start(); "
        "time.sleep(9)"
    )
    judge = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 20
    while not hostile.marked_processes(mark.encode()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    assert hostile.marked_processes(mark.encode())
    judge.kill()
    judge.wait()
    while hostile.marked_processes(mark.encode()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert hostile.marked_processes(mark.encode()) == []
    cgroups.writable_groups.cache_clear()
    for folder, _ in cgroups.writable_groups().values():
        assert not list(folder.glob(f"sdzero-*-{judge.pid}-*"))
