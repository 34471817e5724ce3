"""Block indexers: their count, the blocks that are selected, how they learn, and decoding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from indexed_models import model_of, tokens

from moenas.errors import SpaceError
from moenas.evaluate.causality import find_leaks, mask_boundaries, text_size
from moenas.evaluate.flops import count_flops
from moenas.model.architecture import Architecture
from moenas.records import Plain

D_MODEL, WIDTH, BLOCK, TOP, LOCAL = 16, 8, 3, 3, 2
ATTENTION: Plain = {"kind": "attention", "head_dim": 8, "n_heads": 4, "n_kv_heads": 2}
INDEXER: Plain = {"head_dim": WIDTH, "block": BLOCK, "top_blocks": TOP, "local_blocks": LOCAL}
REACH = BLOCK * TOP


def architecture(indexer: Plain | None = INDEXER, **fields: object) -> Architecture:
    mixer = ATTENTION | fields | ({"block_indexer": indexer} if indexer else {})
    block = {"mixer": mixer, "ffn": {"kind": "dense", "d_ff": 16}}
    return Architecture.parse({"vocab_size": 40, "d_model": D_MODEL, "blocks": [block] * 2})


def test_the_parameters_are_those_of_the_formula() -> None:
    plain, indexed = architecture(None).cost(64), architecture().cost(64)
    assert indexed.params - plain.params == 2 * (D_MODEL * WIDTH * (2 + 1) + 2 * WIDTH)
    assert indexed.kv_bytes_per_token - plain.kv_bytes_per_token == 2 * 2 * WIDTH
    assert sum(p.numel() for p in architecture().build().parameters()) == indexed.params


@pytest.mark.parametrize("context", [1, REACH, REACH + 1, 32])
@pytest.mark.parametrize("fields", [{}, {"sinks": True}, {"softcap": 3.0}], ids=str)
def test_the_operations_are_those_that_fvcore_counts(context: int, fields: Plain) -> None:
    one = architecture(**fields)
    counted = count_flops(one.build(), torch.zeros(1, context, dtype=torch.int64))
    assert 2 * counted.macs == one.pass_flops(context)


@torch.no_grad()
def test_a_context_of_up_to_the_blocks_is_read_whole() -> None:
    indexed, plain = model_of(architecture()), architecture(None).build().eval()
    plain.load_state_dict(indexed.state_dict(), strict=False)
    torch.testing.assert_close(indexed(tokens(REACH)), plain(tokens(REACH)))
    assert not torch.allclose(indexed(tokens(REACH + 6)), plain(tokens(REACH + 6)))


@torch.no_grad()
def test_each_token_and_group_reads_its_best_blocks() -> None:
    """Token by token: its own block and the one before, then the block of the largest score."""
    length = 17
    mixer: Any = model_of(architecture()).blocks[0].mixer
    x = torch.randn(2, length, D_MODEL, generator=torch.Generator().manual_seed(5))
    scores = mixer.indexer.train().scores(x, 0)
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    chosen = mixer.indexer.selected(scores, seen, 0)
    assert chosen.shape == (2, 2, length, length)
    for b in range(2):
        for group in range(2):
            for now in range(length):
                row, own = scores[b, group, now], now // BLOCK
                best = {
                    n: max(float(row[t]) for t in range(n * BLOCK, min(now + 1, (n + 1) * BLOCK)))
                    for n in range(own + 1)
                }
                local = [n for n in range(own, own - LOCAL, -1) if n >= 0]
                others = sorted(set(best) - set(local), key=lambda n: best[n], reverse=True)
                blocks = {*local, *others[: TOP - len(local)]}
                wanted = [t <= now and t // BLOCK in blocks for t in range(length)]
                assert chosen[b, group, now].tolist() == wanted


@pytest.mark.parametrize("steps", [[1] * 17, [11, 1, 5], [4, 13]], ids=str)
@pytest.mark.parametrize("fields", [{}, {"sinks": True}, {"n_kv_heads": 1}], ids=str)
@torch.no_grad()
def test_tokens_with_a_cache_have_the_logits_of_the_whole_text(
    steps: list[int], fields: Plain
) -> None:
    model = model_of(architecture(**fields))
    text, cache = tokens(17), model.new_cache(2, 17)
    pieces = [model(piece, cache) for piece in text.split(steps, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(text), rtol=1e-4, atol=1e-5)


def test_no_token_sees_a_later_one() -> None:
    one = architecture()
    ends = mask_boundaries(one)
    assert ends == {BLOCK, REACH}
    assert find_leaks(model_of(one), torch.randint(40, text_size(16, ends)), ends) == []


def test_the_indexer_learns_by_the_divergence_alone() -> None:
    """Its weights have a gradient of that loss only, and that loss reaches no other weight."""
    model, text = model_of(architecture()).train(), tokens(REACH + 5)
    model.loss(text, text).backward()
    indexers = {n: p for n, p in model.named_parameters() if ".indexer." in n}
    assert len(indexers) == 2 * 4
    assert all(p.grad is None for p in indexers.values())
    model.zero_grad()
    model.loss(text, text)
    loss = model.auxiliary_loss()
    assert loss > 0
    loss.backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == set(indexers)
    copy.deepcopy(model)
    model.after_step()
    assert float(model.auxiliary_loss()) == 0


def test_the_divergence_is_that_of_torch() -> None:
    """Of the mean weights of the heads of each group, over the keys that are read."""
    mixer: Any = model_of(architecture()).blocks[0].mixer.train()
    x = torch.randn(2, 14, D_MODEL, generator=torch.Generator().manual_seed(5))
    mixer(x)
    indexer, attend = mixer.indexer, mixer.attend
    q, k, _ = mixer.qkv.heads(x)
    q, k = mixer.rotary(q, 0), mixer.rotary(k, 0)
    scores = indexer.scores(x, 0)
    chosen = indexer.selected(scores, torch.ones(14, 14, dtype=torch.bool).tril(), 0)
    total = 0.0
    for b in range(2):
        for group in range(2):
            for now in range(14):
                places = chosen[b, group, now]
                heads = q[b, 2 * group : 2 * group + 2, now] @ k[b, group, places].T
                weights = (heads * attend.scale).softmax(dim=-1).mean(dim=0)
                logs = scores[b, group, now, places].log_softmax(dim=-1)
                total += torch.nn.functional.kl_div(logs, weights, reduction="sum").item()
    mixer(x)
    assert indexer.index_loss.item() == pytest.approx(total / (2 * 2 * 14), rel=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 4}, "block_indexer: it selects among all earlier tokens"),
        ({"chunk": 4}, "block_indexer: it selects among all earlier tokens"),
        ({"position_bias": {"kind": "alibi"}}, "block_indexer: the layer has keys of its own"),
        ({"head_dim": 16}, "its head_dim must be at least the 16 elements"),
        ({"block_indexer": INDEXER | {"local_blocks": 4}}, "local_blocks .4. is above top_blocks"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: Plain, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        Architecture.parse(
            {
                "vocab_size": 40,
                "d_model": D_MODEL,
                "blocks": [{"mixer": ATTENTION | {"block_indexer": INDEXER} | fields}],
            }
        )
