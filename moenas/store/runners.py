"""Servers that start drivers: each renews a row; another takes over from a dead one."""

from __future__ import annotations

import os
import uuid

from sqlalchemy import Connection, delete, insert, select, update

from moenas.processes import machine, process_start
from moenas.store.leases import clock, is_alive
from moenas.store.tables import runner, submission


def register(connection: Connection) -> str:
    """Store this process as a server and return its id."""
    number = uuid.uuid4().hex
    row = {
        "id": number,
        "host": os.uname().nodename,
        "machine": machine(),
        "pid": os.getpid(),
        "process_start": process_start(os.getpid()) or "",
        "heartbeat": clock(connection),
    }
    connection.execute(insert(runner), row)
    return number


def renew(connection: Connection, number: str) -> bool:
    """Say that a server lives; False if another one has taken over its studies."""
    this = runner.c.id == number
    now = clock(connection)
    return bool(connection.execute(update(runner).where(this).values(heartbeat=now)).rowcount)


def unregister(connection: Connection, number: str) -> None:
    """Remove a server that ends; another one takes over the studies that it leaves running."""
    connection.execute(delete(runner).where(runner.c.id == number))


def take_over(connection: Connection, number: str) -> list[str]:
    """Give the studies of dead servers to a living one; return the names of the studies."""
    now = clock(connection)
    rows = connection.execute(select(runner)).all()
    living = {row.id for row in rows if is_alive(row, now)} | {number}
    for row in rows:
        if row.id not in living:
            connection.execute(delete(runner).where(runner.c.id == row.id))
    left = submission.c.runner.is_not(None) & submission.c.runner.not_in(living)
    names = list(connection.scalars(select(submission.c.study).where(left).with_for_update()))
    if names:
        mine = submission.c.study.in_(names)
        connection.execute(update(submission).where(mine).values(runner=number))
    return names
