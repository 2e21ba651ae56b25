"""Where the answer stands in a response: the last \\boxed{...} or \\fbox{...} after the last </think>.

One pass over the text, linear in its length whatever it holds. Leaves out the meaning of the
answer (`normalise`, `equality`).
"""

import re

THINK_END = "</think>"
LONGEST_SENTENCE = 8000  # characters searched for a formula: its pattern is not linear in bad text
_TOKEN = re.compile(
    r"\\{1,4}(?:boxed|fbox)\s*\{"  # a box opens; several backslashes come from doubly escaped text
    r"|\\{1,4}(?:boxed|fbox)(?=\s*[\s\d\\+\-.(\[])"  # TeX's box around one token, without braces
    r"|\\.|[{}]",  # an escaped character never counts as a brace
    re.DOTALL,
)
_BOX = re.compile(r"\\{1,4}(?:boxed|fbox)")
_UNCLOSED_END = re.compile(r"\$|\\\]|\\\)|\n\s*\n|\n(?=\s*[A-Z])|\.\s+(?=[A-Z])")
_BARE_CONTENT = re.compile(r"\s*(?!\\{1,4}f?box)([\d\\+\-.(\[][^$\n]*?)\s*(?=\$|\n|\\\]|\\\)|\.?\s*$|\.\s|,\s)")
# What may stand between two boxes that form one list: it ends with a separator and holds no sentence end.
_LIST_GLUE = re.compile(
    r"[^.!?\n]{0,24}?(?:,|;|\band\b|\bor\b)(?:[\s$,;}{]|\\(?:text|q?quad|[,;:! \[\]()])|\band\b|\bor\b)*",
    re.DOTALL,
)


def after_thinking(text: str) -> str:
    """What follows the last </think>; the whole text when there is none."""
    return text.rpartition(THINK_END)[2]


def boxes(text: str) -> list[tuple[int, int, str]]:
    """Every outermost box as (start, end, content), in order.

    A box that is never closed ends with its formula or its sentence; boxes inside it still count.
    """
    stack: list[tuple[int, int]] = []  # (start of the box or -1 for a plain brace, start of its content)
    closed: list[tuple[int, int, str]] = []
    bare: list[tuple[int, int, str]] = []
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token == "{":
            stack.append((-1, match.end()))
        elif token == "}":
            if not stack:
                continue
            start, content = stack.pop()
            if start >= 0:
                while closed and closed[-1][0] > start:  # an inner box belongs to the outer one
                    closed.pop()
                closed.append((start, match.end(), text[content : match.start()]))
        elif token.endswith("{") and _BOX.match(token):
            stack.append((match.start(), match.end()))
        elif _BOX.fullmatch(token):
            found = _BARE_CONTENT.match(text, match.end(), match.end() + 200)
            if found:
                bare.append((match.start(), found.end(), found.group(1)))
    opened = [box for box in stack if box[0] >= 0 and text[box[1] : box[1] + 200].strip()]
    unclosed = [_unclosed(text, *opened[-1])] if opened else []
    found = closed + bare + [box for box in unclosed if box[2].strip()]
    return sorted(found) if bare or unclosed else found


def _unclosed(text: str, start: int, content: int) -> tuple[int, int, str]:
    end = _UNCLOSED_END.search(text, content)
    stop = end.start() if end else len(text)
    return start, stop, text[content:stop]


def last_box(text: str) -> str | None:
    """The content of the last box, inner box commands removed; None when there is no box."""
    found = boxes(text)
    return strip_boxes(found[-1][2]) if found else None


def listed_boxes(text: str) -> str | None:
    """As `last_box`, but boxes with only a separator between them ("\\boxed{1} and \\boxed{2}") form a list.

    For reference answers and answers given as such; a response's answer is its last box alone.
    """
    found = boxes(text)
    if not found:
        return None
    first = len(found) - 1
    while first > 0:
        between = text[found[first - 1][1] : found[first][0]]
        if between.strip() and not _LIST_GLUE.fullmatch(between):
            break
        first -= 1
    contents = list(dict.fromkeys(strip_boxes(box[2]).strip() for box in found[first:]))
    return ", ".join(contents)


_FORMULA = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)"
    r"|\$(?! )((?:\\\$|[^$\n])*(?<! ))\$(?!\d)|\$( (?:\\\$|[^$\n])* )\$",
    re.DOTALL,
)
_PROSE = re.compile(r"(?<![\\A-Za-z])(?!(?:and|or|percent|percentage|pct)\b)[A-Za-z]{3,}")


def last_formula(text: str) -> str:
    """The last formula of a sentence ("Thus $x<2$ is the answer"), or `text` itself when it is no such sentence.

    Formulas with only a separator between them form a list.
    """
    text = text[-LONGEST_SENTENCE:]
    spans = [(m.start(), m.end(), next(g for g in m.groups() if g is not None)) for m in _FORMULA.finditer(text)]
    if not spans or not _PROSE.search(_FORMULA.sub(" ", text)):
        return text
    first = len(spans) - 1
    while first > 0 and _LIST_GLUE.fullmatch(text[spans[first - 1][1] : spans[first][0]]):
        first -= 1
    return ", ".join(span[2] for span in spans[first:])


_CUE = re.compile(r"\banswer\b\s*(?:is\b|:|=)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!](?:\s|$)|\n")
_NEGATED = re.compile(r"\b(?:not|no|never|isn't)\b", re.IGNORECASE)
# Possessive, so that no text is split in two ways: words, formulas without digits, one number, words.
_STATED = re.compile(
    r"(?P<before>(?:[A-Za-z']++|\$[^$\d]*\$|[\s,:=]++)*?)"
    r"(?P<number>[+-]?(?:\\?\$)?\d[\d,]*(?:\.\d+)?(?:/\d+)?(?:\s?\\?%)?)"
    r"(?P<after>(?:\s+[A-Za-z]{2,}+)*+)\s*"
)
_LONE_LETTER = re.compile(r"(?<![A-Za-z'])[b-zB-HJ-Z](?![A-Za-z'])")  # a variable in the open


def stated_answer(text: str) -> str | None:
    """What the sentence behind the last "answer is" or "answer:" gives: its only number, else its last formula.

    None without such a sentence, where it is negated, and where it holds other mathematics in the open.
    """
    cues = list(_CUE.finditer(text[-LONGEST_SENTENCE:]))
    if not cues:
        return None
    sentence = text[-LONGEST_SENTENCE:][cues[-1].end() :]
    end = _SENTENCE_END.search(sentence)
    sentence = sentence[: end.start()] if end else sentence
    if _NEGATED.search(sentence):
        return None
    number = _STATED.fullmatch(sentence)
    if number and not _LONE_LETTER.search(_FORMULA.sub(" ", number["before"])):
        words = number["after"].strip()  # perhaps a unit
        unit = f"\\text{{ {words}}}" if words and "%" not in number["number"] else ""
        return number["number"] + unit
    return last_formula(f"answer {sentence}") if _FORMULA.search(sentence) else None


def strip_boxes(text: str) -> str:
    """The text without box commands; the braces they leave only group."""
    return _BOX.sub("", text)
