"""The description of an exported trial: its numbers as data, and a README for people."""

from __future__ import annotations

from collections.abc import Mapping

import moenas
from moenas.export.trained_trial import TrainedTrial
from moenas.markdown import table_lines
from moenas.model.architecture import Architecture
from moenas.records import Plain
from moenas.store.weights import FILE

TOKENIZER = "tokenizer.json"
"""The tokenizer of the corpus, for the library tokenizers; there if the study has one."""
FORMAT = 1
"""Version of the layout of the data."""


def trial_data(trial: TrainedTrial) -> Plain:
    """Return all that is known of a trial, as plain data; every number says its unit."""
    record, evaluation, architecture = trial.record, trial.evaluation, trial.architecture
    data = {key: value for key, value in record.data.items() if key not in ("files", "tokenizer")}
    meaning = "token i is the byte i" if trial.is_bytes else "ids of the given token arrays"
    if trial.tokenizer is not None:
        meaning = f"ids of {TOKENIZER}"
    values = {
        info["name"]: {
            "value": evaluation.values[info["name"]],
            **{key: info[key] for key in ("unit", "direction", "doc")},
            **evaluation.measurements.get(info["name"], {}),
        }
        for info in record.objectives
    }
    return {
        "format": FORMAT,
        "study": record.name,
        "trial": evaluation.trial,
        "fingerprint": architecture.fingerprint,
        "vocab_size": architecture.vocab_size,
        "architecture": architecture.plain(),
        "values": values,
        "metrics": evaluation.metrics,
        "cost": evaluation.cost,
        "training": {
            **record.space.get("train", {}),
            "tokens": _trained_tokens(trial),
            "lr": evaluation.metrics.get("lr"),
            "seed": evaluation.seed,
        },
        "data": {**data, "section": record.space.get("data"), "tokens": meaning},
        "device": evaluation.device,
        "versions": {**evaluation.versions, "exported_by": moenas.__version__},
        "weights": {"file": FILE, "sha256": evaluation.weights_sha256},
    }


def _trained_tokens(trial: TrainedTrial) -> int:
    """Return the tokens that a trial was trained on; with a budget each has its own number."""
    if trial.record.space.get("train", {}).get("budget") and trial.evaluation.curve:
        return trial.evaluation.curve[-1]["tokens"]
    tokens: int = trial.record.setting("train", "tokens")
    return tokens


def _words(text: object) -> str:
    """Put a text from outside on one line, as code that Markdown leaves alone."""
    return "`" + " ".join(str(text).replace("`", "'").split()) + "`"


def _table(title: str, rows: Mapping[str, object]) -> str:
    return "\n".join(table_lines((title, ""), rows.items()))


def readme(config: Plain, architecture: Architecture, *, intro: str, use: str, files: str) -> str:
    """Write the README of a folder from the data of its trial.

    `intro` is a paragraph, `use` the text of the section on use, `files` a list of the files.
    """
    training, data, device = config["training"], config["data"], config["device"]
    values = {
        _words(name): f"{x['value']:.6g} {x['unit']} ({x['direction']}): {x['doc']}"
        for name, x in config["values"].items()
    }
    cost, bigram = config["cost"], data.get("bigram_loss")
    facts = {
        "architecture": architecture.describe(),
        "fingerprint": _words(config["fingerprint"]),
        "parameters": f"{cost['params']:,}, of which {cost['active_params']:,} act on a token",
        "trained on": f"{training['tokens']:,} tokens of {_words(data['name'])},"
        f" seed {training['seed']}",
        "tokens": f"{data['tokens']}; a vocabulary of {config['vocab_size']:,}",
        "held-out bigram loss": "not known"
        if bigram is None
        else f"{bigram:.4g} nats/token, reached by knowing the previous token alone",
        "data digest": _words(data["sha256"]),
        "device": _words(device.get("name", "unknown")),
        "versions": _words(", ".join(f"{k} {v}" for k, v in config["versions"].items())),
    }
    return _CARD.format(
        trial=config["trial"],
        study=_words(config["study"]),
        values=_table("objective", values),
        facts=_table("what", facts),
        intro=intro,
        use=use,
        files=files,
    )


_CARD = """\
# Trial {trial} of the study {study}

{intro}

## Use

{use}

## Numbers

Measured by moenas when the trial ran, on the device named below.

{values}

## Origin

{facts}

## Files

{files}
"""
