"""The data types that candidates compute in, by the instructions of the device."""

from __future__ import annotations

import torch

from moenas.space.sections import Protocol, Recipe

_CPU_FLAGS = ("avx512_bf16", "amx_bf16")
"""Instructions for products in bfloat16: AVX-512 (AMD Zen 4, Intel Cooper Lake) and AMX."""


def has_bfloat16(device: torch.device | str) -> bool:
    """Whether a device multiplies in bfloat16 by itself; the others emulate it, and slowly.

    A GPU does so from compute capability 8.0 on.
    """
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    flags = torch.cpu.get_capabilities()
    return any(bool(flags.get(name)) for name in _CPU_FLAGS)


def training_dtype(recipe: Recipe, device: torch.device | str) -> torch.dtype:
    """Return the type that training computes in; weights and optimizer stay float32.

    `auto` is bfloat16 where the device has it. It never depends on the candidate or on a timing,
    so all candidates of a device agree.
    """
    return _named(recipe.dtype, has_bfloat16(device))


def deployed_dtype(protocol: Protocol, device: torch.device | str) -> torch.dtype:
    """Return the type of the weights and activations of a model whose latency is measured.

    `auto` is bfloat16 on a GPU that has it, and float32 on a CPU. On a CPU a decoding step of a
    small model consists of small operations, and takes about twice as long in bfloat16.
    """
    on_gpu = torch.device(device).type == "cuda"
    return _named(protocol.dtype, on_gpu and has_bfloat16(device))


def _named(name: str, fast: bool) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32
