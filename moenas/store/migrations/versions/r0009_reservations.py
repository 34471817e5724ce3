"""The ninth schema: names that are kept from new studies until a rename is finished."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"

study = sa.table("moenas_study", sa.column("name"), sa.column("created_at"))
objective = sa.table("moenas_objective", sa.column("study"))
candidate = sa.table("moenas_candidate", sa.column("study"))
driver = sa.table("moenas_driver", sa.column("study"))
event = sa.table(
    "moenas_event",
    sa.column("study"),
    sa.column("kind"),
    sa.column("at"),
    sa.column("data", sa.Text),
)


def upgrade() -> None:
    """Create the table; a killed rename of the eighth schema becomes a reservation.

    It has left a study without objectives and trials under the former name. The event of the study
    that was renamed names it. Where that study was deleted, no study is left that has those files,
    and the name is free.
    """
    reservation = op.create_table(
        "moenas_reservation",
        sa.Column("name", sa.String(512), primary_key=True),
        sa.Column("renamed_to", sa.String(512), nullable=False),
        sa.Column("reserved_at", sa.String(32), nullable=False),
    )
    connection = op.get_bind()
    known = sa.union(sa.select(objective.c.study), sa.select(candidate.c.study))
    left = connection.execute(sa.select(study).where(study.c.name.not_in(known))).all()
    if not left:
        return
    renamed = connection.execute(
        sa.select(event.c.study, sa.cast(event.c.data, sa.Text).label("data"))
        .where(event.c.kind == "renamed")
        .order_by(event.c.at)  # of two with one former name, the later one counts
    )
    present: dict[str, Any] = {json.loads(row.data)["from"]: row.study for row in renamed}
    for row in left:
        if row.name in present:
            reserved = {"name": row.name, "renamed_to": present[row.name]}
            op.bulk_insert(reservation, [reserved | {"reserved_at": row.created_at}])
        connection.execute(sa.delete(driver).where(driver.c.study == row.name))
        connection.execute(sa.delete(study).where(study.c.name == row.name))
