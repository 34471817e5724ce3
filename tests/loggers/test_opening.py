"""The texts of `--log`: which logger each names, and what is wrong with others."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from moenas.errors import InputError
from moenas.loggers.mlflow import MLflowLogger
from moenas.loggers.opening import open_logger
from moenas.loggers.tensorboard import TensorBoardLogger
from moenas.loggers.wandb import WandbLogger

pytestmark = pytest.mark.integration


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """All packages of the tools seem to be installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


@pytest.mark.usefixtures("installed")
def test_a_text_names_a_tool_and_where_it_writes() -> None:
    board, other = open_logger("tensorboard"), open_logger("tensorboard:boards/a")
    assert isinstance(board, TensorBoardLogger)
    assert isinstance(other, TensorBoardLogger)
    assert (board.folder, other.folder) == (Path("runs"), Path("boards/a"))
    server = open_logger("mlflow:http://localhost:5000")
    assert isinstance(server, MLflowLogger)
    assert server.uri == "http://localhost:5000"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tensorbord", "no tool 'tensorbord'. Did you mean 'tensorboard'? There are tensorboard,"),
        ("mlflow:", "nothing follows the colon; write mlflow, or mlflow:WHERE"),
        ("", "no tool ''"),
    ],
)
def test_a_wrong_text_is_refused(text: str, said: str) -> None:
    with pytest.raises(InputError, match="--log") as caught:
        open_logger(text)
    assert said in str(caught.value)


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs wandb; `pip install 'moenas\[wandb\]'`"):
        open_logger("wandb:p")


def test_wandb_without_a_key_asks_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the extra moenas[wandb] is not installed")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(InputError, match="has no API key; `wandb login`, or WANDB_MODE=offline"):
        open_logger("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = open_logger("wandb:p")
    assert isinstance(logger, WandbLogger)
    assert logger.project == "p"
