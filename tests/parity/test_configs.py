"""Configurations of transformers, read as architectures: the same counts and the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf
from test_counts import MODELS as RELEASED
from test_counts import counts
from test_models import MODELS, randomise, theirs_of, tokens
from weights import from_one, rows_of, to_ours

from moenas.grammar.sampling import RandomSuggest
from moenas.huggingface.config import WITHOUT_EFFECT, families
from moenas.huggingface.families import FAMILIES, read_model
from moenas.huggingface.layer_groups import groups_of
from moenas.huggingface.parts import EQUAL_HEADS
from moenas.huggingface.space_text import space_text
from moenas.model.architecture import Architecture
from moenas.space.space import Space

READ = [name for name in MODELS if name != "switch_base_8"]
"""Families with a reader: Switch is an encoder and a decoder."""
DERIVED = {
    *("layer_types", "mlp_layer_types", "no_rope_layers", "moe_layers", "layers_block_type"),
    *("layer_rope_theta", "num_attention_heads_per_layer", "per_layer_config", "indexer_types"),
}
"""Fields whose default follows from other fields."""


def written(config: Any, folder: Path) -> Path:
    """Write the config.json of a model, whole."""
    (folder / "config.json").write_text(config.to_json_string(use_diff=False))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_the_counts_are_those_of_the_configuration(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = RELEASED[name]()
    _, (whole, layers) = read_model(written(model.config, tmp_path))
    space = Space.parse(space_text(whole, layers, [name], ["active_params"]), "space.yaml")
    cost = space.cost(space.architecture(space.draw(RandomSuggest(0))))
    assert (cost.params, cost.active_params) == counts(model)


@pytest.mark.parametrize("name", READ)
@torch.no_grad()
def test_the_logits_are_those_of_the_configuration(name: str, tmp_path: Path) -> None:
    family = MODELS[name]
    theirs = theirs_of(family)
    _, (whole, layers) = read_model(written(theirs.config, tmp_path))
    ours = Architecture.parse({**whole, "blocks": groups_of(layers)}).build().eval()
    state = {n: x for n, x in theirs.state_dict().items() if not n.endswith(family.constants)}
    if theirs.config.tie_word_embeddings:
        del state["lm_head.weight"]
    rows = rows_of(family.table, state, len(ours.blocks))
    randomise(state, 1)
    for _, names, form in rows:
        if form is from_one:
            state[names[0]] -= 1
    ours.load_state_dict(to_ours(rows, state))
    wanted = theirs(tokens()).logits
    torch.testing.assert_close(ours(tokens()), wanted, rtol=0, atol=family.tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_defaults_are_those_of_transformers(family: str) -> None:
    table = families()[family]
    config = getattr(hf, str(table["config_class"]))()
    assert config.model_type == family
    assert table["aliases"] == config.attribute_map
    plain = json.loads(config.to_json_string(use_diff=False))
    for name, value in table["defaults"].items():
        theirs = plain[name]
        if isinstance(value, dict):
            theirs = {inner: theirs.get(inner) for inner in value}
        assert value == theirs, name
    read = {"max_position_embeddings", "router_aux_loss_coef", "time_step_limit"}
    ignored = (WITHOUT_EFFECT | DERIVED | {"model_type"}) - read
    known = {n for n, x in plain.items() if x not in (None, []) and n not in ignored}
    assert known - {"time_step_limit"} == set(table["defaults"])


LATENT = {"deepseek_v2", "longcat_flash"}
"""Families of latent attention, which do not read the number of heads of keys."""
OTHER_RULES = {"jetmoe", "beam", "dots3_note_text"}
"""Families whose number of heads follows from that of keys, or is refused if it differs."""


def test_heads_of_keys_follow_those_of_queries_where_they_do_in_transformers() -> None:
    following = set()
    for family in FAMILIES:
        config_class = getattr(hf, str(families()[family]["config_class"]))
        usual = config_class().to_dict()
        number = usual.get("num_key_value_heads")
        if number is None or "num_attention_heads" not in usual or family in OTHER_RULES:
            continue
        given = 2 * usual["num_attention_heads"]
        doubled = config_class(num_attention_heads=given).to_dict()
        if doubled["num_key_value_heads"] != number:
            assert doubled["num_key_value_heads"] == given
            following.add(family)
    assert following == EQUAL_HEADS | LATENT


def test_the_last_layer_with_experts_of_ernie_is_the_last_layer(tmp_path: Path) -> None:
    config = hf.Ernie4_5_MoeConfig(num_hidden_layers=30)
    assert config.moe_layer_end_index == 29
    plain = {"model_type": "ernie4_5_moe", "num_hidden_layers": 30}
    (tmp_path / "config.json").write_text(json.dumps(plain))
    _, (_, layers) = read_model(tmp_path)
    assert [layer["ffn"]["kind"] for layer in layers] == ["dense"] + 29 * ["moe"]
