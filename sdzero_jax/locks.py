"""One run at a time in a directory; the operating system frees the lock of a dead process.

Of a run on several hosts the first one holds it; all of them are refused when it cannot.
"""

import contextlib
import pathlib
from collections.abc import Iterator

from sdzero_jax import hosts
from sdzero_jax.errors import UserError

try:
    import fcntl
except ImportError:  # not a POSIX system: run without the lock
    fcntl = None


@contextlib.contextmanager
def exclusive(directory: pathlib.Path, name: str = "", setting: str = "run_dir") -> Iterator[None]:
    """Holds `directory`/.lock; UserError, which calls it `name`, when another process does or it cannot be made.

    `setting` is what says where it lies.
    """
    with contextlib.ExitStack() as held:
        hosts.from_first(lambda: _hold(directory, name or str(directory), setting, held))
        yield


def _hold(directory: pathlib.Path, name: str, setting: str, held: contextlib.ExitStack) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = held.enter_context(open(directory / ".lock", "w"))  # noqa: SIM115 - `held` closes it
    except OSError as error:
        raise UserError(f"{name}: cannot be written ({error.strerror}); set another {setting}=") from None
    if fcntl is None:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"another process is running in {name}; wait for it, or give this run a {setting}= of its own"
        ) from None
