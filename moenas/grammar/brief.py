"""An architecture as a person writes it: without the fields that have their defaults.

A derived default counts as well, such as `n_heads` that equals d_model / head_dim. The defaults are
read from `defaults.json`, which `make docs` writes from the components. A command that only reads
so loads no PyTorch. Fields of a user's own part are written out in full.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from moenas.grammar.derived import MODEL_WIDTH, derived_value
from moenas.records import Plain

DEFAULTS = Path(__file__).with_name("defaults.json")
"""Under "defaults": family -> kind ("" for a family without kinds) -> field -> [default, family of
its value, derived default]. The family is null for a plain value. The third item is there only for
a field with a derived default. A required plain field has []. Under "former": family -> kind ->
former name of a field -> its place, as in `Component.former`."""
NO_DEFAULT = "(required)"
"""Stands for the default of a required component."""

Fields = dict[str, list[Any]]


@cache
def _on_file() -> dict[str, dict[str, Any]]:
    stored: dict[str, dict[str, Any]] = json.loads(DEFAULTS.read_text())
    return stored


def _fields(family: str, kind: str) -> Fields:
    fields: Fields = _on_file()["defaults"].get(family, {}).get(kind, {})
    return fields


def _former(family: str, kind: str) -> dict[str, str]:
    former: dict[str, str] = _on_file()["former"].get(family, {}).get(kind, {})
    return former


def brief(plain: Any, family: str = "architecture", d_model: int | None = None) -> Any:
    """Return a component as a JSON object without the fields that have their defaults.

    A field whose value equals its derived default is left out as well; some of these need the
    width of the model, `d_model`. A component inside it whose fields all have their defaults is
    written as its kind. Former names of fields, as earlier versions stored them, are replaced by
    the present ones.
    """
    if isinstance(plain, list):
        return [brief(item, family, d_model) for item in plain]
    if not isinstance(plain, dict):
        return plain
    fields = _fields(family, str(plain.get("kind", "")))
    present = _present(plain, family, fields)
    d_model = present.get(MODEL_WIDTH, d_model)
    short: Plain = {}
    for name, value in present.items():
        default, inner, expression = [*fields.get(name, []), None, None, None][:3]
        if inner is not None:
            value, default = brief(value, inner, d_model), brief(default, inner, d_model)
        if len(fields.get(name, [])) and value == default:
            continue
        if expression is not None and value == _derived(expression, present, fields, d_model):
            continue
        only_kind = isinstance(value, dict) and list(value) == ["kind"]
        short[name] = value["kind"] if only_kind else value
    return short


def _derived(
    expression: str, plain: Plain, fields: Fields, d_model: int | None
) -> bool | int | None:
    """Return the value of a derived default beside the fields of a component."""

    def value_of(name: str) -> Any:
        if name == MODEL_WIDTH:
            return d_model
        _, _, other = [*fields[name], None, None, None][:3]
        if (value := plain.get(name)) is None and other is not None:
            return _derived(other, plain, fields, d_model)
        return value

    return derived_value(expression, value_of)


def _present(plain: Plain, family: str, fields: Fields) -> Plain:
    """Return a component with each field at its present place."""
    former: dict[str, str] = _former(family, str(plain.get("kind", "")))
    present: Plain = {}
    for name, value in plain.items():
        if name in fields or name not in former:
            is_kind = former.get(name) == f"{name}.kind" and isinstance(value, str)
            present[name] = {"kind": value} if is_kind else value
    for name, value in plain.items():
        if name in fields or name not in former:
            continue
        outer, _, inner = former[name].partition(".")
        if not inner:
            present[outer] = value
            continue
        component = present.get(outer) or {}
        if inner in _fields(fields[outer][1], str(component.get("kind", ""))):
            present[outer] = {**component, inner: value}
    return present
