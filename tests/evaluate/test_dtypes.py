"""The types that candidates compute in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moenas.evaluate.dtypes import deployed_dtype, has_bfloat16, training_dtype
from moenas.space.sections import Protocol, Recipe

FLAGS = Path("/proc/cpuinfo")


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_named_type_is_taken(name: Any, device: str) -> None:
    wanted = getattr(torch, name)
    assert training_dtype(Recipe(tokens=1, dtype=name), device) == wanted
    assert deployed_dtype(Protocol(dtype=name), device) == wanted


@pytest.mark.parametrize(
    ("device", "fast", "training", "deployed"),
    [
        ("cpu", True, torch.bfloat16, torch.float32),
        ("cpu", False, torch.float32, torch.float32),
        ("cuda", True, torch.bfloat16, torch.bfloat16),
        ("cuda:1", False, torch.float32, torch.float32),
    ],
)
def test_auto_depends_on_the_device_alone(
    device: str,
    fast: bool,
    training: torch.dtype,
    deployed: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast})
    assert training_dtype(Recipe(tokens=1), device) == training
    assert deployed_dtype(Protocol(), device) == deployed


@pytest.mark.skipif(not FLAGS.exists(), reason="the system says elsewhere what its processor has")
def test_the_probe_agrees_with_the_system() -> None:
    flags = FLAGS.read_text().split()
    assert has_bfloat16("cpu") == ("avx512_bf16" in flags or "amx_bf16" in flags)
