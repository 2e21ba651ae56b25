"""Answer text into one spelling, and what can be told from the text alone.

Unicode signs, dollar wrappers, spacing and trailing punctuation; repeating decimals; number words;
units; exact numbers; bases; ratios; words. Nothing here is evaluated and nothing needs sympy.
"""

import dataclasses
import re
from fractions import Fraction

_UNICODE = {
    "−": "-", "–": "-", "—": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "∕": "/",
    "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∓": r"\mp ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "°": r"^\circ ", "√": r"\sqrt ",
    "≈": r"\approx ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "φ": r"\phi ",
    "⟨": r"\langle ", "⟩": r"\rangle ", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}",
    "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "。": ".", "、": ",", "，": ",", "；": ";", "：": ":",
    "（": "(", "）": ")", "［": "[", "］": "]", "｛": "{", "｝": "}", "％": "%", "＋": "+", "－": "-", "＝": "=",
    "＜": "<", "＞": ">", "／": "/", "．": ".", "’": "'", "′": "'", "\u00a0": " ", "\u2009": " ", "\u200b": "",
    **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
}  # fmt: skip
_TRANSLATE = str.maketrans(_UNICODE)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SUBSCRIPT = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_WRAPPERS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (r"\$\$(.*)\$\$", r"\$([^$]*)\$", r"\\\[(.*)\\\]", r"\\\((.*)\\\)", r"\*\*(.*)\*\*")
]
_SPACING = re.compile(r"\\(?:displaystyle|textstyle|limits|!|left\.|right\.|,(?=\d{3}))")
_COMMAND = re.compile(r"\\\\(?=[A-Za-z{}%$])")
_LEFT_RIGHT = re.compile(
    r"\\(?:left|right|[bB]igg?[lr]?|m?left|m?right)(?=\s*(?:\\?[{}\[\]()|<>]|\\[lr](?:brace|brack|vert|angle)))"
)
_THOUSANDS = re.compile(r"(?<=\d)(?:\{\s*,\s*\}|,?\s*\\[!,;: ]\s*)(?=\d{3}(?!\d))")
_EMPTY_ROOT = re.compile(r"\\sqrt\s*\{\s*\}\s*\{")  # a stray pair of braces behind \sqrt
_TRAILING = re.compile(r"(?:[\s.,;:]|\\(?:[\s,;:!\\]|q?quad(?![A-Za-z]))|(?<!\\)\\$)+$")
_LEADING = re.compile(r"^(?:[\s,;]|\\[,;:! ]|\\q?quad(?![A-Za-z]))+")
_REPEATING = re.compile(r"(\d*)\.(\d*)\s*\\(?:overline|bar|dot)\s*(?:\{\s*(\d+)\s*\}|(\d))")
_PARENTHESISED = re.compile(r"(?<![\w.])(\d+)\.(\d*)\((\d+)\)$")
_TEXT = r"\\(?:text(?:bf|it|rm|normal|up|sf|tt)?|mathrm|mathbf|mathit|mathsf|operatorname|mbox|hbox|rm)\s*"


def clean(text: str) -> str:
    """One spelling of an answer: no wrappers, unicode signs as LaTeX, thousands joined, `0.\\overline{3}` exact."""
    text = text.translate(_TRANSLATE)
    text = _SUPERSCRIPT.sub(lambda m: "^{" + m.group().translate(_SUPERSCRIPTS) + "}", text)
    text = _SUBSCRIPT.sub(lambda m: "_{" + m.group().translate(_SUBSCRIPTS) + "}", text)
    if "matrix" not in text and "array" not in text:
        text = _COMMAND.sub(r"\\", text)
    text = _strip_wrappers(text)
    text = _THOUSANDS.sub("", text)
    text = _SPACING.sub("", text)
    text = _LEFT_RIGHT.sub("", text)
    text = _EMPTY_ROOT.sub(r"\\sqrt{", text)
    text = _REPEATING.sub(lambda m: _repeating(m.group(1), m.group(2), m.group(3) or m.group(4)), text)
    text = _PARENTHESISED.sub(lambda m: _repeating(*m.groups()), text)
    return re.sub(r"\s+", " ", text).strip()


def _strip_wrappers(text: str) -> str:
    for _ in range(4):
        before = text
        text = _LEADING.sub("", _TRAILING.sub("", text))
        for wrapper in _WRAPPERS:
            match = wrapper.fullmatch(text)
            if match:
                text = match.group(1)
        if text == before:
            break
    return text


def _repeating(whole: str, fixed: str, period: str) -> str:
    """0.1 with period 6 -> \\frac{15}{90}: exact, so that no rounding decides."""
    scale = 10 ** len(fixed)
    nines = 10 ** len(period) - 1
    value = Fraction(int((whole or "0") + fixed), scale) + Fraction(int(period), nines * scale)
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


# ---- exact numbers


@dataclasses.dataclass(frozen=True)
class Number:
    """A rational written out. `decimals` counts the digits behind the point, None for integers and fractions."""

    value: Fraction
    decimals: int | None
    percent: bool


_SIGN = r"(?P<sign>[+-]?)\s*"
_UNSIGNED = r"(?:\d+(?:\.\d*)?|\.\d+)"
_GROUPED = re.compile(r"\d{1,3}(?:(?:,|\s)\d{3})+(?:\.\d*)?")
_DECIMAL = re.compile(rf"{_UNSIGNED}")
_FRACTION = re.compile(
    r"(?P<whole>\d+)?\s*\\[dtc]?frac\s*(?:\{\s*(?P<a>[+-]?\s*" + _UNSIGNED + r")\s*\}|(?P<a1>\d))"
    r"\s*(?:\{\s*(?P<b>[+-]?\s*" + _UNSIGNED + r")\s*\}|(?P<b1>\d))"
)
_SLASH = re.compile(r"(?:(?P<whole>\d+)\s+)?(?P<a>" + _UNSIGNED + r")\s*/\s*(?P<b>" + _UNSIGNED + r")")
_SCIENTIFIC = re.compile(
    r"(?:(?P<m>"
    + _UNSIGNED
    + r")\s*(?:\\times|\\cdot|\*|x)\s*)?10\s*(?:\^|\*\*)\s*(?:\{\s*(?P<e>[+-]?\d{1,3})\s*\}|(?P<e1>\d))"
    r"|(?P<m2>" + _UNSIGNED + r")[eE](?P<e2>[+-]?\d{1,3})"
)
_PERCENT = re.compile(
    r"\s*(?:\\?%|\\text\s*\{\s*(?:\\?%|percent(?:age)?|pct)\s*\}|(?:percent(?:age)?|pct)\b)\s*$",
    re.IGNORECASE,
)
MAX_DIGITS = 400


def parse_number(text: str) -> Number | None:
    """The exact number that `text` (cleaned) spells, or None: integers, decimals, fractions, powers of ten, percent."""
    if len(text) > MAX_DIGITS:
        return None
    percent = _PERCENT.search(text)
    body = _unwrap(text[: percent.start()] if percent else text)
    sign = -1 if body[:1] == "-" else 1
    body = body[1:].strip() if body[:1] in "+-" and body else body
    number = _unsigned_number(body)
    if number is None:
        return None
    value, decimals = number
    return Number(sign * value, decimals, percent is not None)


def _unwrap(text: str) -> str:
    """Without an outer pair of braces or parentheses around a number."""
    text = text.strip()
    while len(text) > 2 and (text[0], text[-1]) in (("{", "}"), ("(", ")")) and not re.search(r"[(){},]", text[1:-1]):
        text = text[1:-1].strip()
    return text


def _unsigned_number(text: str) -> tuple[Fraction, int | None] | None:
    if _GROUPED.fullmatch(text):
        text = re.sub(r"[,\s]", "", text)
    if _DECIMAL.fullmatch(text):
        decimals = len(text.partition(".")[2]) if "." in text else None
        return Fraction(text.rstrip(".") if text.endswith(".") else text), decimals
    match = _FRACTION.fullmatch(text) or _SLASH.fullmatch(text)
    if match:
        groups = match.groupdict()
        above = Fraction((groups["a"] or groups.get("a1")).replace(" ", ""))
        below = Fraction((groups["b"] or groups.get("b1")).replace(" ", ""))
        if below == 0:
            return None
        return Fraction(groups["whole"] or 0) + above / below, None
    match = _SCIENTIFIC.fullmatch(text)
    if match:
        mantissa = Fraction(match["m"] or match["m2"] or 1)
        return mantissa * Fraction(10) ** int(match["e"] or match["e1"] or match["e2"]), None
    return None


# ---- number words

_ONES = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen
""".split()  # noqa: SIM905
_TENS = {
    name: 10 * (2 + i)
    for i, name in enumerate(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"])
}
_VALUES = {name: i for i, name in enumerate(_ONES)} | _TENS
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6}


def number_from_words(text: str) -> int | None:
    """five -> 5, "one hundred and twenty-three" -> 123; None for anything else."""
    words = [word for word in re.split(r"[\s-]+", text.lower().strip()) if word]
    if not words or len(words) > 12 or any(w not in _VALUES and w not in _SCALES and w != "and" for w in words):
        return None
    total, group, last = 0, 0, None
    for word in words:
        if word in _VALUES:
            value = _VALUES[word]
            if last in _VALUES and not (last in _TENS and 0 < value < 10):
                return None  # "one two" is a list, not a number
            group += value
        elif word == "hundred":
            group = (group or 1) * 100
        elif word in _SCALES:
            total, group = total + (group or 1) * _SCALES[word], 0
        last = word
    return total + group if words[-1] != "and" and words[0] != "and" else None


# ---- words

_TEXT_COMMAND = re.compile(_TEXT + r"\{([^{}]*)\}")


def words_of(text: str) -> str | None:
    """The bare lower-case words when `text` is prose rather than mathematics, else None.

    Four letters in a row without a command are a word; fewer (`xy`, `abc`) may be a product, unless
    LaTeX says that they are text.
    """
    if "\\" in _TEXT_COMMAND.sub("", text):
        return None
    marked = bool(_TEXT_COMMAND.search(text))
    bare = _TEXT_COMMAND.sub(r" \1 ", text)
    bare = re.sub(r"\s+", " ", re.sub(r"(?:\\\s|~)", " ", bare)).strip(" .,;:!?\"'")
    if not re.fullmatch(r"[A-Za-z][A-Za-z\s,.'\-/&!?()]*", bare):
        return None
    longest = max((len(word) for word in re.findall(r"[A-Za-z]+", bare)), default=0)
    if longest < (2 if marked else 4):
        return None
    return " ".join(re.findall(r"[a-z]+", bare.lower()))


_CHOICE = re.compile(r"^\(?\s*([A-Za-z])\s*\)?\.?$")


def choice_letter(text: str) -> str | None:
    """The letter of `C`, `(C)`, `\\text{(C)}`, `\\textbf{C}`; None for anything else."""
    match = _CHOICE.match(_TEXT_COMMAND.sub(r"\1", text).strip())
    return match.group(1) if match else None


# ---- bases, ratios, brackets

_BASE_WORDS = {
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
}
_BASE = re.compile(
    r"(?:\(\s*(?P<d1>[0-9A-Fa-f]+)\s*\)|" + _TEXT + r"\{\s*(?P<d2>[0-9A-Fa-f]+)\s*\}|(?P<d3>\d[0-9A-Fa-f]*))"
    r"\s*_\s*(?:\{\s*(?:" + _TEXT + r"\{)?\s*(?P<b>\d{1,2}|[a-z]+)\s*\}?\s*\}|(?P<b1>\d{1,2}))"
)


def based_digits(text: str) -> tuple[str, int] | None:
    """(digits, base) of `1011_2`, `A2F_{16}`, `(12)_{\\text{five}}`; None for anything else."""
    match = _BASE.fullmatch(text)
    if not match:
        return None
    word = match["b"] or match["b1"]
    base = int(word) if word.isdigit() else _BASE_WORDS.get(word, 0)
    digits = (match["d1"] or match["d2"] or match["d3"]).lower().lstrip("0") or "0"
    if not 2 <= base <= 36 or any(int(digit, 16) >= base for digit in digits):
        return None
    return digits, base


def right_of_equals(text: str) -> str:
    """What a single chain of equalities arrives at: "S:T = 7:32" -> "7:32"; lists stay whole."""
    if "," in text or ";" in text:
        return text
    return re.split(r"(?<![<>!\\])=", text)[-1].strip()


_NAME = re.compile(r"[A-Za-z\\|][A-Za-z\\'|(){}: ]*(?:_\s*(?:\{[^{}]*\}|\w))?[|)(A-Za-z]*\s*")


def unequated(pred: str, gold: str) -> tuple[str, str] | None:
    """Both answers without "x =" in front, or None where the equations themselves must be compared.

    An equation against a value counts by its right side; a gold equation only when it names its value.
    """
    p, g = right_of_equals(pred), right_of_equals(gold)
    if (p != pred and g != gold) or (g != gold and not _NAME.fullmatch(gold.partition("=")[0])):
        return None
    return p, g


_LEAD = re.compile(_TEXT + r"\{\s*([A-Za-z][\w']*(?:\s+[\w']+)+)\s*[:=]?\s*\}\s*[:=]?\s*(?=[^\s=+*/^_])")
_NEGATION = re.compile(r"\b(?:not|no|never|nor|neither|isn't)\b", re.IGNORECASE)


def without_lead(text: str) -> str:
    """Without words in front of the value: "\\text{The value is }7" -> "7"."""
    match = _LEAD.match(text)
    return text[match.end() :] if match and not _NEGATION.search(match.group(1)) else text


def ratio_parts(text: str) -> list[str] | None:
    """The parts of `7:32` (two or more), else None. Colons in brackets or beside prose do not count."""
    text = right_of_equals(text.replace(r"\colon", ":").replace(r"\mathbin{:}", ":").replace(r"\!", ""))
    if ":" not in text:
        return None
    depth, parts = 0, [""]
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == ":" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    parts = [part.strip() for part in parts]
    plain = all(re.search(r"\d", part) or re.fullmatch(r"\\?[A-Za-z]+", part) for part in parts)
    return parts if len(parts) > 1 and plain else None


def bracket_kind(text: str) -> str | None:
    """ "set" for one outer pair of \\{ \\}, "tuple" for one outer pair of round brackets around a list, else None."""
    for kind, opening, closing in (
        ("set", r"\{", r"\}"),
        ("set", r"\lbrace", r"\rbrace"),
        ("tuple", "(", ")"),
    ):
        if text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening + closing):
            inner = text[len(opening) : len(text) - len(closing)]
            if opening in inner or closing in inner or "(" in inner:
                return None  # nested: left to the symbolic comparison
            return kind if kind == "set" or "," in inner or ";" in inner else None
    return None


# ---- solutions and functions

_SEPARATOR = re.compile(r"[,;]|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|" + _TEXT + r"\{\s*[,;]?\s*(?:and|or)\s*\}")
_ASSIGNMENT = re.compile(r"\s*([A-Za-z](?:_\s*(?:\{\w+\}|\w))?)\s*=\s*([^=<>]+?)\s*")
_GAPS = re.compile(r"\\(?:q?quad(?![A-Za-z])|[,;:! ])")


def assignments(text: str) -> list[dict[str, str]] | None:
    """[{"p": "5", "q": "2"}, ...] of "p=5, q=2; p=7, q=3", a new solution where a name comes again; else None.

    Only where each solution names the same two or more: anything else is a plain list.
    """
    solutions: list[dict[str, str]] = [{}]
    for part in _SEPARATOR.split(_GAPS.sub(" ", text)):
        match = _ASSIGNMENT.fullmatch(part)
        if not match:
            return None
        name, value = re.sub(r"[\s{}]", "", match[1]), match[2]
        if name in solutions[-1]:
            solutions.append({})
        solutions[-1][name] = value
    alike = all(solution.keys() == solutions[0].keys() for solution in solutions)
    return solutions if alike and len(solutions[0]) > 1 else None


_FUNCTION = re.compile(r"\s*([A-Za-z])\s*\(\s*([A-Za-z])\s*\)\s*=")


def with_argument_of(pred: str, gold: str) -> str:
    """f(t) = t^2 as f(x) = x^2 where the reference calls the argument x: its name means nothing."""
    p, g = _FUNCTION.match(pred), _FUNCTION.match(gold)
    if not p or not g or p[1] != g[1] or p[2] == g[2]:
        return pred
    letters = re.findall(r"\\[A-Za-z]+|[A-Za-z]", re.sub(_TEXT_COMMAND, "", pred))
    if g[2] in letters:
        return pred  # it stands for something else there
    return re.sub(r"\\[A-Za-z]+|" + p[2], lambda m: g[2] if m[0] == p[2] else m[0], pred)
