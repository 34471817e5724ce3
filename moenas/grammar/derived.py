"""Derived defaults: the value that null stands for, by an expression of other fields."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import TypeAlias

MODEL_WIDTH = "d_model"
"""The name of the model's width in a derived default of one of its parts."""

Number: TypeAlias = "bool | int | Fraction"
ValueOf: TypeAlias = Callable[[str], "Number | None"]


def derived_value(expression: str, value_of: ValueOf) -> bool | int | None:
    """Return the value of an expression: exact, and None if it is no whole number or truth value.

    `d_model / head_dim`, `ceil(d_model / 16)` and `top_k > 1` are expressions. `value_of` gives
    the value of a name, or None if it is not known; then the expression has no value.

    Raises:
        ValueError: if the expression uses anything but names, whole numbers, `/`, `>` and `ceil`.
    """
    value = _value(_parsed(expression), value_of)
    if isinstance(value, Fraction):
        return value.numerator if value.denominator == 1 else None
    return value


@cache
def _parsed(expression: str) -> ast.expr:
    return ast.parse(expression, mode="eval").body


def _value(node: ast.expr, value_of: ValueOf) -> Number | None:
    match node:
        case ast.Name(id=name):
            return value_of(name)
        case ast.Constant(value=int(number)):
            return number
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return _combined(Fraction, left, right, value_of)
        case ast.Compare(left=left, ops=[ast.Gt()], comparators=[right]):
            return _combined(operator.gt, left, right, value_of)
        case ast.Call(func=ast.Name(id="ceil"), args=[inner]):
            value = _value(inner, value_of)
            return None if value is None else math.ceil(value)
    raise ValueError(
        f"{ast.unparse(node)!r} is not allowed in a derived default;"
        " use names, whole numbers, '/', '>' and 'ceil'"
    )


def _combined(
    combine: Callable[[Number, Number], Number], left: ast.expr, right: ast.expr, value_of: ValueOf
) -> Number | None:
    first, second = _value(left, value_of), _value(right, value_of)
    return None if first is None or second is None else combine(first, second)
