"""A store of one study in memory, for tests of exports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from moenas.errors import NotFoundError
from moenas.model.architecture import Architecture
from moenas.records import Evaluation, ObjectiveInfo, Plain, StudyRecord
from moenas.store.weights import write_weights

VAL_LOSS = ObjectiveInfo("val_loss", "minimize", "nats/token", "Validation loss.", "0" * 64)


@dataclass
class Shelf:
    """A store of one study, in memory, with weights on the disk."""

    runs: Path
    name: str = "tiny"
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    architectures: dict[int, Plain] = field(default_factory=dict)
    model: Any = None
    data: Plain = field(default_factory=lambda: {"name": "pydoc", "sha256": "5" * 64})

    def study(self, name: str) -> StudyRecord:
        if name != self.name:
            raise NotFoundError(f"no study '{name}'")
        return StudyRecord(
            name=name,
            space_text="",
            overrides=[],
            space={"train": {"tokens": 4096, "context": 64, "batch": 8}, "data": {"kind": "pydoc"}},
            space_sha256="",
            objectives=[VAL_LOSS.plain()],
            data={"is_bytes": True, "files": [{"path": "a"}], **self.data},
            versions={},
            trials=9,
        )

    def evaluation(self, name: str, trial: int) -> Evaluation | None:
        return self.evaluations.get(trial)

    def architecture(self, name: str, trial: int) -> Plain:
        return self.architectures[trial]

    def add(
        self,
        trial: int,
        architecture: Architecture,
        scale: Callable[[torch.nn.Module], None] | None = None,
        **changes: Any,
    ) -> torch.nn.Module:
        """Add a complete trial whose weights, buffers too, are random; `scale` draws them."""
        model = architecture.canonical().build(seed=trial)
        generator = torch.Generator().manual_seed(trial)
        for tensor in model.state_dict().values():
            noise = torch.empty(tensor.shape).normal_(0, 0.2, generator=generator)
            tensor.copy_(tensor * 5 + noise)
        if scale is not None:
            scale(model)
        data = safetensors.torch.save(model.state_dict())
        evaluation = Evaluation(
            study=self.name,
            trial=trial,
            attempt=1,
            status="complete",
            fingerprint=architecture.fingerprint,
            values={"val_loss": 2.5},
            measurements={"val_loss": {"val_tokens": 1024}},
            metrics={"lr": 0.003},
            cost=architecture.cost(64).plain(),
            device={"key": "cpu", "name": "A CPU"},
            versions={"torch": "2"},
            weights_sha256=write_weights(self.runs, self.name, trial, data),
        )
        self.evaluations[trial] = replace(evaluation, **changes)
        self.architectures[trial] = architecture.canonical().plain()
        return model.eval()
