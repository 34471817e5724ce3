"""A GPU computes the same as a CPU for every kind of part, or the same when it repeats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_fake_cuda import CASES, case, small
from torch import Tensor
from wide_space import difference, point, stir, trail

from moenas.data.corpus import Corpus
from moenas.evaluate.device_steps import WARM_UP, DeviceSteps
from moenas.evaluate.latency import inference_copy, prepare
from moenas.evaluate.steps import TrainingInputs
from moenas.export.folder import model_source
from moenas.model.architecture import Architecture, Model
from moenas.resources import load_module
from moenas.space.sections import Recipe

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
LENGTH = 16
RECIPE = Recipe(tokens=12 * 4 * LENGTH, context=LENGTH, batch=4, lr=0.01, val_tokens=320)
POINTS = 48
"""Points of the wide space that are compared."""


class Noise:
    """Draws on the CPU in place of both devices, so that they draw the same; counts the draws."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.draws = 0
        for name, draw in {"randn_like": torch.randn, "rand_like": torch.rand}.items():
            monkeypatch.setattr(torch, name, self.like(draw, getattr(torch, name)))

    def like(self, draw: Any, own: Any) -> Any:
        """Return the replacement of a function of torch; inside of graphs it is the function."""

        def replacement(x: Tensor) -> Tensor:
            self.draws += 1
            if torch.cuda.is_current_stream_capturing():
                return own(x)  # type: ignore[no-any-return]
            noise: Tensor = draw(x.shape, generator=torch.Generator().manual_seed(x.numel()))
            return noise.to(x)

        return replacement


@pytest.fixture(autouse=True)
def noise(monkeypatch: pytest.MonkeyPatch) -> Iterator[Noise]:
    yield Noise(monkeypatch)
    torch.cuda.empty_cache()


def corpus(vocab_size: int) -> Corpus:
    """Return 3,000 tokens that count up, so that a model learns something within few steps."""
    steps = 1 + (np.random.RandomState(0).rand(3000) < 0.1) * 7
    tokens = (np.cumsum(steps) % min(vocab_size, 256)).astype(np.uint8)
    return Corpus("count", tokens[:2500], tokens[2500:], vocab_size, False, "", [None, None], {})


def built(architecture: Architecture, device: torch.device, seed: int = 3) -> Model:
    """Return the model with weights that are not at their start."""
    model = architecture.build(seed=seed)
    stir(model, seed + 1)
    return model.to(device)


@pytest.mark.parametrize("name", CASES)
def test_two_steps_in_float32_are_those_of_a_cpu(name: str) -> None:
    architecture = case(name)
    if name == "Score: relu":
        # Scores of 0 tie. Each device takes another expert of weight 0, and a balance loss counts it.
        architecture = small(router={"score": "relu", "balance": "none"})
    assert_equal_trails(architecture)


@pytest.mark.parametrize("first", range(0, POINTS, 8))
def test_points_of_the_wide_space_are_those_of_a_cpu(first: int) -> None:
    apart = []
    for number in range(first, first + 8):
        drawn = point(number)
        if drawn is None:
            continue
        try:
            assert_equal_trails(Architecture.parse(drawn[0]))
        except (AssertionError, RuntimeError) as error:
            apart.append(f"point {number}: {str(error)[:300]}")
    assert not apart, "\n".join(apart)


def assert_equal_trails(architecture: Architecture) -> None:
    """Assert that logits, losses, gradients and buffers of two steps agree within 0.5 %.

    A rounding can carry a token to another expert: a difference counts if other weights show it.
    """
    names = []
    for seed in (3, 5, 7):
        trails = [
            trail(built(architecture, device, seed), LENGTH)
            for device in (torch.device("cpu"), CUDA)
        ]
        on_cpu = [{k: v.cpu() for k, v in values.items()} for values in trails]
        names.append(difference(on_cpu[0], on_cpu[1], 5e-3))
        if names[-1] is None:
            return
    raise AssertionError(f"the devices differ in {names}")


@pytest.mark.parametrize("name", CASES)
def test_steps_in_bfloat16_are_captured_and_equal_those_without_a_graph(
    name: str, noise: Noise
) -> None:
    """Noise is another one at each replay: there only the capture is tested."""
    architecture = case(name)
    text = corpus(architecture.vocab_size)
    runs = []
    for captured in (False, True):
        model = built(architecture, CUDA).train()
        steps = DeviceSteps(TrainingInputs(model, text, RECIPE, 3))
        steps.load(0, RECIPE.steps)
        while steps.done < RECIPE.steps:
            if captured and steps.done == WARM_UP:
                able = model.capturable(steps.dtype, CUDA)
                assert steps.capture() == able, steps.capture_fault
            steps.step()
        sums = steps.read()
        runs.append((sums, {k: v.clone() for k, v in model.state_dict().items()}))
        steps.close()
    (sums, weights), (again, there) = runs
    assert np.isfinite(sums.loss)
    if noise.draws:
        return
    assert again == sums
    for key, value in weights.items():
        assert torch.equal(there[key], value), key


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_tokens_are_generated_as_on_a_cpu(name: str) -> None:
    """With a cache, greedily, in float32."""
    architecture = case(name)
    tokens = torch.arange(2 * LENGTH).view(2, LENGTH) * 7 % architecture.vocab_size
    models = [built(architecture, device).eval() for device in (torch.device("cpu"), CUDA)]
    texts = [m.generate(tokens.to(m.embedding.device), 8).cpu() for m in models]
    right, there = (m(texts[0].to(m.embedding.device)).cpu() for m in models)
    torch.testing.assert_close(there, right, rtol=0, atol=1e-3 * float(right.abs().max()))
    best = right.topk(2).values
    if (best[..., 0] - best[..., 1]).min() > 1e-3:
        assert torch.equal(texts[1], texts[0])


@pytest.mark.parametrize("name", CASES)
def test_latency_is_measured_in_bfloat16(name: str) -> None:
    """A decoding step and a prompt run, and again."""
    architecture = case(name)
    model = inference_copy(architecture, built(architecture, CUDA), torch.bfloat16)
    tokens = torch.zeros(2, LENGTH, dtype=torch.int64, device=CUDA)
    for phase in ("decode", "prefill"):
        step = prepare(model, tokens, phase)
        step()
        step()
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", CASES)
def test_an_exported_module_runs_on_a_gpu(name: str, tmp_path: Path) -> None:
    """It has the forms for a CPU alone, which run on each device."""
    architecture = case(name)
    (tmp_path / "model.py").write_text(model_source(architecture))
    net = load_module(tmp_path / "model.py").build(seed=3)
    stir(net, 4)
    net.eval()
    tokens = torch.arange(2 * LENGTH).view(2, LENGTH) * 7 % architecture.vocab_size
    with torch.no_grad():
        wanted = net(tokens)
        logits = net.to(CUDA)(tokens.to(CUDA)).cpu()
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-3 * float(wanted.abs().max()))
    net.train()
    loss = net.loss(tokens.to(CUDA), tokens.to(CUDA).roll(-1, 1))
    if hasattr(net, "auxiliary_loss"):
        loss = loss + net.auxiliary_loss()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    with torch.no_grad():
        half = net.eval()(tokens.to(CUDA), dtype=torch.bfloat16)
    assert half.isfinite().all()
