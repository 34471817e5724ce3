"""Changed fields of configurations: read as transformers reads them, or refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from test_models import MODELS, randomise, theirs_of, tokens
from weights import from_one, rows_of, to_ours

from moenas.errors import SpaceError
from moenas.huggingface.families import read_model
from moenas.huggingface.layer_groups import groups_of
from moenas.model.architecture import Architecture
from moenas.records import Plain

LEFT_OUT = "(left out)"
"""In place of a value: the field is not in the file."""
LINEAR = {"rope_type": "linear", "factor": 2.0}


def changed_config(name: str, changes: Plain) -> tuple[type[Any], type[Any], Plain]:
    """Return class of the model, class of the configuration, and the changed configuration."""
    theirs = theirs_of(MODELS[name])
    fields = json.loads(theirs.config.to_json_string(use_diff=False)) | changes
    fields = {key: value for key, value in fields.items() if value != LEFT_OUT}
    return type(theirs), type(theirs.config), fields


ACCEPTED: list[tuple[str, Plain]] = [
    # A share of positions has no effect where the family turns whole heads.
    ("mixtral_8x7b", {"partial_rotary_factor": 0.5}),
    ("mixtral_8x7b", {"partial_rotary_factor": 0.0}),
    ("olmoe_1b_7b", {"rope_parameters": {"rope_theta": 99.0, "partial_rotary_factor": 0.5}}),
    ("aria", {"partial_rotary_factor": 0.5}),
    ("glm_4_5", {"rope_parameters": {"rope_theta": 99.0, "partial_rotary_factor": 0.3}}),
    # rope_scaling goes before rope_parameters.
    ("mixtral_8x7b", {"rope_scaling": LINEAR | {"rope_theta": 99.0}}),
    ("mixtral_8x7b", {"rope_scaling": LINEAR, "rope_theta": 55.0}),
    ("mixtral_8x7b", {"rope_scaling": {}, "rope_theta": 55.0}),
    ("hunyuan_a13b", {"rope_scaling": LINEAR | {"rope_theta": 99.0}}),
    (
        "hunyuan_a13b",
        {"rope_scaling": {"type": "dynamic", "alpha": 50.0, "factor": 1.0}, "rope_theta": 55.0},
    ),
    # An object without fields is none of the family.
    ("gpt_oss_20b", {"rope_parameters": {}}),
    ("gpt_oss_20b", {"rope_parameters": LEFT_OUT, "rope_theta": 77.0}),
    ("llama_4_maverick", {"moe_layers": []}),
    ("llama_4_maverick", {"no_rope_layers": [], "layer_types": None}),
    ("jamba_v0_1", {"mamba_dt_rank": LEFT_OUT}),
    ("jamba_v0_1", {"mamba_dt_rank": "auto"}),
    ("command", {"norm_topk_prob": False}),
    ("qwen3_30b_a3b", {"mlp_only_layers": None}),
    ("flint", {"mlp_only_layers": None}),
    ("granite_3_0_1b_a400m", {"router_aux_loss_coef": None}),
    ("gemma4", {"per_layer_config": None}),
    ("gemma4", {"final_logit_softcapping": None}),
    ("mimo_v2_flash", {"sliding_window_size": 3}),
    ("mimo_v2_flash", {"routed_scaling_factor": None}),
    (
        "glm_moe_dsa_shared",
        {"indexer_types": None, "index_topk_pattern": ["full", "full", "shared", "full"]},
    ),
    ("glm_moe_dsa_shared", {"indexer_types": None, "index_topk_pattern": "FSFS"}),
    # These follow from other fields, where the file has none.
    ("ling_hybrid", {"linear_head_dim": LEFT_OUT}),
    ("ling_hybrid", {"linear_head_dim": LEFT_OUT, "head_dim": 16}),
    ("ling_hybrid", {"linear_head_dim": LEFT_OUT, "head_dim": LEFT_OUT}),
    ("ling_hybrid", {"linear_num_heads": LEFT_OUT}),
    ("ling_hybrid", {"linear_conv_kernel_dim": LEFT_OUT, "short_conv_kernel_size": 3}),
    ("olmoe_1b_7b", {"num_key_value_heads": LEFT_OUT}),
    ("granite_3_0_1b_a400m", {"num_key_value_heads": LEFT_OUT}),
]


@pytest.mark.parametrize(("name", "changes"), ACCEPTED)
@torch.no_grad()
def test_a_changed_field_is_read_as_transformers_reads_it(
    name: str, changes: Plain, tmp_path: Path
) -> None:
    family = MODELS[name]
    model_class, config_class, fields = changed_config(name, changes)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    _, (whole, layers) = read_model(tmp_path)
    ours = Architecture.parse({**whole, "blocks": groups_of(layers)}).build().eval()
    theirs = model_class(config_class.from_dict(copy.deepcopy(fields))).eval()
    theirs.set_attn_implementation("eager")
    theirs.set_experts_implementation("eager")
    state = {n: x for n, x in theirs.state_dict().items() if not n.endswith(family.constants)}
    if theirs.config.tie_word_embeddings:
        del state["lm_head.weight"]
    table = [row for row in family.table if theirs_has(row[1], state)]
    rows = rows_of(table, state, len(ours.blocks))
    randomise(state, 1)
    for _, names, form in rows:
        if form is from_one:
            state[names[0]] -= 1
    ours.load_state_dict(to_ours(rows, state))
    wanted = theirs(tokens()).logits
    assert wanted.std() > 0.01
    torch.testing.assert_close(ours(tokens()), wanted, rtol=0, atol=family.tolerance)


def theirs_has(names: tuple[str, ...], state: dict[str, Any]) -> bool:
    """Return whether a row names weights of some layer."""
    layers = range(100)
    return any(all(name.format(i) in state for name in names) for i in layers)


REFUSED: list[tuple[str, Plain, str, str]] = [
    ("mixtral_8x7b", {"num_experts_per_tok": 1}, "num_experts_per_tok", "2 or more"),
    ("ernie_4_5_21b_a3b", {"moe_k": 1}, "moe_k", "2 or more"),
    ("phi_3_5_moe", {"router_jitter_noise": 0.0}, "router_jitter_noise", "above 0"),
    ("kimi_k2", {"topk_group": 0}, "topk_group", "1 or more"),
    ("deepseek_v3", {"head_dim": 2}, "head_dim", "8"),
    ("axk1", {"head_dim": 1}, "head_dim", "8"),
    ("longcat_flash", {"qk_head_dim": 25}, "qk_head_dim", "24"),
    ("glm_4_7_flash", {"head_dim": 2}, "qk_rope_head_dim", "another value"),
    (
        "glm_4_7_flash",
        {"rope_parameters": {"rope_theta": 99.0, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
        "0.5",
    ),
    (
        "glm_4_5",
        {"rope_parameters": {"partial_rotary_factor": 0.2}},
        "partial_rotary_factor",
        "even",
    ),
    (
        "mixtral_8x7b",
        {"rope_parameters": LINEAR | {"partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor",
        "0.5",
    ),
    (
        "mixtral_8x7b",
        {"rope_parameters": LINEAR | {"factor": None}},
        "rope_parameters.factor",
        "number",
    ),
    ("mixtral_8x7b", {"rope_parameters": {"type": "linear"}}, "rope_parameters.factor", "number"),
    ("gpt_oss_20b", {"rope_parameters": {"type": "yarn"}}, "rope_parameters.factor", "number"),
    (
        "llama_4_scout",
        {"layer_types": ["full_attention", *3 * ["chunked_attention"]]},
        "layer_types",
        "no_rope_layers",
    ),
    (
        "dbrx",
        {"rope_parameters": LEFT_OUT},
        "attn_config.rope_theta",
        "rope_parameters.rope_theta",
    ),
    ("ernie_4_5_21b_a3b", {"moe_norm_min": 0.5}, "moe_norm_min", "0.5"),
    ("command", {"rope_scaling": LINEAR}, "rope_scaling", "does not read"),
    ("kimi_linear_48b_a3b", {"tie_word_embeddings": True}, "tie_word_embeddings", "true"),
    ("ling_hybrid", {"tie_word_embeddings": True}, "tie_word_embeddings", "true"),
    ("ling_hybrid", {"q_lora_rank": 8}, "q_lora_rank", "does not read"),
    ("ling_hybrid", {"linear_head_dim": None}, "linear_head_dim", "null"),
    ("jetmoe_8b", {"rms_norm_eps": 1e-5}, "rms_norm_eps", "1e-06"),
    ("granite_3_0_1b_a400m", {"embedding_multiplier": None}, "embedding_multiplier", "null"),
    ("nemotron_3_nano", {"mamba_proj_bias": True}, "mamba_proj_bias", "true"),
    ("nemotron_3_nano", {"n_shared_experts": 2}, "n_shared_experts", "2"),
    ("nemotron_3_nano", {"tie_word_embeddings": True}, "tie_word_embeddings", "true"),
    ("mimo_v2_flash", {"rope_theta": 1e4}, "rope_theta", "does not read"),
    ("mistral4", {"rope_parameters": None, "rope_theta": 1e4}, "rope_theta", "does not read"),
    ("kimi_k2", {"n_group": None}, "n_group", "null"),
    ("mimo_v2_flash", {"attention_value_scale": 0.0}, "attention_value_scale", "other than 0"),
]


@pytest.mark.parametrize(("name", "changes", "field", "message"), REFUSED)
def test_a_field_without_counterpart_is_refused(
    name: str, changes: Plain, field: str, message: str, tmp_path: Path
) -> None:
    fields = changed_config(name, changes)[2]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(SpaceError) as caught:
        read_model(tmp_path)
    assert caught.value.path == field
    assert message in str(caught.value)
