"""The first schema: studies, candidates, evaluations, the front and its history."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

NAME = sa.String(512)
TIME = sa.String(32)
SHA = sa.String(64)
KEY = sa.String(255)


def upgrade() -> None:
    """Create the tables and the view."""
    _studies()
    _trials()
    _evaluations()
    _front()
    sqlite = op.get_bind().dialect.name == "sqlite"
    device = (
        "json_extract(evaluation.device, '$.name')" if sqlite else "evaluation.device ->> 'name'"
    )
    op.execute(PARETO_FRONT.format(device=device))


def _json(name: str, *, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.JSON, nullable=nullable)


def _of_study() -> tuple[sa.Column[str], sa.ForeignKeyConstraint]:
    return (
        sa.Column("study", NAME, primary_key=True),
        sa.ForeignKeyConstraint(["study"], ["moenas_study.name"], ondelete="CASCADE"),
    )


def _of_trial() -> tuple[sa.Column[str], sa.Column[int], sa.ForeignKeyConstraint]:
    return (
        sa.Column("study", NAME, primary_key=True),
        sa.Column("trial", sa.Integer, primary_key=True, autoincrement=False),
        sa.ForeignKeyConstraint(
            ["study", "trial"],
            ["moenas_candidate.study", "moenas_candidate.trial"],
            ondelete="CASCADE",
        ),
    )


def _number(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.Integer, primary_key=True, autoincrement=False)


def _studies() -> None:
    op.create_table(
        "moenas_study",
        sa.Column("name", NAME, primary_key=True),
        sa.Column("space_text", sa.Text, nullable=False),
        _json("overrides"),
        _json("space"),
        sa.Column("space_sha256", SHA, nullable=False),
        _json("data"),
        _json("versions"),
        sa.Column("trials", sa.Integer, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
    )
    op.create_table(
        "moenas_objective",
        *_of_study(),
        sa.Column("name", KEY, primary_key=True),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("direction", sa.String(8), nullable=False),
        sa.Column("unit", sa.Text, nullable=False),
        sa.Column("doc", sa.Text, nullable=False),
        sa.Column("sha256", SHA, nullable=False),
        *(sa.Column(name, sa.Double) for name in ("lowest", "highest", "reference")),
        sa.CheckConstraint("direction IN ('minimize', 'maximize')"),
    )
    op.create_table(
        "moenas_reference",
        *_of_study(),
        sa.Column("key", KEY, primary_key=True),
        sa.Column("ms", sa.Double, nullable=False),
        sa.Column("set_at", TIME, nullable=False),
    )
    op.create_table(
        "moenas_driver",
        *_of_study(),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("host", KEY, nullable=False),
        sa.Column("machine", KEY, nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("born", sa.String(64), nullable=False),
        sa.Column("heartbeat", sa.Double, nullable=False),
    )


def _trials() -> None:
    op.create_table(
        "moenas_candidate",
        *_of_study(),
        _number("trial"),
        sa.Column("fingerprint", SHA, nullable=False),
        _json("architecture"),
        _json("cost"),
        sa.Column("asked_at", TIME, nullable=False),
    )
    op.create_index("ix_moenas_candidate_fingerprint", "moenas_candidate", ["fingerprint"])
    op.create_table(
        "moenas_attempt",
        *_of_trial(),
        _number("attempt"),
        sa.Column("started_at", TIME, nullable=False),
        sa.Column("finished_at", TIME),
        sa.Column("status", sa.String(16)),
        _json("failure", nullable=True),
    )


def _evaluations() -> None:
    op.create_table(
        "moenas_evaluation",
        *_of_trial(),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("fingerprint", SHA, nullable=False),
        sa.Column("recorded_at", TIME, nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        *(_json(name) for name in ("metrics", "cost", "violations", "seconds")),
        *(_json(name) for name in ("device", "versions", "data")),
        _json("failure", nullable=True),
        sa.Column("weights_sha256", SHA),
        sa.CheckConstraint("status IN ('complete', 'failed', 'infeasible')"),
    )
    op.create_table(
        "moenas_value",
        *_of_trial(),
        sa.Column("objective", KEY, primary_key=True),
        sa.Column("value", sa.Double),
        _json("measurement", nullable=True),
    )
    op.create_table(
        "moenas_curve",
        *_of_trial(),
        _number("position"),
        sa.Column("tokens", sa.BigInteger),
        *(sa.Column(name, sa.Double) for name in ("train_loss", "val_loss", "lr")),
        *(sa.Column(name, sa.Double) for name in ("grad_norm", "seconds")),
        _json("extra", nullable=True),
    )
    op.create_table(
        "moenas_routing",
        *_of_trial(),
        _number("layer"),
        _json("load", nullable=True),
        *(sa.Column(name, sa.Double) for name in ("max_vio", "cv", "entropy")),
        sa.Column("dead", sa.Integer),
        sa.Column("dropped", sa.Double),
        _json("extra", nullable=True),
    )


def _front() -> None:
    op.create_table(
        "moenas_hypervolume",
        *_of_study(),
        _number("seq"),
        sa.Column("trial", sa.Integer, nullable=False),
        sa.Column("hypervolume", sa.Double, nullable=False),
        sa.Column("size", sa.Integer, nullable=False),
    )
    op.create_table(
        "moenas_front",
        *_of_trial(),
        sa.Column("entered_seq", sa.Integer, nullable=False),
        sa.Column("left_seq", sa.Integer),
    )


PARETO_FRONT = """
CREATE VIEW pareto_front AS
SELECT
    front.study AS study,
    front.trial AS trial,
    objective.name AS objective,
    value.value AS value,
    objective.unit AS unit,
    objective.direction AS direction,
    evaluation.fingerprint AS fingerprint,
    candidate.architecture AS architecture,
    {device} AS device,
    front.entered_seq AS entered_seq,
    evaluation.recorded_at AS entered_at
FROM moenas_front AS front
JOIN moenas_evaluation AS evaluation
    ON evaluation.study = front.study AND evaluation.trial = front.trial
JOIN moenas_candidate AS candidate
    ON candidate.study = front.study AND candidate.trial = front.trial
JOIN moenas_objective AS objective
    ON objective.study = front.study
JOIN moenas_value AS value
    ON value.study = front.study AND value.trial = front.trial
    AND value.objective = objective.name
WHERE front.left_seq IS NULL
"""
"""One row for each member of a front today and each objective of its study."""
