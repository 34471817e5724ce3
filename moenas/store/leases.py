"""Leases: one process at a time runs a study, by a row that it renews."""

from __future__ import annotations

import os
import time
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from moenas.errors import StudyBusyError
from moenas.processes import machine, process_start
from moenas.store.tables import driver

STALE_S = 30.0
"""A driver that was not seen for this long is taken for dead."""

AHEAD_S = 2.0
"""A heartbeat so far in the future comes from a host with another clock."""


def clock(connection: Connection) -> float:
    """Return seconds since 1970 by the clock that all drivers of this database share."""
    if connection.dialect.name == "sqlite":
        return time.time()
    return float(
        connection.execute(select(func.extract("epoch", func.clock_timestamp()))).scalar_one()
    )


def is_alive(row: Row[Any], now: float) -> bool:
    """Say whether the process of a row is still at work: a driver, or a server."""
    here = machine()
    if here and row.machine == here and process_start(row.pid) != row.process_start:
        return False
    return bool(now - row.heartbeat < STALE_S)


def _row(connection: Connection, study: str) -> Row[Any] | None:
    return connection.execute(select(driver).where(driver.c.study == study)).first()


def holder(connection: Connection, study: str) -> str | None:
    """Say who runs a study now, as "pid 123 on host h (last seen 4 s ago)", or return None."""
    row, now = _row(connection, study), clock(connection)
    if row is None or not is_alive(row, now):
        return None
    ahead = row.heartbeat - now
    seen = f"last seen {max(0.0, -ahead):.0f} s ago"
    if ahead > AHEAD_S:
        seen = f"its clock is {ahead:.0f} s ahead of the clock of this host"
    return f"pid {row.pid} on host {row.host} ({seen})"


def claim(connection: Connection, study: str, owner: str) -> str | None:
    """Make `owner` the driver of a study; the caller's transaction has locked the study's row.

    Returns who runs it, if another one lives: its process is there and it was seen lately. A
    heartbeat in the future is brought back to now, so that it counts for `STALE_S` and no longer. A
    living driver writes a new one.
    """
    row, now = _row(connection, study), clock(connection)
    if row is not None and row.owner != owner and is_alive(row, now):
        who = holder(connection, study)
        if row.heartbeat > now:
            this = driver.c.study == study
            connection.execute(update(driver).where(this).values(heartbeat=now))
        return who
    connection.execute(delete(driver).where(driver.c.study == study))
    connection.execute(
        insert(driver).values(
            study=study,
            owner=owner,
            host=os.uname().nodename,
            machine=machine(),
            pid=os.getpid(),
            process_start=process_start(os.getpid()) or "",
            heartbeat=now,
        )
    )
    return None


def renew(connection: Connection, study: str, owner: str) -> None:
    """Say that the driver lives.

    Raises:
        StudyBusyError: if another one has taken over, since this one was not seen for too long.
    """
    mine = (driver.c.study == study) & (driver.c.owner == owner)
    renewed = connection.execute(update(driver).where(mine).values(heartbeat=clock(connection)))
    if not renewed.rowcount:
        now = holder(connection, study) or "another process, which has ended since"
        raise StudyBusyError(
            f"study '{study}' was taken over by {now}: this process was not heard of for"
            f" {STALE_S:.0f} s"
        )


def release(connection: Connection, study: str, owner: str) -> None:
    """Give the study free, if `owner` is its driver."""
    connection.execute(delete(driver).where((driver.c.study == study) & (driver.c.owner == owner)))
