"""Calibrations as rows: the newest of each set of parts and workload, and those of studies."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import Connection, insert, select

from moenas.records import Calibration, Plain
from moenas.store import statements, tables
from moenas.store.reader import StoreReader
from moenas.store.store import Store


def add(store: Store, calibration: Calibration) -> None:
    """Store a calibration in place of an earlier one of the same parts and workload."""
    table = tables.calibration
    row = {
        "parts_sha256": calibration.parts_sha256,
        "workload": calibration.workload,
        "objective": calibration.objective,
        "made_at": calibration.made_at,
        "calibration": calibration.plain(),
    }

    def change(connection: Connection) -> None:
        added = statements.upsert(connection, table).values(row)
        key = [table.c.parts_sha256, table.c.workload]
        connection.execute(added.on_conflict_do_update(index_elements=key, set_=row))

    store.transact(change)


def of_workload(store: StoreReader, parts_sha256: str, workload: str) -> Calibration | None:
    """Return the calibration of these parts under exactly this workload, or None."""
    table = tables.calibration
    same = (table.c.parts_sha256 == parts_sha256) & (table.c.workload == workload)

    def read(connection: Connection) -> Calibration | None:
        if not statements.exists(connection, table):
            return None  # a reader does not change a database of an older schema
        plain = connection.scalar(select(table.c.calibration).where(same))
        return None if plain is None else Calibration.parse(plain)

    return store.query(read)


def of_study(store: Store, study: str, parts_sha256: str, workload: str) -> Calibration | None:
    """Return the calibration of a study under a workload: the first that a run of it found.

    It is stored with the study, so a newer one changes nothing there unless
    `--accept-changes` takes it.
    """
    table, newest = tables.study_calibration, tables.calibration
    own = (table.c.study == study) & (table.c.workload == workload)
    same = (newest.c.parts_sha256 == parts_sha256) & (newest.c.workload == workload)

    def change(connection: Connection) -> Calibration | None:
        plain = connection.scalar(select(table.c.calibration).where(own))
        if plain is None:
            plain = connection.scalar(select(newest.c.calibration).where(same))
            if plain is None:
                return None
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            row = {"study": study, "workload": workload, "taken_at": now, "calibration": plain}
            connection.execute(insert(table), row)
        return Calibration.parse(plain)

    return store.apply(study, change)


def kept(store: StoreReader, study: str) -> list[Plain]:
    """Return the calibrations by which a study refuses candidates, and when it took each.

    `newest_made_at` is that of the newest calibration of the same parts and workload: a later
    one than `made_at` changes nothing in the study unless `--accept-changes` takes it.
    """
    own, newest = tables.study_calibration, tables.calibration

    def read(connection: Connection) -> list[Plain]:
        if not statements.exists(connection, own):
            return []  # a reader does not change a database of an older schema
        wanted = select(own.c.calibration, own.c.taken_at).where(own.c.study == study)
        rows = []
        for plain, taken_at in connection.execute(wanted.order_by(own.c.workload)):
            one = Calibration.parse(plain)
            same = (newest.c.parts_sha256 == one.parts_sha256) & (newest.c.workload == one.workload)
            rows.append(
                {
                    "objective": one.objective,
                    "device": one.device["name"],
                    "workload": one.workload,
                    "made_at": one.made_at,
                    "taken_at": taken_at,
                    "newest_made_at": connection.scalar(select(newest.c.made_at).where(same)),
                }
            )
        return rows

    return store.query(read)


def workloads(store: StoreReader, parts_sha256: str, objective: str) -> list[str]:
    """Return the workloads under which an objective of these parts has a calibration."""
    table = tables.calibration
    wanted = select(table.c.workload).where(
        table.c.parts_sha256 == parts_sha256, table.c.objective == objective
    )

    def read(connection: Connection) -> list[str]:
        there = statements.exists(connection, table)
        return sorted(connection.scalars(wanted)) if there else []

    return store.query(read)
