"""TensorBoard's own reader finds what a real study stored."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_studies import moe_study

from moenas.loggers.tensorboard import TensorBoardLogger
from moenas.study.launch import run

pytest.importorskip("tensorboard", reason="the extra moenas[tensorboard] is not installed")
pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("study_folder")]


def test_curves_values_and_routing_are_read_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    study = run(moe_study(), workers="inline", listeners=[TensorBoardLogger(tmp_path / "board")])

    folders = {path.name for path in (tmp_path / "board" / study.name).iterdir()}
    assert folders == {"trial-0", "trial-1", "study"}
    for trial in (0, 1):
        evaluation = study.evaluation(trial)
        read = EventAccumulator(str(tmp_path / "board" / study.name / f"trial-{trial}"))
        read.Reload()
        losses = [(s.step, s.value) for s in read.Scalars("train/train_loss")]
        assert losses == [
            (point["tokens"], pytest.approx(point["train_loss"])) for point in evaluation.curve
        ]
        (value,) = read.Scalars("value/val_loss")
        assert value.value == pytest.approx(evaluation.values["val_loss"])
        assert value.step == evaluation.curve[-1]["tokens"]
        (vio,) = read.Scalars("validation_routing/layer_0/max_vio")
        assert vio.value == pytest.approx(evaluation.routing[0]["max_vio"], rel=1e-5)
        (load,) = read.Histograms("validation_routing/layer_0/load")
        assert load.histogram_value.num == len(evaluation.routing[0]["load"]) == 4
        assert load.histogram_value.sum == pytest.approx(1.0, rel=1e-5)
        (text,) = read.Tensors("fingerprint/text_summary")
        assert text.tensor_proto.string_val == [evaluation.fingerprint.encode()]
    read = EventAccumulator(str(tmp_path / "board" / study.name / "study"))
    read.Reload()
    volumes = [point.hypervolume for point in study.view.history]
    logged = [s.value for s in read.Scalars("study/hypervolume")]
    assert logged[-1] == pytest.approx(volumes[-1])
    assert [s.step for s in read.Scalars("study/front")] == [1, 2]


def test_drawn_values_are_hyperparameters(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    study = run(
        moe_study(), trials=1, workers="inline", listeners=[TensorBoardLogger(tmp_path / "board")]
    )
    read = EventAccumulator(str(tmp_path / "board" / study.name / "trial-0"))
    read.Reload()
    content = read.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    stored = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    drawn = study.optuna.trials[0].params
    assert {name: value.number_value for name, value in stored.items()} == pytest.approx(drawn)
