"""Names of fields: by the end of their path, refused where they would mean several fields."""

from __future__ import annotations

import pytest

from moenas.errors import SpaceError
from moenas.grammar import field_names
from moenas.model.architecture import Architecture
from moenas.space.section_reading import known_names
from moenas.space.space import Space

MIXER = "{kind: attention, head_dim: 8, scale: 0.5}"
MOE = "{kind: moe, n_experts: 4, d_expert: 8, router: {scale: 2.5, top_k: 2}}"
MEMORY = "{kind: product_key, n_keys: 4, n_heads: 3, top_k: 4}"


def space(requirement: str, *groups: str) -> Space:
    text = f"""
architecture:
  vocab_size: 256
  d_model: 16
  blocks: [{", ".join(groups)}]
require: ["{requirement}"]
objectives: [active_params]
"""
    return Space.parse(text, "s.yaml")


def group(mixer: str, ffn: str) -> str:
    return f"{{mixer: {mixer}, ffn: {ffn}}}"


def broken(requirement: str, *groups: str) -> bool:
    parsed = space(requirement, *groups)
    plain = parsed.draw(lambda *_: None)  # there are no holes
    return parsed.violations(parsed.architecture(plain))[requirement] > 0


@pytest.mark.parametrize("start", ["", "block."])
def test_a_longer_end_of_the_path_says_which_part_is_meant(start: str) -> None:
    both = group(MIXER, MOE)
    assert not broken(f"{start}mixer.scale == 0.5 and {start}ffn.router.scale == 2.5", both)
    assert broken(f"{start}mixer.scale > 1", both)
    assert broken(f"{start}ffn.router.scale < 1", both)
    assert not broken("router.scale > mixer.scale", both)
    assert not broken("architecture.d_model == d_model", both)
    assert not broken("block.mixer == 'attention' and ffn == 'moe'", both)


@pytest.mark.parametrize(
    ("requirement", "column", "wanted"),
    [
        ("scale < 1", 11, "write router.scale or mixer.scale"),
        ("d_model < 9 and n_heads < 3", 27, "write ffn.n_heads or mixer.n_heads"),
    ],
)
def test_a_name_of_two_parts_of_a_layer_is_refused(
    requirement: str, column: int, wanted: str
) -> None:
    with pytest.raises(SpaceError) as error:
        space(requirement, group(MIXER, MOE), group(MIXER, MEMORY))
    assert str(error.value).startswith(f"s.yaml:6:{column}: require: ")
    assert wanted in str(error.value)


def test_parts_of_different_layers_or_options_may_share_a_name() -> None:
    """A layer has either the memory's top_k or the router's."""
    groups = group(MIXER, MOE), group(MIXER, MEMORY)
    assert broken("top_k < 4", *groups)
    assert not broken("top_k < 5", *groups)
    chosen = group(MIXER, f"{{choice: [null, {MOE}, {MEMORY}]}}")
    assert space("top_k < 4 and n_experts > top_k", chosen).requirements
    pattern = f"{{repeat: 2, blocks: [{groups[0]}, {groups[1]}]}}"
    assert broken("top_k < 4 and d_model == 16", pattern)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(SpaceError, match=r"no cost or field 'routers\.scale'.*'router\.scale'"):
        space("routers.scale < 1", group(MIXER, MOE))


def test_every_name_of_a_layer_is_a_known_name() -> None:
    architecture = Space.load("tiny").tree
    assert field_names.ambiguous(architecture) == {} or "top_k" not in field_names.ambiguous(
        architecture
    )
    mixer = {"kind": "attention", "head_dim": 8}
    ffn = {"kind": "moe", "n_experts": 4, "d_expert": 8}
    plain = {"vocab_size": 9, "d_model": 16, "blocks": [{"mixer": mixer, "ffn": ffn}]}
    (layer,) = Architecture.parse(plain).names()
    assert set(layer) <= known_names()
    assert layer["router.top_k"] == layer["top_k"] == layer["block.ffn.router.top_k"] == 2
    assert layer["n_layers"] == layer["architecture.n_layers"] == 1
    assert layer["n_heads"] == layer["mixer.n_heads"] == 2
    assert {name for name in layer if name.endswith(("repeat", "vary"))} == set()
