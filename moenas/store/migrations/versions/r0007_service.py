"""The seventh schema: the queue of a server, its tokens, its audit and the events of studies."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Create the tables; studies of earlier versions have no events."""
    op.create_table(
        "moenas_event",
        sa.Column("study", sa.String(512), primary_key=True),
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("at", sa.String(32), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
    )
    op.create_table(
        "moenas_event_counter",
        sa.Column("study", sa.String(512), primary_key=True),
        sa.Column("last", sa.Integer, nullable=False),
    )
    op.create_table(
        "moenas_runner",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("machine", sa.String(255), nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("born", sa.String(64), nullable=False),
        sa.Column("heartbeat", sa.Double, nullable=False),
    )
    _create_submission()
    op.create_table(
        "moenas_token",
        sa.Column("id", sa.String(16), primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("user_name", sa.String(100), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("created_at", sa.String(32), nullable=False),
        sa.Column("expires_at", sa.String(32)),
        sa.Column("revoked_at", sa.String(32)),
    )
    op.create_table(
        "moenas_audit",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("at", sa.String(32), nullable=False),
        sa.Column("user_name", sa.String(100), nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("study", sa.String(512)),
        sa.Column("detail", sa.JSON, nullable=False),
    )


def _create_submission() -> None:
    """Create the table of submitted studies."""
    op.create_table(
        "moenas_submission",
        sa.Column("study", sa.String(512), primary_key=True),
        sa.Column("user_name", sa.String(100), nullable=False),
        sa.Column("space_text", sa.Text, nullable=False),
        sa.Column("overrides", sa.JSON, nullable=False),
        sa.Column("trials", sa.Integer, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("idempotency_key", sa.String(255)),
        sa.Column("request_sha256", sa.String(64), nullable=False),
        sa.Column(
            "state",
            sa.String(16),
            sa.CheckConstraint(
                "state IN ('queued', 'running', 'paused', 'finished', 'failed', 'cancelled')",
                name="moenas_submission_state_check",
            ),
            nullable=False,
        ),
        sa.Column("reason", sa.Text),
        sa.Column("restarts", sa.Integer, nullable=False),
        sa.Column("not_before", sa.Double, nullable=False),
        sa.Column("submitted_at", sa.String(32), nullable=False),
        sa.Column("started_at", sa.String(32)),
        sa.Column("ended_at", sa.String(32)),
        sa.Column("runner", sa.String(32)),
        sa.Column("driven_trials", sa.Integer),
        sa.Column("driver_machine", sa.String(255)),
        sa.Column("driver_pid", sa.Integer),
        sa.Column("driver_born", sa.String(64)),
        sa.UniqueConstraint("user_name", "idempotency_key", name="moenas_submission_key"),
    )
