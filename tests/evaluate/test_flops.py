"""fvcore's count with our handlers, against the closed form and against torch's own counter."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from wide_space import point

from moenas.errors import CandidateError
from moenas.evaluate import flops
from moenas.evaluate.flops import (
    HANDLERS,
    NO_PRODUCTS,
    count_flops,
    count_forward,
    count_outline,
)
from moenas.grammar.sampling import RandomSuggest
from moenas.model.architecture import Architecture
from moenas.space.space import Space


def random_architecture(seed: int) -> Architecture:
    draw = random.Random(seed)

    def block() -> dict[str, object]:
        head_dim = draw.choice([8, 16])
        mixer: dict[str, object] = {"kind": "attention", "head_dim": head_dim}
        mixer |= {"n_heads": 4, "n_kv_heads": draw.choice([1, 2, 4])}
        mixer |= {"qk_norm": draw.choice(["none", "head"])}
        activation = draw.choice(["swiglu", "geglu", "reglu", "gelu", "relu2"])
        if draw.random() < 0.3:
            ffn: dict[str, object] = {"kind": "dense", "d_ff": 8 * draw.randint(1, 8)}
        else:
            router = {
                "score": draw.choice(["softmax", "sigmoid"]),
                "top_k": draw.randint(1, 4),
                "normalize": draw.choice([None, False]),
                "capacity_factor": draw.choice([None, 1.0]),
                "balance": draw.choice(["none", "aux_loss", "bias"]),
            }
            ffn = {"kind": "moe", "n_experts": draw.randint(4, 9), "router": router}
            ffn |= {"d_expert": 8 * draw.randint(1, 4), "n_shared_experts": draw.randint(0, 2)}
        return {
            "repeat": draw.randint(1, 2),
            "mixer": mixer,
            "ffn": ffn | {"activation": activation},
        }

    return Architecture.parse(
        {
            "vocab_size": draw.randint(2, 50),
            "d_model": 8 * draw.randint(2, 5),
            "norm": draw.choice(["rmsnorm", "layernorm"]),
            "tie_embeddings": draw.random() < 0.5,
            "blocks": [block() for _ in range(draw.randint(1, 3))],
        }
    )


@pytest.mark.parametrize("seed", range(25))
def test_the_count_equals_the_closed_form(seed: int) -> None:
    architecture = random_architecture(seed)
    context = random.Random(seed).randint(2, 24)
    model = architecture.build()
    model.train(seed % 2 == 0)
    counted = count_flops(model, torch.zeros(1, context, dtype=torch.int64))
    assert counted.per_token == architecture.cost(context).flops_per_token
    assert 2 * counted.macs == counted.per_token * context
    assert sum(counted.by_operator.values()) == counted.macs
    assert model.training == (seed % 2 == 0)


EXPERT = 2 * 3 * 16 * 8
"""Operations of a row of an expert: three matrices of 16 x 8."""
CONTEXT = 16
SURPLUS: dict[str, tuple[dict[str, object], int]] = {
    "every row counts": ({"router": {"top_k": 2}}, 0),
    "three experts take 6 of 16 tokens each": (
        {"n_experts": 3, "router": {"selection": "expert_choice", "top_k": 1}},
        2 * EXPERT,
    ),
    "two rows for the one token that counts in the mean": (
        {"router": {"selection": "threshold", "top_k": 1}},
        CONTEXT * EXPERT,
    ),
    "half the choices have no network": (
        {"n_zero_experts": 4, "router": {"top_k": 2}},
        CONTEXT * EXPERT,
    ),
}


@pytest.mark.parametrize("name", SURPLUS)
def test_a_pass_is_the_cost_and_the_rows_that_carry_nothing(name: str) -> None:
    """By pencil and paper; two layers have twice the surplus of one."""
    fields, surplus = SURPLUS[name]
    router = {"allow_acausal": True, **fields["router"]}  # type: ignore[dict-item]
    ffn = {"kind": "moe", "n_experts": 4, "d_expert": 8, **fields, "router": router}
    for repeat in (1, 2):
        architecture = Architecture.parse(
            {"vocab_size": 32, "d_model": 16, "blocks": [{"ffn": ffn, "repeat": repeat}]}
        )
        (part,) = {layer.ffn for layer in architecture.layers}
        assert part is not None
        assert part.surplus_flops(16, CONTEXT) == surplus
        cost = architecture.cost(CONTEXT).flops_per_token * CONTEXT
        assert architecture.pass_flops(CONTEXT) == cost + repeat * surplus
        counted = count_flops(architecture.build(), torch.zeros(1, CONTEXT, dtype=torch.int64))
        assert 2 * counted.macs == cost + repeat * surplus


@pytest.mark.parametrize("context", [1, 63, 67, 100])
def test_a_scan_takes_back_what_its_tokens_were_rounded_up_by(context: int) -> None:
    mixer = {"kind": "gated_delta", "n_heads": 2, "key_dim": 8, "value_dim": 16}
    architecture = Architecture.parse(
        {"vocab_size": 32, "d_model": 16, "blocks": [{"mixer": mixer, "repeat": 3}]}
    )
    surplus = (
        architecture.pass_flops(context) - context * architecture.cost(context).flops_per_token
    )
    assert -3 * context < surplus <= 0
    counted = count_flops(architecture.build(), torch.zeros(1, context, dtype=torch.int64))
    assert 2 * counted.macs == architecture.pass_flops(context)


def test_the_count_leaves_the_model_as_it_was() -> None:
    architecture = random_architecture(1)
    tokens = torch.arange(8).view(1, 8) % architecture.vocab_size
    before = architecture.build()(tokens)
    model = architecture.build()
    count_flops(model, tokens)
    assert torch.equal(model(tokens), before)


class Products(nn.Module):
    """Matrix products of all kinds, some with shapes that fvcore's own handlers count wrongly."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (1, S) numbers to a scalar."""
        length = x.shape[1]
        rows = x.float().view(length, 1) @ torch.ones(1, 8)
        many = torch.ones(3, 8, 5)
        products = [
            F.linear(rows, torch.ones(7, 8)),
            torch.matmul(rows, many),  # broadcasts over 3
            torch.mm(rows, torch.ones(8, 2)),
            torch.bmm(rows.expand(3, -1, -1), many),
            torch.addmm(torch.zeros(6), rows, torch.ones(8, 6)),
            torch.baddbmm(torch.zeros(1), rows.expand(3, -1, -1), many),
            torch.einsum("sd,hde->she", rows, many),
        ]
        return torch.stack([f.sum() for f in products]).sum()


@pytest.mark.parametrize("length", [1, 4, 12])
def test_matrix_products_are_counted_like_torch_counts_them(length: int) -> None:
    tokens = torch.ones(1, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as oracle:
        Products()(tokens)
    assert 2 * count_flops(Products(), tokens).macs == oracle.get_total_flops()


class Vectors(nn.Module):
    """Products with a vector, which torch's counter leaves out."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (1, S) numbers to a scalar."""
        rows = x.float().view(-1, 1).expand(-1, 8)
        first = torch.mv(rows, torch.ones(8)) + torch.matmul(rows, torch.ones(8))
        return torch.dot(first, first)


def test_products_with_a_vector_are_counted() -> None:
    counted = count_flops(Vectors(), torch.ones(1, 5, dtype=torch.int64))
    assert counted.by_operator == {"mv": 5 * 8, "matmul": 5 * 8, "dot": 5}


class Attends(nn.Module):
    """Grouped-query attention whose values are wider than its queries."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (1, S) to (1, 4, S, 24)."""
        length = x.shape[1]
        query = torch.ones(1, 4, length, 16)
        key, value = torch.ones(1, 2, 2 * length, 16), torch.ones(1, 2, 2 * length, 24)
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def test_attention_counts_the_full_square_of_every_query_head() -> None:
    length = 6
    counted = count_flops(Attends(), torch.ones(1, length, dtype=torch.int64))
    scores_and_values = 4 * length * (2 * length) * 16 + 4 * length * (2 * length) * 24
    assert counted.macs == scores_and_values


class Unknown(nn.Module):
    """Holds a convolution, for which there is no rule."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (1, S) to (1, 1, S - 2)."""
        return F.conv1d(x.float().unsqueeze(0), torch.ones(1, 1, 3)).erfinv()


def test_an_operator_without_a_rule_is_named() -> None:
    with pytest.raises(CandidateError) as error:
        count_flops(Unknown(), torch.ones(1, 8, dtype=torch.int64))
    assert "aten::_convolution, aten::erfinv" in str(error.value)
    assert "moenas/evaluate/flops.py" in str(error.value)


class Square(torch.autograd.Function):
    """A product that a trace does not look into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x @ x.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def hidden(x: Tensor) -> Tensor:
    product: Tensor = Square.apply(x)
    return product


def in_place(x: Tensor) -> Tensor:
    return torch.zeros(len(x), 8).addmm_(x, torch.ones(8, 8))


class Calls(nn.Module):
    """Calls a function on (S, 8) rows."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Map (1, S) to what the function makes of it."""
        return self.function(x.float().view(-1, 1).expand(-1, 8))


@pytest.mark.parametrize(
    ("function", "name"), [(hidden, "prim::PythonOp.Square"), (in_place, "aten::addmm_")]
)
def test_no_product_hides_from_the_count(function: Callable[[Tensor], Tensor], name: str) -> None:
    with pytest.raises(CandidateError, match=f"no rule for {name};"):
        count_flops(Calls(function), torch.ones(1, 5, dtype=torch.int64))


def test_no_operator_has_two_rules() -> None:
    assert not NO_PRODUCTS & set(HANDLERS)


@pytest.mark.slow
def test_a_model_that_fits_no_machine_is_counted_by_its_shapes() -> None:
    space = Space.load("zoo/mixtral_8x22b")
    architecture = space.architecture(space.draw(RandomSuggest(0)))
    counted = count_outline(architecture, 64)
    assert 2 * counted.macs == architecture.pass_flops(64)


@pytest.mark.parametrize("numbers", [range(0, 22), range(22, 44)])
def test_parts_of_every_kind_are_counted_without_values(numbers: range) -> None:
    architectures = [Architecture.parse(p[0]) for p in map(point, numbers) if p is not None]
    assert len(architectures) > 7
    for architecture in architectures:
        assert 2 * count_outline(architecture, 24).macs == architecture.pass_flops(24)


def test_a_part_that_needs_values_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Peeking(nn.Module):
        def forward(self, tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:
            return tokens[: int(tokens.sum())]

    monkeypatch.setattr(Architecture, "outline", lambda self: Peeking())
    with pytest.raises(CandidateError, match="a part needs the values of tensors"):
        count_outline(random_architecture(0), 8)


def test_a_small_model_is_counted_without_the_compiler() -> None:
    """The import of torch's compiler would take longer than the count, in each worker."""
    code = """if True:
        import sys
        from moenas import Space
        from moenas.evaluate.flops import count_forward
        architecture = Space.load("tiny").require_feasible()
        assert 2 * count_forward(architecture, 128).macs == architecture.pass_flops(128)
        assert "sympy" not in sys.modules and "torch._dynamo" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("limit", ["params", "pass"])
def test_a_large_model_is_counted_by_its_shapes(
    limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = Space.load("tiny").require_feasible()
    small = count_forward(architecture, 64)
    lowered = {
        "params": ("SMALL_PARAMS", architecture.cost(64).params - 1),
        "pass": ("SMALL_PASS", architecture.pass_flops(64) - 1),
    }[limit]
    monkeypatch.setattr(flops, *lowered)
    monkeypatch.setattr(Architecture, "build", lambda self: pytest.fail("it was built"))
    assert count_forward(architecture, 64) == small
