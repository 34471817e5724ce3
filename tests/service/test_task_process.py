"""A process that stays: its results, its errors, its limit of time and its death."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from moenas.errors import SourceLocation, SpaceError
from moenas.service.task_process import TaskLostError, TaskProcess, TaskTimeoutError


@pytest.fixture
def process() -> Iterator[TaskProcess]:
    started = TaskProcess("tests")
    yield started
    started.close()


def fail() -> None:
    raise SpaceError("wrong", location=SourceLocation("a.yaml", 3, 4), path="train.batch")


def stumble() -> None:
    raise ZeroDivisionError


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_one_process_serves_one_task_after_another(process: TaskProcess) -> None:
    first = process.call(os.getpid)
    assert first != os.getpid()
    assert process.call(os.getpid) == first
    assert process.call(divmod, 7, 2) == (3, 1)


def test_an_error_keeps_its_place(process: TaskProcess) -> None:
    with pytest.raises(SpaceError, match=r"a\.yaml:3:4: train\.batch: wrong") as caught:
        process.call(fail)
    assert caught.value.location == SourceLocation("a.yaml", 3, 4)
    with pytest.raises(TaskLostError, match="ZeroDivisionError"):
        process.call(stumble)


def test_a_task_that_takes_too_long_is_ended(process: TaskProcess) -> None:
    first = process.call(os.getpid)
    with pytest.raises(TaskTimeoutError, match="longer than"):
        process.call(time.sleep, 60, timeout=0.2)
    assert process.call(os.getpid) != first
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_a_process_that_dies_is_replaced(process: TaskProcess) -> None:
    with pytest.raises(TaskLostError, match="died"):
        process.call(die)
    assert process.call(abs, -2) == 2


def test_a_close_does_not_wait_for_a_task(process: TaskProcess) -> None:
    process.call(os.getpid)
    timer = threading.Timer(0.2, process.close)
    timer.start()
    began = time.monotonic()
    with pytest.raises(TaskLostError, match="died"):
        process.call(time.sleep, 60)
    assert time.monotonic() - began < 20
    timer.join()
