"""The text of a space file: every hole that a comment proposes is valid."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moenas.errors import SpaceError
from moenas.grammar.sampling import RandomSuggest
from moenas.huggingface.families import read_model
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


QWEN = {
    "model_type": "qwen2", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def read(folder: Path, **more: object) -> str:
    (folder / "config.json").write_text(json.dumps(QWEN | more))
    family, _ = read_model(folder)
    return family


def test_a_window_that_is_not_used_is_no_difference(tmp_path: Path) -> None:
    unused = {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28}
    assert read(tmp_path, **unused) == "qwen2"


@pytest.mark.parametrize(
    "more", [{"model_type": []}, {"hidden_act": []}, {"num_attention_heads": 0}]
)
def test_values_that_no_model_has_are_errors_of_the_file(
    tmp_path: Path, more: dict[str, object]
) -> None:
    with pytest.raises(SpaceError, match=r"config\.json"):
        read(tmp_path, **more)


@pytest.mark.parametrize(
    ("fields", "theta", "factor"),
    [
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 5e5, 2.0),
        (
            {
                "rope_theta": 5e5,
                "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            },
            5e5,
            2.0,
        ),
        (
            {
                "rope_theta": 5e5,
                "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
            },
            100.0,
            4.0,
        ),
    ],
)
def test_rope_scaling_goes_before_rope_parameters_as_in_transformers(
    fields: dict[str, Any], theta: float, factor: float, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(QWEN | fields))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert (theirs["rope_theta"], theirs["factor"]) == (theta, factor)
    _, (_, layers) = read_model(tmp_path)
    rope = layers[0]["mixer"]["rope"]
    assert (rope["theta"], rope["scaling"]["factor"]) == (theta, factor)
