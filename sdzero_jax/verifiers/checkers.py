"""Is this output the expected one: by lines, by tokens, or by tokens with floats within 1e-6.

Works on bytes as the program wrote them; bytes that are not UTF-8 equal only themselves. A checker
program (several answers allowed) runs in the sandbox; its answer is read here.
"""

import math
import re

from sdzero_jax.errors import UserError, nearest

TOLERANCE = 1e-6
MODES = ("lines", "tokens", "floats")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")


def outputs_equal(expected: str | bytes, actual: str | bytes, mode: str = "tokens") -> bool:
    """Compares two outputs.

    lines: line by line without trailing white space (so also with CR LF) and trailing empty lines.
    tokens: the white-space separated words. floats: as tokens, and where the expected word is written
    as a float, within 1e-6 absolute or relative; whole numbers stay exact.
    """
    if mode not in MODES:
        raise UserError(f"comparison is {mode!r}, not one of {', '.join(MODES)}{nearest(mode, MODES)}")
    expected, actual = _text(expected), _text(actual)
    if mode == "lines":
        return _lines(expected) == _lines(actual)
    # ASCII white space only: a no-break space inside an answer is not a separator.
    wanted, given = _words(expected), _words(actual)
    if wanted == given:
        return True
    return mode == "floats" and len(wanted) == len(given) and all(map(_close, wanted, given))


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "surrogateescape")


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[ \t\r\n\v\f]+", text) if word]


def _lines(text: str) -> list[str]:
    lines = [line.rstrip(" \t\r\v\f") for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _close(wanted: str, given: str) -> bool:
    if wanted == given:
        return True
    if not (_NUMBER.fullmatch(wanted) and _NUMBER.fullmatch(given)) or wanted.lstrip("+-").isdigit():
        return False
    a, b = float(wanted), float(given)
    if not (math.isfinite(a) and math.isfinite(b)):
        return False
    return abs(a - b) <= TOLERANCE * max(1.0, abs(a))


def checker_says(stdout: bytes, returncode: int) -> bool | None:
    """Reads a checker program: a first word that is a number accepts from 1 on; without any output the
    exit status counts (0 accepts, 1 and 2 reject). None: it crashed or said something else."""
    words = _text(stdout).split()
    if not words:
        return {0: True, 1: False, 2: False}.get(returncode)
    if returncode == 0 and _NUMBER.fullmatch(words[0]):
        return float(words[0]) >= 1
    return None
