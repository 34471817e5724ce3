"""Reads the holes of a space from YAML: their keys, the labels of options, ranges and fits."""

from __future__ import annotations

from collections import Counter
from typing import TypeGuard, cast

from moenas.errors import suggestion
from moenas.grammar.component import MAX_NUMBER, Field, join
from moenas.grammar.conditions import Scalar
from moenas.grammar.nodes import LAYERS, Fit, Range
from moenas.resources import Node

MAX_OPTIONS = 1000
HOLES = {"choice": {"choice"}, "int": {"int", "step", "log"}, "float": {"float", "step", "log"}}
SAME_AS = "same_as"
"""The key of a value that is tied to one elsewhere in the architecture."""
FIT = "fit"
"""The key of a width that is solved after each draw."""
FIT_COSTS = ("active_params", "params", "total_params", "flops_per_token", "weight_bytes")
"""Costs that grow with a width."""
WIDEST = 2**20
"""The widest width that a fit tries, where a field has no bound of its own."""


def hole_kind(node: Node) -> str | None:
    """Return choice, int or float if the node is a hole."""
    if not isinstance(node.value, dict):
        return None
    return next((hole for hole in HOLES if hole in node.value), None)


def check_hole_keys(node: Node, hole: str, path: str) -> dict[str, Node]:
    """Refuse keys that do not belong to this kind of hole."""
    keys = cast(dict[str, Node], node.value)
    for key, value in keys.items():
        if key not in HOLES[hole]:
            allowed = ", ".join(sorted(HOLES[hole]))
            near = suggestion(key, HOLES[hole])
            raise value.error(
                join(path, key), f"not part of a '{hole}' hole.{near} It takes {allowed}.", key=True
            )
    return keys


def option_labels(options: list[Node]) -> list[Scalar]:
    """Name the options: a scalar by itself, a component by kind or preset, else by number."""
    labels: list[Scalar] = []
    taken = Counter(option.value for option in options if isinstance(option.value, str))
    for i, option in enumerate(options):
        if not isinstance(option.value, dict | list):
            labels.append(option.value)
            continue
        named = None
        if isinstance(option.value, dict):
            named = option.value.get("kind") or option.value.get("preset")
        label = str(named.plain) if named is not None else f"option{i + 1}"
        if option.path:  # a named layer
            label = option.path.rpartition(".")[2]
        taken[label] += 1
        labels.append(f"{label}-{taken[label]}" if taken[label] > 1 else label)
    return labels


def shared_name(node: Node, path: str) -> str:
    """Return the name of a hole that several places share, or an empty string.

    These are the holes of named layers, and those that a value is tied to.
    """
    name = (node.hole or path).removeprefix("architecture.")
    return name if node.hole or path.startswith(f"{LAYERS}.") else ""


def read_range(field: Field, node: Node, path: str, *, whole: bool) -> Range:
    """Read `{int: [low, high], step, log}` or `{float: [low, high], step, log}`."""
    hole = "int" if whole else "float"
    keys = check_hole_keys(node, hole, path)
    if field.component is not None or not ({int, float} & set(field.scalars)):
        raise node.error(path, f"a range is not allowed here; give {field.accepts_text()}")
    if not whole and float not in field.scalars:
        raise node.error(path, f"a 'float' range is not allowed here; give {field.accepts_text()}")
    ends = keys[hole]
    if not isinstance(ends.value, list) or len(ends.value) != 2:
        raise ends.error(path, f"'{hole}' needs two numbers: [low, high]")
    for end in ends.value:
        number = isinstance(end.value, int | float) and not isinstance(end.value, bool)
        if not number or (whole and not float(cast(float, end.value)).is_integer()):
            raise end.error(path, f"{end.plain!r} is not a {'whole ' if whole else ''}number")
        if (reason := field.error_for(end.value)) is not None:
            raise end.error(path, reason)
    low, high = (_end(field, cast(float, end.value), whole) for end in ends.value)
    if low > high:
        raise ends.error(path, f"low ({low:g}) is above high ({high:g})")
    step, log = _step_and_log(field, keys, path, whole=whole)
    if log and low <= 0:
        raise ends.error(path, f"'log' needs a low end above 0, not {low:g}")
    if step is not None and not (high - low) / step <= MAX_NUMBER:
        raise keys["step"].error(join(path, "step"), f"{step:g} gives more than 1e15 steps")
    if step is not None and _remainder(high - low, step):
        raise ends.error(
            path, f"from {low:g} to {high:g} is not a whole number of steps of {step:g}"
        )
    return Range(low, high, step, log, whole, node.mark, shared_name(node, path))


def read_fit(field: Field, node: Node, path: str) -> Fit:
    """Read `{fit: {COST: TARGET, within: SHARE, multiple_of: N}}`.

    Raises:
        SpaceError: at the key or the value that is wrong.
    """
    keys = cast(dict[str, Node], node.value)
    for key, value in keys.items():
        if key != FIT:
            raise value.error(join(path, key), "not allowed beside 'fit'", key=True)
    if field.multiple is None or field.component is not None:
        raise node.error(path, f"a 'fit' is for widths; give {field.accepts_text()}")
    inner, place = keys[FIT], join(path, FIT)
    example = "write {active_params: 20e6, within: 0.01}"
    if not isinstance(inner.value, dict):
        raise inner.error(place, f"{inner.plain!r} is not a target; {example}")
    known = (*FIT_COSTS, "within", "multiple_of")
    for key, value in inner.value.items():
        if key not in known:
            text = f"no cost that a width can fit.{suggestion(key, known)}"
            raise value.error(join(place, key), f"{text} There are {', '.join(known)}.", key=True)
    costs = [name for name in FIT_COSTS if name in inner.value]
    if len(costs) != 1:
        raise inner.error(place, f"a fit has one target, not {len(costs)}; {example}")
    target, within = inner.value[costs[0]], inner.value.get("within")
    if not _is_number(target.value) or not 1 <= target.value <= MAX_NUMBER:
        raise target.error(
            join(place, costs[0]), f"{target.plain!r} is not a number from 1 to 1e15"
        )
    if not float(target.value).is_integer():
        raise target.error(join(place, costs[0]), f"{target.plain!r} is not a whole number")
    if within is not None and not (_is_number(within.value) and 0 <= within.value < 1):
        raise within.error(join(place, "within"), f"{within.plain!r} is not a share from 0 to 1")
    step = _multiple_of(field, inner.value.get("multiple_of"), join(place, "multiple_of"))
    low = -(-int(field.low or step) // step) * step
    high = int(field.high or WIDEST) // step * step
    share = float(within.value) if within is not None and _is_number(within.value) else 0.0
    return Fit(costs[0], int(target.value), share, low, high, step, node.mark, path)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _multiple_of(field: Field, node: Node | None, path: str) -> int:
    """Return what the widths of a fit are multiples of: at least what the field asks for."""
    multiple = field.multiple or 1
    if node is None:
        return multiple
    if not _is_number(node.value) or not 0 < node.value <= WIDEST or node.value % multiple:
        raise node.error(path, f"{node.plain!r} is not a multiple of {multiple} up to {WIDEST:,}")
    return int(node.value)


def _end(field: Field, value: float, whole: bool) -> float:
    """Give an end of a range the type of what is drawn: 64 and 64.0 are one space."""
    return int(value) if whole else cast(float, field.convert(value))


def _remainder(span: float, step: float) -> bool:
    """Whether a span is not a whole number of steps; exact for whole numbers."""
    if isinstance(span, int) and isinstance(step, int):
        return bool(span % step)
    return abs(span / step - round(span / step)) > 1e-9


def _step_and_log(
    field: Field, keys: dict[str, Node], path: str, *, whole: bool
) -> tuple[float | None, bool]:
    """Read the step and log keys of a range; whole numbers step by 1 unless told otherwise."""
    log, step = keys.get("log"), keys.get("step")
    if log is not None and not isinstance(log.value, bool):
        raise log.error(join(path, "log"), f"{log.plain!r} is not true or false")
    is_log = bool(log and log.value)
    if step is None:
        return ((field.multiple or 1) if whole else None), is_log
    number = isinstance(step.value, int | float) and not isinstance(step.value, bool)
    if not number or not 0 < cast(float, step.value) <= MAX_NUMBER:
        raise step.error(join(path, "step"), f"{step.plain!r} is not a number above 0")
    value = cast(float, step.value)
    if whole and float(value).is_integer():
        value = int(value)
    if is_log:
        raise step.error(join(path, "step"), "'step' and 'log' exclude each other")
    multiple = field.multiple or 1
    if whole and value % multiple:
        raise step.error(join(path, "step"), f"{value:g} is not a multiple of {multiple}")
    return value, is_log
