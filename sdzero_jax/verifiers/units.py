"""Units at the end of an answer: what is the number, what is the unit, do two units agree.

Leaves out conversion: `1 m` and `100 cm` differ. Words that are no unit (`17 \\text{ apples}`) are dropped.
"""

import re

_ALIASES = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "dm": "decimeter decimetre", "m": "meter metre",
    "km": "kilometer kilometre", "in": "inch inche", "ft": "foot feet", "yd": "yard", "mi": "mile",
    "mg": "milligram", "g": "gram gm", "kg": "kilogram", "t": "ton tonne", "lb": "pound", "oz": "ounce",
    "ms": "millisecond", "s": "second sec", "min": "minute", "h": "hour hr", "day": "d", "week": "wk",
    "month": "mo", "year": "yr", "l": "liter litre", "ml": "milliliter millilitre", "gal": "gallon", "qt": "quart",
    "pt": "pint", "cup": "", "mph": "", "kmh": "kph", "deg": "degree", "rad": "radian", "usd": "dollar",
    "cent": "", "eur": "euro", "gbp": "", "n": "newton", "j": "joule", "w": "watt", "v": "volt", "hz": "hertz",
    "pa": "pascal", "mol": "mole", "acre": "", "hectare": "ha", "am": "", "pm": "", "ohm": "", "k": "kelvin",
}  # fmt: skip
_CANONICAL = {alias: unit for unit, aliases in _ALIASES.items() for alias in (unit, *aliases.split())}
_CURRENCY = {"\\$": "usd", "$": "usd", "€": "eur", "\\euro": "eur", "£": "gbp", "\\pounds": "gbp"}
_POWER_WORDS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_NEUTRAL = {"unit", "of", "the"}
_TEXT_TAIL = re.compile(
    r"(?P<slash>/|\\cdot|\\times)?(?:\\[ ,;:!]|~|\s|\\q?quad)*"
    r"\\(?:text(?:bf|it|rm|normal|up)?|mathrm|mathbf|mathit|mbox|hbox|operatorname)\s*\{(?P<text>[^{}]*)\}"
    r"\s*(?P<power>\^\s*(?:\{\s*-?\d\s*\}|\d))?$"
)
_BARE_TAIL = re.compile(
    r"(?<=[\d})\]])(?P<space>(?:\s|\\[ ,;:]|~)*)"
    r"(?P<text>[A-Za-z][A-Za-z.\s/]*?)\s*(?P<power>\^\s*(?:\{\s*\d\s*\}|\d))?$"
)
_DEGREES = re.compile(
    r"\s*(?:\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree|\\deg)\s*(?P<scale>[CFK]|\\(?:text|mathrm)\s*\{\s*[CFK]\s*\})?$"
)
_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")


def split_unit(text: str) -> tuple[str, str, bool]:
    """(the answer without its unit, the unit in one spelling or "", whether it is surely a unit).

    `5 m` alone is not sure: it may be a product; `5\\text{ m}` and `5 cm` are.
    """
    for sign, unit in _CURRENCY.items():
        negative = "-" if text.startswith("-") else ""
        rest = text[len(negative) :].lstrip()
        if rest.startswith(sign) and re.match(r"\s*[\d.\\(]", rest[len(sign) :]):
            return negative + rest[len(sign) :].strip(), unit, True
        if text.endswith(sign) and re.search(r"\d\s*$", text[: -len(sign)]):
            return text[: -len(sign)].strip(), unit, True
    degrees = _DEGREES.search(text)
    if degrees and degrees.start() > 0 and not _FUNCTION.search(text):
        scale = re.sub(r"[^CFK]", "", degrees["scale"] or "")[-1:]
        return text[: degrees.start()].strip(), "deg" + scale, True
    rest, unit = _text_units(text)
    if rest != text:
        return rest, unit, True
    bare = _BARE_TAIL.search(text)
    if bare:
        unit, known = _canonical(bare["text"], bare["power"])
        letters = bare["text"].replace(".", "")
        if known and unit:
            sure = len(letters) > 1
            if sure or bare["space"]:
                return text[: bare.start()].strip(), unit, sure
    return text, "", False


def _text_units(text: str) -> tuple[str, str]:
    """Takes \\text{...} parts off the end; only known units are reported, other words dropped."""
    rest, parts = text, []
    for _ in range(4):
        match = _TEXT_TAIL.search(rest)
        if not match or not re.search(r"\d|\\pi|\\infty|[a-z)]\s*$", rest[: match.start()]):
            break
        if re.fullmatch(r"\s*(?:and|or)\s*.*", match["text"]) or match["text"].lstrip().startswith("-"):
            break
        unit, known = _canonical(match["text"], match["power"])
        if not known and not re.search(r"[\d})\]]\s*$", rest[: match.start()]):
            break  # a letter with words behind it is no measure
        parts.append((match["slash"] or "").replace("\\cdot", "").replace("\\times", "") + (unit if known else ""))
        rest = rest[: match.start()].rstrip()
    return rest, "".join(reversed(parts))


def _canonical(words: str, power: str | None) -> tuple[str, bool]:
    """("cm^2", True) for `square centimetres` or `cm` with ^2; (_, False) for words that are no unit."""
    exponent = re.sub(r"[^\d-]", "", power or "")
    parts: list[str] = []
    pending = ""
    tokens = re.findall(r"[a-z]+|/", words.lower().replace(".", ""))
    if not tokens:
        return "", not words.strip()
    for token in tokens:
        if token in ("/", "per"):
            parts.append("/")
        elif token in ("squared", "cubed"):
            exponent = str(_POWER_WORDS[token])
        elif token in _POWER_WORDS:
            pending = str(_POWER_WORDS[token])
        else:
            singular = token if token in _CANONICAL or len(token) < 3 else token.removesuffix("s")
            if singular in _NEUTRAL:
                continue
            if singular not in _CANONICAL:
                return "", False
            parts.append(_CANONICAL[singular] + (f"^{pending}" if pending else ""))
            pending = ""
    unit = "".join(parts)
    if unit in ("mi/h", "km/h"):
        unit = {"mi/h": "mph", "km/h": "kmh"}[unit]
    return (f"{unit}^{exponent}" if exponent and unit else unit), True
