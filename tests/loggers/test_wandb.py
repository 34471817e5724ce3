"""The files of W&B's offline mode, read by its own messages, hold what a real study stored."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_studies import moe_study

from moenas.errors import InputError
from moenas.loggers.opening import open_logger
from moenas.loggers.wandb import WandbLogger
from moenas.study.launch import run

pytest.importorskip("wandb", reason="the extra moenas[wandb] is not installed")
pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("study_folder")]

BLOCK, HEADER = 32_768, 7
"""Bytes of a block of a LevelDB log, and of the header of a part of a record."""


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: a LevelDB log behind seven bytes of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


def offline_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Name of a run -> its group, its config, the rows of its history and its summary."""
    runs = {}
    for path in folder.glob("wandb/offline-run-*/*.wandb"):
        run: dict[str, Any] = {"history": [], "summary": {}, "config": {}}
        for record in records(path):
            if record.HasField("run"):
                run |= {"name": record.run.display_name, "group": record.run.run_group}
                run["project"] = record.run.project
                run["config"] |= {
                    item.key: json.loads(item.value_json) for item in record.run.config.update
                }
            elif record.HasField("history"):
                row = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in record.history.item
                }
                run["history"].append(row)
            elif record.HasField("summary"):
                for item in record.summary.update:
                    key = "/".join(item.nested_key) or item.key
                    run["summary"][key] = json.loads(item.value_json)
        runs[run["name"]] = run
    return runs


def test_curves_values_and_routing_are_in_the_offline_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(InputError, match="has no API key"):
        open_logger("wandb")  # the choice of offline comes after a refused login
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))

    study = run(moe_study(), workers="inline", listeners=[WandbLogger("searches")])

    runs = offline_runs(tmp_path)
    assert runs.keys() == {"trial-0", "trial-1", "study"}
    assert {(logged["group"], logged["project"]) for logged in runs.values()} == {
        (study.name, "searches")
    }
    drawn = {t.number: t.params for t in study.optuna.trials}
    for trial in (0, 1):
        evaluation, logged = study.evaluation(trial), runs[f"trial-{trial}"]
        losses = [(row["tokens"], row["train/train_loss"]) for row in logged["history"]]
        assert losses == [(point["tokens"], point["train_loss"]) for point in evaluation.curve]
        summary = logged["summary"]
        assert summary["value/val_loss"] == evaluation.values["val_loss"]
        vio = summary["validation_routing/layer_0/max_vio"]
        assert vio == evaluation.routing[0]["max_vio"]
        assert summary["validation_routing/layer_0/load"]["_type"] == "histogram"
        assert logged["config"]["params"] == drawn[trial]
        assert logged["config"]["fingerprint"] == evaluation.fingerprint
    last = runs["study"]["history"][-1]
    assert last["evaluated"] == 2
    assert last["study/hypervolume"] == study.front().hypervolume
