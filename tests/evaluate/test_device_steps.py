"""Steps that read nothing on the host: the numbers of those that do, and no read in them."""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import NoHostCopies, WithoutAdamW, cuda_forms

from moenas.data.corpus import Corpus
from moenas.data.domains import Domains, table
from moenas.errors import DivergedError, TimeLimitError
from moenas.evaluate.device_steps import DeviceSteps
from moenas.evaluate.footprint import _Shapes as AnyGroupedProduct
from moenas.evaluate.steps import HostSteps, Steps, TrainingInputs
from moenas.evaluate.training import row_ends, train
from moenas.model.architecture import Architecture, Model
from moenas.records import Plain
from moenas.space.sections import Recipe

RECIPE = Recipe(tokens=40 * 64, context=16, batch=4, lr=0.01, val_tokens=320, dtype="float32")

ROUTERS: dict[str, Plain] = {
    "loss": {"top_k": 2},
    "bias": {"top_k": 2, "score": "sigmoid", "balance": "bias"},
    "capacity": {"top_k": 1, "capacity_factor": 1.0},
    "noise": {"top_k": 2, "selection": "noisy_top_k"},
    "dense": {},
}


def corpus(**more: Any) -> Corpus:
    steps = 1 + (np.random.RandomState(0).rand(6000) < 0.1) * 7
    tokens = (np.cumsum(steps) % 32).astype(np.uint8)
    return Corpus("count", tokens[:5000], tokens[5000:], 32, False, "", [None, None], {}, **more)


def with_domains() -> Corpus:
    plain = table({"train": [("a", 2500), ("b", 2500)], "val": [("a", 1000)]})
    assert plain is not None
    return corpus(domains=Domains.parse(plain))


def architecture(router: Plain) -> Architecture:
    ffn = {"kind": "moe", "n_experts": 4, "d_expert": 16, "router": router}
    ffn = ffn if router else {"kind": "dense", "d_ff": 32}
    mixer = {"kind": "attention", "head_dim": 8}
    blocks: list[Plain] = [{"repeat": 2, "mixer": mixer, "ffn": ffn}]
    return Architecture.parse({"vocab_size": 32, "d_model": 16, "blocks": blocks})


def run(steps: Steps, model: Model, recipe: Recipe) -> tuple[list[list[float]], list[Any]]:
    """Return [mean loss, gradient norm] and the routing of each row."""
    model.train()
    numbers, readings, start = [], [], 0
    for end in row_ends(recipe.steps):
        row = steps.advance(end, None, None, with_domains=end == recipe.steps)
        numbers.append([row.loss / (end - start), row.grad_norm])
        readings.append(steps.meter.read())
        start = end
    steps.close()
    return numbers, readings


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("forms", [nullcontext, cuda_forms])
def test_the_numbers_are_those_of_steps_that_ask_the_host(forms: Any, name: str) -> None:
    rows = []
    for kind, form in ((HostSteps, nullcontext), (DeviceSteps, forms)):
        torch.manual_seed(0)
        model = architecture(ROUTERS[name]).build(seed=0)
        with form():
            numbers, readings = run(kind(TrainingInputs(model, corpus(), RECIPE, 3)), model, RECIPE)
        rows.append((numbers, readings, model.state_dict()))
    (host, host_routing, host_weights), (device, device_routing, weights) = rows
    np.testing.assert_allclose(device, host, rtol=5e-5)
    for one, other in zip(host_routing, device_routing, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.layer == b.layer
            assert a.load.sum() == b.load.sum()
            assert b.logit_rms == pytest.approx(a.logit_rms, rel=1e-3)
    for key, value in host_weights.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=1e-4)


def test_a_gradient_is_not_clipped_where_clipping_is_off() -> None:
    recipe, norms = replace(RECIPE, grad_clip=0.0), []
    for kind in (HostSteps, DeviceSteps):
        model = architecture({"top_k": 2}).build(seed=0)
        norms.append(run(kind(TrainingInputs(model, corpus(), recipe, 3)), model, recipe)[0])
    np.testing.assert_allclose(norms[1], norms[0], rtol=5e-5)


def test_domains_are_counted_in_the_last_row_alone() -> None:
    text = with_domains()
    rows = []
    for kind in (HostSteps, DeviceSteps):
        model = architecture({"top_k": 2}).build(seed=0)
        recipe = replace(RECIPE, tokens=80 * 64)
        readings = run(kind(TrainingInputs(model, text, recipe, 3)), model, recipe)[1]
        assert not any(reading.domains.any() for row in readings[:-1] for reading in row)
        assert readings[-1][0].domains.sum() == 2 * 2 * 64  # two steps of a row, top 2
        rows.append(readings[-1][0].domains.sum(dim=-1))
    assert rows[0].equal(rows[1])


def test_a_run_that_diverges_names_the_first_bad_step() -> None:
    messages = []
    for kind in (HostSteps, DeviceSteps):
        model = architecture({}).build(seed=0)
        recipe = replace(RECIPE, tokens=400 * 64)  # rows of 10 steps
        steps: Steps = kind(TrainingInputs(model, corpus(), recipe, 3))
        steps.advance(10, None, None)
        with torch.no_grad():
            model.embedding[0, 0] = math.nan
        with pytest.raises(DivergedError) as error:
            steps.advance(20, None, None)
        messages.append(str(error.value).partition(";")[0])
    assert messages[0] == messages[1]
    assert "step 10 of 400" in messages[0]


def test_the_deadline_ends_a_run() -> None:
    model = architecture({}).build(seed=0)
    steps = DeviceSteps(TrainingInputs(model, corpus(), RECIPE, 3))
    with pytest.raises(TimeLimitError, match="step 0 of 40"):
        steps.advance(5, None, time.monotonic() - 1)


class Counted:
    """Counts how often a device is held."""

    def __init__(self) -> None:
        self.times = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        self.times += 1
        yield


def test_the_device_is_held_for_groups_of_steps() -> None:
    model = architecture({}).build(seed=0)
    recipe = replace(RECIPE, tokens=4000 * 64)
    steps, gate = DeviceSteps(TrainingInputs(model, corpus(), recipe, 3)), Counted()
    steps.advance(20, gate, None)
    assert gate.times == 20  # how long a step takes is not known yet
    steps.advance(40, gate, None)
    assert 21 <= gate.times < 40


@pytest.mark.parametrize("name", ROUTERS)
def test_a_step_reads_nothing_on_the_host(name: str) -> None:
    """Tensors of the meta device have no values to read."""
    model = architecture(ROUTERS[name]).outline("meta")
    steps = DeviceSteps(TrainingInputs(model, corpus(), replace(RECIPE, dtype="bfloat16"), 3))
    model.train()
    steps.load(0, 3)
    with cuda_forms(), AnyGroupedProduct(), WithoutAdamW():
        steps.step()  # tables of positions go to the device
        with NoHostCopies():
            steps.step()
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())
    with pytest.raises((NotImplementedError, RuntimeError), match="meta tensor"):
        steps.read()


# --- on a GPU ----------------------------------------------------------------------------------

ON_GPU = replace(RECIPE, tokens=120 * 64, dtype="bfloat16")


@contextmanager
def no_wait() -> Iterator[None]:
    """Make torch raise where the host would wait for the device."""
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            # torch warns that the mode is a prototype.
            warnings.filterwarnings("ignore", message="Synchronization debug mode")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu(name: str, recipe: Recipe = ON_GPU) -> tuple[DeviceSteps, Model]:
    """A run that is warmed up, with all its tokens on the device."""
    torch.manual_seed(0)
    model = architecture(ROUTERS[name]).build("cuda", 0).train()
    steps = DeviceSteps(TrainingInputs(model, corpus(), recipe, 3))
    steps.load(0, recipe.steps)
    for _ in range(4):
        steps.step()
    torch.cuda.synchronize()
    return steps, model


def weights_of(model: Model) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ROUTERS)
def test_no_step_makes_the_host_wait_for_a_gpu(name: str) -> None:
    steps, _ = on_gpu(name)
    with no_wait():
        steps.step()
        steps.step()
    assert steps.capture(), steps.capture_fault
    with no_wait():
        steps.step()
        steps.step()
    assert math.isfinite(steps.read().loss)
    steps.close()


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "noise"])
def test_a_captured_run_is_the_run_without_a_graph(name: str) -> None:
    """Without noise: each replay of a graph draws another."""
    curves = []
    for captured in (False, False, True, True):
        steps, model = on_gpu(name)
        if captured:
            assert steps.capture(), steps.capture_fault
        while steps.done < ON_GPU.steps:
            steps.step()
        curves.append((steps.read(), weights_of(model)))
        steps.close()
    (sums, weights), *others = curves
    for other, there in others:
        assert other == sums
        for key, value in weights.items():
            assert torch.equal(there[key], value), key


@pytest.mark.gpu
@pytest.mark.parametrize("name", ROUTERS)
def test_two_equal_runs_on_a_gpu_give_equal_bits(name: str) -> None:
    curves = []
    for _ in range(2):
        torch.manual_seed(0)
        model = architecture(ROUTERS[name]).build("cuda", 0)
        rows = [
            (r["train_loss"], r["grad_norm"], r.get("routing"))
            for r in train(model, corpus(), ON_GPU, 3)
        ]
        curves.append((rows, weights_of(model)))
    (rows, weights), (again, there) = curves
    assert again == rows
    assert rows[-1][0] < rows[0][0]
    for key, value in weights.items():
        assert torch.equal(there[key], value), key


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
def test_a_hundred_steps_leave_no_memory_behind(captured: bool) -> None:
    steps, model = on_gpu("loss")
    if captured:
        assert steps.capture(), steps.capture_fault
    for _ in range(6):
        steps.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(100):
        steps.step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    steps.close()
    del steps, model


@pytest.mark.gpu
def test_a_run_leaves_no_memory_behind() -> None:
    def run_one() -> int:
        model = architecture(ROUTERS["loss"]).build("cuda", 0)
        assert len(list(train(model, corpus(), ON_GPU, 3))) == len(row_ends(ON_GPU.steps))
        del model
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    first = run_one()
    assert [run_one() for _ in range(3)] == [first] * 3


@pytest.mark.parametrize("steps", [1, 39, 41, 73, 400])
def test_tokens_stay_where_a_graph_reads_them(steps: int) -> None:
    model = architecture({}).build(seed=0)
    recipe, places = replace(RECIPE, tokens=steps * 64), set()
    run, start = DeviceSteps(TrainingInputs(model, corpus(), recipe, 3)), 0
    for end in row_ends(recipe.steps):
        run.load(start, end)
        places.add(run._crops.data_ptr())
        start = end
    assert len(places) == 1
