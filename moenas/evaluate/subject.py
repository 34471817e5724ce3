"""One candidate as an objective sees it: its cost, model, training, corpus and device."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from moenas.data.corpus import Corpus
from moenas.errors import CandidateError
from moenas.evaluate.device_lock import DeviceLock
from moenas.evaluate.dtypes import training_dtype
from moenas.model.architecture import Architecture, Model
from moenas.records import Cost, CurvePoint, Plain, RoutingRow
from moenas.space.objective import Measurement, shipped_objective
from moenas.space.sections import Protocol, Recipe


@dataclass(frozen=True)
class Training:
    """The results of the training of one candidate."""

    val_loss: float
    """Nats per token."""
    bits_per_byte: float | None
    """None where tokens are not bytes."""
    train_loss: float
    """Mean of the last row of the curve, nats per token."""
    seconds: float
    """NaN of a reused model whose first evaluation is deleted."""
    curve: list[CurvePoint]
    routing: list[RoutingRow]
    """A row for each MoE layer, in validation."""
    acausal: list[str] | None = None
    """Where a model that may look at later tokens did: in training, evaluation; else None."""


@dataclass
class Subject:
    """One candidate, as an objective sees it: as much of it as the objective's `needs` ask for."""

    architecture: Architecture
    cost: Cost
    """At a context of `recipe.context` tokens."""
    recipe: Recipe
    """With the learning rate of this candidate."""
    protocol: Protocol
    corpus: Corpus
    device: torch.device
    seed: int
    device_lock: DeviceLock
    reference_ms: Mapping[str, float] = field(default_factory=dict)
    sharers: int = 1
    """Candidates that share the memory of the device at a time."""
    built: Model | None = None
    build: Callable[[], Model] | None = None
    """Builds the model, once an objective may ask for it."""
    trained: Training | None = None
    original: Callable[[], Model] | None = None
    """Gives the model that a copy is made of at first use: an objective of the user has a copy."""
    timed: list[Plain] = field(default_factory=list)
    """Details of the latencies that were timed; see `latency.candidate_latency`."""

    @property
    def model(self) -> Model:
        """The model: with its first weights under `needs = "model"`, else trained.

        Built when it is first asked for, if it fits the device.
        """
        if self.built is None and self.original is not None:
            self.built = _copied(self.architecture, self.original())
        if self.built is None and self.build is not None:
            self.built = self.build()
        if self.built is None:
            raise CandidateError('no model is built yet; write needs = "model" or "training"')
        return self.built

    def apart(self) -> Subject:
        """Return the subject with a model and results of its own, which may be changed freely."""
        there = self.built is not None or self.build is not None
        return dataclasses.replace(
            self,
            built=None,
            build=None,
            original=(lambda: self.model) if there else None,
            trained=copy.deepcopy(self.trained),
            timed=[],
        )

    @property
    def training(self) -> Training:
        """The results of the training."""
        if self.trained is None:
            raise CandidateError('the model is not trained yet; write needs = "training"')
        return self.trained

    @property
    def dtype(self) -> torch.dtype:
        """The type that training computes in."""
        return training_dtype(self.recipe, self.device)

    # Files of objectives that are stored with a study call these three. New files call the
    # functions that the shipped objectives call.

    def time(self, phase: Literal["decode", "prefill"]) -> Measurement:
        """Return what the shipped objective `decode_ms` or `prefill_ms` measures."""
        return shipped_objective(f"{phase}_ms").measure(self)

    def flops(self) -> Measurement:
        """Return what the shipped objective `flops_per_token` measures."""
        return shipped_objective("flops_per_token").measure(self)

    def peak_memory(self) -> Measurement:
        """Return what the shipped objective `peak_memory` measures."""
        return shipped_objective("peak_memory").measure(self)


def _copied(architecture: Architecture, model: Model) -> Model:
    """Return a copy of a model with weights of its own."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    made = architecture.outline("meta")
    made.load_state_dict(state, assign=True)
    return made.train(model.training)


def excerpts(corpus: Corpus, count: int, length: int) -> torch.Tensor:
    """Return (count, length) tokens, evenly spread over the validation split, as int64.

    A split that is too short is read again from its start.
    """
    size = len(corpus.val)
    starts = torch.arange(count) * (size // count)
    places = (starts[:, None] + torch.arange(length)) % size
    return torch.from_numpy(corpus.val[places.numpy()].astype("int64"))
