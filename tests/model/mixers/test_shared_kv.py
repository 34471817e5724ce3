"""Layers that read the keys of an earlier one: explicit sums, caches, costs, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact import assert_same_function, check_cost, check_gradients
from torch import Tensor
from wide_space import stir

from moenas.errors import SpaceError
from moenas.model import Attention, CrossLayerAttention, SharedKV
from moenas.model.architecture import Architecture, Model
from moenas.records import Plain

ATTENTION: Plain = {"kind": "attention", "head_dim": 8, "n_kv_heads": 1}
OTHER: Plain = {"kind": "short_conv"}
YARN: Plain = {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 20}


def architecture(*mixers: Plain) -> Architecture:
    blocks = [{"mixer": m, "ffn": {"kind": "dense", "d_ff": 8}} for m in mixers]
    return Architecture.parse({"vocab_size": 40, "d_model": 16, "blocks": blocks})


def reading(n: int, **fields: Any) -> Plain:
    return ATTENTION | {"kv_source": n} | fields


def stretched(attention: float, **fields: Any) -> Plain:
    """Attention whose rotary positions multiply queries and keys."""
    return ATTENTION | {"rope": {"scaling": YARN | {"attention_factor": attention}}} | fields


def stirred(architecture: Architecture) -> Model:
    model = architecture.build(seed=1).eval()
    stir(model, 2)
    return model


CASES: dict[str, tuple[Plain, ...]] = {
    "every second": (ATTENTION, reading(1), ATTENTION, reading(1)),
    "past others": (ATTENTION, OTHER, reading(1, q_rank=6, output_gate="head"), reading(1)),
    "the one before": (
        ATTENTION | {"window": 4, "sinks": True, "qk_norm": "head"},
        ATTENTION | {"qk_norm": "full"},
        reading(2, window=4, sinks=True, qk_norm="head"),
        reading(1, qk_norm="full", softcap=2.0, qkv_bias=True, qkv_clip=0.5),
    ),
    "stretched": (
        ATTENTION | {"rope": {"scaling": YARN}, "qk_norm": "head", "qk_norm_after_rope": True},
        reading(1, rope={"scaling": YARN}, qk_norm="head", qk_norm_after_rope=True),
    ),
    "folded": (
        ATTENTION | {"rope": {"scaling": YARN}},
        reading(1, rope={"scaling": YARN}, scale=0.3),
    ),
    "values of its own": (ATTENTION | {"v_norm": True, "k_eq_v": True}, reading(1, v_norm=True)),
}


@pytest.mark.parametrize("name", CASES)
def test_cost_gradients_and_spelling_are_exact(name: str) -> None:
    parsed = architecture(*CASES[name])
    for length in (12, 31):
        check_cost(parsed, length)
    check_gradients(parsed, 31)
    canonical = parsed.canonical()
    assert canonical.canonical() == canonical
    assert Architecture.parse(canonical.plain()) == canonical
    assert_same_function(parsed, canonical)


def inputs_of(model: Model, tokens: Tensor) -> list[Tensor]:
    """What each mixer of a model is given."""
    inputs: list[Tensor] = []
    mixers: list[Any] = [block.mixer for block in model.blocks]
    handles = [
        m.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for m in mixers
    ]
    model(tokens)
    for handle in handles:
        handle.remove()
    return inputs


@torch.no_grad()
def test_the_keys_are_those_that_the_earlier_layer_made() -> None:
    """Explicit sums in float64 over keys and values projected from what layer 0 was given."""
    model = stirred(architecture(ATTENTION, OTHER, reading(1)))
    tokens = torch.arange(40).view(2, 20) % 11
    given = inputs_of(model, tokens)
    owner, reader = model.blocks[0].mixer, model.blocks[2].mixer
    assert isinstance(owner, Attention)
    assert isinstance(reader, CrossLayerAttention)
    _, k, v = owner.qkv.heads(given[0])
    k = owner.rotary(k, 0).double()
    q = given[2] @ reader.queries.project.weight.T
    q = reader.queries.rotary(q.unflatten(-1, (2, 8)).transpose(1, 2), 0).double()
    shares = torch.zeros(2, 2, 20, 20, dtype=torch.float64)
    for now in range(20):
        scores = (q[:, :, now : now + 1] * k[:, :, : now + 1]).sum(-1) / 8**0.5
        shares[:, :, now, : now + 1] = scores.softmax(-1)
    heads = (shares @ v.double()).transpose(1, 2).flatten(2)
    seen: list[Tensor] = []
    handle = reader.register_forward_hook(lambda module, given, y: seen.append(y))
    model(tokens)
    handle.remove()
    torch.testing.assert_close(
        seen[0].double(), heads @ reader.out.weight.double().T, rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_a_reader_with_its_sources_weights_doubles_it() -> None:
    """Two layers of one set of queries and the same input give the same."""
    model = stirred(architecture(ATTENTION, reading(1)))
    owner, reader = (block.mixer for block in model.blocks)
    reader.queries.project.weight.copy_(owner.qkv.weight[:16])
    reader.out.weight.copy_(owner.out.weight)
    lent, x = SharedKV(), torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(owner(x, None, lent), reader(x, None, lent))


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_a_cache_continues_and_readers_keep_nothing(name: str) -> None:
    parsed = architecture(*CASES[name])
    model = stirred(parsed)
    tokens = torch.arange(40).view(2, 20) % 11
    cache = model.new_cache(2, 20)
    assert [c is None for c in cache] == ["kv_source" in mixer for mixer in CASES[name]]
    parts = [model(piece, cache) for piece in tokens.split([7, 1, 12], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-4, atol=1e-4)
    owners = sum(layer.mixer.cost(16, 20).kv_bytes_per_token for layer in parsed.layers)
    assert parsed.cost(20).kv_bytes_per_token == owners
    assert parsed.kv_cache_bytes(20) <= 20 * owners


def test_costs_by_pencil_and_paper() -> None:
    """16 wide, 2 query heads and 1 key-value head of 8: queries and output are 16 x 16 each."""
    one, two = architecture(ATTENTION), architecture(ATTENTION, reading(1))
    added = two.cost(10).params - one.cost(10).params
    assert added == 2 * 16 * 16 + 3 * 16 * 8 + 2 * 16  # with the ffn and two norms
    assert two.cost(10).kv_bytes_per_token == one.cost(10).kv_bytes_per_token == 2 * 2 * 8
    flops = two.cost(10).flops_per_token - one.cost(10).flops_per_token
    assert flops == 2 * (2 * 16 * 16 + 3 * 16 * 8) + 2 * 10 * 2 * 16


@pytest.mark.parametrize(
    ("mixers", "reason"),
    [
        ((reading(1),), "layer 0: kv_source: 1, but fewer attention layers before it have keys"),
        ((ATTENTION, reading(1), reading(2)), "layer 2: kv_source: 2, but fewer"),
        ((ATTENTION, reading(1, rope={"theta": 50.0})), "layer 0, and their rope.theta differ"),
        ((ATTENTION, reading(1, n_kv_heads=2)), "layer 0, and their n_kv_heads differ"),
        ((ATTENTION, reading(1, window=4)), "layer 0, and their window differ"),
        ((ATTENTION | {"qk_norm": "head"}, reading(1, qk_norm="head", inner_eps=0.1)), "inner_eps"),
        ((stretched(1.0, scale=4 * 8**-0.5), stretched(2.0, kv_source=1)), "their rope.scaling"),
        ((ATTENTION | {"window": 1}, reading(1, window=1)), "its queries have no effect"),
        ((ATTENTION, reading(1, scale=0.0)), "its queries have no effect"),
    ],
)
def test_what_cannot_be_read_is_refused(mixers: tuple[Plain, ...], reason: str) -> None:
    with pytest.raises(SpaceError, match=reason):
        architecture(*mixers)


def test_a_reader_alone_says_what_it_lacks() -> None:
    reader = architecture(ATTENTION, reading(1)).layers[1].mixer
    assert reader is not None
    with pytest.raises(ValueError, match="keys and values of an earlier layer are read"):
        reader.build(16)(torch.zeros(1, 3, 16))


def test_spellings_of_the_source_do_not_matter() -> None:
    """Two readers differ by whose keys they read, and not by fields that are the source's."""
    base = (ATTENTION, ATTENTION)
    near, far = architecture(*base, reading(1)), architecture(*base, reading(2))
    assert near.fingerprint != far.fingerprint
    again = architecture(*base, reading(1, v_norm=True, k_eq_v=True, n_heads=2))
    assert again.fingerprint == near.fingerprint
