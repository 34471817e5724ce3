"""The plain form of a space as studies store it: its digest, now and in an earlier version."""

from __future__ import annotations

import json

from moenas.errors import SpaceError
from moenas.grammar import tree as grammar
from moenas.grammar.component import Component
from moenas.model.architecture import Architecture
from moenas.records import Plain
from moenas.resources import Node, sha256
from moenas.space.sections import Protocol, Recipe, Search

RESOURCES = (
    "trials", "replicates", "start_from", "stop", "workers", "cpus", "gpus", "time_limit",
    "candidates_per_worker",
)  # fmt: skip
"""Fields of `search` that a resumed study may change: they do not touch what a value means."""


def digest(plain: Plain) -> str:
    """Return the digest of a space in plain form, leaving out the resources of the search.

    `mtp` of weight 0 builds no heads, so it has the digest of no `mtp`.
    """
    train = dict(plain.get("train") or {})
    if train.get("mtp") and not train["mtp"].get("weight", 1):
        plain = {**plain, "train": {**train, "mtp": None}}
    search = {k: v for k, v in plain.get("search", {}).items() if k not in RESOURCES}
    return sha256(json.dumps({**plain, "search": search}, sort_keys=True).encode())


def with_current_defaults(plain: Plain) -> Plain:
    """Return the stored plain form of a space with the fields that it lacks at their defaults.

    A section that is missing is one without fields. What cannot be read is returned as it is.
    Resources of the search are left at their defaults: they may change, and an earlier version took
    values that are refused now.
    """
    sections: dict[str, type[Component]] = {"train": Recipe, "measure": Protocol, "search": Search}
    search = {k: v for k, v in plain.get("search", {}).items() if k not in RESOURCES}
    lasting = {**plain, "search": search}
    try:
        tree = grammar.read(Architecture, Node.wrap(plain.get("architecture")))
        current = {
            name: grammar.parse(cls, lasting.get(name, {})).plain()
            for name, cls in sections.items()
        }
    except SpaceError:
        return plain
    return {**plain, "architecture": grammar.unparse(tree), **current}
