"""Control groups for one run: memory and number of processes, where this process may make them.

Children of our own group only, so a run never gets more than we have. Versions 1 and 2. Where they
cannot be written (the usual case for an ordinary user and in containers) a Group does nothing.
"""

import contextlib
import functools
import os
import secrets
import shlex
import signal
import time
from pathlib import Path

_FILES = {  # controller -> (limit file, version 1; limit file, version 2)
    "memory": ("memory.limit_in_bytes", "memory.max"),
    "pids": ("pids.max", "pids.max"),
}


@functools.cache
def writable_groups() -> dict[str, tuple[Path, int]]:
    """Returns controller -> (our own group's folder, version) for those where a child group can be made."""
    found: dict[str, tuple[Path, int]] = {}
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return found
    for line in lines:
        _, names, path = line.split(":", 2)
        for mount in mounts:
            if mount[2] == "cgroup" and names and set(names.split(",")) <= set(mount[3].split(",")):
                controllers, version = names.split(","), 1
            elif mount[2] == "cgroup2" and not names:
                controllers, version = list(_FILES), 2
            else:
                continue
            # In a container the path may be the host's; the mount is then our own group.
            folder = next((f for f in (Path(mount[1] + path), Path(mount[1])) if f.is_dir()), None)
            for controller in controllers:
                if controller not in _FILES or controller in found or folder is None:
                    continue
                if _usable(folder, controller, version):
                    _sweep(folder)
                    found[controller] = (folder, version)
    return found


def _usable(folder: Path, controller: str, version: int) -> bool:
    trial = folder / f"sdzero-trial-{secrets.token_hex(6)}"
    try:
        trial.mkdir()
    except OSError:
        return False
    try:
        return os.access(trial / _FILES[controller][version - 1], os.W_OK)
    finally:
        trial.rmdir()


def _name() -> str:
    """Names our process and its process namespace, for the sweep."""
    namespace = os.stat("/proc/self/ns/pid").st_ino
    return f"sdzero-{namespace}-{os.getpid()}-{secrets.token_hex(6)}"


def _sweep(parent: Path) -> None:
    """Removes groups of judges that died without cleaning up, and what is left inside them."""
    namespace = str(os.stat("/proc/self/ns/pid").st_ino)
    for folder in parent.glob(f"sdzero-{namespace}-*-*"):
        pid = folder.name.split("-")[2]
        if not Path("/proc", pid).exists():
            _kill_inside(folder)
            _remove(folder)


def _kill_inside(folder: Path) -> None:
    for _ in range(100):
        try:
            inside = (folder / "cgroup.procs").read_text().split()
        except OSError:
            return
        if not inside:
            return
        for pid in map(int, inside):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def _remove(folder: Path) -> None:
    for _ in range(100):  # a group is busy until its last process is collected
        try:
            folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.005)


class Group:
    """Fresh control groups, one per controller; `with` removes them, killing what is left inside."""

    def __init__(self, memory_bytes: int, processes: int):
        self.folders: dict[str, tuple[Path, int]] = {}
        for controller, limit in (("memory", memory_bytes), ("pids", processes)):
            if controller in writable_groups():
                parent, version = writable_groups()[controller]
                folder = parent / _name()
                with contextlib.suppress(OSError):
                    folder.mkdir()
                    self.folders[controller] = (folder, version)
                    (folder / _FILES[controller][version - 1]).write_text(str(limit))
        self.limits_memory = "memory" in self.folders

    def enter_command(self, command: list[str]) -> list[str]:
        """Returns a command that enters the groups and becomes `command`."""
        if not self.folders:
            return command
        enter = " && ".join(f"echo $$ > {shlex.quote(str(f))}/cgroup.procs" for f, _ in self.folders.values())
        return ["/bin/sh", "-c", f'{enter} && exec "$@"', "enter", *command]

    def out_of_memory(self) -> bool:
        """True when the kernel ended a process for passing the memory limit."""
        if not self.limits_memory:
            return False
        folder, version = self.folders["memory"]
        name = "memory.oom_control" if version == 1 else "memory.events"
        with contextlib.suppress(OSError):
            for line in (folder / name).read_text().splitlines():
                key, value = line.split()
                if key == "oom_kill" and int(value):
                    return True
        return False

    def kill(self) -> None:
        """Ends every process that is still inside."""
        for folder, _ in self.folders.values():
            _kill_inside(folder)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        for folder, _ in self.folders.values():
            _remove(folder)
