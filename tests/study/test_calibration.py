"""Calibrations: real measurements of small models, and the predictions that `check` prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import runner
from studies import SMALL, space

from moenas.errors import InputError, MoenasError, NoCandidateError, NoRoomError
from moenas.model.architecture import Architecture
from moenas.predict.block_latency import predicted
from moenas.records import Calibration, Evaluation
from moenas.report.latency_text import calibration_text, predicted_text
from moenas.space.space import Space
from moenas.store import calibrations
from moenas.store.store import Store
from moenas.study import calibration
from moenas.study.calibration import calibrate, parts_digest, predicted_latency
from moenas.study.events import Event
from moenas.study.launch import load_study, run
from moenas.study.maintenance import remeasure

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("study_folder")]

BLOCK = {"mixer": {"kind": "attention", "head_dim": 8}, "ffn": {"kind": "dense", "d_ff": 32}}
QUICK = "measure: {decode_batch: 2, decode_context: 8, min_repeats: 3, max_repeats: 3}\n"


def timed(objectives: str = "val_loss, decode_ms", more: str = QUICK, name: str = "s") -> Space:
    text = space(SMALL, more, name).text
    return Space.parse(text.replace("val_loss, flops_per_token", objectives), "s.yaml")


def stored(space: Space) -> Calibration:
    (made,) = calibrate(space, models=6)
    return made


def test_the_draws_of_a_calibration_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "TOLD_S", 0.0)
    lines: list[tuple[int, int, str]] = []
    sample = list(calibration._sample(timed(), 5, lambda *told: lines.append(told)))
    assert [line for line in lines if line[0] == 4] == [(4, 5, "different models drawn")]
    assert len(sample) == 5


def test_models_outside_the_fit_set_and_test_the_interval() -> None:
    lines: list[str] = []
    (made,) = calibrate(timed(), models=6, progress=lambda *told: lines.append(str(told)))
    roles = [row["role"] for row in made.held_out]
    assert (made.fitted["models"], roles) == (3, ["interval", "interval", "test"])
    assert made.coverage == pytest.approx(2 / 3)
    assert len(lines) == 6 + made.fitted["blocks"]
    assert not any("drawn" in line for line in lines)
    assert made.settings["batch"] == 2
    assert made.device["kind"] == "cpu"
    assert all(row["measured"] > 0 and row["predicted"] > 0 for row in made.held_out)
    assert calibration_text(made)[-1].startswith(f"  {made.tested[0]['fingerprint']}: measured")
    store = Store.open()
    assert calibrations.of_workload(store, parts_digest(timed()), made.workload) == made


def test_each_latency_of_a_space_has_a_calibration() -> None:
    made = calibrate(
        timed("prefill_ms, decode_ms", QUICK.replace("2,", "2, prefill_tokens: 8,", 1)), models=6
    )
    assert [one.objective for one in made] == ["prefill_ms", "decode_ms"]
    assert [one.settings["context"] for one in made] == [8, 8]


def test_check_predicts_by_the_calibration_of_these_settings_alone() -> None:
    (row,) = predicted_latency(timed(), None)
    assert "no calibration for" in row["missing"]
    assert predicted_text([row], "moenas calibrate s.yaml")[0].endswith(
        "not predicted; `moenas calibrate s.yaml` measures this device"
    )
    made = stored(timed())
    (row,) = predicted_latency(timed(), None)
    assert row["missing"] is None
    assert row["smallest"]["value"] <= row["median"]["value"] <= row["largest"]["value"]
    assert row["median"]["low"] < row["median"]["value"] < row["median"]["high"]
    assert predicted_text([row])[0].startswith("decode_ms, predicted for")
    for other in (
        "decode_batch: 3",
        "decode_batch: 2, threads: 2",
        "decode_batch: 2, dtype: bfloat16",
    ):
        (row,) = predicted_latency(timed(more=QUICK.replace("decode_batch: 2", other)), None)
        assert f"there is one for [{made.workload}], which is not used" in row["missing"]
    wider = Space.parse(timed().text.replace("[16, 24, 32]", "[16, 24, 32, 40]"), "s.yaml")
    assert "no calibration" in predicted_latency(wider, None)[0]["missing"]


def test_a_calibration_of_another_device_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    stored(timed())
    monkeypatch.setattr("moenas.evaluate.latency.device_name", lambda device: "Another CPU")
    (row,) = predicted_latency(timed(), None)
    assert "no calibration for [Another CPU" in row["missing"]


def test_a_predicted_latency_is_no_value_of_a_trial() -> None:
    made = stored(timed())
    wrong = {name: 1000 * amount for name, amount in made.coefficients.items()}
    calibrations.add(Store.open(), replace(made, coefficients=wrong))
    (row,) = predicted_latency(timed(), None)
    study = run(timed().with_search(sampler="grid", trials=6), workers="inline")
    assert study.front().members
    for evaluation in study.view.evaluations:
        details = evaluation.measurements["decode_ms"]
        assert evaluation.values["decode_ms"] == details["ratio"] * details["reference_ms"]
        assert details["n"] == 3
        assert evaluation.values["decode_ms"] < row["smallest"]["value"] / 10


def test_a_space_without_a_latency_is_refused_and_nothing_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moenas.evaluate.devices.has_gpu", lambda: False)
    with pytest.raises(InputError, match="s: no objective is a latency"):
        calibrate(timed("val_loss, flops_per_token"))
    with pytest.raises(InputError, match="--device cuda: PyTorch sees no GPU here"):
        calibrate(timed(), device="cuda")
    with pytest.raises(InputError, match="--device tpu: give cpu or cuda"):
        calibrate(timed(), device="tpu")
    few = Space.parse(timed().text.replace("[16, 24, 32]", "[16]"), "s.yaml")
    with pytest.raises(InputError, match=r"s: 2 different feasible models .* at least 6"):
        calibrate(few)
    assert not Path("moenas.db").exists()


def test_the_command_line_calibrates_and_checks(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    moenas = runner(monkeypatch, capfd)
    Path("s.yaml").write_text(timed().text)
    made = moenas("calibrate", "s.yaml", "--models", "6", "-o", "json")
    assert made.code == 0, made.err
    assert "[1/" in made.err
    assert Calibration.parse(json.loads(made.out)[0]).objective == "decode_ms"
    checked = moenas("check", "s.yaml")
    assert "decode_ms, predicted for" in checked.out
    refused = moenas("calibrate", "s.yaml", "objectives=[val_loss]")
    assert refused.code == 2
    assert "no objective is a latency" in refused.err


# --- requirements on a latency -------------------------------------------------------------------


def bounded(bound: str) -> Space:
    space = Space.parse(f"{timed().text}\nrequire: [{bound}]\n", "s.yaml")
    return space.with_search(sampler="grid", trials=6)


def with_interval(log_error: float) -> Calibration:
    """Store a real calibration with another interval, for which no model is too large."""
    made = stored(timed())
    highest = {name: 100 * amount for name, amount in made.highest.items()}
    changed = replace(made, log_error=log_error, highest=highest)
    calibrations.add(Store.open(), changed)
    return changed


def ended(space: Space) -> list[Evaluation]:
    with suppress(NoCandidateError):
        run(space, workers="inline")
    return Store.open().evaluations("s")


def test_a_latency_that_is_certainly_outside_is_refused_before_training() -> None:
    made = with_interval(0.1)
    rows = ended(bounded("decode_ms < 1e-6"))
    assert len(rows) == 6
    for row in rows:
        assert (row.status, row.values, row.curve) == ("infeasible", {}, [])
        assert row.violations["decode_ms < 1e-6"] > 0.99
        architecture = bounded("decode_ms < 1e-6").architecture(
            Store.open().architecture("s", row.trial)
        )
        assert row.metrics == {"predicted_decode_ms": predicted(made, architecture).value}


@pytest.mark.parametrize(
    ("log_error", "device"), [(20.0, None), (0.1, "Another CPU")], ids=["wide", "elsewhere"]
)
def test_what_may_be_inside_is_trained_and_measured(
    log_error: float, device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_interval(log_error)
    if device is not None:
        monkeypatch.setattr("moenas.evaluate.latency.device_name", lambda _: device)
    for row in ended(bounded("decode_ms < 1e-6")):
        assert row.status == "infeasible"
        assert row.curve
        assert row.values["decode_ms"] > 1e-6
        assert "predicted_decode_ms" not in row.metrics


def test_a_bound_that_all_meet_refuses_nothing() -> None:
    with_interval(0.1)
    rows = ended(bounded("decode_ms < 1e6"))
    assert [row.status for row in rows] == ["complete"] * 6
    assert not any("predicted_decode_ms" in row.metrics for row in rows)


def test_a_model_larger_than_the_measured_ones_is_not_refused() -> None:
    made = with_interval(0.1)
    calibrations.add(Store.open(), replace(made, highest=dict.fromkeys(made.highest, 0.5)))
    assert all(row.curve for row in ended(bounded("decode_ms < 1e-6")))


def test_what_an_earlier_run_has_drawn_is_not_refused_by_a_newer_calibration() -> None:
    wanted = bounded("decode_ms < 1e-6")

    def stop(event: Event) -> None:
        if event.kind == "started" and event.trial == 1:
            raise KeyboardInterrupt

    with pytest.raises((MoenasError, KeyboardInterrupt)):
        run(wanted, workers="inline", listeners=[stop])
    with_interval(0.1)
    rows = {row.trial: row for row in ended(wanted)}
    assert rows[0].curve, "it was trained before"
    assert rows[1].curve, "it was drawn before"
    assert "predicted_decode_ms" not in rows[1].metrics
    assert all("predicted_decode_ms" in rows[trial].metrics for trial in range(2, 6))
    constraints = {t.number: t.constraints for t in load_study("s").optuna.trials}
    for trial, row in rows.items():
        assert constraints[trial]["decode_ms < 1e-6"] == row.violations["decode_ms < 1e-6"]


def test_a_newer_calibration_changes_no_refusal_of_a_study() -> None:
    wanted = bounded("decode_ms < 1e-6")
    first = with_interval(0.1)

    def stop(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises((MoenasError, KeyboardInterrupt)):
        run(wanted, workers="inline", listeners=[stop])
    # By this one no candidate would be refused, and another latency be predicted.
    calibrations.add(Store.open(), replace(first, log_error=20.0, reference_ms=1e3))
    rows = ended(wanted)
    assert len(rows) == 6
    for row in rows:
        architecture = wanted.architecture(Store.open().architecture("s", row.trial))
        assert row.metrics == {"predicted_decode_ms": predicted(first, architecture).value}


def test_a_study_goes_over_to_the_newer_calibration_that_is_accepted() -> None:
    wanted = bounded("decode_ms < 1e-6")
    first = with_interval(0.1)

    def stop(event: Event) -> None:
        if event.trial == 1:
            raise KeyboardInterrupt

    with pytest.raises((MoenasError, KeyboardInterrupt)):
        run(wanted, workers="inline", listeners=[stop])
    n_refused = Store.open().count("s")
    assert 1 <= n_refused < 6
    newer = replace(first, log_error=20.0, made_at="2100-01-01T00:00:00+00:00")
    calibrations.add(Store.open(), newer)
    with pytest.raises(MoenasError, match="none of its 6 trials is complete"):
        run(wanted, workers="inline", accept_changes=True)
    rows = {row.trial: row for row in load_study("s").view.evaluations}
    was_trained = [bool(rows[trial].curve) for trial in range(6)]
    assert was_trained == [False] * n_refused + [True] * (6 - n_refused)
    (change,) = load_study("s").changes
    assert change["what"] == "calibration decode_ms"
    assert (change["before"], change["after"]) == (first.made_at, newer.made_at)
    (kept,) = calibrations.kept(Store.open(), "s")
    assert kept["made_at"] == kept["newest_made_at"] == newer.made_at


def test_a_latency_that_is_measured_again_changes_its_constraint() -> None:
    text = bounded("decode_ms < 1e6").text.replace("sampler: tpe", "sampler: grid")
    study = run(Space.parse(text, "s.yaml"), trials=6, workers="inline")
    before = {t.number: t.constraints["decode_ms < 1e6"] for t in study.optuna.trials}
    remeasure("s", objective="decode_ms", workers="inline")
    for trial in load_study("s").optuna.trials:
        measured = trial.values[1]
        expected = (measured - 1e6) / 1e6
        assert trial.constraints["decode_ms < 1e6"] == pytest.approx(expected, rel=1e-12)
    after = {t.number: t.constraints["decode_ms < 1e6"] for t in load_study("s").optuna.trials}
    assert before.keys() == after.keys()
    assert before != after


# --- models that cannot be measured --------------------------------------------------------------


def measuring_fails(
    monkeypatch: pytest.MonkeyPatch, error: Exception, which: Callable[[Architecture], bool]
) -> None:
    """Let the measurement of some models raise an error."""
    measure = calibration.measure_untrained

    def failing(space: Space, corpus: Any, architecture: Architecture, *rest: Any) -> Any:
        if which(architecture):
            raise error
        return measure(space, corpus, architecture, *rest)

    monkeypatch.setattr(calibration, "measure_untrained", failing)


def test_without_a_model_that_tests_the_interval_nothing_is_stored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outside = next(iter(calibration._sample(timed(), 200))).fingerprint
    measuring_fails(monkeypatch, NoRoomError("large"), lambda a: a.fingerprint == outside)
    with pytest.raises(InputError, match="s: 5 models could be measured on this device"):
        calibrate(timed(), models=6)
    assert not Path("moenas.db").exists()


def test_an_error_of_a_part_ends_the_command_with_its_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measuring_fails(monkeypatch, ValueError("no idea"), lambda _: True)
    with pytest.raises(InputError, match=r"s: .*ValueError: no idea"):
        calibrate(timed(), models=6)


def test_a_model_outside_the_fit_is_no_model_of_one_block_in_it() -> None:
    plain = {"vocab_size": 256, "d_model": 16, "blocks": [{"repeat": 2, **BLOCK}]}
    two = Architecture.parse(plain)
    one = Architecture.parse({**plain, "blocks": [{"repeat": 1, **BLOCK}]})
    (single,) = calibration._single_blocks([two], [])
    assert single.fingerprint == one.fingerprint
    assert list(calibration._single_blocks([two], [one])) == []
