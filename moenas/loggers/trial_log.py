"""The log of one event: a trial with its numbers, its learning curve and its routing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moenas.records import CurvePoint, Evaluation, Plain, RoutingRow
from moenas.study.events import Event

LOGGED = ("finished", "stopped", "reused", "replicated")
"""Kinds of events whose trials are logged. Infeasible draws and copies have no run of their own."""


@dataclass(frozen=True)
class TrialLog:
    """One evaluated trial, and how far its study is."""

    study: str
    run: str
    """Name of its run: `trial-7`, or `trial-7-seed-2` of a replicate."""
    status: str
    params: Plain
    """Hole -> drawn value; empty for a replicate."""
    facts: dict[str, str | int]
    """Trial, attempt, seed, status, fingerprint, device, architecture in one line, failure."""
    numbers: dict[str, float]
    """`value/`, `metric/`, `cost/` and `seconds/` with the name -> number."""
    curve: list[CurvePoint]
    routing: list[RoutingRow]
    """A row for each MoE layer, in validation."""
    evaluated: int
    """Candidates of the study that are evaluated."""
    study_numbers: dict[str, float]
    """`study/hypervolume`, `study/front` and `study/best/` with an objective -> number."""


def trial_log(event: Event) -> TrialLog | None:
    """Return what is logged of an event; None for an event without an evaluated trial."""
    evaluation, progress = event.evaluation, event.progress
    if evaluation is None or event.kind not in LOGGED:
        return None
    run = f"trial-{evaluation.trial}"
    if event.kind == "replicated":
        run += f"-seed-{evaluation.seed}"
    study: dict[str, float] = {"study/front": progress.front}
    if progress.hypervolume is not None:
        study["study/hypervolume"] = progress.hypervolume
    study |= {f"study/best/{name}": value for name, value in progress.best.items()}
    return TrialLog(
        study=evaluation.study,
        run=run,
        status=evaluation.status,
        params=dict(event.params or {}),
        facts=_facts(evaluation, event.text),
        numbers=_numbers(evaluation),
        curve=evaluation.curve,
        routing=evaluation.routing,
        evaluated=progress.evaluated,
        study_numbers=study,
    )


def _facts(evaluation: Evaluation, text: str) -> dict[str, str | int]:
    facts: dict[str, str | int] = {
        "trial": evaluation.trial,
        "attempt": evaluation.attempt,
        "seed": evaluation.seed,
        "status": evaluation.status,
        "fingerprint": evaluation.fingerprint,
        "device": str(evaluation.device.get("name", "")),
        "text": text,
    }
    if evaluation.failure is not None:
        facts["failure"] = str(evaluation.failure)
    return facts


def _numbers(evaluation: Evaluation) -> dict[str, float]:
    groups: Mapping[str, Mapping[str, float]] = {
        "value": evaluation.values,
        "metric": evaluation.metrics,
        "cost": evaluation.cost,
        "seconds": evaluation.seconds,
    }
    return {
        f"{group}/{name}": value
        for group, group_values in groups.items()
        for name, value in group_values.items()
    }


def point_numbers(point: CurvePoint) -> dict[str, float]:
    """Return the numbers of a point of a learning curve, with the statistics of its routing."""
    plain: dict[str, Any] = dict(point)
    numbers = {
        f"train/{name}": value for name, value in plain.items() if name not in ("tokens", "routing")
    }
    return numbers | routing_numbers(point.get("routing", []), "train")


def routing_numbers(rows: list[RoutingRow], pass_name: str) -> dict[str, float]:
    """Return the numbers of the routing: `PASS_routing/layer_I/NAME` -> number."""
    numbers = {}
    for row in rows:
        plain: dict[str, Any] = dict(row)
        for name, value in plain.items():
            if name != "layer" and isinstance(value, int | float):
                numbers[f"{pass_name}_routing/layer_{row['layer']}/{name}"] = value
    return numbers


def expert_loads(rows: list[RoutingRow], pass_name: str) -> dict[str, list[float]]:
    """Return `PASS_routing/layer_I/load` -> share of the slots at each expert."""
    return {
        f"{pass_name}_routing/layer_{row['layer']}/load": row["load"]
        for row in rows
        if "load" in row
    }
