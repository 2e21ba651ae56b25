"""Symbolic comparison of two answers with math-verify, behind guards against answers that never finish.

LaTeX goes through an ANTLR grammar (latex2sympy2-extended): no text is ever evaluated as code, and
math-verify's own extraction, one branch of which calls eval, is not used. sympy is imported on the
first call.
"""

import functools
import logging
import math
from typing import Any

MAX_DIGITS = 3000  # a number of more digits is not computed
MAX_TERMS = 2000  # of a finite sum or product
MAX_DEPTH = 60
_PROBES = ("0.7391", "1.2718", "2.3141", "0.4142", "3.1726", "1.9021", "0.2357", "2.8634")


class TooLarge(Exception):
    """The expression would take unreasonable time or memory to evaluate."""


class Unreadable(Exception):
    """The text is not LaTeX mathematics."""


@functools.cache
def _library():
    """(normalise, parse, verify) of the libraries, imported once."""
    from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
    from math_verify import verify
    from math_verify.parser import parse_latex_cached

    for name in ("math_verify", "latex2sympy2_extended"):  # they warn when their own timer is off
        logging.getLogger(name).setLevel(logging.ERROR)
    settings = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
    )
    return functools.partial(normalize_latex, config=settings), parse_latex_cached, verify


@functools.cache
def load() -> None:
    """Imports sympy and math-verify and compares once, outside any deadline: an interrupted import stays broken."""
    equal(parse(r"\frac{1+x}{y}"), parse(r"\frac{x+1}{y}"), 6)


@functools.lru_cache(maxsize=4096)
def parse(latex: str) -> Any:
    """The sympy expression of `latex`, unevaluated. Raises Unreadable, or TooLarge."""
    normalise, parser, _ = _library()
    try:
        expression = parser(normalise(latex))
    except Exception as error:  # the grammar's errors and sympy's come in many classes
        raise Unreadable(" ".join(str(error).split())[:80]) from None
    if expression is None or isinstance(expression, str):
        raise Unreadable("no expression")
    _refuse_too_large(expression)
    return expression


def equal(pred: Any, gold: Any, digits: int) -> bool:
    """Are two parsed answers equal? Floats agree to `digits` decimals, more where the numbers are small.

    Raises what math-verify raises.
    """
    from sympy import Basic, Expr

    if isinstance(pred, Expr) and isinstance(gold, Expr) and _differ_numerically(pred, gold, digits):
        return False
    rounding = digits
    if isinstance(gold, Expr) and isinstance(pred, Basic) and not gold.free_symbols:
        size = _size(gold)
        rounding += max(0, -size) if size is not None else 0
    _, _, verify = _library()
    return verify(
        gold,
        pred,
        float_rounding=rounding,
        allow_set_relation_comp=True,
        timeout_seconds=None,
        raise_on_error=True,
    )


def _size(number: Any) -> int | None:
    """floor(log10 |number|) + 1, or None."""
    try:
        value = abs(complex(number.evalf(15)))
        return math.floor(math.log10(value)) + 1 if 0 < value < math.inf else None
    except Exception:
        return None


def _differ_numerically(pred: Any, gold: Any, digits: int) -> bool:
    """True when one point shows that the two cannot be equal; False says nothing.

    Sparing simplify the many plainly wrong answers is most of the speed.
    """
    from sympy import E, Float, Symbol

    symbols = sorted(pred.free_symbols | gold.free_symbols, key=str)
    if len(symbols) > len(_PROBES) or isinstance(pred, Symbol) or isinstance(gold, Symbol) or E in (pred, gold):
        return False  # names such as E may stand for a letter: the comparison of symbols decides
    if _letters_only(pred) or _letters_only(gold):
        return False
    tolerance = 10.0**-digits if pred.has(Float) or gold.has(Float) else 1e-8
    at = dict(zip(symbols, (Float(probe, 20) for probe in _PROBES)))
    try:
        a, b = complex(pred.evalf(20, subs=at)), complex(gold.evalf(20, subs=at))
    except Exception:
        return False
    scale = max(abs(a), abs(b))
    if not math.isfinite(scale) or _is_percent(pred) != _is_percent(gold):
        return False
    return abs(a - b) > 10 * tolerance * max(scale, 1.0)


def _letters_only(expression: Any) -> bool:
    """A product of letters may be a word that lost its \\text."""
    from sympy import E, Mul, Symbol

    return isinstance(expression, Mul) and all(isinstance(a, Symbol) or a == E for a in expression.args)


def _is_percent(expression: Any) -> bool:
    from sympy import Mul, Rational, UnevaluatedExpr

    return isinstance(expression, Mul) and UnevaluatedExpr(Rational(1, 100)) in expression.args


# ---- what would not finish


def _refuse_too_large(expression: Any) -> None:
    """Raises TooLarge for towers of powers, huge factorials and long finite sums, without evaluating them."""
    from sympy import MatrixBase

    entries = list(expression) if isinstance(expression, MatrixBase) else [expression]
    for entry in entries:
        _digits(entry, 0)


def _digits(node: Any, depth: int) -> float:
    """An upper estimate of log10 |node| for numeric nodes; every node is visited, symbols count as small."""
    from sympy import MatrixBase, Number, Pow, Product, Sum, binomial, factorial, factorial2

    if depth > MAX_DEPTH:
        raise TooLarge("nested too deeply")
    if isinstance(node, MatrixBase):
        return max((_digits(entry, depth + 1) for entry in node), default=0.0)
    if isinstance(node, Number):
        return _log10(node)
    children = [_digits(child, depth + 1) for child in getattr(node, "args", ())]
    if isinstance(node, Pow):
        base, exponent = children[0], children[1]
        if exponent > 12:
            raise TooLarge("a tower of powers")
        if node.exp.free_symbols or node.base in (0, 1, -1):
            size = 0.0
        else:
            size = max(base, 0.31) * 10.0**exponent
    elif isinstance(node, (factorial, factorial2)):
        if children[0] > 7:
            raise TooLarge("a factorial")
        value = 10.0 ** children[0]
        size = value * max(children[0], 1.0)
    elif isinstance(node, binomial):
        size = 10.0 ** min(children) if min(children) < 7 else math.inf
    elif isinstance(node, (Sum, Product)):
        for limits in node.limits:
            finite = len(limits) == 3 and all(bound.is_number and bound.is_finite for bound in limits[1:])
            if finite and _log10_difference(limits) > math.log10(MAX_TERMS):
                raise TooLarge("a long sum or product")
        size = max(children, default=0.0) + math.log10(MAX_TERMS)
    else:
        size = sum(max(child, 0.0) for child in children)
    if size > MAX_DIGITS:
        raise TooLarge(f"a number of more than {MAX_DIGITS} digits")
    return size


def _log10(number: Any) -> float:
    numerator, denominator = getattr(number, "p", None), getattr(number, "q", None)
    if isinstance(numerator, int) and isinstance(denominator, int) and numerator:
        return math.log10(max(abs(numerator) / denominator, 1.0)) if abs(numerator) < 10**300 else len(str(numerator))
    try:
        value = abs(float(number))
        return math.log10(max(value, 1.0)) if math.isfinite(value) else 0.0
    except (OverflowError, TypeError, ValueError):
        return 0.0


def _log10_difference(limits: Any) -> float:
    try:
        return math.log10(max(float(limits[2]) - float(limits[1]), 1.0))
    except (OverflowError, TypeError, ValueError):
        return math.inf
