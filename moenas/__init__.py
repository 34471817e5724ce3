"""Neural architecture search over mixture-of-experts language models.

The public names are fetched when they are first asked for, so that `import moenas` costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from moenas.former import FormerNames

if TYPE_CHECKING:
    from moenas.cli.progress import print_progress as print_progress
    from moenas.data.corpus import Corpus as Corpus
    from moenas.errors import MoenasError as MoenasError
    from moenas.model.architecture import Architecture as Architecture
    from moenas.model.architecture import Model as Model
    from moenas.records import Cost as Cost
    from moenas.records import Evaluation as Evaluation
    from moenas.service.client import connect as connect
    from moenas.space.objective import Measurement as Measurement
    from moenas.space.objective import Objective as Objective
    from moenas.space.space import Space as Space
    from moenas.study.launch import Front as Front
    from moenas.study.launch import Study as Study
    from moenas.study.launch import load_study as load_study
    from moenas.study.launch import run as run

__version__ = "0.1.0"

_MODULES = {
    "Architecture": "model.architecture",
    "Corpus": "data.corpus",
    "Cost": "records",
    "Evaluation": "records",
    "Front": "study.launch",
    "Measurement": "space.objective",
    "Model": "model.architecture",
    "MoenasError": "errors",
    "Objective": "space.objective",
    "Space": "space.space",
    "Study": "study.launch",
    "connect": "service.client",
    "load_study": "study.launch",
    "print_progress": "cli.progress",
    "run": "study.launch",
}
"""Public name -> the module that defines it."""


sys.meta_path.append(FormerNames())


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'moenas' has no attribute '{name}'")
    return getattr(importlib.import_module(f"moenas.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*_MODULES, "__version__"])
