"""A job names its device, and a process has its share of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moenas.errors import MachineError
from moenas.evaluate import devices

GPU = torch.device("cuda", 0)


def test_a_device_that_is_not_here_is_a_fault_of_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert devices.named("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(MachineError, match=r"sees none there \(CUDA_VISIBLE_DEVICES='3'\)"):
        devices.named("cuda")
    with pytest.raises(MachineError, match="the job names the device 'tpu'; there are cpu and"):
        devices.named("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.named("cuda") == GPU


@pytest.mark.parametrize("gib", [8, 80])
@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_shares_and_the_contexts_of_all_fit_a_gpu(gib: int, count: int) -> None:
    whole = gib * 2**30
    taken = devices.tensor_share(1 / count, whole) * whole
    assert taken > 0
    assert count * taken <= whole
    if gib == 80:
        assert count * (taken + devices.CONTEXT_BYTES) <= whole * (1 + 1e-9)
    assert devices.tensor_share(1.0, whole) == 1.0


class Properties:
    total_memory = 80 * 2**30


def test_a_process_is_given_its_share_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *a: given.append(a))
    devices.prepare_process(torch.device("cpu"), 0.5)
    devices.prepare_process(GPU)
    assert given == []
    devices.prepare_process(GPU, 0.5)
    assert given == [(devices.tensor_share(0.5, Properties.total_memory), GPU)]


def test_a_gpu_that_is_lost_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(device: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")

    assert devices.tidy(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert devices.tidy(GPU) is None
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    said = devices.tidy(GPU)
    assert said == "AcceleratorError: CUDA error: an illegal memory access was encountered"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_process_takes_no_more_than_its_share() -> None:
    whole = torch.cuda.get_device_properties(GPU).total_memory
    devices.prepare_process(GPU, 0.25)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(int(0.3 * whole), dtype=torch.uint8, device=GPU)
        held = torch.empty(int(0.2 * whole), dtype=torch.uint8, device=GPU)
        del held
        assert devices.tidy(GPU) is None
        assert torch.cuda.memory_reserved(GPU) < 0.1 * whole
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)
