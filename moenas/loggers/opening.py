"""Loggers by the text of `--log`: `tensorboard:DIR`, `mlflow:URI` or `wandb:PROJECT`."""

from __future__ import annotations

import importlib.util
import os

from moenas.errors import InputError, suggestion
from moenas.loggers.logger import Logger

TOOLS = ("tensorboard", "mlflow", "wandb")
"""Names of the tools: each is also its extra and the package that it needs."""


def open_logger(text: str) -> Logger:
    """Return the logger that a text names: a tool, and after a colon where it writes.

    Raises:
        InputError: if there is no such tool, its package is not installed, or it cannot log in.
    """
    tool, colon, where = text.partition(":")
    if tool not in TOOLS:
        near = suggestion(tool, TOOLS)
        raise InputError(f"--log {text}: no tool '{tool}'.{near} There are {', '.join(TOOLS)}")
    if colon and not where:
        raise InputError(f"--log {text}: nothing follows the colon; write {tool}, or {tool}:WHERE")
    if importlib.util.find_spec(tool) is None:
        raise InputError(f"--log {text}: needs {tool}; `pip install 'moenas[{tool}]'`")
    if tool == "tensorboard":
        from moenas.loggers.tensorboard import TensorBoardLogger

        return TensorBoardLogger(where or "runs")
    if tool == "mlflow":
        from moenas.loggers.mlflow import MLflowLogger

        return MLflowLogger(where or None)
    from moenas.loggers.wandb import WandbLogger

    _require_login(text)
    return WandbLogger(where or None)


def _require_login(text: str) -> None:
    """Refuse a run of W&B that would ask for a key on the terminal.

    Raises:
        InputError: if W&B is to be online and knows no key.
    """
    import wandb

    if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(
        prompt=False, verify=False
    ):
        raise InputError(
            f"--log {text}: Weights & Biases has no API key; `wandb login`, or WANDB_MODE=offline"
        )
