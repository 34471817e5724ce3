"""The sections of a space file beside the architecture: train, measure and search."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Self

from moenas.errors import SourceLocation, suggestion
from moenas.grammar.component import Component, setting
from moenas.model.architecture import Architecture
from moenas.model.multi_token import MultiTokenPrediction
from moenas.records import TRAINING, Cost
from moenas.resources import Node
from moenas.space.early_stopping import EarlyStopping, NoEarlyStopping

SAMPLERS = {
    "tpe": "",
    "tpe_independent": "",
    "nsga2": "",
    "nsga3": "",
    "random": "",
    "qmc": "",
    "gp": "",
    "grid": "every point of a finite space, in random order",
    "gray_box": "exact costs, a surrogate of the rest",
    "evolution": "mutations of the latest candidates",
}
"""Name of a sampler -> what it proposes, where Optuna's documentation does not say it.

`search.samplers` builds them. Any other sampler is `file.py:Class`.
"""


@dataclass(frozen=True, kw_only=True)
class Budget(Component):
    """What every candidate spends on its training in place of equal tokens: one of the two."""

    train_flops: float | None = setting(
        "training FLOPs of every candidate: 3 times its forward FLOPs of each token, those of `mtp`"
        " included. A candidate trains for the whole steps that fit; one of fewer than one step is"
        " infeasible",
        default=None,
        low=1.0,
    )
    seconds: float | None = setting(
        "seconds of training of every candidate on `device`. Before the training some steps are"
        " timed while no other moenas process computes there, on a CPU in turn with steps of a"
        " reference model. The candidate trains for the whole steps that fit; one of fewer than one"
        " step fails",
        default=None,
        low=0.001,
    )
    device: str | None = setting(
        "name of the device whose `seconds` count, such as `NVIDIA H100`: words of the name that"
        " `moenas front` prints. A run on another device is refused",
        default=None,
    )

    def invalid(self) -> str | None:
        """Refuse two kinds of budget, none, and seconds of no device."""
        if (self.train_flops is None) == (self.seconds is None):
            return "a budget is either train_flops, or seconds with device; give one of the two"
        if (self.seconds is None) != (self.device is None):
            return "seconds and device go together: name the device on which the seconds count"
        if self.device is not None and not self.device.strip():
            return "device is empty; write the name of the device on which the seconds count"
        return None


@dataclass(frozen=True, kw_only=True)
class Recipe(Component):
    """`train`: the run that every candidate gets, equal in tokens, data and order of data."""

    tokens: int = setting("training tokens of every candidate", default=500_000, low=1)
    budget: Budget | None = setting(
        "equal compute or equal time in place of equal tokens, so that a cheaper candidate trains"
        " for longer; `tokens` is then not given",
        default=None,
    )
    context: int = setting("length of a training sequence in tokens", default=128, low=2)
    batch: int = setting("sequences in a step", default=16, low=1)
    lr: float | None = setting(
        "peak learning rate of the matrices, the embedding gets d_model / 64 times it; null sets"
        " it per candidate by the rule of docs/learning_rate.md",
        default=None,
        low=0.0,
    )
    lr_scale: float | None = setting(
        "factor on the learning rate 0.256 / d_model; null: (batch * context / 1024) ** (1 / 3)",
        default=None,
        low=0.0,
    )
    warmup: float = setting("share of the steps that warm up", default=0.1, low=0.0, high=1.0)
    decay: float = setting(
        "share of the steps, at the end, over which the rate falls linearly to 0",
        default=0.3,
        low=0.0,
        high=1.0,
    )
    weight_decay: float = setting("AdamW's decay of matrices", default=0.1, low=0.0)
    beta1: float = setting("AdamW's first-moment decay", default=0.9, low=0.0, high=0.9999)
    beta2: float = setting("AdamW's second-moment decay", default=0.95, low=0.0, high=0.9999)
    grad_clip: float = setting(
        "largest gradient norm of a step; 0 for no limit", default=1.0, low=0.0
    )
    max_dead: float | None = setting(
        "largest share of the experts of a layer that may be dead (below 1 % of the mean load) over"
        " a tenth of the run after warm-up; above it the candidate ends; null: any",
        default=0.9,
        low=0.0,
        high=1.0,
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "compute type of training, weights stay float32; auto takes bfloat16 where the GPU or CPU"
        " has instructions for it. Name it if the machines of a study differ in that",
        default="auto",
    )
    val_tokens: int = setting("validation tokens of every candidate", default=65_536, low=1)
    rungs: int = setting(
        "points of training, at equal distances before its end, at which the validation loss is"
        " measured too; 3 are at a quarter, a half and three quarters of the tokens",
        default=0,
        low=0,
        high=39,
    )
    mtp: MultiTokenPrediction | None = setting(
        "multi-token prediction: heads that predict further tokens. Their cost counts in training"
        " alone, and the validation loss is that of the next token; null: none",
        default=None,
    )
    threads: int = setting("CPU threads of a candidate", default=1, low=1, high=1024)

    def invalid(self) -> str | None:
        """Refuse schedules and budgets that cannot be met."""
        if self.budget is None and self.tokens < self.batch * self.context:
            step = self.batch * self.context
            return f"tokens ({self.tokens}) is less than one step: batch * context = {step}"
        if self.mtp is not None and self.mtp.depth >= self.context:
            return f"mtp.depth ({self.mtp.depth}) must be below context ({self.context})"
        if self.warmup + self.decay > 1:
            return f"warmup ({self.warmup:g}) and decay ({self.decay:g}) add up to more than 1"
        return None

    @property
    def steps(self) -> int:
        """Optimizer steps in the run; the last incomplete step is left out."""
        return self.tokens // (self.batch * self.context)

    @property
    def run_tokens(self) -> int:
        """Tokens of the whole steps of the run."""
        return self.steps * self.batch * self.context

    @property
    def heads(self) -> MultiTokenPrediction | None:
        """The heads that training has beside the model; None without any."""
        return self.mtp if self.mtp is not None and self.mtp.weight else None

    def training_cost(self, architecture: Architecture) -> Cost:
        """Return the cost of an architecture in training, with its heads, at `context` tokens."""
        cost = architecture.cost(self.context)
        return cost if self.heads is None else cost + self.heads.cost(architecture, self.context)

    def cost_record(self, architecture: Architecture) -> dict[str, int]:
        """Return the cost of an architecture as it is stored: a JSON object.

        With heads it has `training_params` and `training_flops_per_token` beside the cost of the
        model: see `training_flops`.
        """
        cost = architecture.cost(self.context)
        if self.heads is None:
            return cost.plain()
        trained = cost + self.heads.cost(architecture, self.context)
        return cost.plain() | {
            "training_params": trained.params,
            "training_flops_per_token": trained.flops_per_token,
        }

    @property
    def has_time_budget(self) -> bool:
        """Whether the tokens of a candidate follow from the time of its training step."""
        return self.budget is not None and self.budget.seconds is not None

    def for_candidate(self, flops_per_token: int, timed_tokens: int | None = None) -> Self:
        """Return the recipe of a candidate by its forward FLOPs in training.

        A budget becomes its tokens. `flops_per_token` is that of `training_cost`. `timed_tokens`
        are those that fit in a budget of seconds.

        Raises:
            ValueError: for a budget of seconds without them.
        """
        if self.budget is None:
            return self
        if self.budget.train_flops is None:
            if timed_tokens is None:
                raise ValueError("a budget of seconds, and the step of the candidate is not timed")
            return replace(self, tokens=timed_tokens)
        step = self.step_flops(flops_per_token)
        steps = int(self.budget.train_flops // step) if step else 0
        return replace(self, tokens=steps * self.batch * self.context)

    def step_flops(self, flops_per_token: int) -> int:
        """Return the training FLOPs of one step, by the forward FLOPs of `training_cost`."""
        return TRAINING * flops_per_token * self.batch * self.context


@dataclass(frozen=True, kw_only=True)
class Protocol(Component):
    """`measure`: the workload that latency is measured under, the same for every candidate."""

    decode_batch: int = setting("sequences decoded side by side", default=8, low=1)
    decode_context: int = setting("tokens in the key-value cache", default=128, low=1)
    prefill_batch: int = setting("sequences prefilled side by side", default=1, low=1)
    prefill_tokens: int = setting("tokens of each prefilled sequence", default=256, low=1)
    min_repeats: int = setting("pairs timed at least", default=10, low=3)
    max_repeats: int = setting("pairs timed at most", default=60, low=3)
    precision: float = setting(
        "stop once the confidence interval's half-width is below this share", default=0.02, low=0.0
    )
    max_seconds: float = setting("longest time for one figure, seconds", default=4.0, low=0.1)
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "type of the weights and activations of a model that is timed; auto takes bfloat16 on GPUs"
        " that have it, float32 on CPUs",
        default="auto",
    )
    threads: int = setting("CPU threads while timing", default=1, low=1, high=1024)

    def invalid(self) -> str | None:
        """Refuse a range of repeats that is empty."""
        if self.min_repeats > self.max_repeats:
            return f"min_repeats ({self.min_repeats}) is above max_repeats ({self.max_repeats})"
        return None


UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86_400}
"""Unit of a duration -> seconds."""


@dataclass(frozen=True, kw_only=True)
class Plateau(Component):
    """The rule that ends a study whose front no longer improves."""

    trials: int = setting("evaluated candidates over which the front is compared", low=1)
    improvement: float = setting(
        "share of the hypervolume before these candidates; a smaller growth ends the study",
        default=0.001,
        low=0.0,
        high=1.0,
    )


@dataclass(frozen=True, kw_only=True)
class Stop(Component):
    """Budgets of the whole study beside `trials`; the first one that is used up ends it.

    Candidates that run at that moment are finished and recorded. Totals count over all runs of the
    study. Copied and reused evaluations cost nothing. A later run with a larger budget goes on.
    """

    wall_time: float | str | None = setting(
        "time for which the study runs: seconds, or a number with s, min, h or d such as 2h",
        default=None,
    )
    train_flops: float | None = setting(
        "training FLOPs, failed candidates included: 3 times the forward FLOPs of each token, those"
        " of `mtp` included",
        default=None,
        low=1.0,
    )
    train_tokens: float | None = setting(
        "training tokens, failed candidates included", default=None, low=1.0
    )
    plateau: Plateau | None = setting(
        "ends the study once the hypervolume has stopped growing", default=None
    )

    def invalid(self) -> str | None:
        """Refuse a duration that cannot be read."""
        if self.wall_time is None or (self.wall_seconds or 0.0) > 0:
            return None
        return f"wall_time: {self.wall_time!r} is not a duration; write seconds, 90min, 2h or 1d"

    @property
    def wall_seconds(self) -> float | None:
        """The wall time in seconds; None without one, 0 for text that is no duration."""
        if not isinstance(self.wall_time, str):
            return self.wall_time
        matched = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(s|min|h|d)", self.wall_time)
        return float(matched[1]) * UNITS[matched[2]] if matched else 0.0


@dataclass(frozen=True, kw_only=True)
class Search(Component):
    """`search`: who proposes candidates, how many, and what each may use."""

    sampler: str = setting(
        " | ".join(f"{name} ({words})" if words else name for name, words in SAMPLERS.items())
        + ", or `file.py:Class`",
        default="gray_box",
    )
    trials: int = setting(
        "candidates that the study evaluates: complete, failed or stopped; infeasible draws and"
        " repeated models are recorded and do not count",
        default=24,
        low=1,
        high=1_000_000,
    )
    seed: int = setting("seed of sampling, initial weights and order of data", default=0, low=0)
    replicates: int = setting(
        "seeds that each member of the front is trained with, that of the search included. The"
        " others are trained after the search and count towards no budget of `stop`. They give"
        " intervals, and for each member the probability that it is non-dominated",
        default=1,
        low=1,
        high=100,
    )
    start_from: tuple[str, ...] = setting(
        "architectures that are evaluated first: a name such as `zoo/olmoe_1b_7b`, the path of a"
        " space file without holes or of an export, or `study:NAME` for the front of a study in the"
        " same database",
        default=(),
    )
    stop: Stop | None = setting("further budgets that end the study", default=None)
    workers: int | None = setting(
        "candidates evaluated at a time; null takes one per core, or per share of a GPU",
        default=None,
        low=1,
    )
    cpus: float = setting("CPU cores of a candidate", default=1.0, low=0.0)
    gpus: float | None = setting(
        "share of a GPU that a candidate has; 0.25 puts four on one, 0 evaluates on the CPU; null"
        " takes GPUs where there are any, two candidates on each, or as many as `workers` asks for",
        default=None,
        low=0.0,
        high=1.0,
        why="one candidate is trained on one GPU at most",
    )
    candidates_per_worker: int | None = setting(
        "candidates that one worker process evaluates, one after another, before a fresh one takes"
        " its place; null takes 1 on a CPU. It takes 50 on a GPU, where a process needs seconds to"
        " start, and with early stopping, where each rung is a job",
        default=None,
        low=1,
    )
    time_limit: float | None = setting(
        "seconds after which a candidate is stopped; null for none", default=1800.0, low=1.0
    )

    early_stopping: EarlyStopping = setting(
        "which candidates end before the last training token", default=NoEarlyStopping()
    )

    def invalid(self) -> str | None:
        """Refuse a sampler that is neither known nor a user's class."""
        if ".py:" in self.sampler or (reason := unknown_sampler(self.sampler)) is None:
            return None
        return f"sampler: {reason}"


def unknown_sampler(name: str) -> str | None:
    """Return why a name is no sampler of `SAMPLERS`, or None if it is one."""
    if name in SAMPLERS:
        return None
    near = suggestion(name, SAMPLERS)
    return f"no sampler '{name}'.{near} There are {', '.join(SAMPLERS)}, or write file.py:Class"


def start_marks(search: Node | None) -> Iterator[SourceLocation]:
    """Yield where the entries of `search.start_from` stand."""
    section = search.value if search is not None else None
    entries = section.get("start_from") if isinstance(section, dict) else None
    if entries is not None and isinstance(entries.value, list):
        yield from (entry.mark for entry in entries.value)
