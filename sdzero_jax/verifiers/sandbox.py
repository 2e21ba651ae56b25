"""Runs one untrusted program: bubblewrap, limits, a cap on its output, everything killed at the end.

Layers, from the outside in: control groups (memory, number of processes) where they can be written;
an unprivileged user of its own when we are root; bubblewrap (own process, network, user and mount
namespaces; only /usr and the interpreter are visible, read-only; one small folder in memory is
writable); resource limits; and this process as the watcher of time, output and memory. Nothing of
a program is ever written to the real file system. Leaves out: system call filters, and anything but Linux.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import pwd
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sdzero_jax.errors import UserError
from sdzero_jax.verifiers.cgroups import Group

MIB = 1 << 20
TICK_S = 0.05  # how often the watcher looks at memory where no control group does
STARVED = 4.0  # a run may take so many times its wall-clock limit longer where others hold the cores
GRACE_S = 5.0  # how long killed processes may take to vanish
HOME = "/tmp"  # the program's folder, inside
BOX = "/box"  # where the given files lie, inside, read-only
INSTALL = "install bubblewrap (apt-get install bubblewrap) on a system with user namespaces"
NOT_PROTECTED = (
    "files that this user can read or write, the network, other processes of this user, processes that detach"
)

ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": HOME,
    "TMPDIR": HOME,
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
# bubblewrap and its helpers fail with status 1; a program's own 1 is passed on as another number.
_ONE = 93
_INIT = f'"$@"; c=$?; [ $c = 1 ] && exit {_ONE}; exit $c'


class SandboxError(Exception):
    """The sandbox itself failed: no verdict about the program."""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What one run may use. Seconds; mebibytes; bytes."""

    cpu_s: float
    wall_s: float
    memory_mb: int
    processes: int
    open_files: int
    output_bytes: int
    file_bytes: int


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended. `stop` is "", or why it was ended: time_limit, memory, output_limit, ended."""

    stdout: bytes
    stderr: bytes
    returncode: int
    stop: str
    cpu_s: float
    wall_s: float


@dataclasses.dataclass(frozen=True)
class Sandbox:
    """A way to run programs that was tried and works; `options` are bubblewrap's, None without it."""

    options: tuple[str, ...] | None
    python: str

    def start(
        self,
        command: Sequence[str],
        bounds: Bounds,
        *,
        files: Mapping[str, bytes] | None = None,
        stdin: bytes | int = b"",
        stdout: int | None = None,
    ) -> "Running":
        """Starts a command; `files` appear under BOX. `stdin` and `stdout` may be open descriptors
        (to connect two programs); the caller closes its copies."""
        return Running(self, command, bounds, files or {}, stdin, stdout)

    def run(self, command: Sequence[str], bounds: Bounds, **kwargs) -> Result:
        """Runs a command to its end and returns its result. Raises SandboxError."""
        with self.start(command, bounds, **kwargs) as running:
            return supervise([running])[0]


# --- finding a sandbox ------------------------------------------------------------------------------


def sandbox_user() -> int | None:
    """The user id that programs run under when we are root: one that nobody has; None when not root."""
    if os.geteuid() != 0:
        return None
    for uid in range(64537, 65000):
        try:
            pwd.getpwuid(uid)
        except KeyError:
            return uid
    raise SandboxError("no free user id between 64537 and 65000")


def _system_options() -> list[str]:
    """Read-only views of what compilers and interpreters need, and nothing else."""
    options = ["--ro-bind", "/usr", "/usr"]
    for path in ("/bin", "/sbin", "/lib", "/lib64", "/lib32"):
        if os.path.islink(path):
            options += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            options += ["--ro-bind", path, path]
    for path in ("/etc/alternatives", "/etc/ld.so.cache"):
        if os.path.exists(path):
            options += ["--ro-bind", path, path]
    options += ["--dir", "/dev", "--symlink", HOME, "/dev/shm", "--symlink", "/proc/self/fd", "/dev/fd"]
    for name in ("null", "zero", "full", "random", "urandom"):
        options += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        options += ["--symlink", f"/proc/self/fd/{number}", f"/dev/{name}"]
    return options


_ALONE = (
    *("--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"),
    *("--unshare-cgroup-try", "--die-with-parent", "--new-session", "--as-pid-1"),
)
# From the strictest on: older versions lack --disable-userns, some containers forbid a new /proc.
_VARIANTS = (
    ("--disable-userns", "--proc", "/proc"),
    ("--proc", "/proc"),
    ("--dir", "/proc"),
)
_TRIAL = Bounds(10.0, 20.0, 1024, 16, 64, 1 << 16, 1 << 20)


def _python_options(python: str) -> tuple[str, ...]:
    """Binds the interpreter's installation when it lies outside /usr."""
    if python.startswith("/usr/"):
        return ()
    prefix = str(Path(python).parents[1])
    return ("--ro-bind", prefix, prefix)


def _pythons() -> list[str]:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    own = os.path.join(sys.base_prefix, "bin", version)
    return [path for path in (own, "/usr/local/bin/python3", "/usr/bin/python3") if os.path.exists(path)]


@functools.cache
def find_sandbox(python: str = "") -> Sandbox | None:
    """Returns the strictest sandbox that works here, found by running Python in it; None if none does."""
    if not (shutil.which("bwrap") and shutil.which("prlimit")):
        return None
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        return None
    for variant in _VARIANTS:
        for candidate in [python] if python else _pythons():
            options = (*_ALONE, *_system_options(), *_python_options(candidate), *variant)
            sandbox = Sandbox(options, candidate)
            with contextlib.suppress(SandboxError):
                if sandbox.run([candidate, "-I", "-c", "print(6 * 7)"], _TRIAL).stdout == b"42\n":
                    return sandbox
    return None


def get_sandbox(python: str = "", unsafe: bool = False) -> Sandbox:
    """Returns the sandbox, or with `unsafe` limits alone where there is none. Raises UserError."""
    found = find_sandbox(python)
    if found:
        return found
    if not unsafe:
        raise UserError(
            f"judging programs needs bubblewrap, which does not work here: {INSTALL}, "
            "or set problems.graders.code.unsafe_without_sandbox=true to run them with limits only"
        )
    if not shutil.which("prlimit") or (os.geteuid() == 0 and not shutil.which("setpriv")):
        raise UserError("judging programs needs prlimit and setpriv of util-linux: install util-linux")
    return _unsafe(python)


@functools.cache
def _unsafe(python: str) -> Sandbox:
    print(f"warning: programs run without a sandbox; not protected: {NOT_PROTECTED}", file=sys.stderr)
    for candidate in [python] if python else _pythons():
        with contextlib.suppress(SandboxError):
            sandbox = Sandbox(None, candidate)
            if sandbox.run([candidate, "-I", "-c", "print(6 * 7)"], _TRIAL).stdout == b"42\n":
                return sandbox
    raise UserError("no Python that an unprivileged user may run: install python3 in /usr")


# --- one run ----------------------------------------------------------------------------------------


class Running:
    """A started program. Use `with`: leaving it kills whatever is left and frees its resources."""

    def __init__(self, sandbox, command, bounds, files, stdin, stdout):
        self.bounds = bounds
        self.sandboxed = sandbox.options is not None
        self.stop = ""
        self.captured: dict[int, bytearray] = {}  # descriptor -> what came out of it
        self.usage = None
        self.returncode: int | None = None
        self.starved = 0.0
        self._mark = secrets.token_hex(16)
        self._folder: str | None = None
        self._info = -1
        self._init: int | None = None  # the namespace's first process, once asked for
        self._killed: set[int] = set()  # without a sandbox: processes found by their mark
        with contextlib.ExitStack() as stack:
            self.group = stack.enter_context(Group(bounds.memory_mb * MIB, bounds.processes + 8))
            stack.callback(self._close)
            with contextlib.ExitStack() as given:
                self._launch(sandbox, command, files, stdin, stdout, given)
            self._cleanup = stack.pop_all()

    def _launch(self, sandbox, command, files, stdin, stdout, given):
        keep = []  # descriptors that the child inherits

        def inherit(fd: int) -> int:
            given.callback(os.close, fd)
            keep.append(fd)
            return fd

        if isinstance(stdin, bytes):
            stdin = inherit(_sealed(stdin))
        self.stderr_fd, stderr = _pipe(given)
        self.captured[self.stderr_fd] = bytearray()
        self.stdout_fd = -1
        if stdout is None:
            self.stdout_fd, stdout = _pipe(given)
            self.captured[self.stdout_fd] = bytearray()
        environment = dict(ENVIRONMENT)
        if self.sandboxed:
            self._info, info = _pipe(given)
            keep.append(info)
            inner = ["bwrap", *sandbox.options, "--info-fd", str(info)]
            inner += ["--perms", "0777", "--size", str(self.bounds.file_bytes), "--tmpfs", HOME]
            for name, content in files.items():
                inner += [
                    "--perms",
                    "0555",
                    "--ro-bind-data",
                    str(inherit(_sealed(content))),
                    f"{BOX}/{name}",
                ]
            inner += [
                "--remount-ro",
                "/",
                "--chdir",
                HOME,
                "--",
                "/bin/sh",
                "-c",
                _INIT,
                "init",
                *self._limits(),
            ]
            inner += command
            cwd = "/"
        else:
            cwd = self._folder = _folder(files)
            inner = ["/bin/sh", "-c", _INIT, "init", *self._limits()]
            inner += [part.replace(BOX + "/", f"{cwd}/box/") for part in command]
            environment |= {"HOME": cwd, "TMPDIR": cwd, "SDZERO_RUN": self._mark}
        # If the judge dies in the moments before bubblewrap watches it, nothing may start.
        inner = ["/bin/sh", "-c", f'[ $PPID = {os.getpid()} ] && exec "$@"', "alive", *inner]
        uid = sandbox_user()
        if uid is not None:
            ids = ["--reuid", str(uid), "--regid", str(uid), "--clear-groups", "--no-new-privs"]
            inner = ["setpriv", *ids, "--pdeathsig", "KILL", "--", *inner]
        elif shutil.which("setpriv"):
            inner = ["setpriv", "--pdeathsig", "KILL", "--", *inner]
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            self.group.enter_command(inner),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=environment,
            cwd=cwd,
            pass_fds=keep,
            start_new_session=True,
        )
        self.pidfd = os.pidfd_open(self.process.pid)

    def _limits(self) -> list[str]:
        bounds = self.bounds
        cpu = max(1, -int(-bounds.cpu_s // 1))
        return [
            "prlimit",
            f"--cpu={cpu}:{cpu + 1}",
            # Libraries and stacks take address space that the problem's limit does not mean.
            f"--as={(bounds.memory_mb + 128) * MIB}",
            f"--stack={min(256, max(8, bounds.memory_mb // 4)) * MIB}",
            f"--nproc={bounds.processes}",
            f"--nofile={bounds.open_files}",
            f"--fsize={bounds.file_bytes}",
            "--core=0",
            "--",
        ]

    # The watcher's side.

    def read(self, fd: int) -> bool:
        """Takes what a pipe holds; returns False at its end."""
        while True:
            try:
                chunk = os.read(fd, 1 << 16)
            except BlockingIOError:
                return True
            if not chunk:
                return False
            self.captured[fd] += chunk
            if sum(map(len, self.captured.values())) > self.bounds.output_bytes:
                self.kill("output_limit")
                return False

    def kill(self, reason: str = "") -> None:
        """Ends every process of this run; the first reason given is kept."""
        if self.returncode is None:
            self.stop = self.stop or reason
        if self.sandboxed:
            # The end of the namespace's first process is the end of all of them.
            init = self._init_pid()
            try:
                if init is None:
                    raise ProcessLookupError
                fd = os.pidfd_open(init)
                try:
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                finally:
                    os.close(fd)
            except OSError:
                self._kill_group()
        else:
            self._kill_marked()
            self._kill_group()

    def _kill_group(self) -> None:
        if self.returncode is None:
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def _init_pid(self) -> int | None:
        if self.returncode is not None:
            return None
        with contextlib.suppress(OSError, ValueError, KeyError):
            self._init = int(json.loads(os.read(self._info, 4096))["child-pid"])
        return self._init

    def _kill_marked(self) -> None:
        """Without namespaces: by the mark in the environment that every descendant inherits."""
        mark = f"SDZERO_RUN={self._mark}".encode()
        for _ in range(20):
            found = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _has_mark(pid, mark)]
            self._killed |= set(found)
            for pid in found:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            if not found:
                return
            time.sleep(0.005)

    def _tasks(self) -> Iterator[tuple[str, bool]]:
        """Folders in /proc of its live threads, and whether each is the first of its process."""
        waiting = [self.process.pid]
        while waiting:
            pid = waiting.pop()
            with contextlib.suppress(OSError, ValueError):
                for task in os.listdir(f"/proc/{pid}/task"):
                    folder = f"/proc/{pid}/task/{task}"
                    waiting += map(int, Path(folder, "children").read_text().split())
                    yield folder, int(task) == pid

    def over_memory(self) -> bool:
        """True when its processes together hold too much; looked at only where no control group is."""
        if self.group.limits_memory or time.monotonic() - self.started < TICK_S:
            return False
        return self.resident_bytes() > (self.bounds.memory_mb + 32) * MIB

    def resident_bytes(self) -> int:
        """Memory of all its processes that no file backs."""
        total = 0
        for folder, first in self._tasks():
            with contextlib.suppress(OSError, ValueError):
                if first:
                    _, resident, shared, *_ = Path(folder, "statm").read_text().split()
                    total += max(0, int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
        return total

    def late(self) -> bool:
        """True when it had its wall-clock time. Time that it was ready to run but other programs had the
        cores does not count (a busy machine is not its fault), up to STARVED times its own."""
        bounds = self.bounds
        wall = time.monotonic() - self.started
        if wall <= bounds.wall_s:
            return False
        used = waited = 0.0
        for folder, _ in self._tasks():
            with contextlib.suppress(OSError, ValueError):
                on_core, ready, *_ = Path(folder, "schedstat").read_text().split()
                used, waited = used + int(on_core) * 1e-9, waited + int(ready) * 1e-9
        self.starved = max(self.starved, min(waited, STARVED * bounds.wall_s))
        return used > bounds.cpu_s or wall > bounds.wall_s + self.starved

    def reap(self) -> None:
        """Collects the exit status; with a sandbox no process of it exists from here on."""
        if self.returncode is not None:
            return
        _, status, self.usage = os.wait4(self.process.pid, 0)
        self.wall_s = time.monotonic() - self.started
        self.returncode = self.process.returncode = os.waitstatus_to_exitcode(status)
        if not self.sandboxed:
            self._kill_marked()
            self._await_killed()
        self.group.kill()

    def _await_killed(self) -> None:
        """Waits until the system's first process has collected the dead: till then they count against the
        number of processes, and the next program could not start any."""
        deadline = time.monotonic() + GRACE_S
        while any(os.path.exists(f"/proc/{pid}") for pid in self._killed) and time.monotonic() < deadline:
            time.sleep(0.01)

    def result(self) -> Result:
        """Reads the run's end. Raises SandboxError when the sandbox and not the program failed."""
        stdout = bytes(self.captured.get(self.stdout_fd, b""))
        stderr = bytes(self.captured[self.stderr_fd])
        cpu = self.usage.ru_utime + self.usage.ru_stime
        stop, code = self.stop, self.returncode
        if stop in ("", "ended") and self.group.out_of_memory():
            stop = "memory"
        if not stop and code == 1:
            lines = stderr.decode("utf-8", "replace").strip().splitlines()
            raise SandboxError(lines[-1][:300] if lines else "the sandbox did not start")
        if not stop and code < 0:
            raise SandboxError(f"the sandbox was ended by signal {-code}")
        code = 1 if code == _ONE else code
        if stop in ("", "ended"):
            if cpu > self.bounds.cpu_s or code == 128 + signal.SIGXCPU:
                stop = "time_limit"
            elif code == 128 + signal.SIGXFSZ:
                stop = "output_limit"
        return Result(stdout, stderr, code, stop, cpu, self.wall_s)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._cleanup.close()

    def _close(self) -> None:
        if getattr(self, "process", None) is not None:
            if self.returncode is None:
                self.kill()
                if not select.select([self.pidfd], [], [], GRACE_S)[0]:
                    self._kill_group()
                self.reap()
            os.close(self.pidfd)
        for fd in [*self.captured, self._info]:
            if fd >= 0:
                os.close(fd)
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)


def supervise(runs: Sequence[Running], leader: Running | None = None) -> list[Result]:
    """Watches runs until all have ended, ends those that pass a bound, and returns their results.

    When `leader` ends, the others are ended too (their stop is then "ended").
    """
    poller = select.poll()
    owner: dict[int, Running] = {}
    for run in runs:
        for fd in (run.pidfd, *run.captured):
            owner[fd] = run
            poller.register(fd, select.POLLIN)
    alive = list(runs)
    killed_at: dict[Running, float] = {}
    while alive:
        now = time.monotonic()
        for run in alive:
            if run.stop:
                if now - killed_at.setdefault(run, now) > GRACE_S:
                    run._kill_group()  # the gentler way did not work
            elif run.late():
                run.kill("time_limit")
            elif run.over_memory():
                run.kill("memory")
        next_stop = min(run.started + run.bounds.wall_s + run.starved for run in alive) - now
        watching = any(run.stop or not run.group.limits_memory for run in alive)
        timeout = min(TICK_S, max(next_stop, 0.01)) if watching else max(next_stop, 0.01)
        for fd, _ in poller.poll(timeout * 1000):
            run = owner[fd]
            if fd != run.pidfd:
                if not run.read(fd):
                    poller.unregister(fd)
                continue
            run.reap()
            poller.unregister(fd)
            alive.remove(run)
            for other in alive if run is leader else ():
                other.kill("ended")
    for run in runs:
        for fd in () if run.stop else run.captured:  # what was written just before the end
            run.read(fd)
    return [run.result() for run in runs]


# --- small parts ------------------------------------------------------------------------------------


def _pipe(given: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe whose reading end does not block and whose writing end is closed with `given`."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    given.callback(os.close, writing)
    return reading, writing


def _sealed(content: bytes) -> int:
    """Content as a descriptor that can be read and sought but by no one written."""
    fd = os.memfd_create("input", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def _folder(files: Mapping[str, bytes]) -> str:
    """A fresh folder for a run without a sandbox, owned by the user that the program runs under."""
    folder = tempfile.mkdtemp(prefix="sdzero-")
    uid = sandbox_user()
    if uid is not None:
        os.chown(folder, uid, uid)
    box = Path(folder, "box")
    box.mkdir()
    for name, content in files.items():
        (box / name).write_bytes(content)
        (box / name).chmod(0o755)
    return folder


def _has_mark(pid: int, mark: bytes) -> bool:
    try:
        return mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
