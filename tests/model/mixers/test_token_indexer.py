"""Token indexers: their count, what is selected, how they learn, and decoding with a cache."""

from __future__ import annotations

import copy

import pytest
import torch
from indexed_models import LATENT, model_of, tokens

from moenas.errors import SpaceError
from moenas.evaluate.causality import find_leaks, mask_boundaries, text_size
from moenas.evaluate.flops import count_flops
from moenas.model.architecture import Architecture
from moenas.records import Plain

D_MODEL, HEADS, WIDTH, TOP_K = 16, 3, 8, 4
INDEXER: Plain = {"n_heads": HEADS, "head_dim": WIDTH, "top_k": TOP_K}


def architecture(**fields: object) -> Architecture:
    block = {"mixer": LATENT | fields, "ffn": {"kind": "dense", "d_ff": 16}}
    return Architecture.parse({"vocab_size": 40, "d_model": D_MODEL, "blocks": [block] * 2})


def test_the_parameters_are_those_of_the_formula() -> None:
    plain, indexed = architecture().cost(64), architecture(indexer=INDEXER).cost(64)
    layer = 6 * HEADS * WIDTH + D_MODEL * WIDTH + D_MODEL * HEADS + 2 * WIDTH
    assert indexed.params - plain.params == 2 * layer
    assert indexed.kv_bytes_per_token - plain.kv_bytes_per_token == 2 * 2 * WIDTH
    built = architecture(indexer=INDEXER).build()
    assert sum(p.numel() for p in built.parameters()) == indexed.params


@pytest.mark.parametrize("context", [1, TOP_K, TOP_K + 1, 33])
def test_the_operations_are_those_that_fvcore_counts(context: int) -> None:
    one = architecture(indexer=INDEXER, window=7, rope_norm=True, output_gate="head")
    counted = count_flops(one.build(), torch.zeros(1, context, dtype=torch.int64))
    assert counted.per_token == one.cost(context).flops_per_token


@torch.no_grad()
def test_a_context_of_up_to_top_k_tokens_is_read_whole() -> None:
    indexed, plain = model_of(architecture(indexer=INDEXER)), architecture().build().eval()
    plain.load_state_dict(indexed.state_dict(), strict=False)
    short, long = tokens(TOP_K), tokens(TOP_K + 3)
    torch.testing.assert_close(indexed(short), plain(short))
    assert not torch.allclose(indexed(long), plain(long), atol=1e-3)
    torch.testing.assert_close(indexed(long)[:, :TOP_K], plain(long)[:, :TOP_K])


@torch.no_grad()
def test_each_token_reads_the_best_tokens_of_its_past() -> None:
    part = model_of(architecture(indexer=INDEXER)).blocks[0].mixer.indexer
    scores = torch.randn(2, 9, 9, generator=torch.Generator().manual_seed(5))
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    chosen = part.selected(scores, seen)
    for batch in range(2):
        for query in range(9):
            past = scores[batch, query, : query + 1].tolist()
            best = sorted(range(query + 1), key=lambda key: -past[key])[:TOP_K]
            assert chosen[batch, query].nonzero().flatten().tolist() == sorted(best)


@pytest.mark.parametrize("fields", [{}, {"window": 6, "rope_norm": True}])
@torch.no_grad()
def test_tokens_with_a_cache_have_the_logits_of_the_whole_text(fields: Plain) -> None:
    model, text = model_of(architecture(indexer=INDEXER, **fields)), tokens(13)
    cache = model.new_cache(2, 13)
    steps = [model(part, cache) for part in (text[:, :3], *text[:, 3:].split(1, dim=1))]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(text), rtol=1e-4, atol=1e-4)


def test_no_token_sees_a_later_one() -> None:
    one = architecture(indexer=INDEXER)
    model, boundaries = model_of(one), mask_boundaries(one)
    for mode in (model.eval(), model.train()):
        text = torch.randint(40, text_size(32, boundaries))
        assert find_leaks(mode, text, boundaries) == []


def test_the_indexer_learns_by_the_divergence_alone() -> None:
    """The gradient of the language model loss does not reach it, nor its own loss the rest."""
    model, text = model_of(architecture(indexer=INDEXER)).train(), tokens(12)
    model.loss(text, text.roll(-1, 1)).backward()
    of_indexer = {n for n, _ in model.named_parameters() if ".indexer." in n}
    assert {n for n, p in model.named_parameters() if p.grad is None} == of_indexer
    model.zero_grad()
    before = model.auxiliary_loss()
    before.backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == of_indexer
    copy.deepcopy(model)
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if ".indexer." in n], 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(text, text.roll(-1, 1))
        loss = model.auxiliary_loss()
        loss.backward()
        optimizer.step()
    assert 0 <= loss.item() < 0.7 * before.item()
    model.after_step()
    assert not model.auxiliary_loss().item()


def test_a_pass_in_evaluation_leaves_no_loss_of_the_pass_before() -> None:
    model = model_of(architecture(indexer=INDEXER)).train()
    model.loss(tokens(12), tokens(12))
    model.auxiliary_loss().backward()
    model.eval()(tokens(4))
    assert not model.auxiliary_loss().requires_grad
    assert model.auxiliary_loss().item() == 0.0


def test_the_divergence_is_that_of_torch() -> None:
    part = model_of(architecture(indexer=INDEXER)).blocks[0].mixer.indexer
    generator = torch.Generator().manual_seed(5)
    scores = torch.randn(2, 6, 6, generator=generator)
    seen = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, -1, -1)
    attention = torch.rand(2, 6, 6, generator=generator).masked_fill(~seen, 0)
    attention = attention / attention.sum(-1, keepdim=True)
    part.learn(scores, seen, attention)
    wanted = []
    for one, weights, known in zip(
        scores.flatten(0, 1), attention.flatten(0, 1), seen.flatten(0, 1), strict=True
    ):
        target = torch.distributions.Categorical(weights[known])
        scored = torch.distributions.Categorical(logits=one[known])
        wanted.append(torch.distributions.kl_divergence(target, scored))
    torch.testing.assert_close(part.index_loss, torch.stack(wanted).mean())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"q_rank": None, "indexer": INDEXER}, "reads the latent of the queries; give q_rank"),
        ({"rope_dim": 12, "indexer": INDEXER}, "head_dim of the indexer must be at least rope_dim"),
    ],
)
def test_an_indexer_needs_a_latent_and_room_for_positions(fields: Plain, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        architecture(**fields)
