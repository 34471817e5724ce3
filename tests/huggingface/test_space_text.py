"""The text of a space file: every hole that a comment proposes is valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moenas.grammar.sampling import RandomSuggest
from moenas.huggingface.layer_groups import groups_of, layers_of
from moenas.huggingface.space_text import space_text
from moenas.space.architecture_file import read_architecture
from moenas.space.space import Space

ZOO = Path(__file__).parents[2] / "spaces" / "zoo"
PROPOSAL = re.compile(r"(\w+: )\S+( +# hole: )(.*)$", re.MULTILINE)


@pytest.mark.parametrize(
    "name", ["olmoe_1b_7b", "deepseek_v3", "gpt_oss_20b", "kimi_linear_48b_a3b"]
)
def test_the_text_is_the_same_model_and_its_holes_are_valid(name: str) -> None:
    architecture = read_architecture(str(ZOO / f"{name}.yaml")).architecture
    plain = architecture.plain()
    layers = layers_of(plain.pop("blocks"))
    text = space_text(plain, layers, [name], ["active_params"])
    space = Space.parse(text, "space.yaml")
    assert space.size == 1
    assert space.architecture(space.draw(RandomSuggest(0))).fingerprint == architecture.fingerprint
    opened, count = PROPOSAL.subn(r"\1\3", text)
    assert count >= 2
    assert Space.parse(opened, "opened.yaml").size >= 2**count


def test_groups_are_the_layers_that_they_were_written_from() -> None:
    names = "a" + 3 * "bba" + 2 * "c"
    layers = [{"mixer": {"kind": name}} for name in names]
    groups = groups_of(layers)
    assert len(groups) < 5
    assert layers_of(groups) == layers
