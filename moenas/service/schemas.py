"""The typed bodies of requests and responses; the OpenAPI document is made from them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from moenas.service.settings import MAX_SPACE
from moenas.store.submissions import Action

Overrides = Annotated[
    list[Annotated[str, Field(max_length=2000)]],
    Field(max_length=200, description="Dotted overrides, as `moenas run` takes them."),
]
SpaceText = Annotated[str, Field(max_length=MAX_SPACE, description="A space file, in YAML.")]
TrialNumber = Annotated[int, Field(ge=0, le=2**31 - 1)]
ExportFormat = Literal["folder", "transformers", "torch_export", "onnx"]
StudyState = Literal["queued", "running", "paused", "finished", "failed", "cancelled", "stopped"]
EXAMPLE_SPACE = """\
name: small
architecture:
  vocab_size: 256
  d_model: {choice: [32, 64]}
  blocks:
    - repeat: 2
      mixer: {kind: attention, head_dim: 16}
      ffn: {kind: dense, activation: swiglu, d_ff: {int: [64, 128], step: 32}}
objectives: [val_loss, flops_per_token]
data: stdlib
train: {tokens: 8192, context: 64, batch: 4}
search: {sampler: random, trials: 4}
"""


class Model(BaseModel):
    """Base of all responses."""


class RequestModel(BaseModel):
    """Base of all requests: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class SpaceRequest(RequestModel):
    """A space to check."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"space": EXAMPLE_SPACE}]})

    space: SpaceText
    overrides: Overrides = []
    draws: int | None = Field(None, ge=1, le=1000, description="Random architectures to look at.")


class Range(Model):
    """The smallest and the largest number of some architectures."""

    min: int
    max: int


class Corpus(Model):
    """The corpus that the candidates train on."""

    name: str
    kind: str
    formats: dict[str, int] = Field(description="Format -> number of files.")
    text_column: str | None
    dtype: str
    train_tokens: int
    val_tokens: int
    vocab_size: int
    split: str | None
    tokenizer: dict[str, Any] | None
    sha256: str


class Draw(Model):
    """One random architecture of a space."""

    params: int
    active_params: int
    flops_per_token: int
    architecture: str


class Estimate(Model):
    """What a study takes; hours are null where no throughput is known."""

    candidates: int
    replicates: int = Field(description="Expected trainings with further seeds.")
    workers: int
    train_tokens: float | None = Field(
        description="Replicates included, as in the numbers below; null if unknown."
    )
    train_flops: float | None
    hours: float | None
    hours_low: float | None
    hours_high: float | None
    basis: str


class PredictedValue(Model):
    """A predicted latency with its interval, in the unit of the objective."""

    value: float
    low: float
    high: float


class PredictedLatency(Model):
    """The predicted range of a latency over random architectures of a space."""

    objective: str
    unit: str
    missing: str | None = Field(description="Why there is no prediction; the rest is null then.")
    smallest: PredictedValue | None = None
    median: PredictedValue | None = None
    largest: PredictedValue | None = None
    drawn: int | None = None
    beyond: int | None = Field(None, description="Draws larger than every measured model.")
    device: str | None = None
    settings: dict[str, Any] | None = Field(None, description="Phase, batch, context, dtype.")
    made_at: str | None = None
    fitted_models: int | None = None
    fitted_blocks: int | None = None
    coverage: float | None = Field(None, description="Of the intervals, for random models.")
    factor: float | None = Field(None, description="An interval is value / factor to its product.")
    tested: int | None = None
    covered: int | None = Field(None, description="Tested models inside their intervals.")
    median_error: float | None = Field(None, description="Relative, of the tested models.")


class SpaceReport(Model):
    """What `moenas check` says of a valid space."""

    name: str
    valid: Literal[True]
    points: int | str
    continuous: int
    holes: list[str]
    objectives: list[str]
    context: int
    drawn: int
    feasible: int
    refused: dict[str, int]
    binding: str | None = Field(None, description="The requirement that few draws meet.")
    params: int | Range
    active_params: int | Range
    flops_per_token: int | Range
    kv_bytes_per_token: int | Range
    weight_bytes: int | Range
    corpus: Corpus
    bigram_loss: float | None
    tokens_per_parameter: dict[str, float] | None = Field(
        description="The smallest and the largest number of training tokens per active parameter."
    )
    notes: list[str]
    draws: list[Draw]
    latency: list[PredictedLatency] = []
    estimate: Estimate


class SubmissionRequest(RequestModel):
    """A study to run."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"space": EXAMPLE_SPACE, "trials": 4, "priority": 0}]},
    )

    space: SpaceText
    overrides: Overrides = []
    trials: int | None = Field(
        None, ge=1, le=1_000_000, description="Candidates in total; null: `search.trials`."
    )
    priority: int = Field(0, ge=-100, le=100, description="A larger one starts earlier.")


class StudySummary(Model):
    """How a study of a list does, as `moenas list -o json` writes it."""

    study: str
    state: StudyState
    evaluated: int = Field(description="Candidates that count towards `trials`.")
    trials: int
    failed: int
    front: int = Field(description="Members of the front.")
    hypervolume: float | None
    objectives: list[str]
    last_activity: str
    created: str | None = Field(description="Null before its driver has begun.")


class Study(Model):
    """One study of a list."""

    name: str
    state: StudyState = Field(description="`stopped`: a command ran it, and it is not over.")
    submitted: bool = Field(description="Whether a server looks after it.")
    user: str | None
    priority: int | None
    trials: int
    evaluations: int = Field(description="Finished trials.")
    created_at: str
    started_at: str | None
    ended_at: str | None
    reason: str | None = Field(description="Why it failed, or why its driver is restarted.")
    restarts: int
    driver_running: bool
    summary: StudySummary | None = Field(None, description="In a list with `summary=true`.")


class StudyPage(Model):
    """A part of the list of studies, newest first."""

    studies: list[Study]
    next: str | None = Field(description="`cursor` of the next page; null at the end.")


class Objective(Model):
    """What a value means."""

    name: str
    direction: Literal["minimize", "maximize"]
    unit: str
    doc: str


class RungAgreement(Model):
    """The rank correlation of the losses at a rung with those at the end of training."""

    rung: int
    tokens: int
    reached: int
    promoted: int
    pairs: int
    correlation: float | None


class RunningTrial(Model):
    """A trial that a worker evaluates now."""

    trial: int
    attempt: int
    started_at: str


class KeptCalibration(Model):
    """A calibration of a latency that a study keeps."""

    objective: str
    device: str
    workload: str
    made_at: str
    taken_at: str
    newest_made_at: str | None = Field(
        description="When the newest one of this workload was made; the study uses its own."
    )


class Progress(Model):
    """How far a study is and how it does; zeros before its driver has begun."""

    evaluated: int = 0
    complete: int = 0
    failed: int = 0
    stopped: int = 0
    paused: int = 0
    infeasible: int = 0
    repeated: int = 0
    left: int = 0
    running_in: str | None = None
    running: list[RunningTrial] = []
    candidates_per_hour: float | None = Field(
        None,
        description="Of the latest run that evaluated a candidate, or of the run that is going on;"
        " null before its first evaluated candidate.",
    )
    seconds_left: float | None = Field(None, description="At that pace; null if nothing runs.")
    ended: str | None = None
    failures: dict[str, int] = {}
    spent: dict[str, float] = {"wall_seconds": 0.0, "train_tokens": 0.0, "train_flops": 0.0}
    best: dict[str, float | None] = {}
    front: int = 0
    hypervolume: float | None = None
    hypervolume_is_exact: bool = True
    bigram_loss: float | None = Field(None, description="Held-out loss of a bigram, in nats.")
    devices: list[str] = []
    data: dict[str, str | None] = {"name": None, "sha256": None}
    rungs: list[RungAgreement] = []
    calibrations: list[KeptCalibration] = Field(
        [],
        description="Those that the study keeps: each refuses candidates by a predicted latency.",
    )


class StudyDetail(Study):
    """One study, whole."""

    actions: list[Action] = Field(
        description="What the user of this request may do now: `POST` to the path of that name,"
        " or `DELETE`."
    )
    objectives: list[Objective]
    overrides: list[str]
    space: str = Field(description="The space file, verbatim.")
    progress: Progress
    last_event: int = Field(description="Id of its newest event; 0 without one.")


class TrialRow(Model):
    """One finished trial of a list."""

    trial: int
    status: str
    values: dict[str, float | None]
    cost: dict[str, float]
    failure: str | None = Field(description="Kind of the failure.")
    message: str | None
    seconds: float | None
    on_front: bool
    has_weights: bool
    params: dict[str, Any] = Field(description="Hole -> value.")


class TrialPage(Model):
    """A part of the finished trials, in order of their numbers."""

    trials: list[TrialRow]
    next: int | None = Field(description="`after` of the next page; null at the end.")


class Failure(Model):
    """Why a trial has no values."""

    kind: str
    message: str
    traceback: str = ""
    cause: str = ""


class Trial(Model):
    """Everything that is stored of one trial, as `moenas show -o json` writes it."""

    study: str
    trial: int
    attempt: int
    status: str
    fingerprint: str
    values: dict[str, float | None]
    measurements: dict[str, dict[str, Any]]
    metrics: dict[str, float | None]
    curve: list[dict[str, Any]]
    routing: list[dict[str, Any]]
    cost: dict[str, int]
    violations: dict[str, float | None]
    seconds: dict[str, float]
    device: dict[str, Any]
    versions: dict[str, str]
    data: dict[str, Any]
    seed: int
    failure: Failure | None
    weights_sha256: str | None
    reused_from: dict[str, Any] | None
    units: dict[str, str]
    enqueued_from: str | None
    on_front: bool
    architecture: dict[str, Any]
    summary: str = Field(description="The architecture in one line.")


class Figures(Model):
    """The figures of a study, as plotly.js takes them."""

    figures: dict[str, dict[str, Any]]


class Report(Model):
    """What a study shows of its space, as `moenas report -o json` writes it."""

    model_config = ConfigDict(extra="allow")

    study: str


class Extension(RequestModel):
    """How many candidates a study is to evaluate in total."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"trials": 40}]})

    trials: int = Field(ge=1, le=1_000_000)


class ArchitectureText(RequestModel):
    """An architecture as text: a space file without holes, or the config.json of an export."""

    name: str = Field(max_length=300, description="What errors and `source` call it.")
    text: SpaceText


class EnqueueRequest(RequestModel):
    """Architectures that a study evaluates next."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"references": ["study:other"]}]})

    references: list[Annotated[str, Field(max_length=300)] | ArchitectureText] = Field(
        [],
        max_length=100,
        description="Shipped spaces such as zoo/olmoe_1b_7b, study:NAME, or texts.",
    )
    architecture: SpaceText | None = Field(None, description="A space file without holes.")


class Enqueued(Model):
    """One architecture, and the trial that evaluates it or has evaluated it."""

    trial: int | None
    status: Literal["known", "enqueued"]
    source: str
    fingerprint: str


class Deleted(Model):
    """A study that is gone."""

    deleted: str
    trials: int


class Device(Model):
    """A device of the server's machine."""

    key: str
    kind: str
    name: str


class RayNode(Model):
    """A node of the Ray cluster that the drivers of the server use."""

    id: str
    address: str
    host: str
    alive: bool
    resources: dict[str, float]


class Devices(Model):
    """The devices of the server's machine, and the nodes of its Ray cluster."""

    devices: list[Device]
    nodes: list[RayNode] = []
    nodes_error: str | None = None
    """Why the cluster could not be asked."""


class AuditRow(Model):
    """One change that a user made."""

    id: int
    at: str
    user: str
    action: str
    study: str | None
    detail: dict[str, Any]


class AuditPage(Model):
    """A part of the audit, newest first."""

    entries: list[AuditRow]
    next: int | None = Field(description="`before` of the next page; null at the end.")


class Health(Model):
    """Whether the server can answer."""

    status: Literal["ok"]


class LoginLink(Model):
    """A link that logs a browser in, once."""

    path: str
    expires_in_s: int


class ProblemDetails(Model):
    """RFC 9457: why a request was not answered as it was meant."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    instance: str
