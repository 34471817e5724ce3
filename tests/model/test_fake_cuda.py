"""Every part runs on CUDA: no values read on the host, no devices mixed, nothing copied to it.

Without a device, on tensors that have none: see `fake_cuda`. Kinds are those that are registered,
so a new one is tried without a word here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from fake_cuda import NoCollisions, NoHostCopies, cuda_forms, fake_device
from torch import Tensor, nn
from wide_space import point

from moenas.evaluate.latency import inference_copy, prepare
from moenas.grammar import component
from moenas.grammar.component import Component
from moenas.model import FFN, Balance, Mixer, PositionBias, RopeScaling, Score, Selection
from moenas.model.architecture import Architecture, Model
from moenas.records import Plain
from moenas.testing.parts import random_architecture

BATCH, LENGTH = 2, 9


# --- one architecture of every kind --------------------------------------------------------------


def small(mixer: Plain | None = None, router: Plain | None = None, **given: Any) -> Architecture:
    """Return a model of one layer, for a word or a part of it."""
    attention: Plain = {"kind": "attention", "head_dim": 8} | (mixer or {})
    ffn: Plain = {"kind": "moe", "n_experts": 4, "d_expert": 8, "router": {"top_k": 2}}
    ffn["router"] |= router or {}
    block = {"mixer": attention, "ffn": ffn}
    return Architecture.parse({"vocab_size": 32, "d_model": 16, "blocks": [block]} | given)


def words(family: type[Component], field: str) -> tuple[Any, ...]:
    return component.fields(family)[field].choices or ()


def part_of(kind: type[Component]) -> Plain:
    """Return plain data of a part with its required fields at their least."""
    needed = {n: f for n, f in component.fields(kind).items() if f.required}
    return {"kind": kind.kind} | {n: f.low or 1 for n, f in needed.items()}


def smallest(kind: type[Component]) -> Architecture:
    """Return the random architecture with the fewest parts of some."""
    architectures = [random_architecture(seed, kind, vocab_size=32) for seed in range(6)]
    return min(architectures, key=lambda x: (len(x.layers), sum(len(y.parts) for y in x.layers)))


def cases() -> dict[str, Callable[[], Architecture]]:
    by_name: dict[str, Callable[[], Architecture]] = {
        f"{family.__name__}: {name}": partial(smallest, cls)
        for family in (Mixer, FFN, Selection)
        for name, cls in family.kinds.items()
        if cls.__module__.startswith("moenas.")
    }
    for name in Score.kinds:
        selection = "hash" if name == "uniform" else "top_k"
        router: Plain = {"score": name, "selection": selection}
        by_name[f"Score: {name}"] = partial(small, router=router)
    for name, kind in PositionBias.kinds.items():
        by_name[f"position_bias: {name}"] = partial(small, {"position_bias": part_of(kind)})
    for name, kind in RopeScaling.kinds.items():
        by_name[f"rope.scaling: {name}"] = partial(small, {"rope": {"scaling": part_of(kind)}})
    choices = {n: words(Architecture, n) for n in ("norm", "norm_position", "positions")}
    choices["balance"] = tuple(Balance.kinds)
    for i in range(max(map(len, choices.values()))):
        own = {name: several[i % len(several)] for name, several in choices.items()}
        router = {"balance": {"kind": own.pop("balance")}, "capacity_factor": 1.0}
        if "loss" in router["balance"]["kind"]:
            router["balance"]["scope"] = "sequence"
        name = f"{router['balance']['kind']}, {own}"
        by_name[name] = partial(small, router=router, max_positions=256, **own)
    return by_name


CASES = cases()


@cache
def case(name: str) -> Architecture:
    return CASES[name]()


# --- what each is put through --------------------------------------------------------------------


def held(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in an attribute, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from held(part)
    elif isinstance(value, list | tuple | set):
        for part in value:
            yield from held(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from held(getattr(value, field.name))
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        yield from held(vars(value))


def graphs(model: Model) -> list[str]:
    """Return the attributes that keep the graph of a pass alive."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if any(tensor.grad_fn is not None for tensor in held(value))
    ]


def train_steps(architecture: Architecture) -> None:
    """Steps in each type; all but the first copy nothing, and none leaves a graph."""
    with fake_device(gradients=True) as device:
        model = architecture.outline(device).train()
        tokens = torch.zeros(BATCH, LENGTH, dtype=torch.int64, device=device)
        for turn, dtype in enumerate((torch.bfloat16, torch.bfloat16, torch.float32)):
            with NoHostCopies() if turn else nullcontext():
                loss = model.loss(tokens, tokens, dtype) + model.auxiliary_loss()
                loss.backward()
                del loss
                model.after_step()
            assert graphs(model) == []
        where = {p.grad.device.type for p in model.parameters() if p.grad is not None}
        assert where == {device.type}


def deploy(architecture: Architecture, model: Model, device: torch.device) -> None:
    """The model as it is run: a step of decoding and a prompt, each twice."""
    run = inference_copy(architecture, model, torch.bfloat16)
    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.int64, device=device)
    for phase in ("decode", "prefill"):
        step = prepare(run, tokens, phase)
        step()
        with nullcontext() if device.type == "cpu" else NoHostCopies():
            step()


@torch.inference_mode()
def passes(architecture: Architecture) -> None:
    """A pass in training and in evaluation, twice, and the model as it is run."""
    with fake_device(gradients=False) as device:
        model = architecture.outline(device)
        tokens = torch.zeros(BATCH, LENGTH, dtype=torch.int64, device=device)
        modes = {True: torch.bfloat16, False: torch.float32}
        if device.type == "meta":  # where steps of training are tried, too
            del modes[True]
        for training, dtype in modes.items():
            model.train(training)
            logits = model(tokens, dtype=dtype)
            with NoHostCopies():
                again = model(tokens, dtype=dtype)
            assert logits.device == again.device == tokens.device
        deploy(architecture, model, device)
    # With values: a tensor that is left behind on the meta device has none.
    deploy(architecture, architecture.build(), torch.device("cpu"))


@pytest.mark.parametrize("name", CASES)
def test_every_kind_runs(name: str) -> None:
    train_steps(case(name))
    passes(case(name))


def gradients(architecture: Architecture) -> dict[str, Tensor]:
    """Return the loss and the gradients of a step with values, on the CPU."""
    model = architecture.build(seed=1).train()
    tokens = torch.randint(model.vocab_size, (BATCH, LENGTH), generator=torch.manual_seed(0))
    loss = model.loss(tokens, tokens.roll(-1, 1)) + model.auxiliary_loss()
    loss.backward()
    model.after_step()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return grads | {"loss": loss.detach()} | dict(model.named_buffers())


@pytest.mark.parametrize("name", CASES)
def test_every_kind_adds_up_in_one_order(name: str) -> None:
    """It computes the same on CUDA and on a CPU, up to rounding."""
    plain = gradients(case(name))
    with cuda_forms(), NoCollisions():
        other = gradients(case(name))
    assert plain.keys() == other.keys()
    for key, value in plain.items():
        scale = max(1e-3, float(value.abs().max()))
        torch.testing.assert_close(other[key], value, rtol=0, atol=1e-4 * scale, msg=key)


def wide(number: int) -> Architecture | None:
    drawn = point(number)
    return None if drawn is None else Architecture.parse(drawn[0])


@pytest.mark.parametrize("number", [5])
def test_candidates_run(number: int) -> None:
    architecture = wide(number)
    assert architecture is not None
    train_steps(architecture)
    passes(architecture)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 200, 20))
def test_a_hundred_candidates_run(first: int) -> None:
    for architecture in map(wide, range(first, first + 20)):
        if architecture is not None:
            train_steps(architecture)
            passes(architecture)


# --- and what would be seen ----------------------------------------------------------------------


def test_a_model_says_whether_a_graph_can_hold_it() -> None:
    waiting = {name for name, cls in Selection.kinds.items() if not cls().build(1, 4).capturable}
    assert waiting == {"base"}
    cuda, bf16 = torch.device("cuda", 0), torch.bfloat16
    assert small().outline().capturable(bf16, cuda)
    assert not case("Selection: base").outline().capturable(bf16, cuda)
    assert not small().outline().capturable(torch.float32, cuda)  # grouped products wait


class Careless(nn.Module):
    """Reads a value, or copies a tensor to the device in each pass."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "reads":
            return x * x.float().mean().item()
        if self.how == "mixes":
            return x + torch.ones(x.shape[-1])
        return x * torch.tensor([0.5] * x.shape[-1], device=x.device)


@pytest.mark.parametrize("how", ["reads", "mixes", "copies"])
def test_what_a_graph_could_not_hold_is_seen(how: str) -> None:
    with fake_device(gradients=False) as device, torch.inference_mode():
        model = small().outline(device)
        assert isinstance(model.norm, nn.Module)
        model.norm = nn.Sequential(model.norm, Careless(how))
        tokens = torch.zeros(BATCH, LENGTH, dtype=torch.int64, device=device)
        with NoHostCopies(), pytest.raises((RuntimeError, AssertionError)) as error:
            model(tokens, dtype=torch.float32)
    said = {"reads": "DataDependent", "mixes": "device", "copies": "from the host"}[how]
    assert said in f"{type(error.value)} {error.value}"
