"""The noise between seeds of a study: intervals, probabilities, and differences in words."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from moenas.grammar.summary import compact
from moenas.predict.seed_noise import ObjectiveNoise, SeedNoise, seed_noise
from moenas.records import Evaluation, Plain, View
from moenas.store.store import Store

SAME_DEVICE = ("kind", "name", "dtype")
SAME_VERSIONS = ("moenas", "torch", "cuda")
PAIRS = 20
"""Pairs of neighbours that are named."""


def seed_report(store: Store, name: str) -> Plain | None:
    """Return what the replicates of a study say of its front; None without replicates.

    A replicate counts if it is complete, and was measured on the device and with the versions of
    its trial.
    """
    rows = store.replicates(name)
    if not rows:
        return None
    view = store.front_view(name)
    directions = view.study.directions
    noise, left_out = _noise(store.evaluations(name), rows, directions)
    if noise is None:
        return None
    front = [e.trial for e in view.members if e.trial in noise.means]
    members = _members(noise, front, directions)
    noisy = [name for name in directions if noise.is_noisy(name)]
    return {
        "objectives": {
            key: {"deviation": noise_of.deviation, "degrees": noise_of.degrees}
            for key, noise_of in noise.objectives.items()
        },
        "noisy": noisy,
        "members": members,
        "pairs": {key: _pairs(members, noise.objectives[key], key) for key in noisy},
        "left_out": left_out,
    }


def seed_intervals(view: View) -> dict[int, dict[str, tuple[float, float]]]:
    """Return trial -> objective -> mean over seeds and half of its 95 % interval.

    These are the trials with replicates that count, and the objectives that differ between seeds;
    see `seed_report`.
    """
    directions = view.study.directions
    noise, _ = _noise(view.evaluations, view.replicates, directions)
    if noise is None:
        return {}
    noisy = [name for name in directions if noise.is_noisy(name)]
    return {
        trial: {
            key: (
                noise.means[trial][key],
                noise.objectives[key].half_width(noise.mean_seeds[trial]),
            )
            for key in noisy
        }
        for trial, seeds in noise.seeds.items()
        if seeds > 1
    }


def _noise(
    evaluations: Sequence[Evaluation], rows: Sequence[Evaluation], directions: dict[str, str]
) -> tuple[SeedNoise | None, int]:
    """Return the noise between seeds, and the number of replicates that do not count."""
    complete = {
        e.trial: e
        for e in evaluations
        if e.status == "complete" and not e.is_copy and e.values.keys() >= directions.keys()
    }
    counted: dict[int, list[Evaluation]] = {}
    left_out = 0
    for row in rows:
        own = complete.get(row.trial)
        if own is None or row.status != "complete" or not _is_like(row, own):
            left_out += 1
            continue
        counted.setdefault(row.trial, []).append(row)
    noise = seed_noise(
        {trial: e.values for trial, e in complete.items()},
        {trial: [e.values for e in seeds] for trial, seeds in counted.items()},
        list(directions),
    )
    return noise, left_out


def _members(noise: SeedNoise, front: Sequence[int], directions: dict[str, str]) -> list[Plain]:
    """Return means, intervals and probabilities of the members of a front."""
    chance = noise.probabilities(front, directions)
    return [
        {
            "trial": trial,
            "seeds": noise.seeds[trial],
            "mean_seeds": noise.mean_seeds[trial],
            "values": {
                key: {
                    "mean": noise.means[trial][key],
                    "half_width": noise.objectives[key].half_width(noise.mean_seeds[trial]),
                }
                for key in directions
            },
            "probability": chance[trial],
        }
        for trial in front
    ]


def _is_like(row: Evaluation, own: Evaluation) -> bool:
    """Whether two evaluations were made on like devices by the same versions."""
    return all(row.device.get(key) == own.device.get(key) for key in SAME_DEVICE) and all(
        row.versions.get(key) == own.versions.get(key) for key in SAME_VERSIONS
    )


def _pairs(members: Sequence[Plain], noise: ObjectiveNoise, key: str) -> list[Plain]:
    """Return the members that are neighbours in an objective, and the noise of the difference."""
    ordered = sorted(members, key=lambda member: (member["values"][key]["mean"], member["trial"]))
    return [
        {
            "trials": [a["trial"], b["trial"]],
            "difference": b["values"][key]["mean"] - a["values"][key]["mean"],
            "noise": noise.half_width(a["mean_seeds"], b["mean_seeds"]),
        }
        for a, b in pairwise(ordered)
    ]


def with_seeds(rows: list[Plain], seeds: Plain | None, *, short_form: bool) -> list[Plain]:
    """Return the rows of a front with the columns of their replicates."""
    if seeds is None:
        return rows
    members = {member["trial"]: member for member in seeds["members"]}
    return [_with_seeds(row, members.get(row["trial"]), seeds["noisy"], short_form) for row in rows]


def _with_seeds(
    row: Plain, member: Plain | None, noisy: Sequence[str], short_form: bool
) -> dict[str, Any]:
    last: Plain = {key: row[key] for key in ("fingerprint", "architecture") if key in row}
    rest = {key: value for key, value in row.items() if key not in last}
    known = member or {"seeds": 1, "probability": None, "values": {}}
    values = known["values"].items()
    if not short_form:
        rest |= {
            "seeds": known["seeds"],
            "means": {key: value["mean"] for key, value in values},
            "half_widths": {key: value["half_width"] for key, value in values},
            "probability": known["probability"],
        }
        return rest | last
    for key, value in values:
        if key in noisy:
            rest[key] = f"{compact(value['mean'])} +- {compact(value['half_width'])}"
    chance = None if known["probability"] is None else f"{known['probability']:.2f}"
    return rest | {"seeds": known["seeds"], "P(front)": chance} | last


def caption(report: Plain | None) -> list[str]:
    """Say what the columns of the replicates are."""
    if report is None:
        return []
    noisy = ", ".join(report["noisy"])
    selected = [m["trial"] for m in report["members"] if m["mean_seeds"] == m["seeds"]]
    seeds = "the seeds" if selected else "the further seeds"
    lines = [
        f"{noisy}: mean over {seeds} of a trial +- half of its 95 % interval; P(front):"
        " the probability that no other trial dominates it"
    ]
    if selected:
        numbers = ", ".join(map(str, selected))
        lines.append(
            f"the means of trials {numbers} contain the seed that selected them, so they are too"
            " good on average; two further seeds (search.replicates: 3) avoid that"
        )
    return lines


def seed_lines(seeds: Plain) -> list[str]:
    """Lay out the replicates of a study for a terminal."""
    lines = []
    for key in seeds["noisy"]:
        noise, pairs = seeds["objectives"][key], seeds["pairs"][key]
        lines.append(
            f"{key}: seeds of one model differ by a standard deviation of"
            f" {compact(noise['deviation'])} ({noise['degrees']} degrees of freedom)"
        )
        small = [pair for pair in pairs if pair["difference"] < pair["noise"]]
        if not pairs:
            continue
        lines.append(
            f"  {len(small)} of {len(pairs)} differences between neighbours on the front are"
            " smaller than the noise between seeds"
        )
        for pair in small[:PAIRS]:
            first, second = pair["trials"]
            lines.append(
                f"  trials {first} and {second} differ by {compact(pair['difference'])}, less than"
                f" {compact(pair['noise'])}: which is better is not known"
            )
    if not seeds["noisy"]:
        lines.append("the seeds of each model have equal values")
    if seeds["left_out"]:
        lines.append(
            f"{seeds['left_out']} replicates are left out: failed, or measured on another device"
            " or with other versions than their trial"
        )
    return lines
