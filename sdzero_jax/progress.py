"""Progress of long work on the terminal: items done, rate, time left and current figures."""

import sys
from collections.abc import Mapping

from tqdm import tqdm

from sdzero_jax import hosts


class Progress:
    """A tqdm bar; in a log file (no terminal) a line every 10 seconds instead of a redrawn one.

    With a `delay` in seconds it is shown only if the work takes longer, and goes away at the end.
    """

    def __init__(self, description: str, total: int, initial: int = 0, unit: str = "it", delay: float = 0.0):
        interactive = sys.stderr.isatty()
        self._bar = tqdm(
            desc=f"{description:<12}",
            total=total,
            initial=initial,
            unit=unit,
            dynamic_ncols=interactive,
            ncols=None if interactive else 120,
            mininterval=0.2 if interactive else 10.0,
            ascii=not interactive,
            delay=delay,
            leave=not delay,
            disable=not hosts.is_first(),
        )

    def update(self, count: int = 1, figures: Mapping[str, float] | None = None) -> None:
        """Counts `count` more items and shows the latest `figures`."""
        if figures:
            self._bar.set_postfix_str(
                ", ".join(f"{name} {value:.4g}" for name, value in figures.items()), refresh=False
            )
        self._bar.update(count)

    def advance_to(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Like `update`, where the number of items may grow."""
        self._bar.total = total
        self.update(done - self._bar.n, figures)

    def close(self) -> None:
        self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def say(line: str) -> None:
    """One line for the person at the terminal, above any progress bar."""
    if hosts.is_first():
        tqdm.write(line, file=sys.stderr)
