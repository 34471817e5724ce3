"""Layers that read the selection of an earlier indexer: what they read, cost, caches, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from indexed_models import LATENT, model_of, tokens
from torch import Tensor

from moenas.errors import SpaceError
from moenas.evaluate.causality import find_leaks, mask_boundaries, text_size
from moenas.evaluate.flops import count_flops
from moenas.model.architecture import Architecture, Model
from moenas.model.multi_token import MultiTokenPrediction
from moenas.records import Plain

TOP_K = 4
OWN: Plain = {"indexer": {"n_heads": 3, "head_dim": 8, "top_k": TOP_K}}
SHARED: Plain = {"index_shared": True}


def architecture(*layers: Plain) -> Architecture:
    blocks = [{"mixer": LATENT | fields, "ffn": {"kind": "dense", "d_ff": 16}} for fields in layers]
    return Architecture.parse({"vocab_size": 40, "d_model": 16, "blocks": blocks})


def masks_of(model: Model, text: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """The selections that the attention of each layer is given."""
    given = []
    for block in model.blocks:
        attend: Any = block.mixer.attend

        def noting(*args: Any, inner: Any = attend.forward, **more: Any) -> Any:
            given.append(more["chosen"])
            return inner(*args, **more)

        monkeypatch.setattr(attend, "forward", noting)
    model(text)
    return given


@torch.no_grad()
def test_a_layer_reads_the_tokens_of_the_nearest_indexer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(architecture(OWN, SHARED, SHARED, OWN, SHARED))
    first, second, third, fourth, fifth = masks_of(model, tokens(TOP_K + 5), monkeypatch)
    assert first is second is third
    assert fourth is fifth
    assert first is not None
    assert fourth is not None
    assert not torch.equal(first, fourth)
    assert int(first.sum(dim=-1).max()) == TOP_K


@torch.no_grad()
def test_a_short_text_is_read_whole_also_after_a_long_one() -> None:
    indexed, plain = architecture(OWN, SHARED), architecture({}, {}).build().eval()
    model = model_of(indexed)
    plain.load_state_dict(model.state_dict(), strict=False)
    model(tokens(TOP_K + 5))
    torch.testing.assert_close(model(tokens(TOP_K)), plain(tokens(TOP_K)))


@pytest.mark.parametrize("steps", [[1] * 11, [6, 1, 4], [3, 8]], ids=str)
@torch.no_grad()
def test_tokens_with_a_cache_have_the_logits_of_the_whole_text(steps: list[int]) -> None:
    model = model_of(architecture(OWN, SHARED, OWN, SHARED))
    text, cache = tokens(11), model.new_cache(2, 11)
    pieces = [model(piece, cache) for piece in text.split(steps, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(text), rtol=1e-4, atol=1e-5)


def test_it_costs_what_attention_costs_and_looks_at_no_later_token() -> None:
    one, plain = architecture(OWN, SHARED), architecture(OWN, {})
    assert one.cost(33) == plain.cost(33)
    assert one.fingerprint != plain.fingerprint
    counted = count_flops(one.build(), torch.zeros(1, 33, dtype=torch.int64))
    assert 2 * counted.macs == one.pass_flops(33)
    ends = mask_boundaries(one)
    assert find_leaks(model_of(one), torch.randint(40, text_size(16, ends)), ends) == []


def test_a_prediction_head_reads_no_earlier_layer() -> None:
    one = architecture(OWN, SHARED)
    model, heads = one.build(seed=1), MultiTokenPrediction().build(one, seed=1)
    text = tokens(TOP_K + 5)
    assert heads.loss(model, model.hidden(text), text, text).isfinite()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([SHARED], "layer 0: index_shared: no layer before it has an indexer"),
        ([{}, SHARED, OWN], "layer 1: index_shared: no layer before it has an indexer"),
        ([OWN, OWN | SHARED], "index_shared: the layer has an indexer of its own"),
        ([OWN, SHARED | {"window": 5}], "layer 1: index_shared: its window is 5"),
    ],
)
def test_a_selection_that_is_not_there_is_refused(layers: list[Plain], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        architecture(*layers)


def test_a_layer_outside_of_a_model_says_what_it_lacks() -> None:
    mixer: Any = architecture(OWN, SHARED).build().blocks[1].mixer
    with pytest.raises(ValueError, match="the selection of an earlier layer is read"):
        mixer(torch.zeros(1, 3, 16))
