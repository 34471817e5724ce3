"""The finished trials that count towards the total of a study."""

from __future__ import annotations

from collections.abc import Mapping

from moenas.records import Failure

NOT_EVALUATED = ("parameters", "foreign", "sampler")
"""Kinds of failure of a trial that no worker has seen: they do not count as evaluated."""


def is_evaluated(
    status: str, metrics: Mapping[str, float], failure: Failure | None, has_values: bool
) -> bool:
    """Say whether a trial counts towards `search.trials`: a worker evaluated its model.

    Complete, failed and stopped candidates count. Three kinds do not: a draw that breaks a
    requirement before training, a copy of an earlier trial, and a trial of another program.
    """
    if "copied_from" in metrics:
        return False
    if status == "failed":
        return failure is None or failure.kind not in NOT_EVALUATED
    return has_values or status == "stopped"
