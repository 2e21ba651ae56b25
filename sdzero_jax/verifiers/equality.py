"""Is an answer equal to a reference answer? Exact rules first, math-verify for the rest.

Rules decide what text or exact arithmetic can decide (numbers, units, bases, ratios, words, sets against
tuples): each of them mends a verdict that math-verify gets wrong. Returns plain tuples, so that the
module knows nothing of rewards. Leaves out extraction and time limits.
"""

import functools
import re
from fractions import Fraction
from typing import Literal, NamedTuple

from sdzero_jax.verifiers import normalise, symbolic, units

Status = Literal["equal", "different", "unreadable", "gold_unreadable", "too_large", "error"]


class Comparison(NamedTuple):
    status: Status
    reason: str


class Rules(NamedTuple):
    """What the settings decide: see `sdzero_jax.verifiers.math.MathSettings`."""

    strict_units: bool = True
    float_digits: int = 6
    max_chars: int = 1000


def compare(pred: str, gold: str, rules: Rules = Rules()) -> Comparison:
    """Compares two answers written as text or LaTeX, without boxes. Never evaluates them as code."""
    if max(len(pred), len(gold)) > 4 * rules.max_chars:  # no pattern touches long text: some take quadratic time
        if pred.strip() and pred.strip() == gold.strip():
            return Comparison("equal", "same text")
        longer = "gold_unreadable" if len(gold) > 4 * rules.max_chars else "unreadable"
        return Comparison(longer, f"more than {rules.max_chars} characters")
    pred, gold = normalise.clean(pred), normalise.clean(gold)
    if not gold:
        return Comparison("gold_unreadable", "empty")
    if not pred:
        return Comparison("unreadable", "empty")
    if re.sub(r"\s", "", pred) == re.sub(r"\s", "", gold):
        return Comparison("equal", "same text")
    if len(gold) > rules.max_chars:
        return Comparison("gold_unreadable", f"more than {rules.max_chars} characters")
    if len(pred) > rules.max_chars:
        return Comparison("unreadable", f"more than {rules.max_chars} characters")
    for rule in (_by_base, _by_number, _by_words, _by_ratio, _by_brackets):
        verdict = rule(pred, gold, rules)
        if verdict is not None:
            return verdict
    pred = normalise.with_argument_of(pred, gold)
    verdict = _by_assignments(pred, gold, rules)
    if verdict is not None:
        return verdict
    pred, gold, verdict = _without_units(normalise.without_lead(pred), normalise.without_lead(gold), rules)
    if verdict is not None:
        return verdict
    return _by_number(pred, gold, rules) or _by_words(pred, gold, rules) or _symbolic(pred, gold, rules)


def _decided(equal: bool, reason: str) -> Comparison:
    return Comparison("equal" if equal else "different", reason)


def _by_base(pred: str, gold: str, rules: Rules) -> Comparison | None:
    """`1011_2` is not 1011. A gold with a base asks for digits in that base: they may come without it."""
    p, g = normalise.based_digits(normalise.right_of_equals(pred)), normalise.based_digits(gold)
    if p is None and g is None:
        return None
    if p and g:
        return _decided(p == g, "digits and base")
    digits, base = p or g
    other = normalise.parse_number(normalise.right_of_equals(gold if p else pred))
    if other is None:
        return _decided(False, "one answer has a base")
    same = other.value.denominator == 1 and str(other.value) == digits
    return _decided(same and (base == 10 or g is not None), "one answer has a base")


def _by_number(pred: str, gold: str, rules: Rules) -> Comparison | None:
    if _decimal_comma(pred, gold) or _decimal_comma(gold, pred):
        return Comparison("equal", "decimal comma")
    sides = normalise.unequated(pred, gold)
    if sides is None:
        return None
    p, g = _number(sides[0]), _number(sides[1])
    if p is None or g is None:
        return None
    return _decided(_same_number(p, g, rules.float_digits), "exact numbers")


@functools.lru_cache(maxsize=8192)
def _number(text: str) -> normalise.Number | None:
    number = normalise.parse_number(text)
    if number is None:
        words = normalise.number_from_words(normalise.words_of(text) or text)
        return normalise.Number(Fraction(words), None, False) if words is not None else None
    return number


def _decimal_comma(a: str, b: str) -> bool:
    """1,22 and 1.22: digits and places agree, only the sign between them differs."""
    return bool(re.fullmatch(r"-?\d+,\d+", a)) and a.replace(",", ".") == b


def _same_number(a: normalise.Number, b: normalise.Number, digits: int) -> bool:
    """Equal, or one is a decimal of at least `digits` places that the other rounds to. `50\\%` is 50 and 1/2."""
    if a.percent == b.percent:
        return _close(a, b, digits)
    plain, percent = (b, a) if a.percent else (a, b)
    hundredth = normalise.Number(percent.value / 100, None if percent.decimals is None else percent.decimals + 2, False)
    return _close(plain, percent, digits) or _close(plain, hundredth, digits)


def _close(a: normalise.Number, b: normalise.Number, digits: int) -> bool:
    if a.value == b.value:
        return True
    written = [n.decimals for n in (a, b) if n.decimals is not None]
    if not written or min(written) < digits or 1 in (a.value.denominator, b.value.denominator):
        return False  # a short decimal is exact: .3333 is not 1/3; and an integer is never rounded to
    size = min(abs(a.value), abs(b.value))
    zeros = len(str(int(1 / size))) - 1 if 0 < size < 1 else 0  # small numbers are compared by digits that count
    places = min(min(written), digits + zeros)
    return size * 10**places >= 1000 and round(a.value, places) == round(b.value, places)


def _by_words(pred: str, gold: str, rules: Rules) -> Comparison | None:
    p_letter, g_letter = normalise.choice_letter(pred), normalise.choice_letter(gold)
    if p_letter and g_letter:
        return _decided(p_letter.lower() == g_letter.lower(), "one letter")
    p, g = normalise.words_of(pred), normalise.words_of(gold)
    if p is not None and g is not None:
        return _decided(p == g, "words")
    plain = g if p is None else p
    other = pred if p is None else gold
    if plain is not None and plain.replace(" ", "") == re.sub(r"[^A-Za-z]", "", other).lower() and other.isalpha():
        return Comparison("equal", "words")
    return None


def _by_ratio(pred: str, gold: str, rules: Rules) -> Comparison | None:
    """1:2 is no fraction; 2:4 is 1:2."""
    p, g = normalise.ratio_parts(pred), normalise.ratio_parts(gold)
    if p is None and g is None:
        return None
    if p is None or g is None or len(p) != len(g):
        return _decided(False, "ratio")
    for part, other in zip(p[1:], g[1:]):
        left, right = f"({p[0]})({other})", f"({g[0]})({part})"
        numbers = [normalise.parse_number(text) for text in (p[0], other, g[0], part)]
        if all(numbers):
            if numbers[0].value * numbers[1].value != numbers[2].value * numbers[3].value:
                return _decided(False, "ratio")
        else:
            verdict = _symbolic(left, right, rules)
            if verdict.status != "equal":
                return verdict
    return _decided(True, "ratio")


def _by_brackets(pred: str, gold: str, rules: Rules) -> Comparison | None:
    """A set written with braces is not the tuple of its members."""
    kinds = {normalise.bracket_kind(pred), normalise.bracket_kind(gold)}
    return _decided(False, "a set and a tuple") if kinds == {"set", "tuple"} else None


def _by_assignments(pred: str, gold: str, rules: Rules) -> Comparison | None:
    """Several solutions "p=5, q=2; p=7, q=3" are pairs, not a set of four equations."""
    p, g = normalise.assignments(pred), normalise.assignments(gold)
    if not p or not g or max(len(p), len(g)) < 2:
        return None
    if len(p) != len(g):
        return _decided(False, "number of solutions")
    for solution in p:
        statuses = [_assignment(solution, other, rules) for other in g]
        if "equal" in statuses:
            del g[statuses.index("equal")]
        elif set(statuses) <= {"different", "unreadable"}:
            return _decided(False, "solutions")
        else:
            return None  # a comparison failed, which says nothing about the answer
    return _decided(True, "solutions")


def _assignment(pred: dict[str, str], gold: dict[str, str], rules: Rules) -> Status:
    """Compares two solutions; the first pair of values that is not equal decides."""
    if pred.keys() != gold.keys():
        return "different"
    statuses = (compare(pred[name], gold[name], rules).status for name in gold)
    return next((status for status in statuses if status != "equal"), "equal")


def _without_units(pred: str, gold: str, rules: Rules) -> tuple[str, str, Comparison | None]:
    """Both answers without their units, and a verdict when the units disagree."""
    (p, p_unit, p_sure), (g, g_unit, g_sure) = units.split_unit(pred), units.split_unit(gold)
    if not g_unit and not p_sure:
        p, p_unit = (pred, "") if p_unit else (p, p_unit)
    if not p_unit and not g_sure:
        g, g_unit = (gold, "") if g_unit else (g, g_unit)
    if p_unit and g_unit and p_unit != g_unit and rules.strict_units:
        return p, g, _decided(False, f"unit {p_unit} for {g_unit}")
    return p, g, None


# ---- the rest is symbolic

_IMAGINARY_J = re.compile(r"(?<![A-Za-z\\])j(?![A-Za-z])")
_IMAGINARY_I = re.compile(r"(?<![A-Za-z\\])i(?![A-Za-z])")
_ADJACENT_NUMBERS = re.compile(r"\d+(?:\.\d+)?(?:\s+\d+(?:\.\d+)?)+")
_OR = re.compile(r"(?<=[\d)\]}])\s*(and|or)\s*(?=[\d(\[A-Za-z\\])")


def _symbolic(pred: str, gold: str, rules: Rules) -> Comparison:
    if _IMAGINARY_J.search(pred) and _IMAGINARY_I.search(gold) and not _IMAGINARY_I.search(pred):
        pred = _IMAGINARY_J.sub("i", pred)
    elif _IMAGINARY_I.search(pred) and _IMAGINARY_J.search(gold) and not _IMAGINARY_I.search(gold):
        gold = _IMAGINARY_J.sub("i", gold)
    try:
        g = symbolic.parse(_latex(gold))
    except symbolic.Unreadable as error:
        return (
            Comparison("gold_unreadable", str(error)) if normalise.words_of(gold) is None else _decided(False, "words")
        )
    except symbolic.TooLarge as error:
        return Comparison("too_large", f"gold: {error}")
    try:
        p = symbolic.parse(_latex(pred))
    except symbolic.Unreadable as error:
        return Comparison("unreadable", str(error))
    except symbolic.TooLarge as error:
        return Comparison("too_large", str(error))
    try:
        return _decided(symbolic.equal(p, g, rules.float_digits), "symbolic")
    except Exception as error:  # sympy fails in many ways; such a failure says nothing about the answer
        return Comparison("error", f"{type(error).__name__} in the comparison")


def _latex(text: str) -> str:
    """Spellings that the grammar misreads: `3or4`; and `5 5`, which it takes for a mixed number."""
    if _ADJACENT_NUMBERS.fullmatch(text):
        raise symbolic.Unreadable("numbers without an operator")
    return _OR.sub(", ", text)
