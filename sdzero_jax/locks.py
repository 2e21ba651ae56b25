"""One run at a time in a directory; the operating system frees the lock of a dead process.

Of a run on several hosts the first one holds it.
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
def exclusive(directory: pathlib.Path) -> Iterator[None]:
    """Holds `directory`/.lock; UserError when another process holds it."""
    if not hosts.is_first():
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as handle:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process is running in {directory}; wait for it, or give this run a run_dir= of its own"
                ) from None
        yield
