"""Two fronts over common objectives: hypervolumes, coverage, and which members dominate which."""

from __future__ import annotations

from moenas.errors import InputError
from moenas.grammar.summary import compact
from moenas.pareto import compare, dominates, is_exact
from moenas.records import Plain
from moenas.report.summary import table
from moenas.store.row_readers import FrontView


def comparison_report(a: FrontView, b: FrontView) -> Plain:
    """Compare the fronts of two studies over the objectives that both have.

    Both hypervolumes are measured from one reference point, of all members of both fronts. Over
    fewer objectives than a study has, members of its own front may dominate one another.
    `coverage.a` is the share of b's front that a member of a equals or dominates (the C metric of
    Zitzler and Thiele, 1998).

    Raises:
        InputError: if no objective is common, one has two directions, or a front is empty.
    """
    first, second = a.study.directions, b.study.directions
    common = [name for name in first if name in second]
    if not common:
        raise InputError(
            f"studies '{a.study.name}' and '{b.study.name}' have no common objective:"
            f" {', '.join(first)}; {', '.join(second)}"
        )
    for name in common:
        if first[name] != second[name]:
            raise InputError(
                f"objective '{name}': '{a.study.name}' has the direction {first[name]},"
                f" '{b.study.name}' has {second[name]}"
            )
    for view in (a, b):
        if not view.members:
            raise InputError(f"study '{view.study.name}': its front is empty; nothing to compare")
    directions = [first[name] for name in common]
    points_a, points_b = (
        {e.trial: [e.values[name] for name in common] for e in view.members} for view in (a, b)
    )
    comparison = compare(list(points_a.values()), list(points_b.values()), directions)
    return {
        "a": a.study.name,
        "b": b.study.name,
        "objectives": {name: first[name] for name in common},
        "only_a": [name for name in first if name not in common],
        "only_b": [name for name in second if name not in common],
        "reference_point": dict(zip(common, comparison.reference, strict=True)),
        "hypervolume": {"a": comparison.hypervolume_a, "b": comparison.hypervolume_b},
        "hypervolume_is_exact": is_exact(len(common)),
        "coverage": {"a": comparison.coverage_ab, "b": comparison.coverage_ba},
        "differences": _differences(a, b, common),
        "members": [
            *_members("a", common, directions, points_a, points_b),
            *_members("b", common, directions, points_b, points_a),
        ],
    }


def _members(
    front: str,
    names: list[str],
    directions: list[str],
    own: dict[int, list[float]],
    others: dict[int, list[float]],
) -> list[Plain]:
    """Return a row for each member of a front, with the members of the other one beside it."""
    return [
        {
            "front": front,
            "trial": trial,
            **dict(zip(names, point, strict=True)),
            "dominates": [t for t, other in others.items() if dominates(point, other, directions)],
            "dominated_by": [
                t for t, other in others.items() if dominates(other, point, directions)
            ],
        }
        for trial, point in own.items()
    ]


def _differences(a: FrontView, b: FrontView, names: list[str]) -> list[str]:
    """Say in what the numbers of two studies differ beside their architectures."""
    lines = []
    if a.study.data.get("sha256") != b.study.data.get("sha256"):
        lines.append(f"corpus: {a.study.data.get('name')} and {b.study.data.get('name')}")
    train_a, train_b = (view.study.space.get("train") or {} for view in (a, b))
    lines += [
        f"train.{field}: {train_a.get(field)} and {train_b.get(field)}"
        for field in dict.fromkeys([*train_a, *train_b])
        if train_a.get(field) != train_b.get(field)
    ]
    digests_a, digests_b = (
        {o["name"]: o["sha256"] for o in view.study.objectives} for view in (a, b)
    )
    lines += [
        f"objective {name}: measured by two versions of its file"
        for name in names
        if digests_a[name] != digests_b[name]
    ]
    devices_a, devices_b = (sorted(view.summary.devices) for view in (a, b))
    if devices_a != devices_b:
        lines.append(f"devices: {', '.join(devices_a)} and {', '.join(devices_b)}")
    return lines


def comparison_text(report: Plain) -> str:
    """Lay out what `comparison_report` found."""
    about = "" if report["hypervolume_is_exact"] else " (approximate)"
    corner = ", ".join(f"{k} {compact(v)}" for k, v in report["reference_point"].items())
    lines = [f"objectives: {', '.join(f'{k} ({v})' for k, v in report['objectives'].items())}"]
    lines += [
        f"only in {report[side]}: {', '.join(report[f'only_{side}'])}"
        for side in ("a", "b")
        if report[f"only_{side}"]
    ]
    lines.append(f"reference point: {corner}")
    for side, other in (("a", "b"), ("b", "a")):
        volume, share = compact(report["hypervolume"][side]), report["coverage"][side]
        lines.append(
            f"{side} is {report[side]}: hypervolume {volume}{about}; it covers {share:.0%} of"
            f" {report[other]}"
        )
    lines += [f"not measured equally: {text}" for text in report["differences"]]
    rows = [
        {
            key: " ".join(map(str, cell)) or "-" if isinstance(cell, list) else cell
            for key, cell in row.items()
        }
        for row in report["members"]
    ]
    return "\n".join([*lines, table(rows)])
