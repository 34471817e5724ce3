"""Failures by their exceptions: whose fault each is, and a text that can be stored."""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterator

from moenas.errors import FAILURE_KINDS, CandidateError, InputError, MachineError
from moenas.passwords import hide
from moenas.records import Failure

MESSAGE = 4096
"""Characters of a failure's message at most."""
TRACEBACK = 32 * 1024
"""Characters of a failure's traceback at most."""

_ERRNOS = ("ENOSPC", "EDQUOT", "EIO", "EMFILE", "ENFILE", "EROFS", "ESTALE", "ENOLCK")
MACHINE_ERRNOS = {getattr(errno, name) for name in _ERRNOS if hasattr(errno, name)}
"""Errors of the operating system that no candidate is to blame for."""
MACHINE_TEXTS = (
    "No space left on device",
    "Disk quota exceeded",
    "No usable temporary directory",
    "busy or unavailable",
    "no CUDA-capable device",
    "CUDA driver initialization failed",
    "CUDA unknown error",
    "uncorrectable ECC error",
    "GPU is lost",
)
"""What libraries say of the same faults, and of a GPU that cannot be used."""

DEVICE_TEXTS = (
    "AcceleratorError",
    "CUDA error",
    "CUBLAS_STATUS_",
    "CUDNN_STATUS_",
    "cuDNN error",
    "device-side assert",
)
"""What PyTorch says of an error of CUDA, after which a process may not be able to use its GPU."""
NO_MEMORY_TEXTS = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
)
"""What PyTorch and libraries of CUDA say in a RuntimeError where memory is short."""

# ECMA-48: a control sequence, a string ended by BEL or ST, or another escape of two bytes.
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-_a-z])")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def clean(text: str, limit: int) -> str:
    """Return a text without passwords, escapes and control characters; a long one is cut in its
    middle."""
    text = hide(text)
    if len(text) > 4 * limit:
        text = text[: 2 * limit] + text[-2 * limit :]
    text = text.replace("\r\n", "\n").encode("utf-8", "replace").decode()
    text = _CONTROLS.sub("", _ESCAPES.sub("", text))
    if len(text) <= limit:
        return text
    note = "\n... cut ...\n"
    head = (limit - len(note)) // 4
    return text[:head] + note + text[-(limit - len(note) - head) :]


def text_of(error: BaseException) -> str:
    """Return what an exception says; its own code runs for that, so it may fail."""
    try:
        return str(error)
    except BaseException:
        return "(its text cannot be had)"


def error_line(error: BaseException) -> str:
    """Return class and first line of an exception."""
    lines = clean(text_of(error), MESSAGE).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def located(error: BaseException) -> str:
    """Return `file:line: class: message` of an exception that nobody foresaw."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""
    return place + error_line(error)


def origin(error: BaseException) -> str:
    """Return class and place of an exception, or of the one that it was raised from.

    It tells whether two exceptions have one reason: their messages may hold a shape or a process
    id. An exception that was not raised has none.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, its causes, and the members of a group."""
    waiting, seen = [error], set[int]()
    while waiting and len(seen) < 100:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions
        before = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
        if before is not None:
            waiting.append(before)


def machine_fault(error: BaseException) -> BaseException | None:
    """Return the fault of the machine that an exception tells of, or None."""
    for one in chain(error):
        if isinstance(one, MachineError) or (
            isinstance(one, OSError) and one.errno in MACHINE_ERRNOS
        ):
            return one
        foreign = isinstance(one, OSError | RuntimeError)
        if foreign and any(text in text_of(one)[:100_000] for text in MACHINE_TEXTS):
            return one
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the CPU had no room; some libraries raise a plain RuntimeError."""
    if isinstance(error, RuntimeError):
        text = text_of(error)[:100_000]
        if any(known in text for known in NO_MEMORY_TEXTS):
            return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    # torch.OutOfMemoryError by name: this module loads no torch.
    names = {cls.__name__ for cls in type(error).__mro__}
    return isinstance(error, MemoryError) or "OutOfMemoryError" in names


def traceback_of(error: BaseException) -> str:
    """Return the traceback of an exception, as long as it may be stored."""
    try:
        return clean("".join(traceback.format_exception(error)), TRACEBACK)
    except BaseException as another:
        return f"(no traceback: {type(another).__name__})"


def failure_of(error: BaseException) -> Failure:
    """Say why a candidate has no values."""
    fault = machine_fault(error)
    if fault is not None:
        text = text_of(fault) if isinstance(fault, MachineError) else error_line(fault)
        return Failure("environment", clean(text, MESSAGE), traceback_of(error), origin(error))
    if isinstance(error, CandidateError):
        tail = traceback_of(error) if error.__cause__ else ""
        kind = error.kind if error.kind in FAILURE_KINDS else "error"
        return Failure(kind, clean(text_of(error), MESSAGE), tail, origin(error))
    if isinstance(error, InputError):
        return Failure("refused", clean(text_of(error), MESSAGE), cause=origin(error))
    kind = "out_of_memory" if is_out_of_memory(error) else "error"
    return Failure(kind, clean(located(error), MESSAGE), traceback_of(error), origin(error))


def is_of_the_device(failure: Failure) -> bool:
    """Whether a candidate met an error of CUDA; memory that is short is none."""
    if failure.kind == "out_of_memory":
        return False
    return any(text in failure.message for text in DEVICE_TEXTS)


def internal(error: BaseException) -> Failure:
    """Describe an exception of moenas itself."""
    return Failure(
        "internal", clean(error_line(error), MESSAGE), traceback_of(error), origin(error)
    )
