"""The tables of a study, as the newest migration leaves them.

A study is one row of moenas_study and one of moenas_objective for each objective. A trial has a row
of moenas_candidate once it was asked for. It has a row of moenas_attempt for each start. Once it
has a result, it has a row of moenas_evaluation, with rows for values, curve and routing. The
evaluation of a later attempt takes the place of a failed one; moenas_attempt keeps why the earlier
one failed. What is compared, sorted or plotted is a column; the rest is JSON, and `column ->>
'key'` reads it on PostgreSQL and on SQLite 3.38 or later. Times are UTC, ISO 8601.

Rows refer to Optuna's by study name and trial number, never by a foreign key: with one,
`optuna.delete_study` would fail in silence.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

NAME_LENGTH = 512
"""Longest name of a study: the length of Optuna's own column."""

Name = String(NAME_LENGTH)
Json = JSON(none_as_null=True)
metadata = MetaData()


def _of_study() -> Column[str]:
    """Return the first key column of a table whose rows belong to a study."""
    return Column(
        "study", Name, ForeignKey("moenas_study.name", ondelete="CASCADE"), primary_key=True
    )


def _of_trial() -> tuple[Column[str], Column[int], ForeignKeyConstraint]:
    """Return the first key columns of a table whose rows belong to a candidate."""
    return (
        Column("study", Name, primary_key=True),
        Column("trial", Integer, primary_key=True, autoincrement=False),
        ForeignKeyConstraint(
            ["study", "trial"],
            ["moenas_candidate.study", "moenas_candidate.trial"],
            ondelete="CASCADE",
        ),
    )


database = Table(
    "moenas_database",
    metadata,
    # The one row is 1.
    Column("id", Integer, primary_key=True, autoincrement=False),
    # Names the database for as long as it lives; a copy gets another one at its first run.
    Column("uuid", String(32), nullable=False),
    # Where it lay at its last run: an SQLite file, or a server, database and schema.
    Column("place", Text),
    # Absolute path of the folder of weights; NULL is moenas_runs beside an SQLite file.
    Column("weights", Text),
    # Of the databases that this one is a copy of: uuids and folders, whose weights may be its own.
    Column("former", Json, nullable=False),
)

study = Table(
    "moenas_study",
    metadata,
    Column("name", Name, primary_key=True),
    Column("space_text", Text, nullable=False),
    Column("overrides", Json, nullable=False),
    Column("space", Json, nullable=False),
    Column("space_sha256", String(64), nullable=False),
    Column("data", Json, nullable=False),
    Column("versions", Json, nullable=False),
    Column("trials", Integer, nullable=False),
    Column("created_at", String(32), nullable=False),
)

objective = Table(
    "moenas_objective",
    metadata,
    _of_study(),
    Column("name", String(255), primary_key=True),
    Column("position", Integer, nullable=False),
    Column(
        "direction",
        String(8),
        CheckConstraint("direction IN ('minimize', 'maximize')"),
        nullable=False,
    ),
    Column("unit", Text, nullable=False),
    Column("doc", Text, nullable=False),
    Column("sha256", String(64), nullable=False),
    # Of all complete trials; NULL before a first one.
    Column("lowest", Double),
    Column("highest", Double),
    # Coordinate of the reference point of the hypervolumes, by the rule of front.reference_point.
    Column("reference", Double),
)

# A study that is not over has no row.
ended = Table(
    "moenas_ended",
    metadata,
    _of_study(),
    # An EndReason.
    Column("reason", String(16), nullable=False),
    Column("ended_at", String(32), nullable=False),
)

run = Table(
    "moenas_run",
    metadata,
    _of_study(),
    # A run of the study, by the moment at which it began.
    Column("began_at", String(32), primary_key=True),
    # Wall seconds of the run up to its last report; it reports every few seconds.
    Column("seconds", Double, nullable=False),
)

change = Table(
    "moenas_change",
    metadata,
    _of_study(),
    # What a user accepted after the start, in order from 1.
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("changed_at", String(32), nullable=False),
    # The objective, the calibration, or "space".
    Column("what", Text, nullable=False),
    # Digests; of calibrations when they were made.
    Column("before", String(64), nullable=False),
    Column("after", String(64), nullable=False),
)

candidate = Table(
    "moenas_candidate",
    metadata,
    _of_study(),
    Column("trial", Integer, primary_key=True, autoincrement=False),
    Column("fingerprint", String(64), nullable=False, index=True),
    Column("architecture", Json, nullable=False),
    # What the architecture costs by arithmetic; moenas_evaluation.cost is what a worker found.
    Column("cost", Json, nullable=False),
    Column("asked_at", String(32), nullable=False),
)

enqueued = Table(
    "moenas_enqueued",
    metadata,
    *_of_trial(),
    # Where the architecture of the trial is from, such as zoo/olmoe_1b_7b or study:NAME trial 3.
    Column("source", Text, nullable=False),
)

attempt = Table(
    "moenas_attempt",
    metadata,
    *_of_trial(),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("started_at", String(32), nullable=False),
    # The rest is NULL until the attempt comes to an end.
    Column("finished_at", String(32)),
    Column("status", String(16)),
    Column("failure", Json),
)

evaluation = Table(
    "moenas_evaluation",
    metadata,
    *_of_trial(),
    Column("attempt", Integer, nullable=False),
    Column(
        "status",
        String(16),
        CheckConstraint(
            "status IN ('complete', 'failed', 'infeasible', 'stopped')",
            name="moenas_evaluation_status_check",
        ),
        nullable=False,
    ),
    Column("fingerprint", String(64), nullable=False),
    Column("recorded_at", String(32), nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("metrics", Json, nullable=False),
    Column("cost", Json, nullable=False),
    Column("violations", Json, nullable=False),
    Column("seconds", Json, nullable=False),
    Column("device", Json, nullable=False),
    Column("versions", Json, nullable=False),
    Column("data", Json, nullable=False),
    Column("failure", Json),
    Column("weights_sha256", String(64)),
)

reuse = Table(
    "moenas_reuse",
    metadata,
    *_of_trial(),
    # The evaluation of another study that this trial has; that study may be gone.
    Column("from_study", Name, nullable=False),
    Column("from_trial", Integer, nullable=False),
)

rung = Table(
    "moenas_rung",
    metadata,
    *_of_trial(),
    # Rungs of training, from 1; the end of training is none.
    Column("rung", Integer, primary_key=True, autoincrement=False),
    Column("tokens", BigInteger, nullable=False),
    Column("val_loss", Double, nullable=False),
    # Objective -> value, of the objectives that are measured before training.
    Column("known", Json, nullable=False),
    Column("recorded_at", String(32), nullable=False),
    # When early stopping let the candidate train on; NULL if it did not.
    Column("promoted_at", String(32)),
    # Of the latest rung of a trial that has no evaluation: the evaluation so far, and its file.
    Column("evaluation", Json),
    Column("checkpoint_sha256", String(64)),
)

replicate = Table(
    "moenas_replicate",
    metadata,
    *_of_trial(),
    # Seed of the initial weights and of the order of the data; not the seed of the study.
    Column("seed", BigInteger, primary_key=True, autoincrement=False),
    Column("recorded_at", String(32), nullable=False),
    Column("status", String(16), nullable=False),
    # The evaluation with this seed, without curve, routing and weights.
    Column("evaluation", Json, nullable=False),
)

value = Table(
    "moenas_value",
    metadata,
    *_of_trial(),
    Column("objective", String(255), primary_key=True),
    # NULL if the candidate failed before the objective had a finite value.
    Column("value", Double),
    # How the value came about: ratio, spread, n ... NULL if nothing is known.
    Column("measurement", Json),
)

curve = Table(
    "moenas_curve",
    metadata,
    *_of_trial(),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("tokens", BigInteger),
    Column("train_loss", Double),
    Column("val_loss", Double),
    Column("lr", Double),
    Column("grad_norm", Double),
    Column("seconds", Double),
    # Whatever else a row of the curve holds; NULL if nothing.
    Column("extra", Json),
)

routing = Table(
    "moenas_routing",
    metadata,
    *_of_trial(),
    Column("layer", Integer, primary_key=True, autoincrement=False),
    # Share of the routed slots of each expert, in order.
    Column("load", Json),
    Column("max_vio", Double),
    Column("cv", Double),
    Column("entropy", Double),
    Column("dead", Integer),
    Column("dropped", Double),
    Column("extra", Json),
)

hypervolume = Table(
    "moenas_hypervolume",
    metadata,
    _of_study(),
    # Complete trials in the order in which they were recorded, from 1.
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("trial", Integer, nullable=False),
    # After this trial, from the reference point of moenas_objective: all rows compare.
    Column("hypervolume", Double, nullable=False),
    Column("size", Integer, nullable=False),
)

front = Table(
    "moenas_front",
    metadata,
    *_of_trial(),
    Column("entered_seq", Integer, nullable=False),
    # The seq of the trial that dominates it; NULL for today's members.
    Column("left_seq", Integer),
)

reference = Table(
    "moenas_reference",
    metadata,
    _of_study(),
    Column("key", String(255), primary_key=True),
    Column("ms", Double, nullable=False),
    Column("set_at", String(32), nullable=False),
)

# Of no study: any study of such a space on such a device can read it.
calibration = Table(
    "moenas_calibration",
    metadata,
    # Digest of the architecture with its holes, and of the files of components.
    Column("parts_sha256", String(64), primary_key=True),
    # The key of the reference time: device, phase, batch, context, dtype, threads, versions.
    Column("workload", String(255), primary_key=True),
    Column("objective", String(255), nullable=False),
    Column("made_at", String(32), nullable=False),
    # The whole record.
    Column("calibration", Json, nullable=False),
)

# The calibration that a study found first: a newer one changes no refusal of the study.
study_calibration = Table(
    "moenas_study_calibration",
    metadata,
    _of_study(),
    Column("workload", String(255), primary_key=True),
    Column("taken_at", String(32), nullable=False),
    # The whole record.
    Column("calibration", Json, nullable=False),
)

driver = Table(
    "moenas_driver",
    metadata,
    _of_study(),
    # Names one open store, so that two of one process are told apart.
    Column("owner", String(64), nullable=False),
    Column("host", String(255), nullable=False),
    # Boot and process namespace: only there does the pid mean that process.
    Column("machine", String(255), nullable=False),
    Column("pid", Integer, nullable=False),
    # When the process began, so that another process with its pid is not taken for it. The column
    # keeps the name of the first schema.
    Column("born", String(64), key="process_start", nullable=False),
    # Seconds since 1970 by the database's clock.
    Column("heartbeat", Double, nullable=False),
)

reservation = Table(
    "moenas_reservation",
    metadata,
    # A former name of a study, which no new study may have until its former files are gone.
    Column("name", Name, primary_key=True),
    # The present name of that study.
    Column("renamed_to", Name, nullable=False),
    Column("reserved_at", String(32), nullable=False),
)

# --- the server ----------------------------------------------------------------------------------

event = Table(
    "moenas_event",
    metadata,
    # A submitted study has events before it has a row of moenas_study.
    Column("study", Name, primary_key=True),
    # Counts from 1 without a gap, in the order in which the changes were committed.
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("at", String(32), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("data", Json, nullable=False),
)

event_counter = Table(
    "moenas_event_counter",
    metadata,
    Column("study", Name, primary_key=True),
    # The newest id. A transaction that adds an event holds this row until it is committed.
    Column("last", Integer, nullable=False),
)

runner = Table(
    "moenas_runner",
    metadata,
    # Names one server that starts drivers, from its start to its end.
    Column("id", String(32), primary_key=True),
    # The columns are the same as in moenas_driver.
    Column("host", String(255), nullable=False),
    Column("machine", String(255), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("born", String(64), key="process_start", nullable=False),
    Column("heartbeat", Double, nullable=False),
)

submission = Table(
    "moenas_submission",
    metadata,
    # A submitted study; moenas_study has a row of this name once its driver has begun.
    Column("study", Name, primary_key=True),
    Column("user_name", String(100), nullable=False),
    Column("space_text", Text, nullable=False),
    Column("overrides", Json, nullable=False),
    # How many candidates the study is to evaluate in total.
    Column("trials", Integer, nullable=False),
    # A larger one starts earlier.
    Column("priority", Integer, nullable=False),
    Column("idempotency_key", String(255)),
    Column("request_sha256", String(64), nullable=False),
    Column(
        "state",
        String(16),
        CheckConstraint(
            "state IN ('queued', 'running', 'paused', 'finished', 'failed', 'cancelled')",
            name="moenas_submission_state_check",
        ),
        nullable=False,
    ),
    # Why it failed, or why its driver is restarted.
    Column("reason", Text),
    # Times that a driver died since the study was submitted or resumed.
    Column("restarts", Integer, nullable=False),
    # Seconds since 1970 by the database's clock; a queued study does not start earlier.
    Column("not_before", Double, nullable=False),
    Column("submitted_at", String(32), nullable=False),
    Column("started_at", String(32)),
    Column("ended_at", String(32)),
    # The server that looks after the driver; NULL while there is no driver.
    Column("runner", String(32)),
    # The total that the driver was started with.
    Column("driven_trials", Integer),
    # The columns are the same as in moenas_driver.
    Column("driver_machine", String(255)),
    Column("driver_pid", Integer),
    Column("driver_born", String(64), key="driver_process_start"),
    UniqueConstraint("user_name", "idempotency_key", name="moenas_submission_key"),
)

token = Table(
    "moenas_token",
    metadata,
    # The public part of the token, by which its row is found.
    Column("id", String(16), primary_key=True),
    # SHA-256 of the whole token, which is stored nowhere.
    Column("digest", String(64), nullable=False),
    Column("user_name", String(100), nullable=False),
    # viewer, submitter or admin.
    Column("role", String(16), nullable=False),
    Column("created_at", String(32), nullable=False),
    Column("expires_at", String(32)),
    Column("revoked_at", String(32)),
)

audit = Table(
    "moenas_audit",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", String(32), nullable=False),
    Column("user_name", String(100), nullable=False),
    Column("action", String(32), nullable=False),
    Column("study", Name),
    Column("detail", Json, nullable=False),
)
