"""The logger of MLflow: an experiment for each study, and a run for each trial."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from moenas.loggers.logger import Logger
from moenas.loggers.trial_log import TrialLog, point_numbers, routing_numbers
from moenas.passwords import note, note_address

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

METRICS, PARAMS, CHARACTERS = 1000, 100, 500
"""What one request takes: metrics, parameters, and characters of a parameter or tag."""
SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
"""Environment variables of MLflow whose values nobody may see."""
Item = TypeVar("Item")


class MLflowLogger(Logger):
    """Writes an experiment with the name of the study, a run for each trial, and a run `study`.

    The step of a curve is its training tokens; the step of the study is its evaluated candidates.
    The routing in validation is the artifact `routing.json` of a run. `uri` is the tracking URI,
    such as `sqlite:///mlflow.db`; None takes $MLFLOW_TRACKING_URI or the default of MLflow.
    """

    tool = "MLflow"

    def __init__(self, uri: str | None = None) -> None:
        super().__init__()
        self.uri = uri
        note_passwords(uri)  # MLflow's errors name the whole address
        self._client: MlflowClient | None = None
        self._study_runs: dict[str, str] = {}
        """Study -> id of its run `study`."""

    def write(self, trial: TrialLog) -> None:
        """Write one trial and the numbers of its study."""
        client = self._client = self._client or self._open()
        experiment = _experiment(client, trial.study)
        tags = {f"moenas.{name}": str(fact)[:CHARACTERS] for name, fact in trial.facts.items()}
        run = client.create_run(experiment, run_name=trial.run, tags=tags).info.run_id
        _log(client, run, _metrics(trial), trial.params)
        if trial.routing:
            client.log_dict(run, {"layers": list(trial.routing)}, "routing.json")
        client.set_terminated(run, "FAILED" if trial.status == "failed" else "FINISHED")
        if trial.study not in self._study_runs:
            made = client.create_run(
                experiment, run_name="study", tags={"moenas.study": trial.study}
            )
            self._study_runs[trial.study] = made.info.run_id
        study = self._study_runs[trial.study]
        numbers = _as_metrics(trial.study_numbers, time.time(), trial.evaluated)
        _log(client, study, numbers, {})

    def finish(self) -> None:
        """End the runs of the studies."""
        if self._client is not None:
            for run in self._study_runs.values():
                self._client.set_terminated(run, "FINISHED")
        self._study_runs.clear()

    def _open(self) -> MlflowClient:
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of each new table
        # At the end of a run it prints the address of a server with its password to stdout.
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
        return MlflowClient(tracking_uri=self.uri)


def note_passwords(uri: str | None) -> None:
    """Note the passwords of a tracking server: in its URI, and in the variables of MLflow."""
    for address in (uri, os.environ.get("MLFLOW_TRACKING_URI")):
        note_address(address or "")
    note(*(os.environ.get(name, "") for name in SECRETS))


def _experiment(client: MlflowClient, study: str) -> str:
    """Return the id of the experiment of a study, which is created where it is missing."""
    known = client.get_experiment_by_name(study)
    return str(client.create_experiment(study) if known is None else known.experiment_id)


def _metrics(trial: TrialLog) -> list[Metric]:
    """Return the curve at the times of its points, then the numbers of the trained model."""
    now, step = time.time(), 0
    began = now - trial.numbers.get("seconds/total", 0.0)
    metrics: list[Metric] = []
    for point in trial.curve:
        step = point["tokens"]
        metrics += _as_metrics(point_numbers(point), began + point.get("seconds", 0.0), step)
    last = {**trial.numbers, **routing_numbers(trial.routing, "validation")}
    return metrics + _as_metrics(last, now, step)


def _as_metrics(numbers: dict[str, float], at: float, step: int) -> list[Metric]:
    """Return the finite numbers as metrics; databases differ in what they do with others."""
    from mlflow.entities import Metric

    return [
        Metric(name, float(value), int(1000 * at), step)
        for name, value in numbers.items()
        if math.isfinite(value)
    ]


def _log(client: MlflowClient, run: str, metrics: Sequence[Metric], params: dict[str, Any]) -> None:
    """Log metrics and parameters in as many requests as their limits need."""
    from mlflow.entities import Param

    for some in _batches(metrics, METRICS):
        client.log_batch(run, metrics=some)
    texts = [Param(name, str(value)[:CHARACTERS]) for name, value in params.items()]
    for few in _batches(texts, PARAMS):
        client.log_batch(run, params=few)


def _batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    left = iter(items)
    while batch := list(islice(left, size)):
        yield batch
