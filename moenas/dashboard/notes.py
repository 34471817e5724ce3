"""The dashboard's notes on a study and on a trial, in Markdown."""

from __future__ import annotations

from moenas.grammar.brief import brief
from moenas.markdown import table_lines
from moenas.records import Evaluation, Plain, View
from moenas.report import figures
from moenas.resources import to_yaml
from moenas.terminal import command

REMARKS = "\n\n---\n*Remarks below this line are yours and stay.*\n"
"""Ends what moenas writes into a note. A person may edit the note in the dashboard below it."""


def study_note(view: View) -> str:
    """Return the study in Markdown: its objectives, what is known of its data, its devices."""
    study = view.study
    done = figures.complete(view)
    statuses = ("failed", "infeasible", "stopped")
    counts = {s: sum(e.status == s for e in view.evaluations) for s in statuses}
    stopped = f" {counts['stopped']} stopped early," if counts["stopped"] else ""
    lines = [
        f"**On the front: {len(view.front)}** of {len(done)} complete candidates;"
        f" {counts['failed']} failed, {counts['infeasible']} infeasible,{stopped}"
        f" {study.trials} trials asked for.",
        "",
        *table_lines(
            ("objective", "direction", "unit", "best", "what it is"), _objective_rows(view)
        ),
        "",
        "**Data.** " + ", ".join(_data_words(study.data)),
    ]
    level = figures.bigram_loss(view)
    if level is not None:
        lines += [
            "",
            f"**Held-out bigram loss of the data: {level:.4g} nats/token.** A bigram model, which"
            " reads only the previous token, has this loss. A model above it has learned little.",
        ]
    devices = sorted({_device_words(e.device) for e in view.evaluations if e.device})
    if devices:
        lines += ["", "**Device.** " + "; ".join(devices)]
    lines += ["", "```", command(["front", study.name]), "```"]
    return "\n".join(lines)


def _objective_rows(view: View) -> list[tuple[str, ...]]:
    rows = []
    for info in figures.objectives(view):
        best = min if info.direction == "minimize" else max
        values = [e.values[info.name] for e in figures.complete(view)]
        shown = figures.quantity(best(values)) if values else "-"
        doc = info.doc.strip().splitlines()[:1]
        rows.append((f"`{info.name}`", info.direction, info.unit, shown, *(doc or [""])))
    return rows


def _data_words(data: Plain) -> list[str]:
    """Say the short facts of a manifest; lists and nested tables stay in the store."""
    words = [str(data.get("name", "unknown"))]
    for key, value in data.items():
        if key == "sha256":
            words.append(f"sha256 {str(value)[:16]}")
        elif (
            key not in ("name", "bigram_loss")
            and isinstance(value, int | float | str)
            and len(str(value)) <= 60
        ):
            plain = isinstance(value, bool | str)
            words.append(f"{key} {value}" if plain else f"{key} {value:,}")
        elif isinstance(value, list) and key != "entropy":
            words.append(f"{len(value):,} {key}")
    return words


def _device_words(device: Plain) -> str:
    threads = device.get("threads")
    many = "" if threads == 1 else "s"
    words = [device.get("name"), device.get("dtype"), threads and f"{threads} thread{many}"]
    return ", ".join(str(word) for word in words if word)


def trial_note(view: View, evaluation: Evaluation) -> str:
    """Return a member of the front in Markdown: its numbers with units and its architecture."""
    study, trial = view.study.name, evaluation.trial
    export = command(["export", study, str(trial), f"{study.lstrip('-')}-{trial}/"])
    steps = [(command(["show", study, str(trial)]), "Print all that is stored of this trial:")]
    if evaluation.weights_sha256 is not None:
        steps.append((export, "Export the trained PyTorch module:"))
    return "\n".join(
        [
            "**On the Pareto front.** " + figures.described(view, trial),
            "",
            *table_lines(("number", "value", "unit", "how sure"), _number_rows(view, evaluation)),
            "",
            f"Fingerprint `{evaluation.fingerprint}`, seed {evaluation.seed}, measured on"
            f" {_device_words(evaluation.device) or 'an unknown device'}.",
            "",
            *(line for step, what in steps for line in (what, "```", step, "```")),
            "The architecture, without the fields that have their defaults:",
            "```yaml",
            to_yaml({"architecture": brief(view.architectures.get(trial, {}))}).rstrip(),
            "```",
        ]
    )


UNITS = {
    "val_loss": "nats/token",
    "train_loss": "nats/token",
    "order1_entropy": "nats/token",
    "bigram_loss": "nats/token",
    "bits_per_byte": "bits/byte",
    "tokens_per_second": "tokens/s",
    "params": "parameters",
    "active_params": "parameters",
    "flops_per_token": "FLOP/token",
    "kv_bytes_per_token": "B/token",
    "weight_bytes": "B",
}


def _number_rows(view: View, evaluation: Evaluation) -> list[tuple[str, ...]]:
    """Return the objectives first, then what else is known; no number twice."""
    rows: list[tuple[str, ...]] = [
        (
            f"**{info.name}**",
            f"**{figures.quantity(evaluation.values[info.name])}**",
            info.unit,
            _uncertainty(evaluation.measurements.get(info.name, {})),
        )
        for info in figures.objectives(view)
    ]
    others = {**evaluation.metrics, **evaluation.cost}
    rows += [
        (name, figures.quantity(value), UNITS.get(name, ""), "")
        for name, value in others.items()
        if name not in evaluation.values
    ]
    seconds = evaluation.seconds.get("train")
    if seconds is not None:
        rows.append(("training", figures.quantity(seconds), "s", ""))
    return rows


def _uncertainty(measurement: Plain) -> str:
    words = []
    if "ratio" in measurement:
        words.append(f"{measurement['ratio']:.3g} of the reference")
    if "spread" in measurement:
        words.append(f"spread {100 * measurement['spread']:.1f} %")
    if "n" in measurement:
        words.append(f"n = {measurement['n']}")
    if "acausal" in measurement:
        words.append("NOT CAUSAL: the model may look at later tokens")
    return ", ".join(words)


def former_note(view: View, trial: int) -> str:
    """Return the note of a trial that was on the front once."""
    out = next((point.trial for point in view.history if trial in point.left), None)
    by = f": trial {out} dominates it" if out is not None else ""
    return f"No longer on the Pareto front{by}."


# --- publish -----------------------------------------------------------------------------------

PUBLISHED = "moenas:published"
"""System attribute of the study: name of a note or figure -> digest, so that it is written once."""
STATE, MEMBERS = "state", "members"
"""Keys of the state and the front that were written: what shows only these is not drawn again."""
