"""Changes of the process by a candidate's code are undone."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moenas.evaluate.isolation import put_back, stdout_to_stderr


def state() -> dict[str, Any]:
    """All of the process that a candidate may change, as far as this looks."""
    return {
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "precision": torch.get_float32_matmul_precision(),
        "kernels": torch.backends.cuda.cudnn_sdp_enabled(),
        "reductions": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        "anomaly": torch.is_anomaly_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "torch random": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "numpy random": np.random.get_state()[1].tolist(),  # type: ignore[index]
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "path": list(sys.path),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "filters": list(warnings.filters),
        "recursion": sys.getrecursionlimit(),
        "collecting": gc.isenabled(),
        "hooks": (sys.excepthook, threading.excepthook),
        "signals": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)],
        "alarm": signal.getitimer(signal.ITIMER_REAL),
    }


def change_everything(folder: Path) -> None:
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    torch.set_float32_matmul_precision("medium")
    torch.backends.cuda.enable_cudnn_sdp(not torch.backends.cuda.cudnn_sdp_enabled())
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = (
        not matmul.allow_bf16_reduced_precision_reduction
    )
    torch.set_anomaly_enabled(True)
    torch.set_autocast_enabled("cpu", True)
    torch.manual_seed(12345)
    random.seed(1)
    np.random.seed(1)
    os.chdir(folder)
    os.environ["NEW"] = "1"
    os.environ.pop("PATH")
    sys.path.insert(0, "/nowhere")
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    warnings.simplefilter("ignore")
    sys.setrecursionlimit(5000)
    gc.disable()
    sys.excepthook = threading.excepthook = print  # type: ignore[assignment]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    signal.alarm(100)


@pytest.mark.parametrize("error", [None, ValueError, SystemExit, KeyboardInterrupt])
def test_everything_is_put_back(tmp_path: Path, error: type[BaseException] | None) -> None:
    before = state()
    with pytest.raises(error) if error else nullcontext(), put_back():
        change_everything(tmp_path)
        with sys.stdout:
            changed = state()
        if error is not None:
            raise error
    assert {name for name in before if changed[name] == before[name]} == set()
    assert state() == before


def test_a_folder_that_is_gone_keeps_nothing_else_from_being_put_back(tmp_path: Path) -> None:
    gone, here = tmp_path / "gone", os.getcwd()
    gone.mkdir()
    os.chdir(gone)
    try:
        with put_back():
            gone.rmdir()
            os.chdir(tmp_path)
            torch.set_grad_enabled(False)
        assert torch.is_grad_enabled()
    finally:
        os.chdir(here)


def test_it_costs_little() -> None:
    began = time.perf_counter()
    for _ in range(100):
        with put_back():
            pass
    assert (time.perf_counter() - began) / 100 < 0.2


def test_what_is_printed_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    with stdout_to_stderr():
        print("one")
        subprocess.run(["echo", "two"], check=True)
    print("three")
    caught = capfd.readouterr()
    assert caught.out == "three\n"
    assert set(caught.err.split()) == {"one", "two"}


def test_a_candidate_loads_no_compiler() -> None:
    """The import of torch._dynamo would take over 1 s of each worker process."""
    code = """if True:
        import sys
        from moenas.evaluate.isolation import put_back
        with put_back():
            pass
        assert "torch._dynamo" not in sys.modules and "sympy" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)
