"""The logger of TensorBoard: an event file for each trial, and one for the study."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from moenas.loggers.logger import Logger
from moenas.loggers.trial_log import TrialLog, expert_loads, point_numbers, routing_numbers

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


class TensorBoardLogger(Logger):
    """Writes `FOLDER/STUDY/trial-N` and `FOLDER/STUDY/study` for `tensorboard --logdir FOLDER`.

    The step of a curve is its training tokens; the step of the study is its evaluated candidates.
    Loads of experts are histograms over the experts of a layer. Drawn values and objectives are
    in the tab HPARAMS.
    """

    tool = "TensorBoard"

    def __init__(self, folder: str | os.PathLike[str] = "runs") -> None:
        super().__init__()
        self.folder = Path(folder)

    def write(self, trial: TrialLog) -> None:
        """Write one trial and the numbers of its study."""
        study = quote(trial.study, safe=" ")
        with _writer(self.folder / study / trial.run) as writer:
            _write_trial(writer, trial)
        with _writer(self.folder / study / "study") as writer:
            for name, value in trial.study_numbers.items():
                writer.add_scalar(name, value, trial.evaluated)


def _writer(folder: Path) -> SummaryWriter:
    from torch.utils.tensorboard.writer import SummaryWriter

    return SummaryWriter(str(folder))


def _write_trial(writer: SummaryWriter, trial: TrialLog) -> None:
    """Write the curve at the times of its points, then the numbers of the trained model."""
    import torch

    now, step = time.time(), 0
    began = now - trial.numbers.get("seconds/total", 0.0)
    for point in trial.curve:
        step, at = point["tokens"], began + point.get("seconds", 0.0)
        for name, value in point_numbers(point).items():
            writer.add_scalar(name, value, step, walltime=at)
        for name, load in expert_loads(point.get("routing", []), "train").items():
            writer.add_histogram(name, torch.tensor(load), step, walltime=at)
    for name, value in {**trial.numbers, **routing_numbers(trial.routing, "validation")}.items():
        writer.add_scalar(name, value, step, walltime=now)
    for name, load in expert_loads(trial.routing, "validation").items():
        writer.add_histogram(name, torch.tensor(load), step, walltime=now)
    for name, fact in trial.facts.items():
        writer.add_text(name, str(fact), step, walltime=now)
    _write_params(writer, trial)


def _write_params(writer: SummaryWriter, trial: TrialLog) -> None:
    """Write the drawn values and the objectives for the tab HPARAMS, into the same event file."""
    from torch.utils.tensorboard.summary import hparams

    params = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in trial.params.items()
    }
    values = {name: value for name, value in trial.numbers.items() if name.startswith("value/")}
    file_writer = writer._get_file_writer()
    for summary in hparams(params, values):
        file_writer.add_summary(summary)
