"""Allowed changes of a study between two runs: its resources, and changes that the user accepts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moenas.errors import InputError
from moenas.former import OBJECTIVE_DIGESTS
from moenas.records import Plain, StudyRecord
from moenas.resources import sha256
from moenas.space.objective import Objective
from moenas.space.stored_form import RESOURCES, digest, with_current_defaults

if TYPE_CHECKING:
    from moenas.data.corpus import Corpus
    from moenas.space.space import Space

FORMER_SAMPLER, FORMER_LR_SCALE = "tpe", 1.0
"""Defaults of `search.sampler` and `train.lr_scale` in earlier versions."""
MAX_DIFFERENCES = 20
"""Lines shown of what differs between two spaces."""


def with_stored_defaults(space: Space, known: StudyRecord | None) -> Space:
    """Return a space with a former default of its study where its file names no value.

    A study that began with an earlier version and no value of its own goes on with that default.
    """
    if known is None:
        return space
    if not space.names_sampler and known.space.get("search", {}).get("sampler") == FORMER_SAMPLER:
        space = space.with_search(sampler=FORMER_SAMPLER)
    if not space.names_lr_scale and known.space.get("train", {}).get("lr_scale") == FORMER_LR_SCALE:
        space = replace(space, train=replace(space.train, lr_scale=FORMER_LR_SCALE))
    return space


def changed_objectives(known: StudyRecord, space: Space) -> list[Objective]:
    """Return the objectives whose files say something else than when the study measured them.

    Comments, docstrings and layout say nothing.
    """
    stored = {info["name"]: info["sha256"] for info in known.objectives}
    return [o for o in space.objectives if o.name in stored and not _is_same(stored[o.name], o)]


def refuse_changes(
    known: StudyRecord, space: Space, corpus: Corpus, accept: bool = False
) -> list[Objective]:
    """Refuse a space or a corpus that is not the study's; return the accepted changed objectives.

    Raises:
        InputError: naming what differs, and the way to go on.
    """
    way_out = "; give the space another `name` for a new study"
    _refuse_other_objectives(known, space, accept, way_out)
    changed = changed_objectives(known, space)
    stored = _with_objectives_of(space, with_current_defaults(known.space))
    if known.space_sha256 != space.sha256 and digest(stored) != space.sha256:
        lines = _differences(stored, space.plain())
        files = [line for line in lines if line.startswith("  objectives.")]
        if files != lines or not accept:
            if files == lines and changed:
                names = ", ".join(f"'{o.name}'" for o in changed)
                raise InputError(
                    f"study '{space.name}': the files of the objectives {names} have changed since"
                    " they were measured; --accept-changes goes on with them, and measures the"
                    f" finished trials again from their stored weights{way_out}"
                )
            if len(lines) > MAX_DIFFERENCES:
                lines[MAX_DIFFERENCES:] = [f"  and {len(lines) - MAX_DIFFERENCES} more"]
            raise InputError(
                "\n".join([f"study '{space.name}' was begun with another space{way_out}:", *lines])
            )
    stored_corpus = known.data.get("sha256")
    if stored_corpus is None:
        raise InputError(
            f"study '{space.name}': its row in the database lacks the digest of its corpus,"
            f" `data.sha256`, so it cannot go on{way_out}"
        )
    if stored_corpus != corpus.sha256:
        raise InputError(
            f"study '{space.name}' was begun on another corpus: its digest was"
            f" {stored_corpus[:12]}, '{corpus.name}' has {corpus.sha256[:12]}{way_out}"
        )
    return changed


def _refuse_other_objectives(known: StudyRecord, space: Space, accept: bool, way_out: str) -> None:
    """Refuse what no measurement of the finished trials can mend: other axes of the front.

    Other names are left to the comparison of the spaces, where changes are not accepted.

    Raises:
        InputError: if names, order or directions of the objectives are others.
    """
    before, now = known.directions, {o.name: o.direction for o in space.objectives}
    if list(before.items()) == list(now.items()) or not (accept or list(before) == list(now)):
        return
    old, new = (", ".join(f"{n} ({d})" for n, d in o.items()) for o in (before, now))
    raise InputError(
        f"study '{space.name}' was begun with the objectives {old}, not {new}; their names, order"
        f" and directions cannot change{way_out}"
    )


def version_changes(known: StudyRecord, versions: dict[str, str]) -> str | None:
    """Say which versions differ from those that the study began with; None if none does."""
    differing = [
        f"{name} {known.versions[name]} -> {version}"
        for name, version in versions.items()
        if known.versions.get(name, version) != version
    ]
    return ", ".join(differing) or None


def _is_same(stored: str, objective: Objective) -> bool:
    """Whether a stored digest belongs to an objective; older studies hold the digest of its
    text."""
    former = () if objective.from_user else OBJECTIVE_DIGESTS.get(objective.name, ())
    return stored in (objective.info().sha256, sha256(objective.source.encode()), *former)


def _with_objectives_of(space: Space, stored: Plain) -> Plain:
    """Write the digests of objectives that say the same as the objectives of the space."""
    present = deepcopy(stored)
    for entry in present.get("objectives", []):
        for objective in space.objectives:
            if objective.name == entry["name"] and _is_same(entry["sha256"], objective):
                entry["sha256"] = objective.info().sha256
    return present


def _differences(before: Plain, after: Plain) -> list[str]:
    old, new = dict(_leaves(before)), dict(_leaves(after))
    return [
        f"  {path}: {_shown(old, path)} -> {_shown(new, path)}"
        for path in {**old, **new}
        if old.get(path, old) != new.get(path, new) and not _is_ignored(path)
    ]


def _is_ignored(path: str) -> bool:
    """Whether a difference is not told: a resumed run may change it, or its digest says it."""
    section, _, field = path.partition(".")
    resource = section == "search" and field in RESOURCES
    return resource or (section == "use" and field.endswith(".source"))


def _leaves(plain: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted path and value of everything in plain data."""
    if isinstance(plain, dict | list) and plain:
        items = plain.items() if isinstance(plain, dict) else enumerate(plain)
        for key, value in items:
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, plain


def _shown(leaves: dict[str, Any], path: str) -> str:
    return json.dumps(leaves[path]) if path in leaves else "(nothing)"
