"""Former names of modules, for files of objectives, figures and parts that were written before.

Such files are stored with a study, and must load for as long as it does. An import by a former name
gives the present module with a DeprecationWarning.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PRESENT = {
    "moenas.component": "moenas.grammar.component",
    "moenas.figures": "moenas.report.figures",
    "moenas.front": "moenas.pareto",
    "moenas.objective": "moenas.space.objective",
    "moenas.parts": "moenas.model",
    "moenas.subject": "moenas.evaluate.subject",
}
"""Former name -> present name."""
RENAMED = {
    "Attend": "SoftmaxAttention",
    "BorrowedAttention": "CrossLayerAttention",
    "Choice": "RoutingDecision",
    "GatedFeedForward": "SigmoidGatedFeedForward",
    "Join": "ResidualAdd",
    "Lending": "SharesKV",
    "Lent": "SharedKV",
    "Picked": "SelectedSlots",
    "Reach": "AttentionSpan",
}
"""Former name of a class of the present modules -> its present name."""
OBJECTIVE_DIGESTS = {
    "decode_ms": ("1606add9dcc28e03ebef1441b19769fa9fbf45779a65aa691c5a6dd2e37ad248",),
    "flops_per_token": ("4c625cb492fcf682a5b2923c33e9e86fb39a391c4fabca97675dfe0be7769a74",),
    "peak_memory": ("39359b392161e7bc84426a7b56c2388e16b18cd95352d7c69f07f5337d757fb3",),
    "prefill_ms": ("f0ca876f4cadae1f9b0132a68897ad1251ce53bf3dcf601005bff36371091eeb",),
}
"""Shipped objective -> digests of former files that measure the same number."""
FORMER = {present: former for former, present in PRESENT.items()}


class FormerNames(MetaPathFinder, Loader):
    """Finds modules by their former names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for a former name, None for any other."""
        return ModuleSpec(fullname, self) if fullname in PRESENT else None

    def exec_module(self, module: ModuleType) -> None:
        """Let the module give what the present one has."""
        former, present = module.__name__, PRESENT[module.__name__]

        def give(name: str) -> Any:
            if name.startswith("__"):  # what tools ask of every module
                raise AttributeError(f"module '{former}' has no attribute '{name}'")
            now = RENAMED.get(name, name)
            value = getattr(importlib.import_module(present), now)
            warnings.warn(
                f"{former} is a former name; write `from {present} import {now}`",
                DeprecationWarning,
                stacklevel=2,
            )
            return value

        module.__doc__ = f"The former name of {present}."
        vars(module)["__getattr__"] = give
