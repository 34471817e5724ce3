"""Output of the command line: rows and texts of a study, a front and a trial."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from moenas.errors import NotFoundError
from moenas.grammar.brief import brief
from moenas.grammar.summary import compact, counted, duration, short
from moenas.pareto import is_exact
from moenas.predict.rank_agreement import RankAgreement, rank_agreements
from moenas.records import Plain
from moenas.resources import to_yaml
from moenas.store import calibrations, origins, row_readers, rungs, submissions
from moenas.store.activity import last_activity
from moenas.store.pace import pace
from moenas.store.row_readers import Summary
from moenas.store.spending import spending
from moenas.store.submissions import Submission

if TYPE_CHECKING:
    from moenas.store.store import Store

SHOWN_EXPERTS = 32
"""Experts of a layer whose loads are printed."""
LAST_COLUMN = 40
"""Characters of a last column that is broken into lines, at least."""
SHOWN_BEST = 3
"""Experts that are named for a domain: those that get the most of it."""


def table(rows: list[dict[str, Any]], width: int | None = None) -> str:
    """Lay rows out in columns, numbers to the right; no rows give '(none)'.

    Where the rows are wider than `width`, the last column continues on lines of its own.
    """
    if not rows:
        return "(none)"
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in [names, *cells]) for i in range(len(names))]
    right = [all(isinstance(row.get(n), int | float | None) for row in rows) for n in names]
    before = sum(widths[:-1]) + 2 * len(widths[:-1])
    lines = []
    for line in [names, *cells]:
        parts = [line[-1]] if width is None else wrapped(line[-1], max(LAST_COLUMN, width - before))
        first = [
            text.rjust(wide) if to_right else text.ljust(wide)
            for text, wide, to_right in zip([*line[:-1], parts[0]], widths, right, strict=True)
        ]
        lines.append("  ".join(first).rstrip())
        lines += [" " * (before + 2) + part for part in parts[1:]]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def wrapped(text: str, width: int) -> list[str]:
    """Break a text between words into lines of at most `width`; an empty one is one line."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def cell(value: Any) -> str:
    """Return a value as the text of a table's cell."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return compact(value)
    return str(value)


# --- studies -----------------------------------------------------------------------------------


def counted_studies(studies: Sequence[Plain]) -> list[Plain]:
    """Return one row for each study that has begun: its state and its counts."""
    return [
        {
            "study": study["study"],
            "state": study["state"],
            "trials": f"{study['evaluated']}/{study['trials']}",
            "front": study["front"],
            "objectives": ", ".join(study["objectives"]),
            "created": study["created"][:19],
        }
        for study in studies
        if study["created"] is not None
    ]


def listed_studies(store: Store) -> list[Plain]:
    """Return one row for each study of the database, with its state and when it last changed.

    A study that a server runs has the state of its queue. The state of another one is running,
    finished or stopped. Queued studies without rows of their own come last; they have the value
    None in `created`.
    """
    submitted = {each.study: each for each in store.query(submissions.every)}
    newest = store.query(last_activity)
    rows = []
    for record in store.studies():
        own = submitted.pop(record.name, None)
        state = own.state if own is not None else command_state(store, record.name)
        rows.append(study_summary(store.summary(record.name), state, newest[record.name]))
    return rows + [queued_summary(own) for own in submitted.values()]


def study_summary(summary: Summary, state: str, last_activity: str) -> Plain:
    """Return the row of a list for a study that has begun."""
    record = summary.study
    return {
        "study": record.name,
        "state": state,
        "evaluated": summary.evaluated,
        "trials": record.trials,
        "failed": summary.counts.get("failed", 0),
        "front": summary.front,
        "hypervolume": summary.hypervolume,
        "objectives": list(record.directions),
        "last_activity": last_activity,
        "created": record.created_at,
    }


def queued_summary(own: Submission) -> Plain:
    """Return the row of a list for a study that waits in a queue and has not begun."""
    return {
        "study": own.study,
        "state": own.state,
        "evaluated": 0,
        "trials": own.trials,
        "failed": 0,
        "front": 0,
        "hypervolume": None,
        "objectives": [],
        "last_activity": own.submitted_at,
        "created": None,
    }


def command_state(store: Store, name: str) -> Literal["running", "finished", "stopped"]:
    """Return the state of a study that a command runs or ran.

    A study whose trials are all evaluated is finished, also if its end was not stored.
    """
    if store.driver(name) is not None:
        return "running"
    if store.ended(name) is not None:
        return "finished"
    evaluated = store.read(name, lambda connection: row_readers.evaluated(connection, name))
    return "finished" if evaluated >= store.study(name).trials else "stopped"


def status_report(store: Store, name: str) -> Plain:
    """Say how far a study is: counts, best values, the front, failures and who runs it."""
    summary = store.summary(name)
    study = summary.study
    own = store.query(lambda connection: submissions.submitted(connection, name))
    driver, study_pace = (
        store.driver(name),
        store.read(name, lambda connection: pace(connection, name)),
    )
    left = max(0, study.trials - summary.evaluated)
    per_hour = study_pace.candidates_per_hour
    return {
        "study": name,
        "state": own.state if own is not None else command_state(store, name),
        "trials": study.trials,
        "evaluated": summary.evaluated,
        "complete": summary.counts.get("complete", 0),
        "failed": summary.counts.get("failed", 0),
        "stopped": summary.counts.get("stopped", 0),
        "paused": len(rungs.pauses(store, name)),
        "infeasible": summary.counts.get("infeasible", 0),
        "repeated": summary.repeated,
        "left": left,
        "running_in": driver,
        "running": study_pace.running if driver is not None else [],
        "candidates_per_hour": per_hour,
        # The pace counts the search alone: further seeds of the front are trained after it.
        "seconds_left": 3600 * left / per_hour if driver and per_hour and left else None,
        "ended": store.ended(name),
        "failures": summary.failures,
        "spent": spending(store, name).plain(),
        "best": summary.best,
        "front": summary.front,
        "hypervolume": summary.hypervolume,
        "hypervolume_is_exact": is_exact(len(study.objectives)),
        "bigram_loss": bigram_loss(summary),
        "devices": summary.devices,
        "data": {key: study.data.get(key) for key in ("name", "sha256")},
        "rungs": [asdict(agreement) for agreement in _agreements(store, name)],
        "calibrations": calibrations.kept(store, name),
    }


def _agreements(store: Store, name: str) -> list[RankAgreement]:
    """Return how well the losses at each rung agree with the final ones."""
    agreements = rank_agreements(rungs.results(store, name), rungs.final_losses(store, name))
    return list(agreements.values())


def _rung_line(rung: Plain) -> str:
    """Lay out one rung of `status_report`."""
    text = (
        f"  rung {rung['rung']} ({short(rung['tokens'])} tokens): {rung['reached']} reached it,"
        f" {rung['promoted']} trained on"
    )
    if rung["correlation"] is None:
        return text
    pairs = rung["pairs"]
    return f"{text}; rank correlation with the end {rung['correlation']:.2f} over {pairs}"


def bigram_loss(summary: Summary) -> float | None:
    """Return the held-out bigram loss of the corpus, where a loss of the study is to compare."""
    return summary.study.data.get("bigram_loss") if summary.trained else None


def _end(report: Plain) -> str:
    """Say whether a study that no process runs is over, and why."""
    if report["state"] in ("queued", "paused", "failed", "cancelled"):
        return str(report["state"])
    texts = {
        "trials": "done",
        "exhausted": "done, every point of the space was drawn",
        "sampler": "done, the sampler proposes nothing more",
        "draws": "done, too many draws in a row gave no new candidate",
        "wall_time": "done, the wall time of search.stop is used up",
        "train_flops": "done, the training FLOPs of search.stop are used up",
        "train_tokens": "done, the training tokens of search.stop are used up",
        "plateau": "done, the hypervolume has stopped growing",
    }
    return texts.get(report["ended"], "done" if not report["left"] else "stopped")


def _pace_lines(report: Plain) -> list[str]:
    """Say which trials run since when, and how long the rest takes at the pace of this run."""
    lines = []
    if report["running"]:
        times = ", ".join(f"{r['trial']} since {r['started_at'][11:19]}" for r in report["running"])
        lines.append(f"  running trials (UTC): {times}")
    if report["candidates_per_hour"] is not None:
        text = f"  latest pace: {report['candidates_per_hour']:,.3g} candidates an hour"
        seconds = report["seconds_left"]
        lines.append(text if seconds is None else f"{text}; {duration(seconds)} left")
    return lines


def status_text(report: Plain) -> str:
    """Lay out what `status_report` found."""
    driver = report["running_in"]
    state = f"running in {driver}" if driver else _end(report)
    lines = [
        f"{report['study']}: {state}; {report['evaluated']} of {report['trials']} trials evaluated",
        f"  complete {report['complete']}, failed {report['failed']},"
        f" infeasible {report['infeasible']}, repeated {report['repeated']}, left {report['left']}",
    ]
    if report["rungs"]:
        lines.append(f"  stopped {report['stopped']}, paused {report['paused']}")
        lines += [_rung_line(rung) for rung in report["rungs"]]
    lines += _pace_lines(report)
    if report["failures"]:
        reasons = ", ".join(f"{kind} {n}" for kind, n in report["failures"].items())
        lines.append(f"  failures: {reasons}")
    for name, value in report["best"].items():
        lines.append(f"  best {name}: {cell(value)}")
    if report["bigram_loss"] is not None:
        lines.append(
            f"  held-out bigram loss of the corpus: {report['bigram_loss']:.4g} nats a token"
        )
    spent = report["spent"]
    lines.append(
        f"  spent: {spent['wall_seconds']:,.0f} s of wall time, {short(spent['train_tokens'])}"
        f" training tokens, {spent['train_flops']:.3g} training FLOPs"
    )
    volume = cell(report["hypervolume"])
    about = "" if report["hypervolume_is_exact"] else " (approximate)"
    members = counted(report["front"], "member")
    lines.append(f"  front: {members}, hypervolume {volume}{about}")
    lines += [f"  device: {name}" for name in report["devices"]]
    lines += [_calibration_line(row) for row in report["calibrations"]]
    return "\n".join(lines)


def _calibration_line(row: Plain) -> str:
    """Say which calibration refuses candidates of a study, and whether there is a newer one."""
    newest = row["newest_made_at"]
    newer = (
        f"; the one of {newest} is newer; --accept-changes takes it"
        if newest is not None and newest > row["made_at"]
        else ""
    )
    return (
        f"  {row['objective']} is predicted by the calibration of {row['made_at']} on"
        f" {row['device']}, kept since {row['taken_at']}{newer}"
    )


# --- a trial -----------------------------------------------------------------------------------


def trial_report(store: Store, study: str, trial: int) -> Plain:
    """Return everything that is stored of one trial, finished or paused at a rung.

    Raises:
        NotFoundError: if the study has no such trial.
    """
    record, evaluation = store.study(study), store.evaluation(study, trial)
    if evaluation is None and (pause := rungs.pauses(store, study).get(trial)) is not None:
        evaluation = pause.evaluation
    if evaluation is None:
        numbers = store.finished(study)
        there = f"it has {spans(numbers)}" if numbers else "it has none yet"
        raise NotFoundError(f"study '{study}' has no finished trial {trial}; {there}")
    return {
        **evaluation.plain(),
        "units": {o["name"]: o["unit"] for o in record.objectives},
        "enqueued_from": origins.source(store, study, trial),
        "on_front": trial in store.front(study),
        "architecture": store.architecture(study, trial),
    }


def spans(numbers: Iterable[int]) -> str:
    """Write numbers as spans: 0-5, 7, 9-12."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def trial_text(report: Plain, *, full: bool = False) -> str:
    """Lay out what `trial_report` found; with `full` every field of the architecture."""
    on_front = ", on the front" if report["on_front"] else ""
    lines = [f"trial {report['trial']} of {report['study']}: {report['status']}{on_front}"]
    if source := report["reused_from"]:
        lines.append(f"  reused from trial {source['trial']} of study '{source['study']}'")
    if report["enqueued_from"]:
        lines.append(f"  enqueued from {report['enqueued_from']}")
    if report["failure"]:
        lines.append(f"  {report['failure']['kind']}: {report['failure']['message']}")
    lines += [
        f"  broken by {by:.3g}: {text}" for text, by in report["violations"].items() if by > 0
    ]
    for name, value in report["values"].items():
        lines.append(
            f"  {name}: {_number(value)} {report['units'].get(name, '')}{_details(report, name)}"
        )
    told = set(report["values"])
    lines += [f"  {n}: {_number(value)}" for n, value in report["metrics"].items() if n not in told]
    told |= set(report["metrics"])
    lines += [f"  {name}: {value:,}" for name, value in report["cost"].items() if name not in told]
    if report["device"]:
        lines.append(f"  device: {report['device'].get('name')}, {report['device'].get('dtype')}")
    lines += [f"  {phase}: {took:.1f} s" for phase, took in report["seconds"].items()]
    lines += [line for row in report["routing"] for line in _routing_lines(row)]
    if report["architecture"]:
        architecture = report["architecture"] if full else brief(report["architecture"])
        lines += ["", to_yaml({"architecture": architecture}).rstrip()]
    return "\n".join(lines)


def _number(value: float) -> str:
    """Write a count in full, as costs are, and a measured value in five digits."""
    is_count = float(value).is_integer() and 1000 <= abs(value) < 2**53
    return f"{value:,.0f}" if is_count else f"{value:.5g}"


def _details(report: Plain, name: str) -> str:
    """Say how sure a measured value is, or that it is not comparable."""
    details = report["measurements"].get(name, {})
    if "acausal" in details:
        seen = " and ".join(details["acausal"]) or "no pass that was tried"
        return f" (NOT CAUSAL: may look at later tokens, and did in {seen})"
    if "ratio" not in details:
        return ""
    spread = f"{100 * details['spread']:.1f} %" if "spread" in details else "unknown"
    return f" ({details['ratio']:.3f} of the reference, spread {spread}, n = {details['n']})"


def _routing_lines(row: Plain) -> list[str]:
    """Return the routing of a layer: its figures, the loads, and where each domain mostly goes."""
    numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "layer"}
    text = ", ".join(f"{k} {v:.3g}" for k, v in numbers.items() if not math.isnan(v))
    lines = [f"  layer {row['layer']} routing: {text}"]
    if load := row.get("load"):
        total = math.fsum(load) or 1.0
        shares = [f"{100 * share / total:.3g}" for share in load[:SHOWN_EXPERTS]]
        more = [f"and {len(load) - len(shares)} more"] if len(load) > len(shares) else []
        lines.append(f"    load by expert, %: {', '.join(shares + more)}")
    for name, shares in row.get("domains", {}).items():
        best = sorted(range(len(shares)), key=lambda i: -shares[i])[:SHOWN_BEST]
        experts = ", ".join(f"expert {i} {100 * shares[i]:.3g} %" for i in best)
        lines.append(f"    {name}: {experts}")
    return lines
