"""MLflow's own client finds what a real study stored in a SQLite file."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

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
        evaluation, logged = study.evaluation(trial), runs[f"trial-{trial}"]
        history = client.get_metric_history(logged.info.run_id, "train/train_loss")
        assert [(m.step, m.value) for m in history] == [
            (point["tokens"], point["train_loss"]) for point in evaluation.curve
        ]
        metrics = logged.data.metrics
        assert metrics["value/val_loss"] == evaluation.values["val_loss"]
        assert metrics["cost/params"] == evaluation.cost["params"]
        vio = metrics["validation_routing/layer_0/max_vio"]
        assert vio == evaluation.routing[0]["max_vio"]
        assert load_dict(f"{logged.info.artifact_uri}/routing.json")["layers"] == evaluation.routing
        assert logged.data.params == {k: str(v) for k, v in drawn[logged.info.run_name].items()}
        assert logged.data.tags["moenas.fingerprint"] == evaluation.fingerprint
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
            MLflowLogger("http://ann:Tr0ub4dor@127.0.0.1:9"),
            lambda event: warnings.append(event.text) if event.kind == "warning" else None,
        ],
    )

    assert study.finished == "trials"
    (text,) = warnings
    assert text.startswith("the logger of MLflow fails and gets no further events: ")
    assert "http://ann:***@127.0.0.1:9" in text, "MLflow names the address"
    assert "Tr0ub4dor" not in text


class Tracking(BaseHTTPRequestHandler):
    """The part of MLflow's REST API that the logger uses; it keeps nothing."""

    def do_GET(self) -> None:
        if "experiments" in self.path:
            return self._answer({"error_code": "RESOURCE_DOES_NOT_EXIST"}, 404)
        return self._answer({"run": self._run("asked")})

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        asked = json.loads(self.rfile.read(length) or b"{}")
        run = self._run(asked.get("run_name") or "updated")
        answers = {"experiments/create": {"experiment_id": "1"}, "runs/create": {"run": run}}
        answers["runs/update"] = {"run_info": run["info"]}
        end = "/".join(self.path.split("/")[-2:])
        self._answer(answers.get(end, {}))

    def _run(self, name: str) -> Any:
        place = Path.cwd()
        run = place.name  # another one in each test, as MLflow caches its runs
        info = {"run_id": run, "run_uuid": run, "experiment_id": "1", "run_name": name}
        info |= {"status": "RUNNING", "start_time": 1, "artifact_uri": f"{place}/artifacts"}
        return {"info": info, "data": {}}

    def _answer(self, body: Any, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *values: Any) -> None:
        pass


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_a_password_of_the_address_is_printed_nowhere(
    how: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client of MLflow prints the address of each run to stdout, which holds data."""
    monkeypatch.delenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Tracking)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    uri = f"http://ann:Tr0ub4dor@127.0.0.1:{server.server_port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    texts: list[str] = []
    logger = MLflowLogger(uri if how == "argument" else None)
    run(moe_study(), workers="inline", listeners=[logger, lambda event: texts.append(event.text)])
    server.shutdown()
    thread.join()
    server.server_close()
    assert Path("artifacts/routing.json").is_file(), "everything was written"
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "Tr0ub4dor" not in printed.err + "".join(texts)
    assert not any("fails" in text for text in texts)
