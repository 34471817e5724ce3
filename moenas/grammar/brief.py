"""An architecture as a person writes it: without the fields that have their defaults.

The defaults are read from `defaults.json`, which `make docs` writes from the components, so that a
command that only reads loads no PyTorch. Fields of a user's own part are written out in full.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from moenas.records import Plain

DEFAULTS = Path(__file__).with_name("defaults.json")
"""Under "defaults": family -> kind ("" for a family without kinds) -> field -> [default, family of
its value]. The family is null for a plain value; a required plain field has []. Under "former":
family -> kind -> former name of a field -> its place, as in `Component.former`."""
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


def brief(plain: Any, family: str = "architecture") -> Any:
    """Return a component as a JSON object without the fields that have their defaults.

    A component inside it whose fields all have their defaults is written as its kind. Former names
    of fields, as earlier versions stored them, are replaced by the present ones.
    """
    if isinstance(plain, list):
        return [brief(item, family) for item in plain]
    if not isinstance(plain, dict):
        return plain
    fields = _fields(family, str(plain.get("kind", "")))
    short: Plain = {}
    for name, value in _present(plain, family, fields).items():
        default, inner = [*fields.get(name, []), None, None][:2]
        if inner is not None:
            value, default = brief(value, inner), brief(default, inner)
        if len(fields.get(name, [])) and value == default:
            continue
        only_kind = isinstance(value, dict) and list(value) == ["kind"]
        short[name] = value["kind"] if only_kind else value
    return short


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
