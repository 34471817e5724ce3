"""Failed trials of a study, run again under their own numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from moenas import repairs
from moenas.errors import InputError, suggestion
from moenas.heartbeat import Lease
from moenas.records import StudyRecord
from moenas.store import Store

if TYPE_CHECKING:
    from moenas.space import Space

SAME_AGAIN = ("diverged", "acausal", "collapsed", "parameters", "foreign")
"""Kinds of failure that another try ends with, too; only named ones are tried again."""


def stored_space(record: StudyRecord) -> Space:
    """Return the space of a study from the text and the overrides that are stored.

    Objectives and other files are read from the places that the text names.
    """
    from moenas.space import Space

    space = Space.parse(record.space_text, f"{record.name}.yaml", record.overrides)
    return replace(space, name=record.name)


def reopen_failed(store: Store, study: str, kinds: Sequence[str] = ()) -> list[int]:
    """Open failed trials again, so that the next run evaluates them; return their numbers.

    Without `kinds`, those whose outcome may be another one: a diverged model diverges again.

    Raises:
        InputError: if no failed trial has a kind of `kinds`.
        StudyBusyError: if a process runs the study.
    """
    failed = {
        e.trial: str((e.failure or {}).get("kind", "error"))
        for e in store.evaluations(study)
        if e.status == "failed"
    }
    there = sorted(set(failed.values()))
    for kind in kinds:
        if kind not in there:
            known = f"its failures are {', '.join(there)}" if there else "it has no failed trial"
            raise InputError(
                f"--failed {kind}: study '{study}' has no such failure."
                f"{suggestion(kind, there)} {known[0].upper()}{known[1:]}."
            )
    chosen = [
        trial
        for trial, kind in failed.items()
        if (kind in kinds if kinds else kind not in SAME_AGAIN)
    ]
    if chosen:
        with Lease(store, study):
            store.apply(study, lambda connection: repairs.reopen(connection, study, chosen))
    return chosen
