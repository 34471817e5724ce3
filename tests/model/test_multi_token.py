"""Heads for further tokens: losses by hand, what they read, gradients, counts and first weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moenas.evaluate.flops import count_flops
from moenas.model.architecture import Architecture, Model
from moenas.model.multi_token import MultiTokenPrediction, PredictionHeads
from moenas.records import Plain

ATTENTION: Plain = {"kind": "attention", "head_dim": 8}
DENSE: Plain = {"kind": "dense", "d_ff": 24}
MOE: Plain = {"kind": "moe", "n_experts": 4, "d_expert": 8, "router": {"top_k": 2}}
LENGTH = 9


def architecture(*blocks: Plain, **fields: object) -> Architecture:
    written = blocks or ({"mixer": ATTENTION, "ffn": DENSE},)
    return Architecture.parse({"vocab_size": 40, "d_model": 16, "blocks": list(written)} | fields)


def tokens(seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(40, (2, LENGTH + 1), generator=generator)
    return text[:, :-1], text[:, 1:]


def pair(
    one: Architecture, mtp: MultiTokenPrediction | None = None
) -> tuple[Model, PredictionHeads]:
    model, heads = one.build(seed=1), (mtp or MultiTokenPrediction(depth=3)).build(one, seed=1)
    generator = torch.Generator().manual_seed(2)
    for module in (model, heads):
        for parameter in module.parameters():
            parameter.data.normal_(0, 0.4, generator=generator)
    return model, heads


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


SPELLINGS: dict[str, Plain] = {
    "pre": {},
    "post": {"norm_position": "post"},
    "layernorm, own head": {"norm": "layernorm_bias", "tie_embeddings": False, "head_bias": True},
}


@pytest.mark.parametrize("name", SPELLINGS)
@torch.no_grad()
def test_the_loss_of_each_head_is_that_of_the_equations(name: str) -> None:
    """Equations 21 to 24 of arXiv 2412.19437, position by position, with 1-based numbers as there."""
    one = architecture(**SPELLINGS[name])
    model, heads = pair(one)
    seen, targets = tokens()
    text = torch.cat((seen, targets[:, -1:]), dim=1)  # t_1 ... t_(T + 1)
    state = model.hidden(seen)
    losses = heads.losses(model, state, seen, targets)
    assert len(losses) == 3
    for k, (head, loss) in enumerate(zip(heads.heads, losses, strict=True), start=1):
        rows, wanted = [], []
        for i in range(1, LENGTH - k + 1):
            before = rms(state[:, i - 1], head.stream_norm.weight)
            later = rms(model.embedding[text[:, i + k - 1]], head.token_norm.weight)
            rows.append(torch.cat((before, later), dim=-1) @ head.join.weight.T)
        state = head.block(torch.stack(rows, dim=1))
        normed = state if head.norm is None else head.norm(state)
        chances = model.head(normed, model.embedding).log_softmax(dim=-1)
        for i in range(1, LENGTH - k + 1):
            wanted.append(-chances[:, i - 1].gather(-1, text[:, i + k].unsqueeze(-1)))
        torch.testing.assert_close(loss, torch.cat(wanted).mean())
    total = heads.loss(model, model.hidden(seen), seen, targets)
    torch.testing.assert_close(total, 0.3 * sum(losses) / 3)


def test_a_head_reads_no_token_from_the_one_on_that_it_predicts() -> None:
    """The output at position i of head k depends on tokens up to i + k, and on each of them."""
    one = architecture()
    model, heads = pair(one, MultiTokenPrediction(depth=2))
    seen, _ = tokens()
    embedded = nn.functional.embedding(seen, model.embedding).detach().requires_grad_()

    def outputs() -> list[Tensor]:
        x: Tensor = embedded
        for block in model.blocks:
            x = block(x)
        assert model.norm is not None
        x, of_heads = model.norm(x), []
        for k, head in enumerate(heads.heads, start=1):
            x = head(x[:, :-1], embedded[:, k:], seen[:, k:])
            of_heads.append(x)
        return of_heads

    for k, output in enumerate(outputs(), start=1):
        for i in range(output.shape[1]):
            (gradient,) = torch.autograd.grad(
                output[:, i].square().sum(), embedded, retain_graph=True
            )
            reached = gradient.abs().sum(dim=(0, 2)) > 0
            assert reached.tolist() == [j <= i + k for j in range(LENGTH)]


BLOCKS: dict[str, list[Plain]] = {
    "dense": [{"mixer": ATTENTION, "ffn": DENSE}],
    "mixture": [{"mixer": ATTENTION, "ffn": DENSE}, {"mixer": ATTENTION, "ffn": MOE}],
    "keys of another layer": [
        {"mixer": ATTENTION | {"qk_norm": "head"}, "ffn": DENSE},
        {"mixer": ATTENTION | {"qk_norm": "head", "kv_source": 1}, "ffn": DENSE},
    ],
    "table of another layer": [
        {"mixer": ATTENTION | {"position_bias": {"kind": "t5"}}, "ffn": DENSE},
        {"mixer": ATTENTION | {"position_bias": {"kind": "t5", "shared": True}}, "ffn": DENSE},
    ],
    "number of the layer": [
        {"mixer": {"kind": "lightning_attention", "n_heads": 2, "head_dim": 8}, "ffn": DENSE}
    ],
    "half blocks": [{"mixer": ATTENTION}, {"ffn": DENSE}],
    "no mixer": [{"ffn": DENSE}],
    "shortcut": [
        {"mixer": ATTENTION, "ffn": DENSE, "shortcut": MOE, "shortcut_delay": 1, "repeat": 2}
    ],
    "hash": [
        {"mixer": ATTENTION, "ffn": MOE | {"router": {"selection": "hash", "score": "uniform"}}}
    ],
}


@pytest.mark.parametrize("norm_position", ["pre", "post", "sandwich"])
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_reach_all_heads_and_the_model(name: str, norm_position: str) -> None:
    model, heads = pair(architecture(*BLOCKS[name], norm_position=norm_position))
    seen, targets = tokens()
    heads.loss(model, model.hidden(seen), seen, targets).backward()
    for module in (model, heads):
        missing = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()]
        untrained = ("head.", "logits.weight")  # a table of its own; a router without a score
        assert [n for n in missing if not n.endswith(untrained)] == []


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", BLOCKS)
def test_parameters_and_operations_are_counted(
    name: str, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operations are the ones that fvcore counts beyond the model's."""
    one, mtp = architecture(*BLOCKS[name]), MultiTokenPrediction(depth=depth)
    model, heads = pair(one, mtp)
    cost = mtp.cost(one, LENGTH)
    assert cost.params == sum(p.numel() for p in heads.parameters())
    assert cost.kv_bytes_per_token == 0
    # A cross entropy has no product; the logits of each head stand for it.
    monkeypatch.setattr(model.head, "loss", lambda x, embedding, _: model.head(x, embedding).sum())

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.heads = model, heads

        def forward(self, seen: Tensor) -> list[Tensor]:
            hidden = self.model.hidden(seen)
            logits = self.model.head(hidden, self.model.embedding)
            return [logits, *self.heads.losses(self.model, hidden, seen, seen)]

    counted = count_flops(Whole(), tokens()[0][:1])
    parts = mtp.block(one).parts.values()
    surplus = sum(
        part.surplus_flops(one.d_model, LENGTH - k) for part in parts for k in range(1, depth + 1)
    )
    of_heads = mtp.pass_flops(one, LENGTH)
    assert 2 * counted.macs == one.pass_flops(LENGTH) + of_heads + surplus
    assert cost.flops_per_token == -(-of_heads // LENGTH)


def test_parameters_by_hand() -> None:
    """A matrix from 2 d to d, three norms and a dense block a head."""
    one = architecture()
    block = 16 * 16 * 4 + 3 * 16 * 24 + 2 * 16
    assert MultiTokenPrediction(depth=2).cost(one, 8).params == 2 * (2 * 16 * 16 + 3 * 16 + block)
    assert MultiTokenPrediction(weight=0.0).cost(one, 8).params == 0


def test_heads_have_first_weights_of_their_own() -> None:
    """The same seed gives the same heads, and none of them is drawn as the model is."""
    one, mtp = architecture(), MultiTokenPrediction(depth=2)
    first, again, model = mtp.build(one, seed=5), mtp.build(one, seed=5), one.build(seed=5)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    heads: Any = list(first.heads)
    assert not torch.equal(heads[0].join.weight, heads[1].join.weight)
    drawn = heads[0].join.weight.detach().flatten()[:16]
    assert not torch.allclose(drawn, model.embedding.flatten()[:16])
    assert float(drawn.std()) > 0.01


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_equal_models_have_equal_heads(norm_position: str) -> None:
    """A norm without an eps leaves `norm_eps` without effect, also on the norms of a head."""
    ones = [
        architecture(norm="dyt", norm_eps=eps, norm_position=norm_position) for eps in (1e-6, 0.1)
    ]
    assert ones[0].fingerprint == ones[1].fingerprint
    losses = []
    for one in ones:
        model, heads = pair(one)
        text, targets = tokens()
        losses.append(heads.losses(model, model.hidden(text), text, targets))
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))
