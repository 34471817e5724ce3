"""Rotary positions and how they are stretched, against transformers and by the formulas."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from moenas.errors import SpaceError
from moenas.export.folder import model_source
from moenas.grammar import tree
from moenas.grammar.component import fields
from moenas.model import Attention, AttentionMixer, LatentAttentionMixer, RopeScaling, Rotary
from moenas.model.architecture import Architecture
from moenas.records import Plain

WIDTH, HEADS = 32, 2
RELEASED: dict[str, tuple[int, float, Plain]] = {
    "gpt-oss": (
        64,
        150000.0,
        {
            "kind": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
    ),
    "deepseek v3": (
        64,
        10000.0,
        {
            "kind": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "attention_factor": 1.0,
        },
    ),
    "kimi k2": (
        64,
        50000.0,
        {
            "kind": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 1.0,
            "attention_factor": 1.0,
        },
    ),
    "llama 3.1": (
        128,
        500000.0,
        {"kind": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
    ),
    "llama 4 scout": (
        128,
        500000.0,
        {
            "kind": "llama3",
            "factor": 16.0,
            "original_max_position_embeddings": 8192,
            "high_freq_factor": 1.0,
        },
    ),
    "gemma 3": (128, 1e6, {"kind": "linear", "factor": 8.0}),
    "a ramp that is cut": (
        16,
        10000.0,
        {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 40, "beta_fast": 3.0},
    ),
    "two turns and a half": (
        16,
        100.0,
        {
            "kind": "llama3",
            "factor": 4.0,
            "original_max_position_embeddings": 60,
            "low_freq_factor": 0.5,
            "high_freq_factor": 2.5,
        },
    ),
}


def scaling_of(plain: Plain) -> RopeScaling:
    return tree.parse(RopeScaling, plain)


def speeds(width: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    own = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return own if scaling is None else own * torch.tensor(scaling.ratios(width, theta)).double()


@pytest.mark.parametrize("name", RELEASED)
def test_the_wavelengths_are_those_of_transformers(name: str) -> None:
    hf = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    width, theta, plain = RELEASED[name]
    scaling = scaling_of(plain)
    words = {k: v for k, v in scaling.plain().items() if k != "kind"}
    config = hf.LlamaConfig(
        head_dim=width,
        max_position_embeddings=1 << 20,
        rope_parameters={"rope_type": scaling.kind, "rope_theta": theta, **words},
    )
    wanted, attention = ROPE_INIT_FUNCTIONS[str(scaling.kind)](config)
    torch.testing.assert_close(
        speeds(width, theta, scaling).float(), wanted, rtol=1e-5, atol=0, msg=name
    )
    assert scaling.attention == pytest.approx(attention)


def test_deepseeks_words_are_an_attention_factor() -> None:
    """mscale and mscale_all_dim, as the field's text translates them."""
    hf = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for mscale, all_dim in ((1.0, 1.0), (0.707, 0.707), (1.0, 0.707)):
        parameters = {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": mscale,
            "mscale_all_dim": all_dim,
        }
        config = hf.LlamaConfig(
            head_dim=64, max_position_embeddings=163840, rope_parameters=parameters
        )
        above, below = (0.1 * m * math.log(40) + 1 for m in (mscale, all_dim))
        assert ROPE_INIT_FUNCTIONS["yarn"](config)[1] == pytest.approx(above / below)


def test_fast_pairs_stay_and_slow_ones_are_stretched() -> None:
    """The paper's definition of the ends, without the released code's rounding between them."""
    for kind, more in (("yarn", {"truncate": False}), ("llama3", {"high_freq_factor": 32.0})):
        plain = {"kind": kind, "factor": 8.0, "original_max_position_embeddings": 4096, **more}
        scaling = scaling_of(plain)
        turns = 4096 * speeds(64, 10000.0, None) / (2 * math.pi)
        ratios = torch.tensor(scaling.ratios(64, 10000.0))
        assert (ratios[turns > 32] == 1).all()
        assert (ratios[turns < 1] == 1 / 8).all()
        between = ratios[(turns < 32) & (turns > 1)]
        assert len(between) > 5
        assert ((between < 1) & (between > 1 / 8)).all()
        assert between.diff().max() < 0


@pytest.mark.parametrize("name", [n for n in RELEASED if n != "a ramp that is cut"])
def test_scores_depend_on_the_distance_alone(name: str) -> None:
    width, theta, plain = RELEASED[name]
    scaling = scaling_of(plain)
    rotary = Rotary(width, theta, scaling.build())
    q, k = torch.randn(2, 1, 1, 1, width, generator=torch.Generator().manual_seed(0))
    scores = [(rotary(q, start + 5) * rotary(k, start)).sum().item() for start in (0, 3, 900)]
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-3)
    plainly = Rotary(width, theta)
    assert (rotary(q, 0) / plainly(q, 0)).flatten().tolist() == pytest.approx(
        [scaling.attention] * width
    )
    assert not torch.allclose(rotary(q, 50), plainly(q, 50) * scaling.attention)


# --- one spelling -------------------------------------------------------------------------------

YARN: Plain = {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3: Plain = {"kind": "llama3", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR: Plain = {"kind": "linear", "factor": 4.0}
USUAL = 0.1 * math.log(4) + 1

ALIKE: dict[str, tuple[Plain, Plain]] = {
    "a factor of 1": ({"rope": {"scaling": LINEAR | {"factor": 1.0}}}, {}),
    "yarn by 1": ({"rope": {"scaling": YARN | {"factor": 1.0}}}, {}),
    "llama3 by 1": ({"rope": {"scaling": LLAMA3 | {"factor": 1.0}}}, {}),
    "nothing turns": (
        {"rope": {"scaling": YARN, "partial_rotary_factor": 0.0}},
        {"rope": {"partial_rotary_factor": 0.0}},
    ),
    "nothing turns, without a base": (
        {"rope": {"theta": None}},
        {"rope": {"partial_rotary_factor": 0.0}},
    ),
    "all wavelengths are long": (
        {"rope": {"scaling": LLAMA3 | {"original_max_position_embeddings": 5}}},
        {"rope": {"scaling": LINEAR}},
    ),
    "all wavelengths are short": (
        {"rope": {"scaling": LLAMA3 | {"original_max_position_embeddings": 10**9}}},
        {},
    ),
    "one pair": (
        {"rope": {"partial_rotary_factor": 0.25, "theta": 50.0,
                  "scaling": LLAMA3 | {"original_max_position_embeddings": 5}}},
        {"rope": {"partial_rotary_factor": 0.25, "scaling": LINEAR}},
    ),
    "the usual factor of yarn": (
        {"rope": {"scaling": YARN | {"attention_factor": USUAL}}},
        {"rope": {"scaling": YARN}},
    ),
    "the factor of yarn is one of the scores": (
        {"rope": {"scaling": YARN | {"attention_factor": 1.0}}, "scale": 8**-0.5 * USUAL**2},
        {"rope": {"scaling": YARN}},
    ),
    "yarn that stretches nothing where whole heads turn": (
        {"rope": {"scaling": YARN | {"factor": 1.0, "attention_factor": 2.0}}},
        {"scale": 1.41421356237},
    ),
    "yarn in other units": (
        {"rope": {"scaling": YARN | {"original_max_position_embeddings": 128, "beta_slow": 2.0,
                                 "beta_fast": 8.0, "truncate": False}}},
        {"rope": {"scaling": YARN | {"beta_fast": 4.0, "truncate": False}}},
    ),
    "llama3 in other units": (
        {"rope": {"scaling": LLAMA3 | {"original_max_position_embeddings": 128,
                                        "low_freq_factor": 2.0, "high_freq_factor": 8.0}}},
        {"rope": {"scaling": LLAMA3}},
    ),
    "yarn of a part of a head that stretches nothing": (
        {"rope": {"partial_rotary_factor": 0.5,
                  "scaling": YARN | {"factor": 1.0, "attention_factor": 2.0}}},
        {"rope": {"partial_rotary_factor": 0.5,
                  "scaling": {"kind": "yarn", "factor": 1.0, "beta_slow": 2.0,
                              "original_max_position_embeddings": 99,
                              "attention_factor": 2.0}}},
    ),
    "queries that are not scaled": ({"floor_scale": 7, "attn_scale": 0.0}, {}),
    "a scale of no queries": ({"attn_scale": 0.7}, {}),
    "a window and a chunk of one token": ({"chunk": 1}, {"window": 1}),
    "a token alone has no scores": (
        {"window": 1, "softcap": 2.0, "scale": 3.0,
         "rope": {"theta": 9.0, "scaling": LINEAR, "partial_rotary_factor": 0.5},
         "qk_norm": "weightless", "floor_scale": 2},
        {"window": 1},
    ),
    "a token alone has no scores, with weights in the norm": (
        {"chunk": 1, "qk_norm": "head", "inner_eps": 0.1, "qk_norm_after_rope": True},
        {"window": 1, "qk_norm": "head"},
    ),
    "a chunk of one token beside a sink": ({"chunk": 1, "sinks": True}, {"window": 1, "sinks": True}),
    "all heads together are one": (
        {"n_heads": 1, "qk_norm": "full"},
        {"n_heads": 1, "qk_norm": "head"},
    ),
}  # fmt: skip

DIFFERENT: list[Plain] = [
    {},
    {"rope": {"scaling": LINEAR}},
    {"rope": {"scaling": LLAMA3}},
    {"rope": {"scaling": LLAMA3 | {"high_freq_factor": 1.0}}},
    {"rope": {"scaling": YARN}},
    {"rope": {"scaling": YARN | {"truncate": False}}},
    {"rope": {"scaling": YARN | {"attention_factor": 1.0}}},
    {"rope": {"scaling": YARN | {"truncate": False, "beta_fast": 3.0}}},
    {"rope": {"scaling": YARN}, "qk_norm": "weightless"},
    {"rope": {"scaling": YARN}, "qk_norm": "weightless", "qk_norm_after_rope": True},
    {"rope": {"scaling": YARN, "partial_rotary_factor": 0.5}},
    {"rope": {"scaling": YARN | {"attention_factor": 1.0}, "partial_rotary_factor": 0.5}},
    {"floor_scale": 4},
    {"floor_scale": 4, "attn_scale": 0.2},
    {"floor_scale": 4, "floor_offset": 0},
    {"floor_scale": 4, "scale_growth": "power"},
    {"window": 1, "sinks": True},
    {"window": 1, "sinks": True, "scale": 2.0},
    {"window": 1},
    {"window": 2},
    {"n_heads": 2, "n_kv_heads": 1, "qk_norm": "full"},
    {"n_heads": 2, "n_kv_heads": 1, "qk_norm": "head"},
]


def mixer(plain: Plain) -> AttentionMixer:
    return tree.parse(AttentionMixer, {"head_dim": 8} | plain)


def output(part: AttentionMixer | LatentAttentionMixer, length: int = 80) -> Tensor:
    module = part.build(WIDTH).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        mixed: Tensor = module(torch.randn(1, length, WIDTH, generator=generator))
    return mixed


@pytest.mark.parametrize("name", ALIKE)
def test_two_spellings_of_one_function_are_one(name: str) -> None:
    one, other = map(mixer, ALIKE[name])
    assert one != other
    canonical = one.canonical_at(WIDTH)
    assert canonical == other.canonical_at(WIDTH) == canonical.canonical_at(WIDTH)
    for part in (one, other):
        torch.testing.assert_close(output(canonical), output(part), rtol=0, atol=2e-5)
        assert canonical.cost(WIDTH, 80) == part.cost(WIDTH, 80)


def test_different_functions_are_spelled_differently() -> None:
    parts = [mixer(plain).canonical_at(WIDTH) for plain in DIFFERENT]
    assert len(set(parts)) == len(DIFFERENT)
    outputs = [output(part) for part in parts]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert (one - other).abs().max() > 1e-4


@pytest.mark.parametrize("kind", RopeScaling.kinds)
def test_random_fields_have_a_canonical_form_of_the_same_function(kind: str) -> None:
    """Where all of a head turns, and where only a part does."""
    rng, seen = random.Random(0), 0
    for _ in range(120):
        plain: Plain = {"kind": kind, "factor": rng.choice([1.0, 2.0, 9.5])}
        for name in fields(RopeScaling.kinds[kind]):
            if name == "original_max_position_embeddings":
                plain[name] = rng.choice([7, 24, 100, 4096])
            elif name in ("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"):
                plain[name] = rng.choice([0.25, 0.5, 1.0, 2.0, 3.3, 32.0])
            elif name == "fraction":
                plain[name] = rng.choice([0.1, 0.25, 0.3, 0.5, 1.0])
            elif name == "truncate":
                plain[name] = rng.random() < 0.5
            elif name == "attention_factor":
                plain[name] = rng.choice([None, 1.0, 1.3])
        theta = rng.choice([2.0, 100.0, 1e4])
        rope = {"partial_rotary_factor": rng.choice([0.25, 0.5, 1.0]), "theta": theta}
        try:
            part = mixer({"rope": {"scaling": plain} | rope})
        except SpaceError:
            continue
        seen += 1
        canonical = part.canonical_at(WIDTH)
        assert canonical.canonical_at(WIDTH) == canonical
        torch.testing.assert_close(output(canonical, 30), output(part, 30), rtol=0, atol=1e-4)
    assert seen > 50


def test_latent_attention_resets_what_has_no_effect() -> None:
    def latent(**more: Any) -> LatentAttentionMixer:
        sizes = {"n_heads": 2, "kv_rank": 32, "nope_dim": 8, "rope_dim": 4, "v_dim": 8}
        return tree.parse(LatentAttentionMixer, sizes | more).canonical_at(WIDTH)

    assert latent(rope={"theta": None, "scaling": YARN}) == latent(rope={"theta": None})
    assert latent(rope={"partial_rotary_factor": 0.0}) == latent(rope={"theta": None}) != latent()
    assert latent(rope={"scaling": YARN | {"factor": 1.0}}) == latent()
    assert latent(rank_scale=True) == latent() == latent(rank_scale=False)
    assert latent(rank_scale=True, q_rank=32) == latent(q_rank=32)
    assert latent(rank_scale=True, q_rank=16) != latent(q_rank=16)
    assert latent(rank_scale=True, kv_rank=16) != latent(kv_rank=16)
    one = latent(rope_dim=2, rope={"theta": 50.0, "scaling": LLAMA3})
    assert one.rope.theta == 10000.0
    assert latent(rope={"scaling": YARN}) != latent(
        rope={"scaling": YARN | {"attention_factor": 1.0}}
    )
    torch.testing.assert_close(output(latent(rank_scale=True)), output(latent()))


# --- decoding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [[1] * 24, [5, 1, 11, 7]], ids=["by token", "by piece"])
@pytest.mark.parametrize(
    "fields_",
    [
        {"floor_scale": 3, "attn_scale": 0.5},
        {"floor_scale": 3, "rope": {"partial_rotary_factor": 0.0}, "softcap": 3.0},
        {"floor_scale": 5, "window": 4, "sinks": True, "rope": {"scaling": YARN}},
    ],
    ids=["temperature", "soft cap", "window"],
)
def test_a_cache_continues_at_the_right_temperature(fields_: Plain, steps: list[int]) -> None:
    attention = mixer(fields_).build(WIDTH).eval()
    assert isinstance(attention, Attention)
    generator = torch.Generator().manual_seed(1)
    for parameter in attention.parameters():
        parameter.data.normal_(0, 0.25, generator=generator)
    x = torch.randn(2, 24, WIDTH, generator=torch.Generator().manual_seed(2))
    cache = attention.new_cache(2, 24)
    with torch.no_grad():
        pieces = [attention(piece, cache) for piece in x.split(steps, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), attention(x), rtol=0, atol=1e-5)


def test_the_temperature_is_that_of_the_formula() -> None:
    tempered = mixer({"floor_scale": 4, "attn_scale": 0.3}).build(WIDTH).attend.temperature
    q = torch.ones(1, 1, 13, 8)
    wanted = [1 + 0.3 * math.log(1 + (p + 1) // 4) for p in range(2, 15)]
    assert tempered(q, 2)[0, 0, :, 0].tolist() == pytest.approx(wanted)
    assert tempered(q[:, :, :1], 2) is not None
    assert tempered(q[:, :, :3], 0).eq(1).all()
    assert tempered(q.bfloat16(), 2).dtype == torch.bfloat16


@pytest.mark.parametrize("scaling", [LINEAR, YARN, LLAMA3], ids=lambda plain: plain["kind"])
def test_an_exported_model_turns_alike(scaling: Plain) -> None:
    """The exported text of the model alone, without the modules that it came from."""
    block: Plain = {
        "kind": "attention",
        "head_dim": 8,
        "rope": {"scaling": scaling},
        "floor_scale": 5,
    }
    one = Architecture.parse(
        {"vocab_size": 20, "d_model": WIDTH, "blocks": [{"mixer": block | {"q_rank": 6}}]}
    )
    space: dict[str, Any] = {"__name__": "model", "__file__": "model.py"}
    text = model_source(one)
    assert "moenas." not in text.partition("import")[2]
    exec(compile(text, "model.py", "exec", dont_inherit=True), space)
    theirs, ours = space["build"]().eval(), one.build().eval()
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.arange(40).view(1, -1) % 20
    with torch.no_grad():
        assert torch.equal(theirs(tokens), ours(tokens))
    plainly = (
        Architecture.parse(
            one.plain() | {"blocks": [{"mixer": block | {"q_rank": 6, "rope": {"scaling": None}}}]}
        )
        .build()
        .eval()
    )
    plainly.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert not torch.allclose(plainly(tokens), ours(tokens), atol=1e-6)


@pytest.mark.parametrize(
    ("plain", "reason"),
    [
        ({"rope": {"scaling": YARN | {"beta_fast": 0.5}}}, "must not be above beta_fast"),
        (
            {"rope": {"scaling": YARN | {"beta_slow": 30.0}}},
            "no pair has that many rotations in 64 tokens",
        ),
        (
            {"rope": {"scaling": LLAMA3 | {"low_freq_factor": 9.0}}},
            "must not be above high_freq_factor",
        ),
        ({"rope": {"scaling": YARN, "theta": 1.0}}, "give a theta above 1"),
        (
            {"rope": {"scaling": {"kind": "dynamic", "factor": 2.0}}},
            "There are linear, yarn, llama3",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(plain: Plain, reason: str) -> None:
    with pytest.raises(SpaceError, match=reason):
        mixer(plain)
