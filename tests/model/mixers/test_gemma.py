"""Attention of Gemma 4 against transformers: windows, values that are the keys, keys of others."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from moenas.grammar import tree
from moenas.model import AttentionMixer, SharedKV
from moenas.model.architecture import Architecture
from moenas.records import Plain

pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")

D_MODEL, LENGTH, WINDOW = 32, 30, 7
SLIDING, FULL = "sliding_attention", "full_attention"


def theirs() -> Any:
    """Their module; its import takes seconds, which a process without these tests is spared."""
    return import_module("transformers.models.gemma4.modeling_gemma4")


def config(n_shared: int = 0, types: tuple[str, ...] = (SLIDING, FULL)) -> Any:
    return theirs().Gemma4TextConfig(
        hidden_size=D_MODEL,
        num_hidden_layers=len(types),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=16,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        sliding_window=WINDOW,
        layer_types=list(types),
        num_kv_shared_layers=n_shared,
        attn_implementation="eager",
    )


def ours_at(kind: str) -> Plain:
    """The fields of our mixer for a kind of layer."""
    mixer: Plain = {"n_heads": 4, "qk_norm": "head", "v_norm": True, "scale": 1.0}
    if kind == SLIDING:
        return mixer | {"head_dim": 8, "n_kv_heads": 2, "window": WINDOW}
    scaling = {"kind": "proportional", "fraction": 0.25}
    whole = {"head_dim": 16, "n_kv_heads": 1, "k_eq_v": True}
    return mixer | whole | {"rope": {"theta": 1e6, "scaling": scaling}}


def weights(attention: Any) -> dict[str, Tensor]:
    """Their weights, drawn at random, under the names of ours."""
    generator = torch.Generator().manual_seed(1)
    for parameter in attention.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    w = attention.state_dict()
    if "k_proj.weight" not in w:
        names = {"queries.project": "q_proj", "queries.norm": "q_norm", "out": "o_proj"}
        return {f"{ours}.weight": w[f"{name}.weight"] for ours, name in names.items()}
    qkv = [w[f"{x}_proj.weight"] for x in "qkv" if f"{x}_proj.weight" in w]
    norms = {f"norm.{x}.weight": w[f"{x}_norm.weight"] for x in "qk"}
    return {"qkv.qkv.weight": torch.cat(qkv), "out.weight": w["o_proj.weight"], **norms}


def given(configuration: Any, kind: str, x: Tensor) -> tuple[Any, Tensor]:
    """The angles and the additive mask that their attention takes."""
    places = torch.arange(x.shape[1]).expand(len(x), -1)
    angles = theirs().Gemma4TextRotaryEmbedding(configuration)(x, places, kind)
    query, key = places[0].unsqueeze(-1), places[0]
    seen = (key <= query) & (key > query - (WINDOW if kind == SLIDING else LENGTH))
    return angles, torch.zeros(LENGTH, LENGTH).masked_fill(~seen, -torch.inf).expand(2, 1, -1, -1)


def tokens(seed: int) -> Tensor:
    return torch.randn(2, LENGTH, D_MODEL, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1])
def test_attention_is_that_of_gemma_4(layer: int) -> None:
    configuration, kind, x = config(), (SLIDING, FULL)[layer], tokens(2)
    attention = theirs().Gemma4TextAttention(configuration, layer).eval()
    state = weights(attention)
    wanted = attention(x, *given(configuration, kind, x), {})[0]
    module: Any = tree.parse(AttentionMixer, ours_at(kind)).build(D_MODEL).eval()
    module.load_state_dict(state)
    torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-5)
    cache = module.new_cache(2, LENGTH)
    parts = [module(piece, cache) for piece in x.split([12, 1, LENGTH - 13], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_layers_at_the_end_read_the_last_keys_of_their_kind() -> None:
    """Of 6 layers the last 3 make no keys: windows read layer 1, of the two with keys of their own
    before them the second, and the full layer reads layer 2, the first."""
    types = (SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL)
    configuration = config(3, types)
    sources = [None, None, None, 2, 2, 1]
    mixers = [
        {"kind": "attention", "kv_source": n, **ours_at(kind)}
        for n, kind in zip(sources, types, strict=True)
    ]
    blocks: list[Plain] = [{"mixer": mixer} for mixer in mixers]
    model = Architecture.parse({"vocab_size": 9, "d_model": D_MODEL, "blocks": blocks}).build()
    shared: dict[str, Any] = {}
    lent = SharedKV()
    for i, kind in enumerate(types):
        attention = theirs().Gemma4TextAttention(configuration, i).eval()
        module: Any = model.blocks[i].mixer
        module.load_state_dict(weights(attention))
        x = tokens(i)
        wanted = attention(x, *given(configuration, kind, x), shared)[0]
        torch.testing.assert_close(module(x, None, lent), wanted, rtol=1e-4, atol=1e-5)
