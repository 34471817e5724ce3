"""Only an evaluation of the job passes, and what passes is plain data of moderate size."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moenas.checked import DETAILS_BYTES, checked_evaluation, plain_json, real
from moenas.records import Evaluation, Job

TIMED = {"reference_key": "cpu, torch 2", "reference_ms": 2.0, "ratio": 1.5}
JOB = Job(
    study="s",
    trial=3,
    attempt=2,
    architecture={},
    objectives={"val_loss": None, "decode_ms": None},
    data={},
    data_sha256="",
    train={},
    measure={},
    seed=7,
)
FOUND = Evaluation(
    study="s",
    trial=3,
    attempt=2,
    status="complete",
    fingerprint="f",
    values={"val_loss": 2.0, "decode_ms": 3.0},
    measurements={"decode_ms": {"unit": "ms", **TIMED}},
    metrics={"lr": 0.1},
    curve=[{"tokens": 64, "train_loss": 5.0, "routing": [{"layer": 1}]}],
    routing=[{"layer": 1, "load": [0.5, 0.5], "domains": None}],
    cost={"params": 10},
    seconds={"total": 1.0},
    device={"kind": "cpu", "cores": 2},
    versions={"torch": "2"},
    data={"name": "d", "train_tokens": 5},
    seed=7,
    weights_sha256="0" * 64,
)


def sent(**changes: Any) -> dict[str, Any]:
    return FOUND.plain() | changes


def test_an_evaluation_passes_as_it_is() -> None:
    assert checked_evaluation(FOUND.plain(), JOB) == FOUND
    assert checked_evaluation(json.loads(json.dumps(FOUND.plain())), JOB) == FOUND


def test_numbers_of_libraries_become_floats() -> None:
    values = {"val_loss": np.float32(2.0), "decode_ms": torch.tensor(3.0)}
    evaluation = checked_evaluation(sent(values=values), JOB)
    assert evaluation == FOUND
    assert [type(value) for value in evaluation.values.values()] == [float, float]
    assert real(np.int64(5)) == 5.0


def test_a_failed_one_may_lack_values_and_keeps_a_short_clean_reason() -> None:
    failure = {"kind": "error", "message": "\x1b[31mred\x07" + "x" * 10**6, "traceback": "t\0"}
    evaluation = checked_evaluation(
        sent(status="failed", values={"val_loss": None}, measurements={}, failure=failure), JOB
    )
    assert evaluation.values == {}
    assert evaluation.failure is not None
    assert evaluation.failure.message.startswith("redxxx")
    assert len(evaluation.failure.message) <= 4096
    assert evaluation.failure.traceback == "t"


DEEP: list[Any] = []
for _ in range(100):
    DEEP = [DEEP]


def measured(**details: Any) -> dict[str, Any]:
    return {"measurements": {"decode_ms": details}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"study": "other"}, "study is 'other'"),
        ({"trial": 4}, "trial is 4"),
        ({"trial": True}, "trial is True"),
        ({"attempt": 2.0}, "attempt is 2.0"),
        ({"status": "infeasible"}, "status is 'infeasible'"),
        ({"status": ["complete"]}, "status is"),
        ({"status": "failed"}, "its failure is None"),
        ({"status": "failed", "failure": {"kind": "no kind!"}}, "failure.kind"),
        ({"status": "failed", "failure": {"kind": "error", "message": 5}}, "failure.message is 5"),
        ({"failure": {"kind": "error"}}, "complete, and yet with a failure"),
        ({"values": [1.0, 2.0]}, "values is"),
        ({"values": {"val_loss": 1.0}}, "without a value of decode_ms"),
        ({"values": {"val_loss": 1.0, "decode_ms": None}}, "without a value of decode_ms"),
        ({"values": {"val_loss": 1.0, "decode_ms": 1.0, "x": 1.0}}, "'x' is no objective"),
        ({"values": {"val_loss": True, "decode_ms": 1.0}}, "val_loss: True; give back a number"),
        ({"values": {"val_loss": "2", "decode_ms": 1.0}}, "val_loss: '2'; give back a number"),
        ({"values": {"val_loss": math.nan, "decode_ms": 1.0}}, "nan; give back a finite"),
        ({"values": {"val_loss": -math.inf, "decode_ms": 1.0}}, "-inf; give back a finite"),
        ({"values": {"val_loss": 1.7e308, "decode_ms": 1.0}}, "below 1e+150"),
        ({"values": {"val_loss": 10**400, "decode_ms": 1.0}}, "give back a finite"),
        ({"values": {"val_loss": np.bool_(True), "decode_ms": 1.0}}, "give back a number"),
        ({"measurements": {"other": {}}}, "'other' has no value"),
        ({"measurements": {"decode_ms": []}}, "not an object"),
        (measured(a=object()), "is not JSON"),
        (measured(a=math.nan), "nan is not a finite number"),
        (measured(a={1: 2}), "the key 1 is not a text"),
        (measured(a="x" * DETAILS_BYTES), "too large"),
        (measured(a="\u1234" * (DETAILS_BYTES // 4)), "bytes as JSON, over"),
        (measured(a=DEEP), "nested deeper"),
        (measured(a=2**70), "more than 64 bits"),
        (measured(reference_key="cpu"), "None; give back a number"),
        (measured(**TIMED | {"reference_key": ["cpu"]}), "reference_key is ['cpu']"),
        (measured(**TIMED | {"reference_ms": 0.0}), "reference_ms is 0.0"),
        (measured(**TIMED | {"reference_ms": "1"}), "'1'; give back a number"),
        (measured(**TIMED | {"ratio": -1.0}), "ratio is -1.0"),
        ({"metrics": {"lr": "high"}}, "metrics: 'high'; give back a number"),
        ({"curve": {"tokens": 1}}, "curve is not a list"),
        ({"curve": [1.0]}, "curve: a row is not an object"),
        ({"routing": [[1]]}, "routing: a row is not an object"),
        ({"cost": {"params": 1.5}}, "cost: params is 1.5"),
        ({"seconds": None}, "seconds is None"),
        ({"versions": {"torch": 2}}, "versions: torch is 2"),
        ({"device": "cpu"}, "device is 'cpu'"),
        ({"fingerprint": 5}, "fingerprint is 5"),
        ({"weights_sha256": "f" * 63}, "weights_sha256 is"),
    ],
)
def test_what_is_no_evaluation_of_the_job_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r"\S") as error:
        checked_evaluation(sent(**changes), JOB)
    assert words in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("other", [None, "text", 5, [], FOUND])
def test_other_things_are_refused(other: object) -> None:
    with pytest.raises(ValueError, match="not an evaluation"):
        checked_evaluation(other, JOB)


def test_texts_can_be_stored_by_every_database() -> None:
    assert plain_json({"a": "x\0y\ud800"}, 100) == {"a": "x?y?"}
    assert plain_json((1, np.float64(2.0), [None, True]), 100) == [1, 2.0, [None, True]]


def test_the_seed_and_unknown_fields_are_not_the_workers() -> None:
    evaluation = checked_evaluation(sent(seed=99, newer="field", violations={"a": 1.0}), JOB)
    assert evaluation == replace(FOUND, seed=7)
