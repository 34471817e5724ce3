"""Position biases against T5's and BLOOM's own code, and explicit sums in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moenas.errors import SpaceError
from moenas.model import Attention, AttentionMixer, Rope
from moenas.model.architecture import Architecture
from moenas.model.mixers.position_bias import AlibiBias, T5Bias, alibi_slopes, first_distances
from moenas.model.mixers.softmax_attention import distances
from moenas.records import Plain

hf = pytest.importorskip("transformers")

D_MODEL, LENGTH = 32, 40
T5: Plain = {"kind": "t5", "num_buckets": 8, "max_distance": 20}


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 20), (2, 7), (3, 50), (9, 5)])
def test_buckets_are_those_of_t5(buckets: int, farthest: int) -> None:
    """At distances where the logarithm is no whole number, which float32 may round either way."""
    far = torch.arange(3 * farthest)
    theirs = hf.models.t5.modeling_t5.T5Attention._relative_position_bucket(
        -far, False, buckets, farthest
    )
    ours = torch.searchsorted(torch.tensor(first_distances(buckets, farthest)), far, right=True)
    assert torch.equal(ours, theirs)


def test_a_bucket_begins_where_its_logarithm_is_a_whole_number() -> None:
    """32 buckets up to 256: 16 * 16^(k / 16) is whole for k = 4, 8, 12 and 16."""
    firsts = first_distances(32, 256)
    assert [firsts[15 + k] for k in (0, 4, 8, 12)] == [16, 32, 64, 128]
    assert firsts[:16] == list(range(1, 17))


@pytest.mark.parametrize("n_heads", [1, 2, 3, 8, 12, 20])
def test_slopes_are_those_of_bloom(n_heads: int) -> None:
    """BLOOM adds slope * position of the key: over a row the same but for a constant."""
    build = hf.models.bloom.modeling_bloom.build_alibi_tensor
    theirs = build(torch.ones(1, 5), n_heads, torch.float32).view(n_heads, 5)
    torch.testing.assert_close(theirs[:, 1], torch.tensor(alibi_slopes(n_heads)))


def built(seed: int = 0, **fields: Any) -> Attention:
    attention = AttentionMixer(**{"head_dim": 8, "rope": Rope(theta=None), **fields}).build(D_MODEL)
    assert isinstance(attention, Attention)
    generator = torch.Generator().manual_seed(seed)
    for parameter in attention.parameters():
        parameter.data.normal_(0, 0.4, generator=generator)
    return attention


def bias_of(attention: Attention, far: int, head: int) -> float:
    """One number, from the formulas of the papers."""
    bias: Any = attention.attend.bias
    if not hasattr(bias, "num_buckets"):
        return -far * 2.0 ** (-8 * (head + 1) / 4)
    place = torch.tensor([[-far]])
    bucket = hf.models.t5.modeling_t5.T5Attention._relative_position_bucket(
        place, False, bias.num_buckets, bias.max_distance
    )
    return float(bias.weight[bucket.item(), head])


def textbook(attention: Attention, x: Tensor) -> Tensor:
    """One sequence (S, D) in float64, one query after another."""
    attend: Any = attention.attend
    q, k, v = (part.squeeze(0).double() for part in attention.qkv.heads(x.unsqueeze(0)))
    out = torch.zeros(4, len(x), 8, dtype=torch.float64)
    for head in range(4):
        keys, values = k[head * len(k) // 4], v[head * len(v) // 4]
        for now in range(len(x)):
            seen = [t for t in range(now + 1) if attend.reach.window is None or now - t < 6]
            scores = keys[seen] @ q[head, now] * attend.scale
            if attend.softcap:
                scores = (scores / attend.softcap).tanh() * attend.softcap
            scores = scores + torch.tensor([bias_of(attention, now - t, head) for t in seen])
            shares = scores.double().exp()
            whole = shares.sum() + (
                attend.sinks[head].double().exp() if attend.sinks is not None else 0
            )
            out[head, now] = shares @ values[seen] / whole
    return out.transpose(0, 1).flatten(1) @ attention.out.weight.double().T


@pytest.mark.parametrize("bias", [AlibiBias(), T5Bias(num_buckets=8, max_distance=20)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"n_kv_heads": 2, "window": 6}, {"n_kv_heads": 1, "sinks": True}, {"softcap": 1.0}],
    ids=["multi-head", "window", "sinks", "soft cap"],
)
def test_a_bias_is_added_to_the_scores(bias: Any, training: bool, fields: Any) -> None:
    attention = built(position_bias=bias, **fields)
    x = torch.randn(2, LENGTH, D_MODEL, generator=torch.Generator().manual_seed(1))
    with torch.set_grad_enabled(training):
        y = attention(x)
    with torch.no_grad():
        for sequence, output in zip(x, y, strict=True):
            wanted = textbook(attention, sequence)
            torch.testing.assert_close(output.double(), wanted, rtol=1e-4, atol=1e-5)
        cache = attention.new_cache(2, LENGTH)
        parts = [attention(piece, cache) for piece in x.split([20, 1, LENGTH - 21], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), y, rtol=1e-4, atol=1e-5)


def two_layers(**shared: Any) -> Architecture:
    mixer = {"kind": "attention", "head_dim": 8, "rope": {"partial_rotary_factor": 0.0}}
    blocks = [
        {"mixer": mixer | {"position_bias": T5}},
        {"mixer": mixer | {"position_bias": shared}},
    ]
    return Architecture.parse({"vocab_size": 9, "d_model": D_MODEL, "blocks": blocks})


def test_a_shared_table_is_one_table() -> None:
    """Two layers with equal tables of their own compute the same, and the gradients add up."""
    one, two = two_layers(**T5, shared=True), two_layers(**T5)
    assert two.cost(8).params - one.cost(8).params == 8 * 4
    shared, apart = one.build(seed=1), two.build(seed=1)
    apart.load_state_dict(shared.state_dict(), strict=False)
    tables = [block.mixer.attend.bias for block in apart.blocks]
    tables[1].weight.data.copy_(tables[0].weight.data)
    tokens = torch.arange(2 * 30).view(2, 30) % 9
    torch.testing.assert_close(shared(tokens), apart(tokens))
    for model in (shared, apart):
        model.loss(tokens, tokens.roll(-1, 1)).backward()
    wanted = tables[0].weight.grad + tables[1].weight.grad
    torch.testing.assert_close(shared.blocks[0].mixer.attend.bias.weight.grad, wanted)
    assert shared.blocks[1].mixer.attend.bias.weight is None


def test_a_table_that_is_not_there_is_refused() -> None:
    with pytest.raises(SpaceError, match="layer 1: position_bias is shared with layer 0"):
        two_layers(kind="t5", num_buckets=4, shared=True)
    alone = {"kind": "attention", "head_dim": 8, "position_bias": T5 | {"shared": True}}
    with pytest.raises(SpaceError, match="layer 0: position_bias is shared, but no layer before"):
        Architecture.parse({"vocab_size": 9, "d_model": 32, "blocks": [{"mixer": alone}]})
    with pytest.raises(SpaceError, match=r"max_distance \(4\) must be above num_buckets / 2 \(4\)"):
        two_layers(kind="t5", num_buckets=8, max_distance=4)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"max_distance": 20}, {"max_distance": 21}, False),
        ({"num_buckets": 2, "max_distance": 50}, {"num_buckets": 2, "max_distance": 9}, True),
        ({"window": 4, "max_distance": 50}, {"window": 4}, True),
        ({"window": 6, "max_distance": 50}, {"window": 6}, True),
        ({"window": 7, "max_distance": 50}, {"window": 7}, False),
        ({"chunk": 3, "max_distance": 50}, {"chunk": 3}, True),
    ],
)
def test_equal_buckets_in_reach_are_one_spelling(one: Plain, other: Plain, same: bool) -> None:
    """Of 8 buckets up to 20: distances below 6 are told apart by up to 50 as well."""

    def fingerprint(given: Plain) -> str:
        bias = T5 | {k: v for k, v in given.items() if k not in ("window", "chunk")}
        rest = {k: v for k, v in given.items() if k in ("window", "chunk")}
        mixer = {"kind": "attention", "head_dim": 8, "position_bias": bias, **rest}
        return Architecture.parse(
            {"vocab_size": 9, "d_model": 32, "blocks": [{"mixer": mixer}]}
        ).fingerprint

    assert (fingerprint(one) == fingerprint(other)) is same


@pytest.mark.parametrize("buckets", [2, 5, 8])
def test_the_canonical_distance_has_the_same_buckets(buckets: int) -> None:
    """By brute force over all distances: the same table is read, and no smaller number does it."""
    far = distances(0, 90, 0, torch.device("cpu"))[-1]
    for farthest in range(buckets // 2 + 1, 60):
        canonical = T5Bias(num_buckets=buckets, max_distance=farthest).canonical_within(None)
        read = [
            torch.searchsorted(torch.tensor(first_distances(buckets, n)), far, right=True)
            for n in (farthest, canonical.max_distance)
        ]
        assert torch.equal(*read)
        assert canonical.canonical_within(None) == canonical
