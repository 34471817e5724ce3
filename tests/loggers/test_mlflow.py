"""MLflow's own client finds what a real study stored in a SQLite file."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_studies import moe_study

from moenas.loggers.mlflow import MLflowLogger
from moenas.study.launch import run

pytest.importorskip("mlflow", reason="the extra moenas[mlflow] is not installed")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.usefixtures("study_folder"),
    # MLflow uses what SQLAlchemy 2.1 and pydantic deprecate.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def test_curves_values_and_routing_are_read_back(tmp_path: Path) -> None:
    from mlflow.artifacts import load_dict
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    study = run(moe_study(), workers="inline", listeners=[MLflowLogger(uri)])

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(study.name)
    assert experiment is not None
    runs = {one.info.run_name: one for one in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"trial-0", "trial-1", "study"}
    assert {one.info.status for one in runs.values()} == {"FINISHED"}
    drawn = {f"trial-{t.number}": t.params for t in study.optuna.trials}
    for trial in (0, 1):
        evaluation, found = study.evaluation(trial), runs[f"trial-{trial}"]
        history = client.get_metric_history(found.info.run_id, "train/train_loss")
        assert [(m.step, m.value) for m in history] == [
            (point["tokens"], point["train_loss"]) for point in evaluation.curve
        ]
        metrics = found.data.metrics
        assert metrics["value/val_loss"] == evaluation.values["val_loss"]
        assert metrics["cost/params"] == evaluation.cost["params"]
        vio = metrics["validation_routing/layer_0/max_vio"]
        assert vio == evaluation.routing[0]["max_vio"]
        assert load_dict(f"{found.info.artifact_uri}/routing.json")["layers"] == evaluation.routing
        assert found.data.params == {k: str(v) for k, v in drawn[found.info.run_name].items()}
        assert found.data.tags["moenas.fingerprint"] == evaluation.fingerprint
    volumes = client.get_metric_history(runs["study"].info.run_id, "study/hypervolume")
    assert [m.step for m in volumes][-1] == 2
    assert volumes[-1].value == study.front().hypervolume


def test_a_server_that_is_not_there_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    warnings: list[str] = []

    study = run(
        moe_study(),
        workers="inline",
        listeners=[
            MLflowLogger("http://127.0.0.1:9"),
            lambda event: warnings.append(event.text) if event.kind == "warning" else None,
        ],
    )

    assert study.finished == "trials"
    (text,) = warnings
    assert text.startswith("the logger of MLflow fails and gets no further events: ")
