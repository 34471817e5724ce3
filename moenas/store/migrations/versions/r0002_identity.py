"""The second schema: a database has an identity, and knows where its weights lie."""

from __future__ import annotations

import uuid

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Create the table and its one row."""
    table = op.create_table(
        "moenas_database",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("uuid", sa.String(32), nullable=False),
        sa.Column("place", sa.Text),
        sa.Column("weights", sa.Text),
        sa.Column("former", sa.JSON, nullable=False),
    )
    op.bulk_insert(table, [{"id": 1, "uuid": uuid.uuid4().hex, "former": []}])
