"""Reads "name" or "name(1, key=value)" out of a config string; nothing is evaluated.

Leaves out what the names mean: `registry.py` holds the table.
"""

import ast
from collections.abc import Callable, Mapping
from typing import Any

from sdzero_jax.errors import UserError, nearest


def parse(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Splits "topk(64, tail=bucket)" into ("topk", [64], {"tail": "bucket"}).

    Values are numbers, bare or quoted words, or nested calls (returned as their text).
    Raises UserError when the text has another form.
    """
    problem = UserError(f"cannot read {text!r}; write NAME or NAME(value, key=value), such as mixed_kl(0.5)")
    if not isinstance(text, str):
        raise problem
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise problem from None
    if isinstance(node, ast.Name):
        return node.id, [], {}
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise problem
    values = [_value(argument, problem) for argument in node.args]
    if any(keyword.arg is None for keyword in node.keywords):
        raise problem
    return node.func.id, values, {k.arg: _value(k.value, problem) for k in node.keywords}


def _value(node: ast.expr, problem: UserError) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float, str):
        return node.value
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Call):
        return ast.unparse(node)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _value(node.operand, problem)
        if isinstance(inner, (int, float)):
            return -inner
    raise problem


def bind(text: str, tables: Mapping[str, tuple[Callable, tuple[str, ...]]]) -> tuple[str, dict[str, Any]]:
    """Name and keyword settings of `text`, checked against {name: (function, parameter names)}."""
    name, values, keywords = parse(text)
    if name not in tables:
        raise UserError(f"unknown divergence {name!r}{nearest(name, tables)}")
    parameters = tables[name][1]
    if len(values) > len(parameters):
        takes = ", ".join(parameters) or "nothing"
        raise UserError(f"{name} got {len(values)} values in {text!r}; it takes {takes}")
    settings = dict(zip(parameters, values))
    for key, value in keywords.items():
        if key not in parameters:
            raise UserError(f"{name} has no setting {key!r}{nearest(key, parameters)}")
        if key in settings:
            raise UserError(f"{name} got {key!r} twice in {text!r}")
        settings[key] = value
    return name, settings


def choice(what: str, value: Any, choices: tuple[str, ...]) -> str:
    """Returns `value` if it is one of `choices`, else raises UserError."""
    if value not in choices:
        raise UserError(f"unknown {what} {value!r}{nearest(str(value), choices)}")
    return value


def number(what: str, value: Any, low: float, high: float, *, open_low: bool = False) -> float:
    """Returns `value` if it is a number in [low, high] (low excluded when `open_low`), else UserError."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (ok and low <= value <= high and not (open_low and value == low)):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}]"
        raise UserError(f"{what} is {value!r}, wanted a number in {interval}")
    return float(value)
