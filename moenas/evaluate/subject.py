"""One candidate as an objective sees it: cost, model, training, and what can be timed."""

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
from moenas.evaluate.dtypes import deployed_dtype, training_dtype
from moenas.evaluate.flops import count_forward
from moenas.evaluate.footprint import require_fit
from moenas.evaluate.latency import Workload, inference_copy, measure_latency
from moenas.evaluate.memory import peak_bytes
from moenas.evaluate.training import train
from moenas.model.architecture import Architecture, Model
from moenas.records import Cost, CurvePoint, Plain, RoutingRow
from moenas.space.objective import Measurement
from moenas.space.sections import Protocol, Recipe

MIB = 2**20


@dataclass(frozen=True)
class Training:
    """What came of the run of one candidate."""

    val_loss: float
    """Nats per token."""
    bits_per_byte: float | None
    """None where tokens are not bytes."""
    train_loss: float
    """Mean of the last row of the curve, nats per token."""
    seconds: float
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
    lease: DeviceLock
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
    """Details of the latencies that were timed."""

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
        """What came of the training."""
        if self.trained is None:
            raise CandidateError('the model is not trained yet; write needs = "training"')
        return self.trained

    @property
    def dtype(self) -> torch.dtype:
        """The type that training computes in."""
        return training_dtype(self.recipe, self.device)

    def time(self, phase: Literal["decode", "prefill"]) -> Measurement:
        """Time the model on text of the validation split, in ms; see `latency.measure_latency`."""
        protocol = self.protocol
        sizes = {
            "decode": (protocol.decode_batch, protocol.decode_context),
            "prefill": (protocol.prefill_batch, protocol.prefill_tokens),
        }
        dtype = deployed_dtype(protocol, self.device)
        workload = Workload(phase, *sizes[phase], dtype, protocol.threads, self.device)
        tokens = excerpts(self.corpus, *workload.tokens).to(self.device)
        model = inference_copy(self.architecture, self.model, dtype)
        found = measure_latency(model, tokens, workload, protocol, self.lease, self.reference_ms)
        self.timed.append(dict(found.details))
        return found

    def flops(self) -> Measurement:
        """Count the forward FLOPs per token at `recipe.context`; see `flops.count_forward`.

        Raises:
            CandidateError: if the count differs from the closed form, or knows an operator not.
        """
        context = self.recipe.context
        counted = count_forward(self.architecture, context)
        foreseen = self.architecture.pass_flops(context)
        if 2 * counted.macs != foreseen:
            raise CandidateError(
                f"flops_per_token: fvcore counts {2 * counted.macs} operations in a pass of"
                f" {context} tokens, the closed form says {foreseen}; `cost` or `surplus_flops` of"
                " one of the parts is wrong"
            )
        details = {
            "context": context,
            "macs": counted.macs,
            "macs_by_operator": counted.by_operator,
        }
        return Measurement(self.cost.flops_per_token, details)

    def peak_memory(self) -> Measurement:
        """Return the peak of memory of a training step in MiB; see `memory.peak_bytes`.

        Two steps of a second copy: optimizer state and gradients exist from the second on.
        """
        recipe = self.recipe
        two_steps = dataclasses.replace(recipe, tokens=2 * recipe.batch * recipe.context)
        with self.lease.shared():
            require_fit(self.architecture, recipe, self.device, training=True, sharers=self.sharers)
            model = self.architecture.build(self.device, self.seed)
            held = model.state_dict(keep_vars=True).values()
            steps = train(model, self.corpus, two_steps, self.seed)
            peak = peak_bytes(lambda: list(steps), held, self.device)
        details = {
            "bytes": peak,
            "batch": recipe.batch,
            "context": recipe.context,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
        }
        return Measurement(peak / MIB, details)


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
