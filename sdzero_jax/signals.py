"""SIGINT and SIGTERM as a flag that long work looks at between two steps, to save and stop; on all hosts at once."""

import signal

from sdzero_jax import hosts

_received: list[int] = []


def install() -> None:
    """Turns the first SIGINT or SIGTERM into `requested()`; a second SIGINT interrupts at once."""

    def handle(signum, frame):
        if _received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        _received.append(signum)

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)


def requested() -> int | None:
    """The signal that asked any host to stop, or None. With several hosts: to be called by all of them."""
    return next((first for first in hosts.gather(_received[0] if _received else None) if first), None)
