"""Loggers by the text of `--log`: `tensorboard:DIR`, `mlflow:URI` or `wandb:PROJECT`."""

from __future__ import annotations

import importlib.util
import os

from moenas.errors import InputError, suggestion
from moenas.loggers.logger import Logger
from moenas.loggers.mlflow import MLflowLogger, note_passwords
from moenas.passwords import note_address, shown_address

TOOLS = ("tensorboard", "mlflow", "wandb")
"""Names of the tools: each is also its extra and the package that it needs."""


def check_logger(text: str) -> None:
    """Check a text that names a logger, and note the password in it.

    Raises:
        InputError: if there is no such tool, its package is not installed, or it cannot log in.
    """
    note_address(text)
    place = f"--log {shown_address(text)}"
    tool, colon, where = text.partition(":")
    if tool not in TOOLS:
        near = suggestion(tool, TOOLS)
        raise InputError(f"{place}: no tool '{tool}'.{near} There are {', '.join(TOOLS)}")
    if colon and not where:
        raise InputError(f"{place}: nothing follows the colon; write {tool}, or {tool}:WHERE")
    if importlib.util.find_spec(tool) is None:
        raise InputError(f"{place}: needs {tool}; `pip install 'moenas[{tool}]'`")
    if tool == "mlflow":
        note_passwords(where or None)
    if tool == "wandb":
        _require_login(place)


def open_logger(text: str) -> Logger:
    """Return the logger that a text names: a tool, and after a colon where it writes.

    Raises:
        InputError: as `check_logger` does.
    """
    check_logger(text)
    tool, _, where = text.partition(":")
    if tool == "tensorboard":
        from moenas.loggers.tensorboard import TensorBoardLogger

        return TensorBoardLogger(where or "runs")
    if tool == "mlflow":
        return MLflowLogger(where or None)
    from moenas.loggers.wandb import WandbLogger

    return WandbLogger(where or None)


def _require_login(place: str) -> None:
    """Refuse a run of W&B that would ask for a key on the terminal.

    Raises:
        InputError: if W&B is to be online and knows no key.
    """
    import wandb

    if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(
        prompt=False, verify=False
    ):
        raise InputError(
            f"{place}: Weights & Biases has no API key; `wandb login`, or WANDB_MODE=offline"
        )
