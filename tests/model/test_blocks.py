"""Blocks with two feed-forward layers, parallel parts, and multipliers of the stream."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import normed, parse, tokens
from torch import Tensor

from moenas import resources
from moenas.errors import SpaceError
from moenas.evaluate.flops import count_flops
from moenas.evaluate.latency import prepare
from moenas.export.folder import model_source
from moenas.model.architecture import Model
from moenas.records import Plain

POSITIONS = ("pre", "post", "output", "sandwich")
ATTENTION: Plain = {"kind": "attention", "head_dim": 8}
DENSE: Plain = {"kind": "dense", "d_ff": 16}
MOE: Plain = {
    "kind": "moe",
    "n_experts": 4,
    "d_expert": 8,
    "n_zero_experts": 2,
    "router": {"balance": "bias_and_loss"},
}
PLAIN: Plain = {"mixer": ATTENTION, "ffn": DENSE}
SHORTCUT: Plain = PLAIN | {"shortcut": MOE, "shortcut_delay": 1}


def same(x: Tensor) -> Tensor:
    return x


def stream(model: Model) -> Tensor:
    """What the last block leaves, before the last norm."""
    inputs: list[Tensor] = []
    model.blocks[-1].register_forward_hook(lambda _, __, y: inputs.append(y))
    model(tokens())
    return inputs[0]


@torch.no_grad()
@pytest.mark.parametrize("source", ["ffn", "block"])
@pytest.mark.parametrize("delay", [0, 1, 9])
@pytest.mark.parametrize("position", POSITIONS)
def test_a_shortcut_reads_and_joins_where_it_says(position: str, delay: int, source: str) -> None:
    group = SHORTCUT | {"shortcut_delay": delay, "shortcut_input": source}
    architecture = parse(group, PLAIN, PLAIN, norm_position=position, residual_multiplier=0.5)
    model = architecture.build(seed=1).eval()
    before = normed if position in ("pre", "sandwich") else same
    after = normed if position in ("output", "sandwich") else same
    last = normed if position == "post" else same
    x = model.embedding[tokens()]
    sent = x
    for i, block in enumerate(model.blocks):
        start = x
        x = last(x + 0.5 * after(block.mixer(before(x))))
        read = before(x)
        y = 0.5 * after(block.ffn(read))
        if block.shortcut is not None:
            inner = block.shortcut.ffn
            sent = 0.5 * after(inner(before(start) if source == "block" else read))
        x = last(x + y + sent) if i == min(delay, 2) else last(x + y)
    torch.testing.assert_close(stream(model), x)


@torch.no_grad()
@pytest.mark.parametrize("position", POSITIONS)
def test_parallel_parts_read_the_same_and_are_added_together(position: str) -> None:
    model = parse(PLAIN | {"parallel": True}, norm_position=position, skip_multiplier=0.7).build()
    block = model.blocks[0].eval()
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    read = normed(x) if position in ("pre", "sandwich") else x
    y = block.mixer(read) + block.ffn(read)
    y = 0.7 * x + (normed(y) if position in ("output", "sandwich") else y)
    torch.testing.assert_close(block(x), normed(y) if position == "post" else y)


@torch.no_grad()
def test_the_stream_is_scaled_and_the_embedding_normed() -> None:
    model = parse(PLAIN, skip_multiplier=2.0, embedding_norm=True, embedding_multiplier=3.0).build()
    block = model.blocks[0]
    x = normed(3 * model.embedding[tokens()])
    x = 2 * x + block.mixer(normed(x))
    torch.testing.assert_close(stream(model), 2 * x + block.ffn(normed(x)))


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("source", ["ffn", "block"])
def test_parameters_and_operations_are_counted(position: str, source: str) -> None:
    architecture = parse(
        SHORTCUT | {"shortcut": DENSE, "shortcut_input": source, "parallel": True},
        SHORTCUT | {"shortcut": DENSE, "shortcut_input": source},
        PLAIN | {"parallel": True},
        norm="layernorm_bias",
        norm_position=position,
        embedding_norm=True,
    )
    model, cost = architecture.build(), architecture.cost(8)
    assert cost.params == sum(p.numel() for p in model.parameters())
    counted = count_flops(model, torch.zeros(1, 8, dtype=torch.int64))
    assert counted.per_token == cost.flops_per_token


def test_the_mixture_of_a_shortcut_is_trained_balanced_and_named() -> None:
    architecture = parse(PLAIN, SHORTCUT, PLAIN)
    model = architecture.build().train()
    ((layer, moe),) = model.moe_layers()
    assert layer == 1
    (model.loss(tokens(), tokens()) + model.auxiliary_loss()).backward()
    assert moe.router.logits.weight.grad.abs().sum() > 0
    assert moe.routing.load.sum() == 2 * 12 * 2
    model.after_step()
    assert moe.balance.bias.abs().sum() > 0
    names = architecture.names()
    assert [name.get("shortcut") for name in names] == [None, "moe", None]
    assert names[1]["n_experts"] == 4
    assert "shortcut moe 4e" in architecture.describe()
    spread = {n: p.std() for n, p in model.named_parameters() if n.endswith((".down", ".up"))}
    down, up = (spread[f"blocks.1.shortcut.ffn.experts.{x}"] for x in ("down", "up"))
    assert down < 0.6 * up  # it writes into the stream: divided by sqrt(2 * 3)


@torch.no_grad()
def test_a_model_with_shortcuts_decodes_and_is_exported(tmp_path: Path) -> None:
    architecture = parse(SHORTCUT | {"repeat": 2}, PLAIN | {"parallel": True}, embedding_norm=True)
    model = architecture.build(seed=3).eval()
    wanted = model(tokens())
    cache = model.new_cache(2, 12)
    pieces = [model(piece, cache) for piece in tokens().split([7, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), wanted)
    torch.testing.assert_close(prepare(model, tokens(), "decode")(), wanted[:, -1:])
    alone = resources.load_module(tmp_path / "model.py", model_source(architecture)).build().eval()
    alone.load_state_dict(model.state_dict())
    torch.testing.assert_close(alone(tokens()), wanted)


def test_spellings_of_one_block_share_a_fingerprint() -> None:
    for one, other in [
        (parse(PLAIN), parse(PLAIN | {"shortcut_delay": 3, "shortcut_input": "block"})),
        (parse({"mixer": ATTENTION}), parse({"mixer": ATTENTION, "parallel": True})),
        (parse(PLAIN, SHORTCUT), parse(PLAIN, SHORTCUT | {"shortcut_delay": 0})),
        (parse(SHORTCUT, PLAIN), parse(SHORTCUT | {"shortcut_delay": 7}, PLAIN)),
    ]:
        assert one.fingerprint == other.fingerprint
    prints = {
        parse(SHORTCUT | fields, PLAIN).fingerprint
        for fields in ({}, {"shortcut_delay": 0}, {"shortcut_input": "block"}, {"parallel": True})
    }
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        ({"mixer": ATTENTION, "shortcut": MOE}, "a shortcut needs an ffn beside it"),
        ({"ffn": MOE, "shortcut": MOE}, "a block has one mixture of experts"),
        ({"shortcut": MOE, "blocks": [PLAIN]}, "either 'blocks' or 'mixer' and 'ffn'"),
        ({"ffn": DENSE, "shortcut": MOE | {"router": {"top_k": 9}}}, "top_k (9) must be at most"),
    ],
)
def test_a_shortcut_that_makes_no_sense_is_refused(group: Plain, reason: str) -> None:
    with pytest.raises(SpaceError) as error:
        parse(group)
    assert reason in str(error.value)
