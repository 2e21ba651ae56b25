"""The program inside a response: the last fenced block in a known language.

Follows CommonMark's fences (backticks or tildes, three or more, closed by at least as many) and is
lenient in one place: a last fence that is never closed counts to the end of the text. Only what
follows the last `</think>` is read. Leaves out: guessing a language from the text of a program.
"""

import dataclasses
import re
import textwrap

THINK_END = "</think>"
_FENCE = re.compile(r"^(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})(?P<info>.*)$")
_CPP = re.compile(r"^(?:gnu)?(?:c\+\+|cpp|cxx|cc|g\+\+)-?(?P<year>11|14|17|20|23|2a|2b|1z)?$")
_PYTHON = frozenset({"python", "py", "python3", "py3"})
DEFAULT_STANDARD = "17"


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its first info word in lower case, its text, and whether the fence was closed."""

    info: str
    text: str
    closed: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """Source text; `language` is "python" or "cpp", `standard` the year of C++ ("17")."""

    language: str
    code: str
    standard: str = DEFAULT_STANDARD


def language_of(info: str) -> tuple[str, str] | None:
    """Returns (language, C++ standard) for a fence's info word, None when the language is not known."""
    if info in _PYTHON:
        return "python", DEFAULT_STANDARD
    match = _CPP.match(info)
    return ("cpp", match["year"] or DEFAULT_STANDARD) if match else None


def blocks(text: str) -> list[Block]:
    """Returns every fenced block of a text, in order."""
    found: list[Block] = []
    opened: re.Match | None = None
    lines: list[str] = []
    for line in text.splitlines():
        match = _FENCE.match(line)
        if opened is None:
            # A backtick fence's info may hold no backtick: "```x```" is code inside a line.
            if match and not (match["fence"][0] == "`" and "`" in match["info"]):
                opened, lines = match, []
        elif match and not match["info"].strip() and match["fence"].startswith(opened["fence"]):
            found.append(_block(opened, lines, closed=True))
            opened = None
        else:
            lines.append(line)
    if opened is not None:
        if lines and lines[-1].rstrip().endswith(opened["fence"]):  # closed at the end of a line of code
            lines[-1] = lines[-1].rstrip().removesuffix(opened["fence"])
        found.append(_block(opened, lines, closed=False))
    return found


def _block(opened: re.Match, lines: list[str], closed: bool) -> Block:
    words = opened["info"].strip().lower().strip("{}").split()
    info = words[0].lstrip(".").split(",")[0] if words else ""
    text = "\n".join(lines) + "\n"
    return Block(info, textwrap.dedent(text) if opened["indent"] else text, closed)


def last_program(response: str, default_language: str | None = None) -> Program | None:
    """Returns the last block in a known language, or None.

    `default_language` is the language that the question asked for: where no block names a language,
    the last block without any name is taken to be in it.
    """
    found = blocks(response.rpartition(THINK_END)[2])
    for block in reversed(found):
        known = language_of(block.info)
        if known:
            return Program(known[0], block.text, known[1])
    if default_language:
        for block in reversed(found):
            if not block.info:
                return Program(default_language, block.text)
    return None
