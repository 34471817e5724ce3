"""Neural architecture search over mixture-of-experts language models.

The public names are fetched when they are first asked for, so that `import moenas` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moenas.architecture import Architecture as Architecture
    from moenas.architecture import Model as Model
    from moenas.corpus import Corpus as Corpus
    from moenas.errors import MoenasError as MoenasError
    from moenas.objective import Measurement as Measurement
    from moenas.objective import Objective as Objective
    from moenas.records import Cost as Cost
    from moenas.records import Evaluation as Evaluation
    from moenas.space import Space as Space
    from moenas.study import Front as Front
    from moenas.study import Study as Study
    from moenas.study import load_study as load_study
    from moenas.study import run as run

__version__ = "0.1.0"

_ROOMS = {
    "Architecture": "architecture",
    "Corpus": "corpus",
    "Cost": "records",
    "Evaluation": "records",
    "Front": "study",
    "Measurement": "objective",
    "Model": "architecture",
    "MoenasError": "errors",
    "Objective": "objective",
    "Space": "space",
    "Study": "study",
    "load_study": "study",
    "run": "study",
}
"""Public name -> the module that defines it."""


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'moenas' has no attribute '{name}'")
    return getattr(importlib.import_module(f"moenas.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*_ROOMS, "__version__"])
