"""The device of a job: a process is prepared for it, and freed of its memory afterwards."""

from __future__ import annotations

import gc
import os
import platform
import socket
from pathlib import Path

import torch

from moenas.errors import MachineError
from moenas.failures import error_line
from moenas.model.mixers.softmax_attention import avoid_cudnn_attention
from moenas.records import Plain

CONTEXT_BYTES = 896 * 2**20
"""Bytes of a GPU that each process needs beside torch's tensors: CUDA's context and libraries.

An H100 had 827 MiB with CUDA 13.0 and torch 2.11 after a candidate (docs/gpu.md).
"""


def has_gpu() -> bool:
    """Whether this process sees a GPU that PyTorch can use."""
    return torch.cuda.is_available()


def n_gpus() -> int:
    """Return how many GPUs this process sees."""
    return torch.cuda.device_count()


def named(name: str) -> torch.device:
    """Return the device that a job names: the CPU, or the first GPU that this process sees.

    Raises:
        MachineError: if this process does not see it.
    """
    if name == "cpu":
        return torch.device("cpu")
    if name != "cuda":
        raise MachineError(f"the job names the device '{name}'; there are cpu and cuda")
    if not has_gpu():
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = "" if given is None else f" (CUDA_VISIBLE_DEVICES={given!r})"
        raise MachineError(
            f"host {os.uname().nodename}: the job names a GPU, and PyTorch sees none there{seen}"
        )
    return torch.device("cuda", 0)


def of_candidates(gpus: float | None) -> torch.device:
    """Return the device that candidates run on here, by `search.gpus`: a GPU where there is one."""
    return named("cuda" if gpus != 0 and has_gpu() else "cpu")


def device_key(device: torch.device) -> str:
    """Return what tells one device of this host from another: `cpu` or `cuda:<uuid>`."""
    if device.type == "cuda":
        return f"cuda:{torch.cuda.get_device_properties(device).uuid}"
    return device.type


def device_name(device: torch.device) -> str:
    """Return the model name of a device; two devices of one name are taken to be equally fast."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def is_called(device: str, name: str) -> bool:
    """Whether the words of a name stand one after another in the model name of a device."""
    words, wanted = device.casefold().split(), name.casefold().split()
    starts = range(len(words) - len(wanted) + 1)
    return any(words[i : i + len(wanted)] == wanted for i in starts)


def seen_devices() -> list[Plain]:
    """Return key, kind and name of the CPU and of each GPU that this process sees."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(n_gpus()))]
    return [
        {"key": device_key(device), "kind": device.type, "name": device_name(device)}
        for device in devices
    ]


def device_info(device: torch.device, threads: int, dtype: torch.dtype) -> Plain:
    """Return what an evaluation stores of the device that it ran on."""
    return {
        "key": device_key(device),
        "kind": device.type,
        "name": device_name(device),
        "cores": os.cpu_count(),
        "threads": threads,
        "dtype": str(dtype).removeprefix("torch."),
        "host": socket.gethostname(),
    }


def prepare_process(device: torch.device, share: float | None = None) -> None:
    """Set what a process must have set for candidates on this device; before each of them.

    `share` is the part of a GPU's memory that the process may take, its CUDA context included; None
    sets no bound.
    """
    if device.type != "cuda":
        return
    avoid_cudnn_attention()
    if share is not None:
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(tensor_share(share, whole), device)


def tensor_share(share: float, whole: int) -> float:
    """Return the part of a GPU's `whole` bytes for the tensors of a process with a share of it."""
    return 1.0 if share >= 1 else max(share / 2, share - CONTEXT_BYTES / whole)


def tidy(device: torch.device) -> str | None:
    """Free what a candidate has left in this process; say why the device is lost, if it is.

    An error inside a kernel, such as a failed assertion or an illegal address, ends the CUDA
    context. Every later call of the process fails.
    """
    gc.collect()
    if device.type != "cuda":
        return None
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError as error:
        return error_line(error)
    return None
