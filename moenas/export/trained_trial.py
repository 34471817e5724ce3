"""A trained trial of a store, from which every format of an export is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import safetensors.torch

import moenas
from moenas.data import tokenizer_file
from moenas.errors import InputError, MoenasError, NotFoundError
from moenas.grammar import user_parts
from moenas.model.architecture import Architecture, Model
from moenas.records import Evaluation, Plain, StudyRecord
from moenas.store.object_path import StorePath
from moenas.store.weights import read_weights
from moenas.terminal import command


class Archive(Protocol):
    """What an export reads from the store."""

    @property
    def runs(self) -> StorePath:
        """The folder that the weights lie in."""

    def study(self, name: str) -> StudyRecord:
        """Return a study; raise NotFoundError if there is none of this name."""

    def evaluation(self, name: str, trial: int) -> Evaluation | None:
        """Return the result of a trial, or None if there is none yet."""

    def architecture(self, name: str, trial: int) -> Plain:
        """Return the canonical architecture of a trial."""


@dataclass(frozen=True)
class TrainedTrial:
    """A complete trial with its weights."""

    record: StudyRecord
    evaluation: Evaluation
    architecture: Architecture
    weights: bytes
    """A safetensors file in float32."""

    @property
    def is_bytes(self) -> bool:
        """Whether token i is the byte i."""
        return bool(self.record.data.get("is_bytes", False))

    @property
    def tokenizer(self) -> str | None:
        """The text of the tokenizer.json that the study has; None without one."""
        return tokenizer_file.stored(self.record.data)

    @property
    def name(self) -> str:
        """The words that an error begins with."""
        return f"study '{self.record.name}', trial {self.evaluation.trial}"

    def model(self) -> Model:
        """Build the model on the CPU and give it the trained weights, in evaluation mode.

        Raises:
            MoenasError: if the weights belong to another set of parameters.
        """
        return model_with(self.architecture, self.weights)


def trained_trial(
    store: Archive, study: str, trial: int, *, allow_code: bool = False
) -> TrainedTrial:
    """Return a trial with its trained weights.

    With `allow_code` the Python files that the database holds for the study are run; see
    `user_parts.load_stored`.

    Raises:
        NotFoundError: if there is no such study or trial, or its weights are gone.
        InputError: if the trial has no trained weights.
    """
    record = store.study(study)
    evaluation = _trained(store, study, trial)
    user_parts.load_stored(record.space, allow_code=allow_code)
    architecture = Architecture.parse(store.architecture(study, trial))
    weights = read_weights(store.runs, study, trial, str(evaluation.weights_sha256))
    return TrainedTrial(record, evaluation, architecture, weights)


def _trained(store: Archive, study: str, trial: int) -> Evaluation:
    """Return the evaluation of a complete trial with weights."""
    evaluation, listed = store.evaluation(study, trial), command(["front", study])
    if evaluation is None:
        raise NotFoundError(
            f"study '{study}' has no result for trial {trial}; `{listed}` lists trials"
            " that have one"
        )
    if evaluation.status != "complete":
        raise InputError(
            f"study '{study}', trial {trial}: is {evaluation.status} and has no trained model;"
            f" `{listed}` lists trials that have one"
        )
    if evaluation.weights_sha256 is None:
        raise InputError(
            f"study '{study}', trial {trial}: was not trained, because no objective of the study"
            " needs training; add val_loss to its objectives"
        )
    return evaluation


def model_with(architecture: Architecture, weights: bytes) -> Model:
    """Build the model and give it trained weights.

    Raises:
        MoenasError: if the weights belong to another set of parameters.
    """
    model = architecture.build()
    try:
        model.load_state_dict(safetensors.torch.load(weights))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise MoenasError(
            f"the stored weights do not fit moenas {moenas.__version__}: {reason}"
        ) from None
    return model.eval()
