"""SIGINT and SIGTERM as a flag that long work looks at, to save and stop; on all hosts at once.

`requested` between two steps that all hosts take together; `pending` inside a step, where every host is at
its own work.
"""

import os
import signal
import time

from sdzero_jax import hosts
from sdzero_jax.errors import Stopped

_received: list[int] = []
_KEY = "sdzero_jax/stop"
_SECONDS = 1.0  # between two looks at the coordinator's table
_looked = 0.0
_told = False  # the others, of this host's signal
_asked = False  # somebody looks at the flag: there is work to save


def install() -> None:
    """Turns the first SIGINT or SIGTERM into `requested()`; a second SIGINT interrupts at once.

    Until somebody asks there is nothing to save, and the first one stops this process at once, if it is the only one.
    """

    def handle(signum, frame):
        if _received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        _received.append(signum)
        if not _asked and hosts.count() == 1:
            raise Stopped(signum, "before anything was begun")
        if len(_received) == 1:  # not print, which may be interrupted in its own middle
            os.write(2, b"\nstopping as soon as all is saved; Ctrl-C ends at once\n")

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)


def requested() -> int | None:
    """The signal that asked any host to stop, or None. With several hosts: to be called by all of them."""
    global _asked
    _asked = True
    return next((first for first in hosts.gather(_received[0] if _received else None) if first), None)


def pending() -> int | None:
    """The signal that this host received, or has heard that another one did; waits for nobody.

    Hosts hear of it at different times: what they do then must end where all of them meet.
    """
    global _asked, _looked, _told
    _asked = True
    own = _received[0] if _received else None
    tell = own is not None and not _told
    if hosts.count() == 1 or not (tell or time.monotonic() - _looked >= _SECONDS):
        return own
    import jax
    from jax._src import distributed  # the only way to the coordinator's table; public jax has none

    _looked = time.monotonic()
    table = distributed.global_state.client
    try:
        if tell:  # at once: who heard a signal stops asking, and waits for the others
            table.key_value_set(_KEY, str(int(own)), allow_overwrite=True)
            _told = True
        return int(table.key_value_try_get(_KEY))
    except jax.errors.JaxRuntimeError:  # nobody has written there
        return own
