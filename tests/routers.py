"""Routers from fields as a space file has them."""

from __future__ import annotations

from typing import Any

from moenas.grammar.component import fields
from moenas.model import Router


def router_of(**given: Any) -> Router:
    """Return a router of fields; a component is a kind, or a mapping with its kind.

    Unlike a space file it may break rules, so that a test can ask which.
    """
    known = fields(Router)
    values = {}
    for name, value in given.items():
        family = known[name].component
        if family is not None and isinstance(value, str | dict):
            plain = {"kind": value} if isinstance(value, str) else dict(value)
            value = family.kinds[plain.pop("kind")](**plain)
        values[name] = value
    return Router(**values)
