"""Requirements: a closed grammar of comparisons over costs and fields; nothing is executed."""

from __future__ import annotations

import ast
import math
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from moenas.errors import SourceLocation, SpaceError
from moenas.grammar.spellings import present_name
from moenas.grammar.synonyms import hint

Number: TypeAlias = float
Names: TypeAlias = Mapping[str, "float | str | None"]

MAX_LENGTH = 500
LARGEST = 1e30
"""The largest number that a requirement can hold."""

TRAINED = {
    "max_vio": ("max_vio", "the largest load of an expert over the mean, minus 1"),
    "load_cv": ("cv", "standard deviation of the loads over their mean"),
    "load_entropy": (
        "entropy",
        "entropy of the shares of the load over the entropy of an even load",
    ),
    "dead_experts": ("dead", "experts with less than 1 % of the mean load"),
    "dropped_share": ("dropped", "share of the slots without room at the capacity of training"),
    "logit_rms": ("logit_rms", "root of the mean square of the router's logits"),
    "logit_max": ("logit_max", "the largest absolute logit of the router"),
}
"""Names of statistics of a trained layer's routing over the text of validation -> the key of a row,
and the meaning."""

LATENCIES = {
    "decode_ms": "the measured time of one decoding step",
    "prefill_ms": "the measured time of one forward pass over a prompt",
}
"""Names of objectives whose measured value a requirement can use."""

_ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[..., float]] = {"min": min, "max": max, "abs": abs}
_STRICT = 1e-9
"""Violation of `a < b` where a equals b."""


@dataclass(frozen=True)
class Requirement:
    """One line of `require`, e.g. `active_params < 2e6` or `top_k * d_expert <= d_model`."""

    text: str
    tree: ast.expr
    names: frozenset[str]
    mark: SourceLocation
    former: tuple[str, ...] = ()
    """A line for each former name of a field in the text."""

    @property
    def trained(self) -> bool:
        """Whether it can be decided on the trained model alone."""
        return not self.names.isdisjoint({*TRAINED, *LATENCIES})

    @property
    def bounded_latency(self) -> str | None:
        """The latency that the requirement bounds on one side, such as in `decode_ms < 5`.

        None for every other form: only of such a one a whole range of values breaks it if both
        ends do.
        """
        used = self.names & LATENCIES.keys()
        if len(used) != 1 or not self.names.isdisjoint(TRAINED):
            return None
        tree, (name,) = self.tree, used
        if not isinstance(tree, ast.Compare) or len(tree.ops) != 1:
            return None
        if not isinstance(tree.ops[0], ast.Lt | ast.LtE | ast.Gt | ast.GtE):
            return None
        sides = (tree.left, tree.comparators[0])
        alone = [isinstance(side, ast.Name) and side.id == name for side in sides]
        count = sum(isinstance(node, ast.Name) and node.id == name for node in ast.walk(tree))
        return name if any(alone) and count == 1 else None

    def violation(self, layers: list[Names]) -> float:
        """Return by how much the requirement is broken: over 0 if broken, else 0 or less.

        The expression is taken for each layer that has all of its names, and the worst counts;
        with no such layer it holds. A comparison is broken by the difference of its sides over
        the larger of them, so that requirements of different units have equal weight.
        """
        violations = [
            _violation(self.tree, names)
            for names in {id(layer): layer for layer in layers}.values()
            if all(names.get(name) is not None for name in self.names)
        ]
        return max(violations, default=0.0)


def parse_requirement(
    text: str,
    mark: SourceLocation,
    known: set[str],
    ambiguous: Mapping[str, list[str]] | None = None,
    former: Mapping[str, str] | None = None,
) -> Requirement:
    """Read one requirement; `ambiguous` maps names of several fields to those to write instead.

    `former` maps former names of fields to their present places; such names are read as well.

    Raises:
        SpaceError: at the column of what is wrong.
    """
    if len(text) > MAX_LENGTH:
        raise SpaceError(f"longer than {MAX_LENGTH} characters", location=mark, path="require")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = getattr(error, "msg", None) or "not an expression"
        place = _shift(mark, (getattr(error, "offset", 1) or 1) - 1)
        raise SpaceError(
            f"{text!r} is not valid: {reason}; write e.g. 'active_params < 2e6'",
            location=place,
            path="require",
        ) from None
    present = _PresentNames(known, former or {})
    tree = present.visit(tree)
    names: set[str] = set()
    _check_logic(tree, names, mark, known)
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.expr)):
        name = _dotted(node)
        if name in names and ambiguous and name in ambiguous:
            which = " or ".join(ambiguous[name])
            raise _refuse(node, mark, f"'{name}' is a field of several parts; write {which}")
    former_names = (f"{mark}: require: {line}" for line in present.replaced)
    return Requirement(text, tree, frozenset(names), mark, tuple(former_names))


class _PresentNames(ast.NodeTransformer):
    """Replaces former names of fields, such as `router.bias_rate`, by the present ones."""

    def __init__(self, known: set[str], former: Mapping[str, str]) -> None:
        self.known = known
        self.former = former
        self.replaced: list[str] = []

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """Replace one word."""
        return self._present(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        """Replace a dotted name."""
        return self._present(node)

    def _present(self, node: ast.expr) -> ast.expr:
        name = _dotted(node)
        if name is None or name in self.known:
            return node
        now = present_name(name, self.former)
        if now == name:
            return node
        self.replaced.append(f"{name}: a former name; write {now}")
        expression = ast.parse(now, mode="eval").body
        for inner in ast.walk(expression):
            if isinstance(inner, ast.expr):
                ast.copy_location(inner, node)
        return expression


def _shift(mark: SourceLocation, columns: int) -> SourceLocation:
    return SourceLocation(mark.source, mark.line, mark.column + columns) if mark.line else mark


def _refuse(node: ast.expr, mark: SourceLocation, message: str) -> SpaceError:
    return SpaceError(message, location=_shift(mark, node.col_offset), path="require")


def _check_logic(node: ast.expr, names: set[str], mark: SourceLocation, known: set[str]) -> None:
    """Accept comparisons joined by and, or, not; collect the names they use."""
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            _check_logic(value, names, mark, known)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _check_logic(node.operand, names, mark, known)
    elif isinstance(node, ast.Compare):
        for op in node.ops:
            if isinstance(op, ast.In | ast.NotIn | ast.Is | ast.IsNot):
                raise _refuse(node, mark, "compare with <, <=, >, >=, == or !=")
        sides = [node.left, *node.comparators]
        for side in sides:
            _check_value(side, names, mark, known)
        if any(_is_text(side) for side in sides) and not all(
            isinstance(op, ast.Eq | ast.NotEq) for op in node.ops
        ):
            raise _refuse(node, mark, "words compare with == or != only")
    else:
        raise _refuse(node, mark, "not a comparison; write e.g. 'active_params < 2e6'")


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _check_value(node: ast.expr, names: set[str], mark: SourceLocation, known: set[str]) -> None:
    """Accept numbers, words, known names, arithmetic and min, max, abs."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str):
        if not isinstance(node.value, str) and not abs(node.value) <= LARGEST:
            raise _refuse(node, mark, f"numbers go up to {LARGEST:g}")
        return
    if (name := _dotted(node)) is not None:
        if name not in known:
            near = hint(name, known)
            raise _refuse(node, mark, f"no cost or field '{name}'.{near}")
        names.add(name)
    elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        _check_value(node.left, names, mark, known)
        _check_value(node.right, names, mark, known)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        _check_value(node.operand, names, mark, known)
    elif isinstance(node, ast.Call) and _is_function(node):
        for argument in node.args:
            _check_value(argument, names, mark, known)
    else:
        allowed = "numbers, names, + - * / // %, min, max and abs"
        raise _refuse(node, mark, f"not allowed here: '{ast.unparse(node)}'; use {allowed}")


def _dotted(node: ast.AST) -> str | None:
    """Return the name that an expression is, such as `scale` or `mixer.scale`, or None."""
    if isinstance(node, ast.Attribute) and (before := _dotted(node.value)) is not None:
        return f"{before}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


def _is_function(node: ast.Call) -> bool:
    if not isinstance(node.func, ast.Name) or node.keywords:
        return False
    takes_one = node.func.id == "abs"
    return node.func.id in _FUNCTIONS and (len(node.args) == 1) is takes_one and bool(node.args)


def _violation(node: ast.expr, names: Names) -> float:
    """Return over 0 if the expression is false; `and` takes the worst side, `or` the best."""
    if isinstance(node, ast.BoolOp):
        parts = [_violation(value, names) for value in node.values]
        return max(parts) if isinstance(node.op, ast.And) else min(parts)
    if isinstance(node, ast.UnaryOp):
        inner = _violation(node.operand, names)
        return -inner if inner > 0 else max(-inner, _STRICT)
    assert isinstance(node, ast.Compare)
    sides = [_value(side, names) for side in (node.left, *node.comparators)]
    pairs = zip(sides, node.ops, sides[1:], strict=False)
    return max(_broken(left, op, right) for left, op, right in pairs)


def _broken(left: float | str, op: ast.cmpop, right: float | str) -> float:
    """Return by how much `left op right` fails, relative to the larger side."""
    if isinstance(op, ast.Eq | ast.NotEq) and (isinstance(left, str) or isinstance(right, str)):
        return _STRICT if (left == right) is isinstance(op, ast.NotEq) else 0.0
    if isinstance(left, str) or isinstance(right, str):
        return 1.0
    difference = (left - right) / max(abs(left), abs(right), 1e-300)
    if math.isnan(difference):
        return 1.0
    if isinstance(op, ast.Gt | ast.GtE):
        difference = -difference
    if isinstance(op, ast.Eq):
        return abs(difference)
    if isinstance(op, ast.NotEq):
        return _STRICT if difference == 0 else -abs(difference)
    strict = isinstance(op, ast.Lt | ast.Gt)
    return _STRICT if strict and difference == 0 else difference


def _value(node: ast.expr, names: Names) -> float | str:
    """Compute one side of a comparison; a division by zero is nan."""
    if isinstance(node, ast.Constant):
        assert isinstance(node.value, int | float | str)
        return node.value
    if (name := _dotted(node)) is not None:
        value = names[name]
        assert value is not None
        return value
    if isinstance(node, ast.UnaryOp):
        inner = _number(node.operand, names)
        return -inner if isinstance(node.op, ast.USub) else inner
    if isinstance(node, ast.Call):
        assert isinstance(node.func, ast.Name)
        return _FUNCTIONS[node.func.id](*(_number(a, names) for a in node.args))
    assert isinstance(node, ast.BinOp)
    try:
        compute = _ARITHMETIC[type(node.op)]
        return _bounded(compute(_number(node.left, names), _number(node.right, names)))
    except (ZeroDivisionError, OverflowError):
        return math.nan


def _bounded(value: float) -> float:
    """Return a number that fits a float: the largest there is in place of more."""
    return max(-sys.float_info.max, min(sys.float_info.max, value))


def _number(node: ast.expr, names: Names) -> float:
    value = _value(node, names)
    return math.nan if isinstance(value, str) else value
