"""Whose fault an exception is, and a text that can be stored and printed."""

from __future__ import annotations

import errno

import pytest
import torch

from moenas.errors import CandidateError, DivergedError, InputError, MachineError
from moenas.failures import clean, failure_of, is_of_the_device, one_line
from moenas.records import Failure


def wrapped(error: BaseException) -> BaseException:
    """The exception that an objective makes of another."""
    try:
        try:
            raise error
        except BaseException as inner:
            raise ValueError("outside") from inner
    except ValueError as outer:
        return outer


class Hostile(Exception):
    def __str__(self) -> str:
        raise SystemExit(0)


FULL = OSError(errno.ENOSPC, "No space left on device", "/tmp/x")


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (ValueError("text\nmore"), "error", "ValueError: text"),
        (SystemExit(0), "error", "SystemExit: 0"),
        (Hostile(), "error", "its text cannot be had"),
        (FileNotFoundError(2, "No such file", "my.txt"), "error", "my.txt"),
        (DivergedError("the loss"), "diverged", "the loss"),
        (InputError("a file"), "refused", "a file"),
        (FULL, "environment", "/tmp/x"),
        (wrapped(FULL), "environment", "/tmp/x"),
        (OSError(errno.EIO, "I/O error", "/data"), "environment", "/data"),
        (OSError(errno.EMFILE, "Too many open files"), "environment", "Too many"),
        (OSError(errno.EROFS, "Read-only", "/x"), "environment", "/x"),
        (OSError(errno.ESTALE, "Stale", "/nfs"), "environment", "/nfs"),
        (ExceptionGroup("two", [ValueError("a"), FULL]), "environment", "/tmp/x"),
        (MachineError("no lock"), "environment", "no lock"),
        (wrapped(MachineError("no lock")), "environment", "no lock"),
        (
            FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"),
            "environment",
            "temporary",
        ),
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
         "environment", "busy"),
        (ValueError("No space left on device"), "error", "No space"),
        (MemoryError(), "out_of_memory", "MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory", "CUDA"),
        (RuntimeError("DefaultCPUAllocator: can't allocate"), "out_of_memory", "Default"),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be"),
         "out_of_memory", "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
         "out_of_memory", "CUBLAS"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "out_of_memory", "cuDNN"),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), "error", "assert"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out_of_memory", "allocate"),
    ],
)  # fmt: skip
def test_the_kind_of_an_exception(error: BaseException, kind: str, words: str) -> None:
    failure = failure_of(error)
    assert failure.kind == kind
    assert words in failure.message


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (ValueError("the reason"), False),
    ],
)
def test_an_error_of_the_gpu_is_told_from_others(error: BaseException, lost: bool) -> None:
    assert is_of_the_device(failure_of(error)) == lost


def test_texts_are_cut_and_free_of_escapes() -> None:
    assert (
        clean("a\x1b[1;31mb\x1b]0;title\x07c\x1b(d\x00e\tf\ng\u00e9", 100) == "abc(de\tf\ng\u00e9"
    )
    long = clean("head" + "x" * 10**7 + "tail", 1000)
    assert len(long) <= 1000
    assert long.startswith("headx")
    assert long.endswith("xtail")
    failure = failure_of(ValueError("\x1b[31m" + "y" * 10**7))
    assert len(failure.message) <= 4096
    assert len(failure.traceback) <= 32 * 1024
    assert "\x1b" not in failure.message + failure.traceback
    assert len(one_line(ValueError("z" * 10**7))) < 5000


def raised(number: int) -> BaseException:
    """An error of one line, whose message holds a number, as shapes and process ids do."""
    try:
        try:
            raise ValueError(f"shape ({number}, 4)")
        except ValueError as error:
            raise CandidateError(f"objective 'x': shape ({number}, 4)") from error
    except CandidateError as error:
        return error


def test_failures_of_one_line_of_code_have_one_reason() -> None:
    one, two = failure_of(raised(3)), failure_of(raised(5))
    assert one.message != two.message
    assert one.has_reason_of(two)
    assert one.cause.startswith(f"ValueError {__file__}:")
    elsewhere = failure_of(ValueError("shape (3, 4)"))
    assert not one.has_reason_of(elsewhere)


def test_without_a_cause_the_texts_are_compared() -> None:
    stored = Failure("error", "a.py:3: no file x")
    assert stored.has_reason_of(Failure("error", "a.py:3: no file x", cause="OSError a.py:3"))
    assert not stored.has_reason_of(Failure("error", "a.py:3: no file y"))
    assert not stored.has_reason_of(Failure("refused", "a.py:3: no file x"))
