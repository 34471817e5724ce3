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
"""Family -> kind ("" for a family without kinds) -> field -> [default, family of its value]. The
family is null for a plain value; a required plain field has []."""
NO_DEFAULT = "(required)"
"""Stands for the default of a required component."""


@cache
def _families() -> dict[str, dict[str, dict[str, list[Any]]]]:
    found: dict[str, dict[str, dict[str, list[Any]]]] = json.loads(DEFAULTS.read_text())
    return found


def brief(plain: Any, family: str = "architecture") -> Any:
    """Return a component as a JSON object without the fields that have their defaults."""
    if isinstance(plain, list):
        return [brief(item, family) for item in plain]
    if not isinstance(plain, dict):
        return plain
    fields = _families().get(family, {}).get(str(plain.get("kind", "")), {})
    found: Plain = {}
    for name, value in plain.items():
        default, inner = [*fields.get(name, []), None, None][:2]
        if len(fields.get(name, [])) and value == default:
            continue
        found[name] = value if inner is None else brief(value, inner)
    return found
