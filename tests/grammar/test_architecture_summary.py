"""The description of an architecture in one line: short, and it names what is unusual."""

from __future__ import annotations

from pathlib import Path

import pytest

from moenas.grammar.sampling import RandomSuggest
from moenas.grammar.summary import WIDTH, one_line, short
from moenas.records import Plain
from moenas.space.space import Space

ZOO = Path(__file__).parents[2] / "spaces" / "zoo"
# What the papers of the models stress; each word must survive where the line is cut.
UNUSUAL = {
    "arctic": "shortcut",
    "deepseek_v3": "latent 512, +1 shared, sigmoid, top8",
    "glam_64b_64e": "t5",
    "gpt_oss_20b": "sinks, window 128",
    "granite_4_0_h_small": "mamba2, NoPE, +1 shared",
    "grok_1": "sandwich",
    "hunyuan_large": "keys of -1",
    "jamba_v0_1": "mamba, NoPE",
    "jetmoe_8b": "moa 8e",
    "kimi_linear_48b_a3b": "20 kimi_delta, latent 512, NoPE",
    "llama_4_scout": "chunk 8192, NoPE, sigmoid",
    "longcat_flash": "+256 identity, latent 512",
    "mimo_v2_flash": "window 129, sinks",
    "minimax_text_01": "lightning_attention, post-norm",
    "nemotron_3_nano": "23 mamba2, NoPE, +1 shared",
    "qwen3_next_80b_a3b": "gated_delta, gate, +1 shared",
    "smallthinker_4b_a0_6b": "reads-block, sigmoid",
    "switch_base_8": "t5, top1",
    "trinity_mini": "sandwich, window 2048, NoPE, gate, +1 shared, sigmoid",
}


def of_the_zoo(name: str) -> Plain:
    space = Space.load(ZOO / f"{name}.yaml")
    return space.architecture(space.draw(RandomSuggest(0))).plain()


@pytest.mark.parametrize("name", sorted(path.stem for path in ZOO.iterdir()))
def test_a_published_model_is_described_in_one_short_line(name: str) -> None:
    plain = of_the_zoo(name)
    text = one_line(plain)
    assert len(text) <= WIDTH
    assert "\n" not in text
    assert "..." not in text, "the words are chosen, not cut"
    assert text.startswith(f"{plain['d_model']}d")
    kinds = {g[part]["kind"] for g in plain["blocks"] for part in ("mixer", "ffn") if g[part]}
    assert {kind for kind in kinds if kind not in text} == set()
    assert [word for word in UNUSUAL.get(name, "").split(", ") if word not in text] == []


def test_a_pattern_is_folded_and_a_part_is_described_once() -> None:
    attention = {"kind": "attention", "n_heads": 4, "n_kv_heads": 2, "window": 8}
    dense = {"kind": "dense", "d_ff": 64, "activation": "gelu"}
    lower = {"repeat": 3, "mixer": attention, "ffn": dense}
    upper = {"repeat": 1, "mixer": {**attention, "window": None}, "ffn": dense}
    plain = {"d_model": 32, "norm": "rmsnorm", "blocks": [lower, upper] * 6}
    assert one_line(plain) == (
        "32d rmsnorm, 6x[3x(attention-a 4q/2kv window 8, dense 64 gelu), (attention-b 4q/2kv, dense)]"
    )


def test_counts_stand_for_the_order_where_that_is_too_long() -> None:
    """The numbers of parts add up to the number of layers."""
    text = one_line(of_the_zoo("kimi_linear_48b_a3b"))
    mixers, networks = text.partition(": ")[2].split("; ")
    for part in (mixers, networks):
        assert sum(int(words.split()[0]) for words in part.split(", ")) == 27


def test_numbers_without_a_unit_have_an_exponent() -> None:
    numbers = (812, 1234, 46.7e9, 9.99e14, 1e15, -2.86e140)
    assert [short(n) for n in numbers] == ["812", "1.23k", "46.7B", "999T", "1e+15", "-2.86e+140"]


def test_a_description_of_any_random_architecture_is_short() -> None:
    for architecture in Space.load("wide").feasible(60):
        if not isinstance(architecture, str):
            assert len(one_line(architecture.canonical().plain())) <= WIDTH
