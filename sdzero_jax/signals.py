"""SIGINT and SIGTERM as a flag that long work looks at between two steps, to save and stop."""

import signal

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
    """The signal that asked the run to stop, or None."""
    return _received[0] if _received else None
