"""The causality test: all shipped parts pass it, and planted leaks are found."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import cuda_forms
from routers import router_of
from torch import Tensor, nn

from moenas.evaluate import causality
from moenas.evaluate.causality import allows_acausal, find_leaks, text_size
from moenas.model.architecture import Architecture, Model
from moenas.model.feedforward.dense import FFN
from moenas.model.mixers.mixer import Mixer
from moenas.model.moe.selection import Selection
from moenas.records import Plain
from moenas.testing.parts import random_architecture

KINDS = [*Mixer.kinds.values(), *FFN.kinds.values()]
SELECTIONS: dict[str, Plain] = {name: {"selection": name} for name in Selection.kinds}
SELECTIONS["base"]["top_k"] = 1
SELECTIONS |= {
    "jitter": {"logits": {"kind": "linear", "jitter": 0.2}},
    "capacity": {"capacity_factor": 0.5, "top_k": 1},
    "noise": {"selection": "noisy_top_k", "capacity_factor": 1.0},
    "even groups": {
        "selection": {"kind": "top_k", "n_groups": 2, "top_groups": 2, "even_groups": True},
        "expert_scale": True,
    },
    "top_p": {"top_k": 4, "selection": {"kind": "top_k", "top_p": 0.6}, "entropy_coef": 0.1},
    "sparsemixer": {
        "selection": {"kind": "top_k", "sparsemixer_eps": 0.3},
        "logits": {"kind": "linear", "input": "block", "input_norm": True},
    },
    "cosine": {"logits": {"kind": "cosine", "hidden": 8, "input": "stream", "cap": 0.9}},
    "standardised": {"logits": {"kind": "linear", "standardize": True, "multiplier": 2.0}},
}


def text(vocab_size: int = 32, length: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (text_size(99)[0], length), generator=generator)


def architecture(**router: Any) -> Architecture:
    moe = {"kind": "moe", "n_experts": 4, "d_expert": 16, "router": router}
    mixer = {"kind": "attention", "head_dim": 8}
    blocks: list[Plain] = [
        {"mixer": mixer, "ffn": {"kind": "dense", "d_ff": 32}},
        {"mixer": mixer, "ffn": moe},
    ]
    return Architecture.parse({"vocab_size": 32, "d_model": 16, "blocks": blocks})


def a_step(model: Model) -> None:
    """Move weights, biases and cut-offs as a step of training does, by a large rate."""
    model.train()
    tokens = text()
    (model.loss(tokens, tokens.roll(-1, 1)) + model.auxiliary_loss()).backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight -= 0.1 * (weight.grad if weight.grad is not None else 0)
    model.after_step()


# --- what is causal passes ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_every_kind_of_part_passes(kind: Any) -> None:
    architecture = random_architecture(0, kind)
    assert find_leaks(architecture.build(seed=0), text(architecture.vocab_size, 64)) == []


@pytest.mark.parametrize("router", SELECTIONS.values(), ids=SELECTIONS)
def test_every_selection_passes_or_is_marked(router: Plain) -> None:
    causal = router_of(**router).causal
    parsed = architecture(**router, allow_acausal=not causal)
    assert allows_acausal(parsed) is not causal
    model = parsed.build(seed=0)
    for _ in range(2):
        leaks = find_leaks(model, text())
        assert (leaks == []) is causal
        assert {leak.place for leak in leaks} <= {"blocks.1.ffn"}
        a_step(model)


def test_leave_without_use_is_none() -> None:
    assert not allows_acausal(architecture(allow_acausal=True))


def test_the_shortest_sequence_is_looked_at() -> None:
    model = architecture().build(seed=0)
    assert find_leaks(model, text(length=2)) == []
    model.head.register_forward_hook(lambda module, given, y: y + y.flip(1))
    assert [leak.position for leak in find_leaks(model, text(length=2))] == [0, 0]


# --- planted leaks -----------------------------------------------------------------------------


def seeing_all(module: nn.Module, given: Any, y: Tensor) -> Tensor:
    """Attention without a mask."""
    return F.scaled_dot_product_attention(y, y, y)


def one_token_ahead(module: nn.Module, given: Any, y: Tensor) -> Tensor:
    return y + 0.01 * F.pad(y[:, 1:], (0, 0, 0, 1))


def batch_norm(module: nn.Module, given: Any, y: Tensor) -> Tensor:
    """Normed over the first tokens of all sequences: later tokens do not matter, others do."""
    return y - y[:, :1].mean(dim=0, keepdim=True) if len(y) > 1 else y


def in_training(hook: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda module, given, y: hook(module, given, y) if module.training else y


def leaky(place: str, hook: Callable[..., Tensor]) -> Model:
    model = architecture().build(seed=0)
    model.get_submodule(place).register_forward_hook(hook)
    return model


@pytest.mark.parametrize("place", ["blocks.0.mixer", "blocks.1.ffn", "blocks.1.norm2"])
@pytest.mark.parametrize("hook", [seeing_all, one_token_ahead])
def test_a_part_that_looks_ahead_is_found_where_it_is(
    place: str, hook: Callable[..., Tensor]
) -> None:
    training, evaluation = find_leaks(leaky(place, hook), text())
    assert (training.mode, evaluation.mode) == ("training", "evaluation")
    for leak in (training, evaluation):
        assert leak.place == place
        assert leak.alone
        assert leak.position < leak.cut
        assert leak.size > 0
    assert f"in training, layer {place[7]} ({place}) looks ahead" in str(training)
    assert f"position {training.position} change by" in str(training)


def test_the_next_token_is_seen_from_the_one_before_the_cut() -> None:
    leak, _ = find_leaks(leaky("blocks.1", one_token_ahead), text())
    assert leak.position == leak.cut - 1


def test_sequences_that_mix_are_found_only_among_others() -> None:
    leak, _ = find_leaks(leaky("blocks.0.ffn", batch_norm), text())
    assert not leak.alone
    assert leak.place == "blocks.0.ffn"
    assert "and the other sequences of its batch" in str(leak)


@pytest.mark.parametrize("hook", [seeing_all, batch_norm])
def test_a_leak_in_training_alone_is_found(hook: Callable[..., Tensor]) -> None:
    (leak,) = find_leaks(leaky("blocks.1.mixer", in_training(hook)), text())
    assert (leak.mode, leak.place) == ("training", "blocks.1.mixer")


def test_a_leak_behind_the_layers_has_no_layer() -> None:
    leak, _ = find_leaks(leaky("head", one_token_ahead), text())
    assert leak.place == ""
    assert "the model looks ahead" in str(leak)


def test_what_depends_on_a_later_token_being_there_is_found() -> None:
    """The last token of the sequence decides whether anything changes: a leak that is not smooth."""

    def odd(module: nn.Module, given: Any, y: Tensor) -> Tensor:
        return y * torch.where(y[:, -1:, :1] > 0, 1.0, 1.1)

    assert find_leaks(leaky("blocks.0", odd), text())


def test_the_text_is_as_long_as_what_the_parts_look_at() -> None:
    def mask_boundaries(*mixers: Plain) -> set[int]:
        blocks = [{"mixer": {"kind": "attention", "head_dim": 8, **m}} for m in mixers]
        plain = {"vocab_size": 32, "d_model": 16, "blocks": blocks}
        return causality.mask_boundaries(Architecture.parse(plain))

    assert mask_boundaries({}, {"window": 200}, {"chunk": 50}) == {200, 50}
    assert text_size(100) == (9, 100)
    assert text_size(5000) == (9, 256)
    assert text_size(5000, {200, 50}) == (9, 401)
    assert text_size(300, {200, 50}) == (9, 300)


def behind(start: int) -> Callable[..., Tensor]:
    """What goes wrong in long sequences alone, as the mask of a window can."""

    def hook(module: nn.Module, given: Any, y: Tensor) -> Tensor:
        if y.shape[1] <= start:
            return y
        return torch.cat((y[:, :start], seeing_all(module, given, y[:, start:])), dim=1)

    return hook


def at_the_end_of(chunk: int) -> Callable[..., Tensor]:
    """The last token of a chunk sees the first of the next."""

    def hook(module: nn.Module, given: Any, y: Tensor) -> Tensor:
        ends = torch.tensor(range(chunk - 1, y.shape[1] - 1, chunk), dtype=torch.int64)
        return y.index_add(1, ends, y[:, ends + 1])

    return hook


@pytest.mark.parametrize("hook", [behind(128), at_the_end_of(64), at_the_end_of(100)])
def test_a_leak_of_long_sequences_is_found(hook: Callable[..., Tensor]) -> None:
    model = leaky("blocks.1.mixer", hook)
    leaks = find_leaks(model, text(length=text_size(512)[1]), {100})
    assert [leak.place for leak in leaks] == ["blocks.1.mixer"] * 2
    assert find_leaks(model, text(length=60), {100}) == []


# --- rounding ----------------------------------------------------------------------------------


def test_rounding_in_float32_is_no_leak() -> None:
    """A part whose rounding depends on later tokens: in float64 the difference vanishes."""

    def rounded(module: nn.Module, given: Any, y: Tensor) -> Tensor:
        if y.dtype == torch.float64:
            return y
        return y * (1 + 3e-5 * y[:, -1:, :1].sign())

    model = leaky("blocks.0", rounded)
    pair = causality._parts(text(), 32, 0)
    run = causality._plain_run(model.train())
    assert (
        causality._search(model, run, pair, causality._cuts(40, ()), causality.FLOAT32_TOLERANCE)
        is not None
    )
    assert find_leaks(model, text()) == []


def only_float32(y: Tensor) -> None:
    if y.dtype == torch.float64:
        raise RuntimeError("no kernel for Double")


def test_without_float64_a_leak_must_show_in_every_text() -> None:
    def always(module: nn.Module, given: Any, y: Tensor) -> Tensor:
        only_float32(y)
        return one_token_ahead(module, given, y)

    first = text()[0, 0]

    def once(module: nn.Module, given: Any, y: Tensor) -> Tensor:
        """What a tie between two experts does: it shows in one text, wherever it turns up."""
        only_float32(y)
        table = y.new_zeros(32).scatter(0, first, 1.0)
        tie = table[seen[-1][:, :1]].unsqueeze(-1)
        return y + tie * F.pad(y[:, 1:], (0, 0, 0, 1))

    seen: list[Tensor] = []
    assert [leak.place for leak in find_leaks(leaky("blocks.0", always), text())] == [
        "blocks.0"
    ] * 2
    model = leaky("blocks.0", once)
    model.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    pair = causality._parts(text(), 32, 0)
    run = causality._plain_run(model.eval())
    assert (
        causality._search(model, run, pair, causality._cuts(40, ()), causality.FLOAT32_TOLERANCE)
        is not None
    )
    assert find_leaks(model, text()) == []


def test_a_kernel_that_reads_other_rows_is_not_hidden_by_float64() -> None:
    def grossly(module: nn.Module, given: Any, y: Tensor) -> Tensor:
        return y if y.dtype == torch.float64 else seeing_all(module, given, y)

    assert len(find_leaks(leaky("blocks.0", grossly), text())) == 2


def test_the_model_in_float64_is_the_model() -> None:
    model = architecture(jitter=0.0, score="sigmoid", top_k=2).build(seed=0).eval()
    tokens = text()[:3]
    with torch.no_grad():
        (*_, (_, exact)) = causality._exact_run(model)(tokens)
        (*_, (_, plain)) = causality._named_run(model)(tokens)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.float(), plain, rtol=1e-4, atol=1e-5)


# --- what it leaves behind ---------------------------------------------------------------------


class Counting(nn.Module):
    """State of every kind that a guest's part may have."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("steps", torch.zeros(1), persistent=False)
        self.plain = torch.zeros(1)
        self.log: list[int] = []
        self.last: Tensor | None = None

    def forward(self, y: Tensor) -> Tensor:
        mean: Any = self.mean
        mean.mul_(0.9).add_(0.1 * y.detach().mean(dim=(0, 1)))
        self.steps = self.steps + 1
        self.plain += 1
        self.log.append(len(y))
        self.last = y
        self.extra = y
        return y


@pytest.mark.parametrize(
    "router", [{"selection": "threshold"}, {"logits": {"kind": "linear", "jitter": 0.1}}]
)
@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_generators_stay_as_they_were(router: Plain, training: bool) -> None:
    model = architecture(**router).build(seed=0)
    guest = Counting()
    model.add_module("guest", guest)
    model.blocks[0].register_forward_hook(lambda module, given, y: guest(y))
    a_step(model)
    model.train(training)
    (_, moe), *_ = model.moe_layers()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    held = (moe.routing, guest.mean, guest.steps, guest.plain, guest.last, guest.extra)
    values = [guest.steps.clone(), guest.plain.clone(), list(guest.log), set(vars(guest))]
    gradients = {name: p.grad for name, p in model.named_parameters()}
    torch.manual_seed(5)
    generator = torch.get_rng_state()
    assert find_leaks(model, text()) == []
    assert torch.equal(torch.get_rng_state(), generator)
    assert {module.training for module in model.modules()} == {training}
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    now = (moe.routing, guest.mean, guest.steps, guest.plain, guest.last, guest.extra)
    assert all(a is b for a, b in zip(held, now, strict=True))
    assert [guest.steps, guest.plain, guest.log, set(vars(guest))] == values
    assert {name: p.grad for name, p in model.named_parameters()} == gradients
    assert not any(module._forward_hooks for module in model.blocks[1].modules())


def test_a_loss_that_is_not_finite_is_not_called_a_leak() -> None:
    model = architecture().build(seed=0)
    model.embedding.data[3] = torch.nan
    assert find_leaks(model, text()) == []


# --- on CUDA -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "hook", "router"),
    [
        ("blocks.0", None, {}),
        ("blocks.0", None, {"capacity_factor": 0.5}),
        ("blocks.0", None, {"selection": "noisy_top_k"}),
        ("blocks.0", None, {"selection": "expert_choice", "allow_acausal": True}),
        ("blocks.0.mixer", seeing_all, {}),
        ("blocks.1.norm2", one_token_ahead, {"selection": "noisy_top_k"}),
        ("blocks.0.ffn", batch_norm, {}),
        ("head", one_token_ahead, {}),
    ],
)
def test_cuts_side_by_side_find_the_same(
    place: str, hook: Callable[..., Tensor] | None, router: Plain
) -> None:
    reports, passes = [], []
    for form in (nullcontext(), cuda_forms()):
        model = architecture(**router).build(seed=0)
        if hook is not None:
            model.get_submodule(place).register_forward_hook(hook)
        counted: list[int] = []
        model.register_forward_pre_hook(lambda module, given, n=counted: n.append(len(given[0])))
        with form:
            leaks = find_leaks(model, text())
        reports.append([(leak.mode, leak.alone, leak.cut, leak.place) for leak in leaks])
        passes.append(len(counted))
    assert reports[0] == reports[1]
    if hook is None and "selection" not in router:
        assert passes[1] < 0.65 * passes[0]
