"""One job in, one evaluation out: cost, model, training, and every objective that was asked for."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import platform
import random
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import safetensors.torch
import torch

import moenas
from moenas.checked import TIMED
from moenas.data import cache
from moenas.data.corpus import Corpus
from moenas.errors import AcausalError, CandidateError, InputError, MachineError, TimeLimitError
from moenas.evaluate import checkpoint, devices
from moenas.evaluate.causality import Leak, allows_acausal, find_leaks, mask_boundaries, text_size
from moenas.evaluate.devices import device_info, device_name
from moenas.evaluate.dtypes import training_dtype
from moenas.evaluate.footprint import require_fit
from moenas.evaluate.isolation import put_back
from moenas.evaluate.latency import device_lock
from moenas.evaluate.optimizer import learning_rate
from moenas.evaluate.step_reference import reference_key
from moenas.evaluate.step_time import require_named_device, require_steps, time_step
from moenas.evaluate.steps import TrainingInputs
from moenas.evaluate.subject import Subject, Training, excerpts
from moenas.evaluate.threads import cpu_threads
from moenas.evaluate.training import TrainingRun, rung_tokens, validate, validation_loss
from moenas.failures import failure_of, is_out_of_memory, located, machine_fault
from moenas.grammar import tree, user_parts
from moenas.model.architecture import Architecture, Model
from moenas.model.multi_token import build_heads
from moenas.records import CurvePoint, Evaluation, Failure, Job, Plain, Status, WeightsFile
from moenas.resources import sha256
from moenas.space.objective import Measurement, Objective, load_objective, shipped_objective
from moenas.space.sections import Protocol, Recipe
from moenas.store.weights import read_stored, remove_draft, write_draft

OWN = "own_"
"""Goes before a detail of an objective that has the name of one of a timed latency."""


def versions() -> dict[str, str]:
    """Return the versions that a value can depend on."""
    packages = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "moenas": moenas.__version__,
        "cpu": device_name(torch.device("cpu")),
    }
    return packages | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def evaluate(job: Job) -> tuple[Evaluation, bytes | WeightsFile | None]:
    """Evaluate one candidate; return its evaluation, and the trained weights as safetensors.

    The weights are in a file if the job says where to write it, and it can be written; below a URL
    it must be. A candidate
    that pauses at a rung has the status `paused`, and its checkpoint in place of the weights.

    Cheap objectives are measured first: objectives that need the cost, then objectives that need
    the model, then, after training, the rest. Nothing is built or trained that no objective needs.
    A failure of the candidate is an evaluation with the status `failed` and a reason, and with all
    that was measured before.
    """
    run = _Run(job)
    failure = None
    try:
        with cpu_threads(), run.phase("total"):
            run.evaluate()
    except KeyboardInterrupt:  # by the user or by the candidate: the pool knows
        if isinstance(run.weights, WeightsFile):
            remove_draft(run.weights.path)
        raise
    except BaseException as error:
        failure = failure_of(error)
    return run.evaluation(failure), run.weights


def _with_own_names(measurement: Measurement, timed: list[Plain]) -> Measurement:
    """Mark details by which a study would move the value to its reference time, but must not.

    That is right for a latency that the subject has timed, with the value it was given back with.
    """
    details = measurement.details
    if "reference_key" not in details:
        return measurement
    for one in timed:
        same = all(details.get(name) == one[name] for name in TIMED)
        if same and math.isclose(measurement.value, one["ratio"] * one["reference_ms"]):
            return measurement
    renamed = {OWN + name if name in TIMED else name: value for name, value in details.items()}
    return Measurement(measurement.value, renamed)


class _Run:
    """The state of one evaluation: all that is known so far, whatever comes next."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.began = time.monotonic()
        self.fields: dict[str, Any] = {"fingerprint": ""}
        self.values: dict[str, float] = {}
        self.measurements: dict[str, Plain] = {}
        self.curve: list[CurvePoint] = []
        self.seconds: dict[str, float] = {}
        self.weights: bytes | WeightsFile | None = None
        """The trained weights, or the checkpoint of a pause, as safetensors."""
        self.paused = False
        """Whether the training paused at a rung."""
        self.timed: dict[str, float] = {}
        """Metrics of a budget of seconds: the tokens of the run, and the time of a step."""
        if job.paused is not None:
            self.resume(Evaluation.parse(job.paused))

    @property
    def deadline(self) -> float | None:
        """Moment of time.monotonic at which the candidate is out of time."""
        limit = self.job.time_limit_s
        return None if limit is None else self.began + limit

    def resume(self, before: Evaluation) -> None:
        """Take in the measurements from before the pause; their time counts for the time limit."""
        self.values, self.measurements = dict(before.values), dict(before.measurements)
        self.curve, self.seconds = list(before.curve), dict(before.seconds)
        self.began -= self.seconds.get("total", 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the wall time of a block to a phase."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

    def evaluate(self) -> None:
        """Do the job."""
        job = self.job
        device = devices.named(job.device)
        user_parts.load_all(job.use)
        architecture = Architecture.parse(job.architecture)
        recipe = tree.parse(Recipe, job.train)
        cost = architecture.cost(recipe.context)
        require_named_device(recipe, device)
        if not recipe.has_time_budget:
            recipe = recipe.for_candidate(recipe.training_cost(architecture).flops_per_token)
        recipe = dataclasses.replace(recipe, lr=learning_rate(architecture, recipe))
        self.fields["fingerprint"] = architecture.fingerprint
        self.fields["cost"] = recipe.cost_record(architecture)
        self.fields["device"] = device_info(device, recipe.threads, training_dtype(recipe, device))
        torch.set_num_threads(recipe.threads)
        torch.manual_seed(job.seed)
        with self.phase("data"):
            corpus = self.load_corpus(recipe.context, architecture.vocab_size)
        protocol = tree.parse(Protocol, job.measure)
        objectives = [
            shipped_objective(name) if source is None else load_objective(name, source)
            for name, source in job.objectives.items()
        ]
        with closing(device_lock(device)) as lock:
            subject = Subject(
                architecture=architecture,
                cost=cost,
                recipe=recipe,
                protocol=protocol,
                corpus=corpus,
                device=device,
                seed=job.seed,
                device_lock=lock,
                reference_ms=job.reference_ms,
                sharers=job.sharers,
            )
            if recipe.has_time_budget and any(o.needs == "training" for o in objectives):
                self.fix_tokens(subject)
            self.measure_all(subject, objectives)

    def fix_tokens(self, subject: Subject) -> None:
        """Set the training tokens under a budget of seconds: from a former run, or timed now.

        Timing leaves no trace: a job with these tokens trains in the same way.
        """
        job, recipe = self.job, subject.recipe
        before: dict[str, float] = (job.paused or job.known or {}).get("metrics", {})
        tokens = job.train_tokens or before.get("train_tokens")
        if tokens is not None:
            self.timed = {k: v for k, v in before.items() if k in ("step_ms", "step_spread")}
        else:
            key = reference_key(recipe, subject.device)
            reference_ms = None if key is None else job.reference_ms.get(key)
            with self.phase("time_step"):
                step = time_step(
                    subject.architecture,
                    subject.corpus,
                    recipe,
                    subject.device,
                    lock=subject.device_lock,
                    seed=subject.seed,
                    reference=None if reference_ms is None else reference_ms / 1000,
                    sharers=subject.sharers,
                    deadline=self.deadline,
                )
            require_steps(recipe, step, 1 if job.rung_limits is None else 1 + recipe.rungs)
            tokens, self.timed = step.tokens(recipe), step.metrics
            torch.manual_seed(job.seed)
        self.timed["train_tokens"] = float(tokens)
        subject.recipe = recipe.for_candidate(subject.cost.flops_per_token, int(tokens))

    def load_corpus(self, context: int, vocab_size: int) -> Corpus:
        """Load the corpus and make sure that it is the one that the study is on."""
        try:
            corpus = cache.load(self.job.data, self.job.data_sha256, self.job.data_at)
        except (InputError, OSError) as error:
            raise MachineError(
                f"node {os.uname().nodename}: the corpus {self.job.data_sha256[:12]} cannot be read"
                f" here: {error}{self.hint()}"
            ) from error
        self.fields["data"] = {
            "name": corpus.name,
            "sha256": corpus.sha256,
            "train_tokens": len(corpus.train),
            "val_tokens": len(corpus.val),
            "vocab_size": corpus.vocab_size,
        }
        if corpus.sha256 != self.job.data_sha256:
            raise MachineError(
                f"data '{corpus.name}': node {os.uname().nodename} has another corpus than the"
                f" study: digest {corpus.sha256[:12]}, not {self.job.data_sha256[:12]}; use the"
                f" same Python version and the same files everywhere{self.hint()}"
            )
        corpus.require(context, vocab_size)
        return corpus

    def hint(self) -> str:
        """Return how a node gets a corpus that it lacks, if nothing is published."""
        if self.job.data_at is not None:
            return ""
        return "; with MOENAS_RUNS=URL the nodes of a cluster fetch the corpus from there"

    def measure_all(self, subject: Subject, objectives: list[Objective]) -> None:
        """Measure the objectives in the order of their needs."""
        needs = {objective.needs for objective in objectives}
        self.measure(subject, [o for o in objectives if o.needs == "cost"])
        if needs == {"cost"}:
            return
        subject.build = lambda: self.build(subject, training="training" in needs)
        if self.job.known is not None:
            self.measure_again(subject, objectives)
            return
        self.measure(subject, [o for o in objectives if o.needs == "model"])
        if "training" not in needs:
            return
        self.train(subject)
        if self.paused:
            return
        if self.job.keeps_weights:  # now: they belong to the stored loss
            self.weights = _weights(subject, self.job)
        self.measure(subject, [o for o in objectives if o.needs == "training"])

    def measure_again(self, subject: Subject, objectives: list[Objective]) -> None:
        """Measure objectives of a candidate that was trained before, from its stored weights."""
        self.measure(subject, [o for o in objectives if o.needs == "model"])
        trained = [o for o in objectives if o.needs == "training"]
        if not trained:
            return
        known, weights = Evaluation.parse(self.job.known or {}), self.job.weights
        if self.job.weights_at is not None:
            weights = read_stored(self.job.weights_at)
        if weights is None or "val_loss" not in known.metrics:
            raise CandidateError("no trained weights are stored, and an objective needs them")
        state = safetensors.torch.load(weights)
        subject.model.load_state_dict(state)
        metrics = known.metrics
        subject.trained = Training(
            metrics["val_loss"],
            metrics.get("bits_per_byte"),
            metrics["train_loss"],
            known.seconds.get("train", math.nan),
            known.curve,
            known.routing,
            known.measurements.get("val_loss", {}).get("acausal"),
        )
        self.measure(subject, trained)

    def build(self, subject: Subject, *, training: bool) -> Model:
        """Build the model if it fits its device, and training it does if it is to be trained."""
        with self.phase("build"), subject.device_lock.shared():
            architecture, recipe, device = subject.architecture, subject.recipe, subject.device
            require_fit(architecture, recipe, device, training=training, sharers=subject.sharers)
            return architecture.build(device, subject.seed)

    def train(self, subject: Subject) -> None:
        """Train and validate the model, or pause at a rung with a checkpoint."""
        model, corpus, recipe = subject.model, subject.corpus, subject.recipe
        if self.job.paused is None:
            self.require_causal(subject, "with its first weights")
        self.train_to_rung(subject)
        if self.paused:
            return
        self.check_time()
        leaks = self.require_causal(subject, "trained")
        with self.phase("validate"), subject.device_lock.shared():
            validation = validate(model, corpus, recipe)
        self.curve[-1]["val_loss"] = validation.loss
        self.fields["routing"] = validation.routing
        seconds, train_loss = self.seconds["train"], float(self.curve[-1]["train_loss"])
        metrics = {
            "val_loss": validation.loss,
            "bits_per_byte": validation.bits_per_byte,
            "train_loss": train_loss,
            "lr": recipe.lr,
            "tokens_per_second": recipe.steps * recipe.batch * recipe.context / seconds,
            "bigram_loss": corpus.bigram_loss,
            "causal": float(leaks is None),
        }
        self.fields["metrics"] = {k: v for k, v in metrics.items() if v is not None}
        subject.trained = Training(
            validation.loss,
            validation.bits_per_byte,
            train_loss,
            seconds,
            self.curve,
            validation.routing,
            None if leaks is None else [leak.mode for leak in leaks],
        )

    def train_to_rung(self, subject: Subject) -> None:
        """Train the model to its end, or to the rung at which it pauses.

        The curve's points at the rungs get the validation loss.
        """
        model, corpus, recipe = subject.model, subject.corpus, subject.recipe
        lock = subject.device_lock
        with lock.shared():
            heads = build_heads(recipe.heads, subject.architecture, subject.device, subject.seed)
        inputs = TrainingInputs(model, corpus, recipe, subject.seed, heads)
        run = TrainingRun(inputs, gate=lock, deadline=self.deadline)
        saved = self.job.checkpoint
        if self.job.checkpoint_at is not None:
            saved = read_stored(self.job.checkpoint_at)
        if saved is not None:
            checkpoint.restore(run, safetensors.torch.load(saved))
        rungs = {tokens: number for number, tokens in enumerate(rung_tokens(recipe), start=1)}
        with closing(run.points()) as points:
            while True:
                with self.phase("train"):
                    point = next(points, None)
                if point is None:
                    return
                rung = rungs.get(point["tokens"])
                if rung is not None:
                    with self.phase("validate"), lock.shared():
                        point["val_loss"] = validation_loss(model, corpus, recipe)
                self.curve.append(point)
                if rung is not None and self.pauses(rung, point["val_loss"]):
                    run.require_alive()
                    self.pause(subject, run, rung)
                    return

    def pauses(self, rung: int, loss: float) -> bool:
        """Whether the job pauses at a rung with this validation loss."""
        limits = self.job.rung_limits
        if limits is None:
            return False
        limit = limits[rung - 1]
        return limit is None or loss > limit

    def pause(self, subject: Subject, run: TrainingRun, rung: int) -> None:
        """Save the run, and write down that it paused."""
        point = self.curve[-1]
        with self.phase("checkpoint"):
            self.weights = _safetensors(checkpoint.save(run), subject, self.job)
        self.fields["metrics"] = {
            "rung": float(rung),
            "rung_loss": point["val_loss"],
            "train_loss": point["train_loss"],
            "lr": float(subject.recipe.lr or 0.0),
        }
        self.paused = True

    def require_causal(self, subject: Subject, state: str) -> list[Leak] | None:
        """Return what looks ahead in a model that was given leave to; None if it was not.

        Raises:
            AcausalError: if a model without leave looks ahead.
        """
        leave = allows_acausal(subject.architecture)
        with self.phase("causality"), subject.device_lock.shared():
            ends = mask_boundaries(subject.architecture)
            text = excerpts(subject.corpus, *text_size(subject.recipe.context, ends))
            leaks = find_leaks(subject.model, text, ends)
        if leaks and not leave:
            raise AcausalError(f"{state}, {leaks[0]}")
        return leaks if leave else None

    def measure(self, subject: Subject, objectives: list[Objective]) -> None:
        """Measure some objectives."""
        for objective in objectives:
            if self.job.paused is not None and objective.name in self.values:
                continue  # it was measured before the pause
            self.check_time()
            with self.phase("measure"):
                measured = self.measured(subject, objective)
            self.values[objective.name] = measured.value
            self.measurements[objective.name] = {"unit": objective.unit, **measured.details}

    def measured(self, subject: Subject, objective: Objective) -> Measurement:
        """Measure one objective; one of the user gets a copy of the model, and leaves no trace."""
        if objective.from_user:
            subject = subject.apart()
        try:
            with put_back():
                # So that a value does not depend on the draws of training, or on its absence.
                _seed_random(f"{subject.seed}:{objective.name}")
                measurement = objective.measure(subject)
        except (CandidateError, InputError, MachineError, KeyboardInterrupt):
            raise
        except BaseException as error:
            if is_out_of_memory(error) or machine_fault(error) is not None:
                raise
            text = f"objective '{objective.name}': {located(error)}"
            raise CandidateError(text) from error
        return _with_own_names(measurement, subject.timed)

    def check_time(self) -> None:
        """Raise TimeLimitError if the candidate is out of time."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise TimeLimitError(f"used up its time limit of {self.job.time_limit_s:g} s")

    def evaluation(self, failure: Failure | None) -> Evaluation:
        """Write down all that is known."""
        job = self.job
        status: Status = "paused" if self.paused else "complete"
        self.fields["metrics"] = {**self.fields.get("metrics", {}), **self.timed}
        return Evaluation(
            study=job.study,
            trial=job.trial,
            attempt=job.attempt,
            status=status if failure is None else "failed",
            values=self.values,
            measurements=self.measurements,
            curve=self.curve,
            seconds=self.seconds,
            versions=versions(),
            seed=job.seed,
            failure=failure,
            weights_sha256=_digest(self.weights),
            **self.fields,
        )


def _seed_random(text: str) -> None:
    """Seed the generators of torch, numpy and Python by a text."""
    seed = int(sha256(text.encode())[:8], 16)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _digest(weights: bytes | WeightsFile | None) -> str | None:
    """Return the SHA-256 of weights."""
    if isinstance(weights, WeightsFile):
        return weights.sha256
    return None if weights is None else sha256(weights)


def _weights(subject: Subject, job: Job) -> bytes | WeightsFile:
    """Return parameters and buffers as safetensors; as a file where the driver finds it."""
    state = {k: v.detach().cpu().contiguous() for k, v in subject.model.state_dict().items()}
    return _safetensors(state, subject, job)


def _safetensors(state: dict[str, torch.Tensor], subject: Subject, job: Job) -> bytes | WeightsFile:
    """Return tensors as safetensors; as a file where the driver finds it."""
    metadata = {
        "format": "pt",
        "fingerprint": subject.architecture.fingerprint,
        "study": job.study,
        "trial": str(job.trial),
        "moenas": moenas.__version__,
    }
    if job.weights_to is not None:
        save = functools.partial(safetensors.torch.save_file, state, metadata=metadata)
        file = write_draft(job.weights_to, save)
        if file is not None:
            return file
    return safetensors.torch.save(state, metadata=metadata)
