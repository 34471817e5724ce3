"""Layers that compute one function have one spelling; what writes into the stream starts small."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from small_models import normed, parse, tokens
from wide_space import carry, stir

from moenas.model import FFN, Mixer, MoE
from moenas.model.architecture import Architecture, Model
from moenas.model.layers.linear import output_projections
from moenas.records import Plain
from moenas.testing.parts import random_architecture

POSITIONS = ("pre", "post", "output", "sandwich")
ATTENTION: Plain = {"kind": "attention", "head_dim": 8}
STATE: Plain = {"kind": "short_conv"}
DENSE: Plain = {"kind": "dense", "d_ff": 16}
MOE: Plain = {"kind": "moe", "n_experts": 4, "d_expert": 8}
SHARED: Plain = MOE | {"n_shared_experts": 2, "d_shared": 8}
KINDS = [kind for family in (Mixer, FFN) for kind in family.kinds.values()]


@torch.no_grad()
def assert_one_function(architecture: Architecture) -> Architecture:
    """Compare with the canonical form, and return that: the costs, and logits of equal weights."""
    canonical = architecture.canonical()
    for context in (7, 12):
        assert canonical.cost(context) == architecture.cost(context)
        assert canonical.pass_flops(context) == architecture.pass_flops(context)
    model, other = architecture.build().eval(), canonical.build().eval()
    assert model.n_residual_branches == other.n_residual_branches
    stir(other, 1)
    carry(architecture, model, other)
    torch.testing.assert_close(model(tokens()), other(tokens()), rtol=1e-3, atol=1e-4)
    return canonical


# --- halves of a block --------------------------------------------------------------------------


def random_layers(seed: int) -> Architecture:
    """Mixers and feed-forward layers alone and in blocks, shortcuts of all lengths over them."""
    rng = random.Random(seed)
    blocks = []
    for _ in range(rng.randint(2, 7)):
        mixer, ffn = rng.choice([(1, 0), (0, 1), (1, 0), (0, 1), (1, 1)])
        block: Plain = {"mixer": rng.choice([ATTENTION, STATE])} if mixer else {}
        block |= {"ffn": rng.choice([DENSE, SHARED])} if ffn else {}
        if ffn and rng.random() < 0.4:
            other = rng.choice([16, 24])
            block["shortcut"] = DENSE | {
                "activation": rng.choice(["swiglu", "gelu"]),
                "d_ff": other,
            }
            block["shortcut_delay"] = rng.randint(0, 3)
            block["shortcut_input"] = rng.choice(["ffn", "block"])
        blocks.append(block | {"parallel": rng.random() < 0.2})
    return parse(
        *blocks,
        norm=rng.choice(["layernorm_bias", "nonparametric"]),
        norm_position=rng.choice(POSITIONS),
        residual_multiplier=rng.choice([1.0, 0.5]),
        skip_multiplier=rng.choice([1.0, 0.7]),
    )


def test_the_canonical_layers_compute_the_same() -> None:
    shorter = 0
    for seed in range(80):
        architecture = random_layers(seed)
        canonical = assert_one_function(architecture)
        assert canonical.canonical() == canonical
        shorter += len(canonical.layers) < len(architecture.layers)
    assert shorter > 30


@pytest.mark.parametrize("position", POSITIONS)
def test_a_mixer_and_the_ffn_after_it_are_a_block(position: str) -> None:
    fields = {"norm_position": position, "skip_multiplier": 0.7}
    halves = [{"mixer": ATTENTION}, {"ffn": SHARED}]
    one, other = parse(*halves, **fields), parse({"mixer": ATTENTION, "ffn": SHARED}, **fields)
    assert one.fingerprint == other.fingerprint
    assert one.names() == other.names()
    models = one.build(seed=1), other.build(seed=1)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(models[0](tokens()), models[1](tokens()))


def layers_of(*blocks: Plain, **fields: Any) -> int:
    return len(assert_one_function(parse(*blocks, norm_position="pre", **fields)).layers)


def test_halves_that_are_no_block_stay_apart() -> None:
    mixer, ffn = {"mixer": ATTENTION}, {"ffn": DENSE}
    other = DENSE | {"activation": "gelu"}
    slower = {"mixer": {"kind": "lightning_attention", "n_heads": 2, "head_dim": 8}}
    assert layers_of(mixer, ffn, mixer, ffn) == 2
    assert layers_of(ffn, mixer, mixer, ffn, ffn) == 4
    for delay, wanted in ((0, 2), (1, 3), (2, 2)):  # 1: between the halves
        start = ffn | {"shortcut": other, "shortcut_delay": delay}
        assert layers_of(start, mixer, ffn) == wanted
    beside = {"shortcut": other, "shortcut_delay": 1}
    assert layers_of(mixer, ffn | beside, ffn) == 2
    assert layers_of(mixer, ffn | beside | {"shortcut_input": "block"}, ffn) == 3
    assert layers_of(slower, ffn, ffn) == 2
    slower["mixer"]["slower_by_depth"] = True
    assert layers_of(slower, ffn, ffn) == 3


# --- two feed-forward layers side by side -------------------------------------------------------

GELU: Plain = DENSE | {"activation": "gelu"}
ONE: dict[str, tuple[Plain, Plain]] = {
    "two networks are a wider one": (
        {"ffn": DENSE, "shortcut": DENSE | {"d_ff": 24}},
        {"ffn": DENSE | {"d_ff": 40}},
    ),
    "a network beside a mixture is a shared expert": (
        {"ffn": MOE, "shortcut": DENSE},
        {"ffn": MOE | {"n_shared_experts": 1, "d_shared": 16}},
    ),
    "a mixture beside a network has it as a shared expert": (
        {"ffn": DENSE, "shortcut": SHARED},
        {"ffn": MOE | {"n_shared_experts": 4, "d_shared": 8}},
    ),
    "two of other activations have an order": (
        {"ffn": GELU, "shortcut": DENSE},
        {"ffn": DENSE, "shortcut": GELU},
    ),
    "so have a mixture and a network with biases": (
        {"ffn": DENSE | {"bias": True}, "shortcut": MOE},
        {"ffn": MOE, "shortcut": DENSE | {"bias": True}},
    ),
}
NORMED = ("two of other activations have an order", "so have a mixture and a network with biases")


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("name", ONE)
def test_a_sum_of_two_layers_has_one_spelling(name: str, parallel: bool, position: str) -> None:
    fields = {"norm_position": position, "norm": "layernorm_bias"}
    one, other = (
        parse({"mixer": ATTENTION, "parallel": parallel, **block}, **fields) for block in ONE[name]
    )
    norms = position in ("output", "sandwich")
    alike = not norms or (name in NORMED and not parallel)
    assert (one.fingerprint == other.fingerprint) is alike
    assert_one_function(one)
    assert_one_function(other)


def test_layers_that_are_no_sum_stay_two() -> None:
    alone = parse({"ffn": DENSE, "shortcut": DENSE})
    assert alone.fingerprint == parse({"ffn": DENSE | {"d_ff": 32}}).fingerprint
    for block in (
        {"ffn": DENSE | {"bias": True}, "shortcut": DENSE},
        {"ffn": DENSE, "shortcut": DENSE, "shortcut_input": "block", "mixer": ATTENTION},
        {"ffn": SHARED | {"shared_gate": True}, "shortcut": DENSE},
        {"ffn": DENSE, "shortcut": GELU},
    ):
        assert assert_one_function(parse(block)).layers[0].shortcut is not None
    late = parse({"ffn": DENSE, "shortcut": DENSE, "shortcut_delay": 1}, {"ffn": DENSE})
    assert late.canonical().layers[0].shortcut is not None


# --- where a shortcut joins ---------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("position", POSITIONS)
def test_a_shortcut_joins_with_the_mixer_where_there_is_no_ffn(position: str) -> None:
    sending = {"ffn": DENSE, "shortcut": GELU, "shortcut_delay": 1}
    model = parse(sending, {"mixer": ATTENTION}, norm_position=position).build(seed=1).eval()
    first, second = model.blocks
    before = normed if position in ("pre", "sandwich") else torch.clone
    after = normed if position in ("output", "sandwich") else torch.clone
    last = normed if position == "post" else torch.clone
    x = model.embedding[tokens()]
    sent = after(first.shortcut.ffn(before(x)))
    x = last(x + after(first.ffn(before(x))))
    x = last(x + after(second.mixer(before(x))) + sent)
    wanted = x if model.norm is None else normed(x)
    torch.testing.assert_close(model.hidden(tokens()), wanted)


# --- how the stream starts ----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_a_part_is_proportional_to_what_it_writes_by(kind: Any) -> None:
    """Apart from biases, which start at 0, and from experts that pass their input on."""
    x = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(3))
    tried = 0
    for seed in range(6):
        model = random_architecture(seed, kind, d_model=16).build(seed=1).eval()
        stir(model, 2)
        for _, part in model.parts():
            for name, parameter in part.named_parameters():
                if parameter.dim() == 1 or name.endswith("_bias.weight"):
                    parameter.zero_()
            numbers = (torch.zeros(2, 12, dtype=torch.int64),)
            given = (x, *numbers) if isinstance(part, MoE) else (x,)
            outputs, weights = [], [weight.clone() for weight in output_projections(part)]
            for factor in (0, 1, 3):
                for weight, start in zip(output_projections(part), weights, strict=True):
                    weight.copy_(factor * start)
                outputs.append(part(*given))
            rest, once, thrice = outputs
            torch.testing.assert_close(thrice - rest, 3 * (once - rest), rtol=1e-4, atol=1e-4)
            passes_on = getattr(part, "zero", None) is not None
            assert passes_on or not rest.any()
            tried += bool((once - rest).any())
    assert tried > 3


def test_everything_that_writes_is_found() -> None:
    latent = SHARED | {
        "d_latent": 8,
        "n_zero_experts": 1,
        "zero_kind": "constant",
        "shared_gate": True,
    }
    memory = {"kind": "product_key", "n_keys": 4, "top_k": 2}
    model = parse(
        {"mixer": STATE, "ffn": latent}, {"ffn": memory, "shortcut": MOE, "shortcut_delay": 1}
    ).build("meta")
    writers = {id(weight) for _, part in model.parts() for weight in output_projections(part)}
    assert {name for name, p in model.named_parameters() if id(p) in writers} == {
        "blocks.0.mixer.out.weight",
        "blocks.0.ffn.experts.leave.weight",
        "blocks.0.ffn.shared.down.weight",
        "blocks.0.ffn.zero.vector",
        "blocks.1.ffn.values",
        "blocks.1.shortcut.ffn.experts.down",
    }
    assert model.n_residual_branches == 4


STACKS: dict[str, list[Plain]] = {
    "ffns": [{"ffn": DENSE, "repeat": 12}],
    "mixers": [{"mixer": STATE, "repeat": 12}],
    "blocks": [{"mixer": STATE, "ffn": DENSE, "repeat": 12}],
    "hybrid": [{"repeat": 6, "blocks": [{"mixer": STATE, "repeat": 3}, {"ffn": DENSE}]}],
    "shortcuts": [{"ffn": DENSE, "shortcut": GELU, "shortcut_delay": 1, "repeat": 12}],
    "wider": [{"ffn": DENSE, "shortcut": DENSE, "repeat": 12}],
}


def added(model: Model) -> float:
    """Mean square of what the layers add to a stream of mean square 1."""
    model.stem.multiplier = 1 / float(model.embedding.square().mean().sqrt())
    model.norm = None
    x = model.embedding[tokens(64)] * model.stem.multiplier
    return float((model.hidden(tokens(64)) - x).square().mean())


@torch.no_grad()
@pytest.mark.parametrize("name", STACKS)
def test_the_stream_starts_alike_at_every_depth(name: str) -> None:
    """Four times the layers add about as much, whatever they are made of."""
    shallow, deep = (
        added(parse(*STACKS[name] * times, d_model=128, embedding_multiplier=2.0).build())
        for times in (1, 4)
    )
    assert 0 < deep < 1
    assert deep / shallow == pytest.approx(1, abs=0.25)
