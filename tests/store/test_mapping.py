"""Stored data has bounds, and is read back as it was stored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from test_store import FULL, a_study, an_evaluation, ask

from moenas.records import Failure
from moenas.store import mapping
from moenas.store.store import Store


def stored(tmp_path: Path, evaluation):
    store = Store.open(f"sqlite:///{tmp_path}/moenas.db", create=True)
    store.create_study(a_study())
    ask(store, evaluation.trial)
    store.record(evaluation)
    return store


def test_long_texts_of_a_failure_are_cut_and_so_said(tmp_path: Path) -> None:
    failure = Failure("error", "m" * 50_000_000, "t" * 9_000_000 + "END")
    store = stored(tmp_path, replace(an_evaluation(0, status="failed"), failure=failure))
    kept = store.evaluation("x", 0).failure
    assert kept.message.startswith("mmm")
    assert kept.message.endswith("... cut (50,000,000 characters)")
    assert len(kept.message) < mapping.MESSAGE + 100
    assert kept.traceback.startswith("(9,000,003 characters) ... cut\nt")
    assert kept.traceback.endswith("tEND")
    assert len(kept.traceback) < mapping.TRACEBACK + 100
    assert (tmp_path / "moenas.db").stat().st_size < 1_000_000
    assert store.summary("x").failures == {"error": 1}


def test_long_details_keep_what_is_short(tmp_path: Path) -> None:
    details = {"ratio": 1.5, "text": "x" * 30_000_000, "spread": 0.1, "rows": list(range(99_999))}
    values = {"val_loss": 1.0, "speed": 2.0}
    known = replace(an_evaluation(0, values), measurements={"speed": details})
    kept = stored(tmp_path, known).evaluation("x", 0).measurements["speed"]
    assert (kept["ratio"], kept["spread"]) == (1.5, 0.1)
    assert kept["cut"].endswith("characters of details... cut")
    assert kept["text"].endswith("... cut")
    assert len(json.dumps(kept)) <= mapping.DETAILS


def test_details_of_many_entries_stay_within_the_bound() -> None:
    details = mapping.details({f"key{i}": "y" * 500 for i in range(10_000)})
    assert "cut" in details
    assert len(json.dumps(details)) <= mapping.DETAILS
    assert mapping.details({"n": 3}) == {"n": 3}


def test_a_long_curve_keeps_its_ends(tmp_path: Path) -> None:
    curve = [{"tokens": i, "train_loss": 1.0} for i in range(25_000)]
    curve[-1]["note"] = "z" * 100_000
    known = replace(an_evaluation(0, {"val_loss": 1.0, "speed": 2.0}), curve=curve)
    kept = stored(tmp_path, known).evaluation("x", 0).curve
    assert len(kept) == mapping.CURVE_ROWS
    assert (kept[0]["tokens"], kept[-1]["tokens"]) == (0, 24_999)
    assert len(json.dumps(kept[-1])) < mapping.DETAILS


def test_curves_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    known = replace(FULL, failure=None)
    store = stored(tmp_path, replace(known, fingerprint="f3"))
    (rows,) = store.evaluations("x")
    assert "curve" not in rows.__dict__
    assert "routing" not in rows.__dict__
    assert rows.curve == known.curve
    assert "routing" not in rows.__dict__
    assert rows == store.evaluation("x", 3)
    assert store.evaluation("x", 3) == rows
    assert replace(rows, trial=9).routing == known.routing
    view = store.view("x")
    assert "evaluations" not in view.__dict__
    assert view.evaluations == [rows]
    assert view.architectures == {3: {"d_model": 3}}
