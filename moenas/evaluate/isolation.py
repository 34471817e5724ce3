"""What the code of a candidate changes of this process is put back after it."""

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
from typing import Any

import numpy as np
import torch

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
    threads, dtype, device = torch.get_num_threads(), torch.get_default_dtype(), _default_device()
    grad, anomaly = torch.is_grad_enabled(), torch.is_anomaly_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    precision, state = torch.get_float32_matmul_precision(), torch.get_rng_state()
    cudnn = torch.backends.cudnn
    flags = cudnn.enabled, cudnn.benchmark, cudnn.deterministic
    autocast = {kind: torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")}

    def cudnn_flags() -> None:
        if (cudnn.enabled, cudnn.benchmark, cudnn.deterministic) != flags:
            cudnn.enabled, cudnn.benchmark, cudnn.deterministic = flags

    def only_if(differs: Callable[[], bool], restore: Restore) -> Restore:
        return lambda: differs() and restore()

    return [
        only_if(lambda: torch.get_num_threads() != threads, lambda: torch.set_num_threads(threads)),
        lambda: torch.set_default_dtype(dtype),
        only_if(
            lambda: _default_device() != device,
            lambda: torch.set_default_device(device),
        ),
        lambda: torch.set_grad_enabled(grad),
        lambda: torch.set_anomaly_enabled(anomaly),
        lambda: torch.use_deterministic_algorithms(deterministic, warn_only=warn_only),
        lambda: torch.set_float32_matmul_precision(precision),
        lambda: torch.set_rng_state(state),
        *(lambda k=k, on=on: torch.set_autocast_enabled(k, on) for k, on in autocast.items()),
        cudnn_flags,
        *_of_cuda(),
    ]


def _of_cuda() -> list[Restore]:
    """Return what puts the choice of CUDA's kernels back; it can be set without a GPU."""
    cuda = torch.backends.cuda
    kernels = {
        cuda.enable_flash_sdp: cuda.flash_sdp_enabled(),
        cuda.enable_mem_efficient_sdp: cuda.mem_efficient_sdp_enabled(),
        cuda.enable_math_sdp: cuda.math_sdp_enabled(),
        cuda.enable_cudnn_sdp: cuda.cudnn_sdp_enabled(),
    }
    names = (
        "allow_bf16_reduced_precision_reduction",
        "allow_fp16_reduced_precision_reduction",
    )
    reductions = {name: getattr(cuda.matmul, name) for name in names}

    def precision() -> None:
        for name, value in reductions.items():
            if getattr(cuda.matmul, name) != value:
                setattr(cuda.matmul, name, value)

    return [*(lambda f=f, on=on: f(on) for f, on in kernels.items()), precision]


def _default_device() -> torch.device | None:
    """Return the device of `torch.set_default_device`, None if there is none."""
    found = torch.get_default_device()
    return None if found.type == "cpu" else found


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
