"""The report on a study, against losses whose truth is known."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from random import Random
from typing import Any

import pytest
from typer.testing import CliRunner

from moenas import Space, Study, run
from moenas.cli.commands import app
from moenas.model.architecture import Architecture
from moenas.records import Evaluation, Job
from moenas.study.insights import insights
from moenas.workers.replay_pool import ReplayPool

SPACE = """
name: taught
architecture:
  vocab_size: 256
  d_model: {choice: [16, 32, 64]}
  norm: {choice: [rmsnorm, layernorm]}
  blocks:
    - mixer: {kind: attention, head_dim: 8}
      ffn: {kind: dense, d_ff: {int: [16, 256], step: 16}, activation: {choice: [swiglu, relu2]}}
require: [active_params < 70e3]
objectives: [val_loss, flops_per_token]
data: {files: [FOLDER/text.txt]}
train: {tokens: 64, context: 8, batch: 2, val_tokens: 16}
search: {sampler: random, trials: 60}
"""
PENALTY = 0.2
"""How much worse relu2 is than swiglu in the made-up truth, at any size."""


def recorded(job: Job) -> tuple[Evaluation, float]:
    """A loss of size, activation and a little noise; the norm does nothing."""
    architecture = Architecture.parse(job.architecture)
    cost = architecture.cost(8)
    relu2 = job.architecture["blocks"][0]["ffn"]["activation"] == "relu2"
    noise = Random(job.trial).gauss(0, 0.01)
    loss = 5 - 0.1 * math.log2(cost.active_params) + PENALTY * relu2 + noise
    values = {"val_loss": loss, "flops_per_token": float(cost.flops_per_token)}
    evaluation = Evaluation(
        study=job.study,
        trial=job.trial,
        attempt=job.attempt,
        status="complete",
        fingerprint=architecture.fingerprint,
        values=values,
        metrics={"val_loss": loss},
        cost=cost.plain(),
        seed=job.seed,
    )
    return evaluation, 1.0


def make(folder: Path, trials: int, text: str = SPACE) -> Study:
    (folder / "text.txt").write_text("to be read, not trained on\n" * 200)
    (folder / "taught.yaml").write_text(text.replace("FOLDER", str(folder)))
    space = Space.load(folder / "taught.yaml")
    return run(
        space,
        storage=f"sqlite:///{folder}/moenas.db",
        pool=ReplayPool(recorded, 4),
        trials=trials,
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make(tmp_path_factory.mktemp("taught"), 60)


@pytest.fixture(scope="module")
def report(study: Study) -> dict[str, Any]:
    return insights(study)


def of_hole(rows: list[dict[str, Any]], end: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["hole"].endswith(end)]


def test_the_effect_of_a_hole_is_its_true_one(report: dict[str, Any]) -> None:
    effects = report["objectives"]["val_loss"]["effects"]
    by_level = {row["level"]: row for row in of_hole(effects, "activation")}
    difference = by_level["relu2"]["effect"] - by_level["swiglu"]["effect"]
    assert difference == pytest.approx(PENALTY, abs=0.02)
    for row in by_level.values():
        assert abs(row["effect"]) > 3 * row["half_width"]


def test_a_hole_without_effect_is_not_clear_and_not_important(report: dict[str, Any]) -> None:
    for row in of_hole(report["objectives"]["val_loss"]["effects"], "norm"):
        assert abs(row["effect"]) < 2 * row["half_width"]
    importance = report["objectives"]["val_loss"]["importance"]
    (norm,), (activation,) = of_hole(importance, "norm"), of_hole(importance, "activation")
    assert norm["surrogate"] < 0.2 * activation["surrogate"]
    # Half of the difference is the deviation of two values.
    assert activation["surrogate"] == pytest.approx(PENALTY / 2, abs=0.03)
    assert sum(row["ped_anova"] for row in importance) == pytest.approx(1)


def test_a_known_cost_has_exact_importances_and_no_effects(report: dict[str, Any]) -> None:
    flops = report["objectives"]["flops_per_token"]
    (norm,) = of_hole(flops["importance"], "norm")
    assert norm["surrogate"] == 0.0
    assert flops["effects"] == []


def test_numbers_stand_in_order_and_in_ranges(report: dict[str, Any]) -> None:
    effects = report["objectives"]["val_loss"]["effects"]
    assert [row["level"] for row in of_hole(effects, "d_model")] == ["16", "32", "64"]
    ranges = [row["level"] for row in of_hole(effects, "d_ff")]
    assert len(ranges) == 5
    assert ranges == sorted(ranges, key=lambda level: float(level.split()[0]))


def test_coverage_requirements_and_growth(report: dict[str, Any], study: Study) -> None:
    size = 3 * 2 * 16 * 2
    assert report["space"]["points"] == size
    assert report["space"]["share"] == pytest.approx(report["space"]["drawn"] / size)
    infeasible = report["evaluations"]["infeasible"]
    assert report["requirements"] == [{"requirement": "active_params < 70e3", "broken": infeasible}]
    last = report["front"][-1]
    assert (last["complete"], last["members"]) == (60, len(study.front()))
    assert last["hypervolume"] == pytest.approx(study.front().hypervolume)
    assert [row["share"] for row in report["front"]] == sorted(r["share"] for r in report["front"])


def test_a_space_without_holes_is_seen_whole(tmp_path: Path) -> None:
    whole = SPACE.replace("{choice: [16, 32, 64]}", "16").replace(
        "{choice: [swiglu, relu2]}", "gelu"
    )
    whole = whole.replace("{choice: [rmsnorm, layernorm]}", "rmsnorm")
    whole = whole.replace("{int: [16, 256], step: 16}", "64")
    space = insights(make(tmp_path, 5, whole))["space"]
    assert space == {"points": 1, "drawn": 1, "share": 1.0}


def test_few_candidates_have_no_importances(tmp_path: Path) -> None:
    report = insights(make(tmp_path, 5))
    assert report["objectives"] == {}
    assert [row["complete"] for row in report["front"]] == [1, 2, 3, 4, 5]


def test_a_small_front_has_each_row_once(tmp_path: Path) -> None:
    report = insights(make(tmp_path, 2))
    assert [row["complete"] for row in report["front"]] == [1, 2]


def test_the_command_writes_text_json_and_csv(study: Study, report: dict[str, Any]) -> None:
    storage = ["--storage", study.store.place]
    runner = CliRunner()
    text = runner.invoke(app, ["report", "taught", *storage])
    assert text.exit_code == 0
    assert "Effects on val_loss between models of equal active parameters" in text.output
    assert "broken" in text.output
    written = runner.invoke(app, ["report", "taught", "-o", "json", *storage])
    assert json.loads(written.output) == json.loads(json.dumps(report))
    rows = list(csv.DictReader(io.StringIO(
        runner.invoke(app, ["report", "taught", "-o", "csv", *storage]).output
    )))  # fmt: skip
    assert len(rows) == len(report["objectives"]["val_loss"]["effects"])


def test_a_view_has_the_parameters_that_optuna_holds(study: Study) -> None:
    held = {t.number: t.params for t in study.optuna.get_trials(deepcopy=False) if t.params}
    assert study.view.params == held
    assert len(held) >= 60


def test_the_report_has_the_agreement_between_rungs(tmp_path: Path) -> None:
    """Against ranks of the losses that the pool gave."""
    (tmp_path / "text.txt").write_text("to be read, not trained on\n" * 200)
    text = SPACE.replace("FOLDER", str(tmp_path)).replace("random, ", "random, STOP ")
    text = text.replace("STOP", "early_stopping: {kind: successive_halving},")
    text = text.replace("tokens: 64", "tokens: 256")
    (tmp_path / "taught.yaml").write_text(text)
    url = f"sqlite:///{tmp_path}/moenas.db"
    done = run(Space.load(tmp_path / "taught.yaml"), storage=url, workers="inline", trials=12)
    rungs = insights(done)["rungs"]
    assert [row["rung"] for row in rungs] == list(range(1, len(rungs) + 1))
    results = done.store.rung_results(done.name)
    assert rungs[0]["reached"] == sum(result.rung == 1 for result in results) >= 8
    assert rungs[0]["promoted"] == sum(r.promoted for r in results if r.rung == 1)
    shown = CliRunner().invoke(app, ["report", "taught", "--storage", url]).stdout
    assert "Agreement of the losses at each rung with the final ones" in shown
