"""The short form of `make chaos`: a few faults of each kind, by a fixed seed."""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path
from random import Random

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import oracle
import scenarios as faults
import sqlalchemy
from arena import Arena, Outcome, end

pytestmark = pytest.mark.integration


def assert_survived(outcome: Outcome) -> None:
    assert outcome.problems == []
    assert outcome.survived == outcome.tried > 0


@pytest.mark.slow
def test_driver_kills() -> None:
    assert_survived(faults.driver_kills(Random(1), 4))


@pytest.mark.slow
def test_driver_kills_with_early_stopping() -> None:
    assert_survived(faults.driver_kills(Random(11), 2, stopping="successive_halving"))


def test_two_drivers() -> None:
    assert_survived(faults.double_launches(Random(2), 1))


@pytest.mark.slow
def test_a_moved_database() -> None:
    assert_survived(faults.moved_database(Random(3), 1))


@pytest.mark.slow
def test_a_full_disk() -> None:
    assert_survived(faults.full_disk(Random(4), 2))


@pytest.mark.slow
def test_other_programs() -> None:
    assert_survived(faults.other_programs(Random(5), 3))


@pytest.mark.slow
def test_signals() -> None:
    assert_survived(faults.signals(Random(6), 4))


@pytest.mark.slow
def test_changed_data() -> None:
    assert_survived(faults.changed_data(Random(7), 2))


@pytest.mark.slow
def test_worker_kills() -> None:
    assert_survived(faults.worker_kills(Random(8), 6))


@pytest.mark.slow
def test_database_restarts() -> None:
    assert_survived(faults.database_restarts(Random(9), 3))


def test_the_oracle_sees_what_is_wrong() -> None:
    """Each damage to a sound study is named; without that the other tests could not fail."""
    damages = {
        "DELETE FROM moenas_evaluation WHERE trial = 1": "our trials are",
        "UPDATE trials SET state = 'RUNNING' WHERE number = 0": "trial 0 is RUNNING",
        "UPDATE trial_values SET value = 7 WHERE objective = 1": "is not",
        "DELETE FROM moenas_front": "the front is",
        "UPDATE moenas_hypervolume SET hypervolume = 3": "the hypervolume is",
        "UPDATE moenas_evaluation SET weights_sha256 = 'a' WHERE status = 'complete'": "weights",
        "INSERT INTO moenas_driver VALUES ('{study}', 'o', 'h', 'm', 1, 'b', 0)": "a driver is",
    }
    with Arena(Random(0), trials=3) as arena:
        assert end(arena.start())[0] == 0
        database = sqlite3.connect(arena.folder / "moenas.db")
        sound = sqlite3.connect(":memory:")
        database.backup(sound)
        for statement, said in damages.items():
            sound.backup(database)
            assert arena.wrong() == []
            engine = sqlalchemy.create_engine(arena.url)
            with engine.begin() as connection:
                connection.execute(sqlalchemy.text(statement.format(study=arena.study)))
            engine.dispose()
            problems = oracle.problems(arena.url, arena.folder, arena.study, 3)
            assert any(said in text for text in problems), (statement, problems)
        database.close()
        sound.close()
