"""Changes of this process by the code of a candidate are undone after it."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")
Restore = Callable[[], object]


@contextmanager
def put_back() -> Iterator[None]:
    """Leave this process as it was: torch's modes, random states, environment, folder, signals.

    What is not: modules that were imported or changed, threads, open files, child processes.
    """
    restores = [*_of_torch(), *_of_python(), *_of_signals()]
    try:
        yield
    finally:
        for restore in restores:
            # One that fails, as the folder is gone, must not keep the others from running.
            with suppress(Exception):
                restore()


def _of_torch() -> list[Restore]:
    """Return what puts torch's settings back."""
    cudnn = torch.backends.cudnn

    def deterministic() -> tuple[bool, bool]:
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        return torch.are_deterministic_algorithms_enabled(), warn_only

    def set_deterministic(value: tuple[bool, bool]) -> None:
        torch.use_deterministic_algorithms(value[0], warn_only=value[1])

    def cudnn_flags() -> tuple[bool, bool, bool]:
        return cudnn.enabled, cudnn.benchmark, cudnn.deterministic

    def set_cudnn_flags(value: tuple[bool, bool, bool]) -> None:
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic = value

    state = torch.get_rng_state()
    return [
        _unless_equal(torch.get_num_threads, torch.set_num_threads),
        _unless_equal(torch.get_default_dtype, torch.set_default_dtype),
        _unless_equal(_default_device, torch.set_default_device),
        _unless_equal(torch.is_grad_enabled, torch.set_grad_enabled),
        _unless_equal(torch.is_anomaly_enabled, torch.set_anomaly_enabled),
        _unless_equal(deterministic, set_deterministic),
        _unless_equal(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        _unless_equal(cudnn_flags, set_cudnn_flags),
        lambda: torch.set_rng_state(state),
        *(
            _unless_equal(
                partial(torch.is_autocast_enabled, kind), partial(torch.set_autocast_enabled, kind)
            )
            for kind in ("cpu", "cuda")
        ),
        *_of_cuda(),
    ]


def _unless_equal(read: Callable[[], T], write: Callable[[T], object]) -> Restore:
    """Return what writes a setting back if it is another one than now.

    Some writes are dear: torch imports its compiler to set deterministic algorithms, over 1 s.
    """
    before = read()
    return lambda: None if read() == before else write(before)


def _of_cuda() -> list[Restore]:
    """Return what puts the choice of CUDA's kernels back; it can be set without a GPU."""
    cuda = torch.backends.cuda
    names = (
        "allow_bf16_reduced_precision_reduction",
        "allow_fp16_reduced_precision_reduction",
    )
    return [
        _unless_equal(cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
        _unless_equal(cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
        _unless_equal(cuda.math_sdp_enabled, cuda.enable_math_sdp),
        _unless_equal(cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
        *(
            _unless_equal(partial(getattr, cuda.matmul, name), partial(setattr, cuda.matmul, name))
            for name in names
        ),
    ]


def _default_device() -> torch.device | None:
    """Return the device of `torch.set_default_device`, None if there is none."""
    device = torch.get_default_device()
    return None if device.type == "cpu" else device


def _of_python() -> list[Restore]:
    """Return what puts the interpreter's settings back."""
    environment, path = dict(os.environ), list(sys.path)
    streams = sys.stdin, sys.stdout, sys.stderr
    folder = _folder()
    state, numpy_state = random.getstate(), np.random.get_state()
    filters, depth, collecting = list(warnings.filters), sys.getrecursionlimit(), gc.isenabled()
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook

    def environ() -> None:
        if dict(os.environ) != environment:
            os.environ.clear()
            os.environ.update(environment)

    def standard_streams() -> None:
        sys.stdin, sys.stdout, sys.stderr = streams

    def exception_hooks() -> None:
        sys.excepthook, threading.excepthook, sys.unraisablehook = hooks

    def warning_filters() -> None:
        if warnings.filters != filters:
            warnings.resetwarnings()
            warnings.filters[:] = filters  # type: ignore[index]

    def working_directory() -> None:
        if folder is not None and _folder() != folder:
            os.chdir(folder)

    return [
        environ,
        standard_streams,
        exception_hooks,
        warning_filters,
        working_directory,
        lambda: sys.path.__setitem__(slice(None), path),
        lambda: random.setstate(state),
        lambda: np.random.set_state(numpy_state),
        lambda: sys.setrecursionlimit(depth),
        gc.enable if collecting else gc.disable,
    ]


def _folder() -> str | None:
    """Return the working directory, None if it is gone."""
    try:
        return os.getcwd()
    except OSError:
        return None


def _of_signals() -> list[Restore]:
    """Return what puts signal handlers and the alarm clock back; only the main thread may."""
    if threading.current_thread() is not threading.main_thread():
        return []
    handlers: dict[signal.Signals, Any] = {}
    for number in signal.valid_signals():
        if isinstance(number, signal.Signals) and number not in (signal.SIGKILL, signal.SIGSTOP):
            handlers[number] = signal.getsignal(number)
    alarm = signal.getitimer(signal.ITIMER_REAL)

    def restore() -> None:
        for number, handler in handlers.items():
            # None: the handler is not Python's, and cannot be set from here.
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        if alarm[0] == 0.0:
            signal.setitimer(signal.ITIMER_REAL, 0.0)

    return [restore]


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Let what is printed meanwhile go to stderr, by child processes too: stdout is data."""
    before = sys.stdout
    with ExitStack() as stack:
        sys.stdout = sys.stderr
        stack.callback(setattr, sys, "stdout", before)
        if threading.current_thread() is threading.main_thread():
            with suppress(OSError, ValueError, AttributeError):
                before.flush()
                kept = os.dup(1)
                stack.callback(os.close, kept)
                stack.callback(os.dup2, kept, 1)
                os.dup2(2, 1)
        yield
