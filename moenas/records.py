"""Plain data that crosses machines and years: Cost, Job, Failure and Evaluation."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypedDict

from moenas.errors import FAILURE_KINDS, FailureKind, InputError

Plain = dict[str, Any]
"""A JSON object: strings, numbers, booleans, None, lists and objects of these."""

TRAINING = 3
"""Operations of a training step over the operations of its forward pass."""


def training_flops(cost: Mapping[str, Any]) -> float:
    """Return the forward FLOPs of a token in training, by the stored cost of a candidate.

    With heads for multi-token prediction they exceed the FLOPs of the model.
    """
    return float(cost.get("training_flops_per_token") or cost.get("flops_per_token") or 0)


Status = Literal["complete", "failed", "infeasible", "stopped", "paused"]
"""`stopped`: early stopping ended the training at a rung. `paused`: the training may continue from
a checkpoint; such an evaluation is stored with its rung and is not the last one of its trial."""
EndReason = Literal[
    "trials",  # all trials are evaluated
    "exhausted",  # every point of a finite space was drawn
    "sampler",  # the sampler stopped the study
    "draws",  # too many draws in a row gave no new candidate
    "wall_time",  # a budget of `search.stop` is used up
    "train_flops",
    "train_tokens",
    "plateau",  # the hypervolume has stopped growing
]
"""Why a study is over."""


@dataclass(frozen=True, init=False)
class Cost:
    """What an architecture costs, by exact arithmetic, before anything is built.

    Costs add up: a model is the sum of its parts, and `cost * 3` is three equal layers.
    """

    params: int = 0
    """Trainable parameters, all experts included."""
    active_params: int = 0
    """Trainable parameters that one token passes through: top_k of n_experts experts. The
    input embedding counts with one row, and a tied table counts whole, as the output head."""
    flops_per_token: int = 0
    """Forward operations per token at the given context: 2 per multiply-add of every matrix
    product (a multiplication and an addition), attention over the full context, nothing for
    element-wise work. A training step costs about three times that."""
    kv_bytes_per_token: int = 0
    """Growth of the key-value cache per token of context, 2 bytes an element (bfloat16). It holds
    keys and values of every token, also behind a window or chunk. Latent attention has the latent
    and the rotary key. A state of fixed size adds 0."""

    def __init__(
        self,
        params: int = 0,
        active_params: int = 0,
        flops_per_token: int = 0,
        kv_bytes_per_token: int = 0,
        weight_bytes: int | None = None,
    ) -> None:
        """Build a cost; give the numbers by keyword.

        `weight_bytes` is ignored: files of components that stored studies hold still pass it.
        """
        put = object.__setattr__
        put(self, "params", params)
        put(self, "active_params", active_params)
        put(self, "flops_per_token", flops_per_token)
        put(self, "kv_bytes_per_token", kv_bytes_per_token)

    @property
    def weight_bytes(self) -> int:
        """Size of the parameters, 2 bytes an element (bfloat16)."""
        return 2 * self.params

    def __add__(self, other: Cost) -> Cost:
        if not isinstance(other, Cost):
            return NotImplemented
        # Written out: spaces of many layers add millions of costs.
        return Cost(
            params=self.params + other.params,
            active_params=self.active_params + other.active_params,
            flops_per_token=self.flops_per_token + other.flops_per_token,
            kv_bytes_per_token=self.kv_bytes_per_token + other.kv_bytes_per_token,
        )

    def __mul__(self, times: int) -> Cost:
        if times == 1:
            return self
        return Cost(
            params=self.params * times,
            active_params=self.active_params * times,
            flops_per_token=self.flops_per_token * times,
            kv_bytes_per_token=self.kv_bytes_per_token * times,
        )

    __rmul__ = __mul__

    def plain(self) -> dict[str, int]:
        """Return the cost as a JSON object, `weight_bytes` included."""
        return dataclasses.asdict(self) | {"weight_bytes": self.weight_bytes}


class _Record:
    """JSON both ways for the frozen records below."""

    def plain(self) -> Plain:
        """Return the record as a JSON object."""
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]

    @classmethod
    def parse(cls, plain: Mapping[str, Any]) -> Self:
        """Build the record from a JSON object; fields of newer versions are ignored."""
        names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        return cls(**{key: value for key, value in plain.items() if key in names})


@dataclass(frozen=True)
class Job(_Record):
    """Everything that a remote worker needs to evaluate one candidate."""

    study: str
    trial: int
    attempt: int
    architecture: Plain
    """The canonical architecture, as `Architecture.plain()` gives it."""
    objectives: dict[str, str | None]
    """Name -> source text of a user's objective file, or None for a shipped one."""
    data: Plain
    """The `data` section of the space file, with paths made absolute."""
    data_sha256: str
    """Digest of the corpus; a worker that finds no such corpus refuses the job."""
    train: Plain
    """The `train` section of the space file, defaults filled in."""
    measure: Plain
    """The `measure` section of the space file, defaults filled in."""
    seed: int
    time_limit_s: float | None = None
    use: dict[str, str] = field(default_factory=dict)
    """Path -> source text of a user's file of components."""
    reference_ms: dict[str, float] = field(default_factory=dict)
    """Device and workload -> time of the reference model there, in ms, as this study fixed it."""
    sharers: int = 1
    """Candidates that share the memory of its device at a time, this one included."""
    device: str = "cpu"
    """cpu, or cuda: the first GPU that its process sees."""
    known: Plain | None = None
    """The stored evaluation, if its objectives are to be measured again without training."""
    weights: bytes | None = field(default=None, repr=False)
    """Its trained weights as safetensors."""
    rung_limits: list[float | None] | None = None
    """Early stopping: for each rung, the largest validation loss with which the job continues by
    itself; at a larger one, or at None, it pauses. Without the field it trains to the end."""
    paused: Plain | None = None
    """The evaluation that the job paused with, if it continues from a checkpoint."""
    checkpoint: bytes | None = field(default=None, repr=False)
    """The checkpoint of that pause as safetensors."""
    train_tokens: int | None = None
    """Training tokens under a budget of seconds, if a former run of the trial has fixed them."""
    keeps_weights: bool = True
    """Whether the trained weights come back with the evaluation."""
    data_at: Plain | None = None
    """Where the corpus is published for nodes that lack its files: see `data.published`."""
    weights_at: Plain | None = None
    """In place of `weights`: the path or URL of their file, and its SHA-256."""
    checkpoint_at: Plain | None = None
    """In place of `checkpoint`: the path or URL of its file, and its SHA-256."""
    weights_to: Plain | None = field(default=None, repr=False)
    """Where a worker that shares the driver's storage writes weights: see `weights.place`."""


@dataclass(frozen=True)
class WeightsFile(_Record):
    """Trained weights that a worker has written, not yet under their name."""

    path: str
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True)
class Failure(_Record):
    """Why a candidate has no values."""

    kind: FailureKind
    message: str
    traceback: str = ""
    cause: str = ""
    """Class and place of the exception, such as `ValueError x.py:12`. Two failures of one kind and
    one cause have the same reason. It is not stored."""

    @classmethod
    def parse(cls, plain: Mapping[str, Any]) -> Self:
        """Build the record from a JSON object; a kind of a newer version is an `error`."""
        kind: Any = plain.get("kind")
        texts = {name: str(plain.get(name) or "") for name in ("message", "traceback", "cause")}
        return cls(kind if kind in FAILURE_KINDS else "error", **texts)

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"

    def has_reason_of(self, other: Failure) -> bool:
        """Whether two failures have one reason: the same kind and cause, or the same text."""
        if self.kind != other.kind:
            return False
        if self.cause and other.cause:
            return self.cause == other.cause
        return self.message == other.message


class RoutingRow(TypedDict, total=False):
    """How one MoE layer routes the tokens of one pass or several."""

    layer: int
    load: list[float]
    """Share of the slots at each expert; they add up to 1."""
    max_vio: float
    """Largest load over mean load, minus 1 (arXiv 2408.15664, eq. 4)."""
    cv: float
    """Standard deviation of the load over its mean."""
    entropy: float
    """Entropy of the shares over the logarithm of the number of experts: 1 when even."""
    dead: int
    """Experts with less than 1 % of the mean load."""
    dropped: float
    """Share of the slots that find no room at an expert."""
    logit_rms: float
    """Root mean square of the router's logits."""
    logit_max: float
    """Largest absolute logit of the router."""
    domains: dict[str, list[float]]
    """Domain of the corpus -> share of its slots at each expert."""


class CurvePoint(TypedDict, total=False):
    """One row of a learning curve."""

    tokens: int
    """Training tokens seen."""
    train_loss: float
    """Mean cross entropy since the row before, nats per token."""
    val_loss: float
    """Validation loss, nats per token; in the last row and at the rungs alone."""
    lr: float
    grad_norm: float
    """Norm of the last step's gradient, before clipping."""
    seconds: float
    """Wall seconds since the run began."""
    routing: list[RoutingRow]
    """Routing of training since the row before; `domains` in the last row alone."""


@dataclass(frozen=True)
class Evaluation(_Record):
    """The result of one candidate; a failure is an evaluation too."""

    study: str
    trial: int
    attempt: int
    status: Status
    fingerprint: str
    values: dict[str, float] = field(default_factory=dict)
    """Objective name -> value. Never positional."""
    measurements: dict[str, Plain] = field(default_factory=dict)
    """Objective name -> how the value came about: unit, ratio, spread, n, reference_ms ..."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Further numbers of the trained model: val_loss, bits_per_byte, train_loss, lr, causal (0 if
    it was given leave to look at later tokens) ..."""
    curve: list[CurvePoint] = field(default_factory=list)
    routing: list[RoutingRow] = field(default_factory=list)
    """A row for each MoE layer, in validation."""
    cost: dict[str, int] = field(default_factory=dict)
    violations: dict[str, float] = field(default_factory=dict)
    """Requirement -> by how much it is broken (over 0), for an infeasible candidate."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Phase -> wall seconds: train, measure, total ..."""
    device: Plain = field(default_factory=dict)
    """{key, kind, name, threads, dtype, host}"""
    versions: dict[str, str] = field(default_factory=dict)
    data: Plain = field(default_factory=dict)
    """{name, sha256, train_tokens, val_tokens, vocab_size}"""
    seed: int = 0
    failure: Failure | None = None
    """Why it has no values; None unless its status is `failed`."""
    weights_sha256: str | None = None
    reused_from: Plain | None = None
    """{study, trial}: the evaluation of another study in the same database whose training this one
    has, and its values or some of them."""

    @classmethod
    def parse(cls, plain: Mapping[str, Any]) -> Self:
        """Build the record from a JSON object; fields of newer versions are ignored."""
        failure = plain.get("failure")
        parsed = Failure.parse(failure) if isinstance(failure, Mapping) else failure
        return super().parse({**plain, "failure": parsed})

    @property
    def is_copy(self) -> bool:
        """Whether it is copied from an earlier trial of the same model."""
        return "copied_from" in self.metrics


@dataclass(frozen=True)
class RungResult(_Record):
    """The result of one candidate at one rung of training."""

    trial: int
    rung: int
    """From 1; the end of training is no rung."""
    tokens: int
    """Training tokens seen."""
    val_loss: float
    """Validation loss, nats per token."""
    known: dict[str, float] = field(default_factory=dict)
    """Objective -> value, of the objectives that are measured before training."""
    promoted: bool = False
    """Whether early stopping let the candidate train on."""


@dataclass(frozen=True)
class Calibration(_Record):
    """A predictor of one latency on one device, fitted to measured models of a space."""

    objective: str
    """decode_ms or prefill_ms."""
    unit: str
    workload: str
    """Device, phase, batch, context, dtype, threads, versions of torch and of the reference: the
    key of the reference time. It holds for no other workload."""
    settings: Plain
    """{phase, batch, context, dtype, threads}"""
    space: str
    """Name of the space whose models were measured."""
    parts_sha256: str
    """Digest of the architecture with its holes, and of the files of components."""
    device: Plain
    """{key, kind, name, threads, dtype, host}"""
    versions: dict[str, str]
    reference_ms: float
    """Median time of the reference model meanwhile. Predictions are ratios to it."""
    coefficients: dict[str, float]
    """Term of a model -> its ratio to the reference; see `predict.block_latency`."""
    highest: dict[str, float]
    """Term -> its largest amount in the models of the fit."""
    log_error: float
    """Half-width of the interval of a prediction, in logarithms of the ratio."""
    coverage: float
    """Probability with which the interval contains the latency of a further random model."""
    fitted: dict[str, int]
    """{models, blocks}: measurements of the fit, whole models and models of one block."""
    held_out: list[Plain]
    """Models outside the fit, in the order of their measurement: fingerprint, predicted, measured
    and spread, as ratios, and `role`: `interval` sets `log_error`, `test` has no part in it."""
    made_at: str
    seconds: float
    """Wall time of the measurements and the fit."""

    @property
    def factor(self) -> float:
        """An interval reaches from a prediction over this factor to the prediction times it."""
        return math.exp(self.log_error)

    def interval(self, value: float) -> tuple[float, float]:
        """Return the interval of a prediction."""
        return value / self.factor, value * self.factor

    @property
    def tested(self) -> list[Plain]:
        """The models that neither the fit nor the interval has used."""
        return [row for row in self.held_out if row["role"] == "test"]

    @property
    def median_error(self) -> float:
        """Median relative error of the predictions over the tested models."""
        return statistics.median(
            float(abs(row["predicted"] / row["measured"] - 1)) for row in self.tested
        )

    @property
    def covered(self) -> int:
        """How many tested models have their measured latency inside the interval."""
        errors = [abs(math.log(row["predicted"] / row["measured"])) for row in self.tested]
        return sum(error <= self.log_error for error in errors)


@dataclass(frozen=True)
class ObjectiveInfo(_Record):
    """What a stored value means."""

    name: str
    direction: Literal["minimize", "maximize"]
    unit: str
    doc: str
    sha256: str
    """Digest of the code that measures it, without comments, docstrings and layout."""


@dataclass(frozen=True)
class StudyRecord(_Record):
    """One study as it is stored."""

    name: str
    space_text: str
    """The space file, verbatim."""
    overrides: list[str]
    """Dotted overrides given at the launch, as written: ["train.tokens=2e6"]."""
    space: Plain
    """What the file and the overrides say, presets and defaults written out."""
    space_sha256: str
    """Digest of all of `space` that a resumed run must not change."""
    objectives: list[Plain]
    """`ObjectiveInfo` records, in the order of Optuna's values."""
    data: Plain
    """Manifest of the corpus: name, sha256, files, sizes, python, entropy ..."""
    versions: dict[str, str]
    trials: int
    """How many trials the study is to have in total."""
    reference_point: dict[str, float] = field(default_factory=dict)
    """Objective -> the corner that the hypervolume is measured from; {} before a first front."""
    created_at: str = ""

    def setting(self, section: str, field: str) -> Any:
        """Return a field of a section of the stored space, such as the context of `train`.

        Raises:
            InputError: if the stored space lacks it.
        """
        fields = self.space.get(section, {})
        if field not in fields:
            raise InputError(
                f"study '{self.name}': its row in the database lacks `{section}.{field}`; a study"
                " that `moenas run` began has it"
            )
        return fields[field]

    @property
    def directions(self) -> dict[str, str]:
        """Objective name -> minimize or maximize, in order."""
        return {o["name"]: o["direction"] for o in self.objectives}


@dataclass(frozen=True)
class FrontPoint(_Record):
    """The front after one more complete trial."""

    trial: int
    hypervolume: float
    entered: bool
    """Whether this trial joined the front."""
    left: list[int]
    """Trials that it pushed out."""
    size: int
    """Members of the front afterwards."""


@dataclass(frozen=True)
class View:
    """Everything of one study that a figure, a table or a report reads."""

    study: StudyRecord
    evaluations: list[Evaluation]
    architectures: dict[int, Plain]
    """Trial -> canonical architecture."""
    front: list[int]
    """Trials on the front, in order of the first objective, best first."""
    history: list[FrontPoint]
    params: dict[int, Plain] = field(default_factory=dict)
    """Trial -> hole -> drawn value."""
    rungs: list[RungResult] = field(default_factory=list)
    """Results at the rungs of early stopping, in order of rungs and trials."""
    replicates: list[Evaluation] = field(default_factory=list)
    """Trials that were trained again with further seeds, in order of trials and seeds."""
