"""Errors that a person caused and can mend, and the nearest valid name to offer.

Every layer may raise `UserError`; only `run.py` catches it, prints its one line
and exits with status 2. Anything else that escapes is a fault of ours (status 1).
"""

import difflib
import errno
import traceback
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """Bad input: one line that names what came, what was wanted and the nearest valid choice."""


class Fault(Exception):
    """Something that the run needs failed (a store, a disk): one line that says what to do. Exit status 1."""


def full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is a disk without space: libraries wrap it in errors of their own."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return any(getattr(e, "errno", None) in full or "No space left on device" in str(e) for e in causes(error))


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that a program did not fit a device's memory."""
    import jax

    said = ("RESOURCE_EXHAUSTED", "Out of memory")
    return any(isinstance(e, jax.errors.JaxRuntimeError) and any(s in str(e) for s in said) for e in causes(error))


def no_backend(error: BaseException | None) -> bool:
    """Whether jax found no device of the kind that it was told to use."""
    return any(_no_backend(e) for e in causes(error))


def _no_backend(error: BaseException) -> bool:
    if isinstance(error, AssertionError):  # jax without its CUDA plugin, told to use CUDA
        return traceback.extract_tb(error.__traceback__)[-1].filename.endswith("xla_bridge.py")
    return isinstance(error, RuntimeError) and str(error).startswith("Unable to initialize backend")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what led to it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class Stopped(Exception):
    """A signal asked the run to stop and the state was saved; `signum` gives the exit status."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" for the closest choice, else the list of choices."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; choose from {', '.join(choices)}" if choices else ""


class HealthStop(Exception):
    """A health gate stopped the run; the last good checkpoint is kept. Exit status 1."""
