"""Patterns of blocks, blocks without a part, norm positions, multipliers, learned positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from small_models import normed, tokens

from moenas import resources
from moenas.errors import SpaceError
from moenas.evaluate.flops import count_flops
from moenas.evaluate.latency import prepare
from moenas.export.folder import model_source
from moenas.grammar import sampling, tree
from moenas.grammar.counting import count
from moenas.model import Mixer, RMSNorm
from moenas.model.architecture import Architecture
from moenas.model.layers.norms import NORMS, NormKind
from moenas.records import Plain
from moenas.resources import Node
from moenas.testing.parts import check_part

LOCAL: Plain = {"kind": "attention", "head_dim": 8, "window": 4}
WHOLE: Plain = {"kind": "attention", "head_dim": 8}
DENSE: Plain = {"kind": "dense", "d_ff": 16}
STATE: Plain = {"kind": "mamba2", "n_heads": 2, "head_dim": 8, "d_state": 4}
MIXERS: dict[str, Any] = dict(Mixer.kinds)


def plain(*blocks: Plain, **fields: Any) -> Plain:
    return {"vocab_size": 30, "d_model": 16, "blocks": list(blocks), **fields}


def parse(*blocks: Plain, **fields: Any) -> Architecture:
    return Architecture.parse(plain(*blocks, **fields))


# --- every kind of mixer ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MIXERS)
def test_a_kind_of_mixer_keeps_the_contract_of_parts(kind: str) -> None:
    check_part(MIXERS[kind], instances=4)


@pytest.mark.parametrize("context", [1, 10, 100, 128])
def test_every_kind_counts_what_fvcore_counts(context: int) -> None:
    mixers: list[Plain] = [
        {**LOCAL, "v_head_dim": 16, "output_gate": "element", "n_kv_heads": 1},
        {**LOCAL, "sinks": True, "softcap": 3.0, "output_gate": "head", "qkv_bias": True},
        {
            **WHOLE,
            "chunk": 5,
            "rope": {"partial_rotary_factor": 0.5},
            "qk_norm": "full",
            "out_bias": True,
        },
        {**WHOLE, "qkv_clip": 0.1, "qk_norm": "head", "qk_norm_after_rope": True},
        {**WHOLE, "output_gate": "head", "gate_activation": "softplus", "gate_bias": True}
        | {"floor_scale": 9, "scale_growth": "power"},
        {"kind": "latent_attention", "n_heads": 2, "q_rank": 6, "kv_rank": 5, "nope_dim": 8}
        | {"rope_dim": 4, "v_dim": 16, "output_gate": "head"},
        {**STATE, "n_state_groups": 2},
        {"kind": "mamba", "d_inner": 24, "d_state": 4, "inner_norm": True},
        {"kind": "gated_delta", "n_heads": 2, "n_key_heads": 1, "key_dim": 8, "value_dim": 16},
        {"kind": "short_conv"},
        {"kind": "kimi_delta", "n_heads": 2, "key_dim": 8, "value_dim": 16, "rank": 4},
        {"kind": "lightning_attention", "n_heads": 3, "head_dim": 8},
    ]
    architecture = parse(*({"mixer": mixer} for mixer in mixers))
    counted = count_flops(architecture.build(), torch.zeros(1, context, dtype=torch.int64))
    assert counted.per_token == architecture.cost(context).flops_per_token


def test_one_model_of_all_kinds_is_timed_and_exported(tmp_path: Path) -> None:
    mixers: list[Plain] = [
        WHOLE,
        STATE,
        {"kind": "latent_attention", "n_heads": 2, "kv_rank": 5, "nope_dim": 8}
        | {"rope_dim": 4, "v_dim": 16},
        {"kind": "mamba", "d_inner": 24},
        {"kind": "gated_delta", "n_heads": 2, "key_dim": 8, "value_dim": 16},
        {"kind": "short_conv"},
        {"kind": "kimi_delta", "n_heads": 2, "key_dim": 8, "value_dim": 16, "decay_limit": 5.0},
        {"kind": "lightning_attention", "n_heads": 3, "head_dim": 8, "slower_by_depth": True},
    ]
    moe = {"kind": "moe", "n_experts": 4, "d_expert": 8}
    architecture = parse({"ffn": moe}, *({"mixer": mixer, "ffn": moe} for mixer in mixers))
    model = architecture.build().eval()
    logits = prepare(model, tokens(9), "decode")()
    torch.testing.assert_close(logits, model(tokens(9))[:, -1:])
    alone = resources.load_module(tmp_path / "model.py", model_source(architecture))
    torch.testing.assert_close(alone.build().eval()(tokens(9)), model(tokens(9)))


def test_a_mixer_of_linear_time_has_a_cache_that_does_not_grow() -> None:
    architecture = parse({"mixer": STATE}, {"mixer": WHOLE})
    assert parse({"mixer": STATE}).cost(64).kv_bytes_per_token == 0
    assert architecture.cost(64).kv_bytes_per_token == 2 * 2 * 16


def test_keys_behind_a_window_or_chunk_are_not_needed() -> None:
    mixers: list[Plain] = [LOCAL, {**WHOLE, "chunk": 5}, WHOLE, STATE]
    architecture = parse(*({"mixer": mixer} for mixer in mixers))
    a_token = 2 * 2 * 16
    for context in (1, 3, 5, 20):
        seen = [max(min(t, 3) + 1 for t in range(context))]
        seen += [max(t % 5 + 1 for t in range(context)), context]
        assert architecture.kv_cache_bytes(context) == a_token * sum(seen)
    assert architecture.kv_cache_bytes(3) == 3 * architecture.cost(3).kv_bytes_per_token


# --- patterns -----------------------------------------------------------------------------------


def test_a_pattern_is_a_spelling_of_its_layers() -> None:
    local, whole = {"mixer": LOCAL, "ffn": DENSE}, {"mixer": WHOLE, "ffn": DENSE}
    pattern = parse({"repeat": 2, "blocks": [{**local, "repeat": 3}, whole]}, whole)
    written = parse(*([local] * 3 + [whole]) * 2, whole)
    assert pattern.fingerprint == written.fingerprint
    assert pattern.layers == written.layers
    assert pattern.cost(20) == written.cost(20)
    assert [group.repeat for group in pattern.canonical().blocks] == [3, 1, 3, 2]
    assert torch.equal(pattern.build()(tokens()), written.build()(tokens()))
    assert len(pattern.names()) == 9


def test_the_description_folds_patterns() -> None:
    blocks = [{"mixer": LOCAL, "repeat": 2}, {"mixer": WHOLE, "ffn": DENSE}]
    text = parse({"repeat": 12, "blocks": blocks}, {"mixer": WHOLE}).describe()
    assert text.startswith(
        "16d rmsnorm, 12x[2x(attention-a 2q/2kv window 4), (attention-b 2q/2kv, dense 16 swiglu)] + attention-b"
    )


def test_a_pattern_with_holes_is_counted_and_drawn() -> None:
    hole = {"kind": "attention", "head_dim": {"choice": [8, 16]}}
    varied = {"repeat": {"int": [1, 2]}, "vary": True, "mixer": hole}
    same = tree.read(Architecture, Node.wrap(plain({"repeat": 3, "blocks": [{"mixer": hole}]})))
    free = tree.read(
        Architecture,
        Node.wrap(plain({"repeat": 2, "vary": True, "blocks": [varied, {"ffn": DENSE}]})),
    )
    assert count(same) == 2
    assert count(free) == (2 + 4) ** 2
    drawn = set()
    for seed in range(600):
        architecture = Architecture.parse(sampling.draw(free, sampling.RandomSuggest(seed)))
        assert 4 <= len(architecture.layers) <= 6
        drawn.add(architecture.fingerprint)
    assert len(drawn) == (2 + 4) ** 2
    for hole_found in sampling.holes(free):
        assert hole_found.name.startswith("blocks.0.0.blocks.0.")


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        ({}, "a group needs 'mixer', 'ffn' or both, or 'blocks'"),
        ({"ffn": DENSE, "blocks": [{"ffn": DENSE}]}, "either 'blocks' or 'mixer' and 'ffn'"),
        ({"blocks": [{"mixer": {**WHOLE, "head_dim": 24}}]}, "blocks.0.blocks.0.mixer: head_dim"),
        ({"mixer": {**LOCAL, "chunk": 4}}, "window and chunk exclude each other"),
    ],
)
def test_a_group_that_makes_no_sense_is_refused(group: Plain, reason: str) -> None:
    with pytest.raises(SpaceError) as error:
        parse(group)
    assert reason in str(error.value)


# --- norms and the stream -----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("position", ["pre", "post", "output", "sandwich"])
def test_a_norm_stands_where_its_position_says(position: str) -> None:
    architecture = parse({"ffn": DENSE}, norm_position=position, residual_multiplier=0.5)
    model = architecture.build(seed=1)
    block = model.blocks[0]
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    wanted = {
        "pre": x + 0.5 * block.ffn(normed(x)),
        "post": normed(x + 0.5 * block.ffn(x)),
        "output": x + 0.5 * normed(block.ffn(x)),
        "sandwich": x + 0.5 * normed(block.ffn(normed(x))),
    }
    torch.testing.assert_close(block(x), wanted[position])
    assert (model.norm is None) == (position == "post")
    norms = sum(isinstance(module, RMSNorm) for module in model.modules())
    assert norms == {"pre": 2, "post": 1, "output": 2, "sandwich": 3}[position]


def test_every_name_of_a_norm_has_an_entry() -> None:
    assert get_args(NormKind) == tuple(NORMS)


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_counts_its_parameters(norm: str) -> None:
    for position in ("pre", "post", "output", "sandwich"):
        blocks = [{"mixer": WHOLE, "ffn": DENSE}, {"ffn": DENSE}]
        architecture = parse(*blocks, norm=norm, norm_position=position)
        built = sum(p.numel() for p in architecture.build("meta").parameters())
        assert architecture.cost(8).params == built


@torch.no_grad()
def test_norms_are_those_of_their_formulas() -> None:
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)) * 3
    centred = x - x.mean(dim=-1, keepdim=True)
    for norm, wanted in {
        "rmsnorm": normed(x, 0.1),
        "layernorm": normed(centred, 0.1),
        "layernorm_bias": normed(centred, 0.1) + 2,
        "nonparametric": normed(centred, 0.1),
        "dyt": (0.5 * x).tanh() + 2,
    }.items():
        module = parse({"ffn": DENSE}, norm=norm, norm_eps=0.1).build().norm
        if norm in ("layernorm_bias", "dyt"):
            module.bias.fill_(2)
        torch.testing.assert_close(module(x), wanted)


@torch.no_grad()
def test_multipliers_soft_cap_bias_and_positions_do_what_they_say() -> None:
    fields = {"embedding_multiplier": 3.0, "logit_multiplier": 0.5, "logit_softcap": 2.0}
    model = parse(
        {"mixer": WHOLE}, **fields, head_bias=True, positions="learned", max_positions=256
    ).build(seed=1)
    model.head.bias.normal_(generator=torch.Generator().manual_seed(0))
    x = model.embedding[tokens()] * 3 + model.stem.positions[:12]
    logits = model.norm(model.blocks[0](x)) @ model.embedding.T + model.head.bias
    wanted = 2 * torch.tanh(logits * 0.5 / 2)
    torch.testing.assert_close(model(tokens()), wanted)
    cache = model.new_cache(2, 12)
    joined = torch.cat([model(piece, cache) for piece in tokens().split([5, 1, 6], dim=1)], dim=1)
    torch.testing.assert_close(joined, wanted)
    with pytest.raises(ValueError, match="257 tokens; max_positions is 256"):
        model(tokens(257))


def test_fields_without_effect_share_a_fingerprint() -> None:
    block = {"mixer": WHOLE, "ffn": DENSE}
    for one, other in [
        (parse(block), parse(block, max_positions=256)),
        (parse(block, norm="dyt"), parse(block, norm="dyt", norm_eps=0.1)),
        (
            parse({"mixer": {**WHOLE, "rope": {"partial_rotary_factor": 0.0}}}),
            parse({"mixer": {**WHOLE, "rope": {"partial_rotary_factor": 0.0, "theta": 9.0}}}),
        ),
        (parse(block), parse({**block, "mixer": {**WHOLE, "scale": 8**-0.5, "inner_eps": 0.1}})),
        (parse(block), parse({**block, "mixer": {**WHOLE, "v_head_dim": 8}})),
        (parse(block), parse({**block, "mixer": {**WHOLE, "qk_norm_after_rope": True}})),
        (
            parse({"mixer": {**WHOLE, "qk_norm": "weightless"}}),
            parse({"mixer": {**WHOLE, "qk_norm": "weightless", "qk_norm_after_rope": True}}),
        ),
    ]:
        assert one.fingerprint == other.fingerprint
    assert parse(block).fingerprint != parse(block, norm_eps=0.1).fingerprint
