"""Families that equal an architecture; tests/parity/test_exports.py compares logits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moenas.errors import InputError, SpaceError
from moenas.grammar.sampling import RandomSuggest
from moenas.huggingface.config import families
from moenas.huggingface.config_writers import WRITERS
from moenas.huggingface.families import FAMILIES
from moenas.huggingface.family_matching import family_config
from moenas.model.architecture import Architecture
from moenas.records import Plain
from moenas.space.space import Space

PAGE = (Path(__file__).parents[2] / "docs" / "exports.md").read_text(encoding="utf-8")


def test_the_page_lists_every_family() -> None:
    table = PAGE[PAGE.index("| layers | families |") : PAGE.index("`moenas init --from` reads")]
    assert set(re.findall(r"`(\w+)`", table)) == set(WRITERS)


def test_every_family_that_is_written_is_read() -> None:
    assert set(WRITERS) <= set(FAMILIES)
    assert set(WRITERS) <= set(families())


def test_the_page_says_how_many_families_are_not_written() -> None:
    assert len(set(FAMILIES) - set(WRITERS)) == 9
    assert "reads nine further families" in PAGE


def test_every_architecture_of_the_wide_space_has_a_family_or_is_refused() -> None:
    space, outcomes = Space.load("wide"), set[str]()
    for seed in range(60):
        try:
            architecture = space.architecture(space.draw(RandomSuggest(seed)))
        except SpaceError:
            continue
        try:
            outcomes.add(str(family_config(architecture, 64)["model_type"]))
        except InputError as refused:
            outcomes.add(str(refused))
    assert len(outcomes) > 10
    assert all(text in WRITERS or "The nearest is" in text for text in outcomes)


def test_the_refusal_of_the_page_is_the_one_of_its_model() -> None:
    """Trial 10 of the study that README.md shows: 2 layers, 8 experts, LayerNorm."""
    router = {"preset": "deepseek_v3", "top_k": 2}
    block: Plain = {
        "repeat": 2,
        "mixer": {"kind": "attention", "head_dim": 16, "n_kv_heads": 2},
        "ffn": {"kind": "moe", "activation": "geglu", "n_experts": 8, "d_expert": 96}
        | {"router": router},
    }
    whole: Plain = {"vocab_size": 256, "d_model": 96, "norm": "layernorm", "blocks": [block]}
    with pytest.raises(InputError) as refused:
        family_config(Architecture.parse(whole), 128)
    (shown,) = re.findall(r"trial 10: (no family.*?) \.\.\.\n", PAGE, re.DOTALL)
    assert str(refused.value).startswith(" ".join(shown.split()))
