"""The logger of Weights & Biases: a group for each study, and a run for each trial."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

from moenas.loggers.logger import Logger
from moenas.loggers.trial_log import TrialLog, expert_loads, point_numbers, routing_numbers
from moenas.passwords import note, note_address

if TYPE_CHECKING:
    import wandb

PROJECT = "moenas"
"""The project, where neither the caller nor $WANDB_PROJECT names one."""
SERVICE_WAIT_S = 120.0
"""Seconds for the start of W&B's process. Its default of 30 is too short on a busy machine."""


class WandbLogger(Logger):
    """Writes a run for each trial into the group of its study, and a run `study`.

    The step metric of a curve is `tokens`; the step metric of the study is `evaluated`. Loads of
    experts are histograms. Drawn values are the config of a run. $WANDB_MODE and $WANDB_DIR apply.
    Neither code nor facts of this machine are sent.
    """

    tool = "Weights & Biases"

    def __init__(self, project: str | None = None) -> None:
        super().__init__()
        note(os.environ.get("WANDB_API_KEY", ""))
        note_address(os.environ.get("WANDB_BASE_URL", ""))
        self.project = project or os.environ.get("WANDB_PROJECT") or PROJECT
        self._study_runs: dict[str, wandb.Run] = {}

    def write(self, trial: TrialLog) -> None:
        """Write one trial and the numbers of its study."""
        config = {"params": trial.params, **trial.facts}
        run = self._open(trial.study, trial.run, "trial", config)
        try:
            _write_trial(run, trial)
        finally:
            run.finish(exit_code=int(trial.status == "failed"))
        if trial.study not in self._study_runs:
            opened = self._open(trial.study, "study", "study", {})
            opened.define_metric("*", step_metric="evaluated")
            self._study_runs[trial.study] = opened
        self._study_runs[trial.study].log({"evaluated": trial.evaluated, **trial.study_numbers})

    def finish(self) -> None:
        """End the runs of the studies."""
        for run in self._study_runs.values():
            run.finish()
        self._study_runs.clear()

    def _open(self, study: str, name: str, job_type: str, config: dict[str, Any]) -> wandb.Run:
        import wandb

        # W&B reads its variables once in a process; a login that was refused before is such a time.
        return wandb.init(
            mode=cast(Any, os.environ.get("WANDB_MODE")),  # a wrong mode is refused there
            dir=os.environ.get("WANDB_DIR"),
            project=self.project,
            group=study,
            name=name,
            job_type=job_type,
            config=config,
            reinit="create_new",
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_code=True,
                disable_git=True,
                save_code=False,
                x_disable_meta=True,
                x_disable_stats=True,
                x_service_wait=SERVICE_WAIT_S,
            ),
        )


def _write_trial(run: wandb.Run, trial: TrialLog) -> None:
    """Write the curve, then the numbers of the trained model as the summary."""
    import wandb

    run.define_metric("*", step_metric="tokens")
    for point in trial.curve:
        loads = expert_loads(point.get("routing", []), "train")
        histograms = {name: wandb.Histogram(load) for name, load in loads.items()}
        run.log({"tokens": point["tokens"], **point_numbers(point), **histograms})
    loads = expert_loads(trial.routing, "validation")
    run.summary.update(
        {
            **trial.numbers,
            **routing_numbers(trial.routing, "validation"),
            **{name: wandb.Histogram(load) for name, load in loads.items()},
        }
    )
