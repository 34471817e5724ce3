"""Configurations that transformers reads in another way than their fields say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moenas.errors import SpaceError
from moenas.huggingface.families import read_model
from moenas.huggingface.layer_groups import groups_of
from moenas.model.architecture import Architecture
from moenas.records import Plain

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "head_dim": 16,
}
LATENT: dict[str, Any] = SIZES | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
INDEX = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}
INDEXED, FULL, SLIDING = "indexed_attention", "full_attention", "sliding_attention"
KINDS = {"layer_types": [SLIDING, FULL], "sliding_window": 8}
TURNS = {"rope_type": "default", "rope_theta": 5e5}
LINEAR = TURNS | {"rope_type": "linear", "factor": 2.0}
BOTH = {FULL: TURNS, SLIDING: TURNS | {"rope_theta": 1e3}}
DOTS = LATENT | INDEX | {"layer_types": [INDEXED, INDEXED], "head_dim": 24}
FULL_DOTS = DOTS | {"layer_types": [INDEXED, FULL], "per_layer_config": {}}
FAMILIES: dict[str, dict[str, Any]] = {
    "dots3_note_text": DOTS,
    "glm_moe_dsa": LATENT | INDEX,
    "deepseek_v32": LATENT | INDEX,
    "mistral4": LATENT,
    "stablelm": SIZES,
    "hy_v3": SIZES | EXPERTS,
    "laguna": SIZES | EXPERTS | KINDS | {"shared_expert_intermediate_size": 16},
    "mellum": SIZES | EXPERTS | KINDS,
    "beam": SIZES | EXPERTS | KINDS | {"n_group": 1, "topk_group": 1},
    "gemma4_text": SIZES | KINDS | {"head_dim": 8, "hidden_size_per_layer_input": 0},
    "minimax_m3_vl_text": SIZES
    | {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16}
    | {"dense_intermediate_size": 40, "shared_intermediate_size": 16},
}
RELEASED_M3: Plain = {
    "hidden_act": "swigluoai",
    "moe_layer_freq": [0, 1],
    "sparse_attention_config": {
        "sparse_attention_freq": [0, 1],
        "sparse_num_index_heads": 2,
        "sparse_index_dim": 16,
        "sparse_block_size": 4,
        "sparse_topk_blocks": 2,
        "sparse_local_block": 1,
    },
}
"""The form of the released configuration, by `MiniMaxM3VLTextConfig` of transformers 5.23."""
GEMMA_EXPERTS = {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 16}
GEMMA_EXPERTS |= {"enable_moe_block": True}
"""Family -> a small configuration that is read."""


def read(folder: Path, family: str, changes: Plain) -> tuple[Plain, list[Plain]]:
    fields = FAMILIES[family] | changes | {"model_type": family}
    (folder / "config.json").write_text(json.dumps(fields))
    return read_model(folder)[1]


REFUSED: list[tuple[str, Plain, str, str]] = [
    ("dots3_note_text", {"layer_types": [INDEXED, SLIDING]}, "per_layer_config", "missing"),
    ("dots3_note_text", {"layer_types": [INDEXED, FULL]}, "per_layer_config", "missing"),
    ("dots3_note_text", {"swa_rope_theta": 1e4}, "swa_rope_theta", "rope_parameters"),
    ("dots3_note_text", {"rope_theta": 1e4}, "rope_theta", "rope_parameters"),
    ("dots3_note_text", {"rope_scaling": {"type": "linear"}}, "rope_scaling", "rope_parameters"),
    ("dots3_note_text", {"rope_parameters": {}}, "rope_parameters", INDEXED),
    ("dots3_note_text", {"rope_parameters": {FULL: TURNS}}, "rope_parameters", INDEXED),
    ("dots3_note_text", {"rope_parameters": {INDEXED: {}}}, "rope_parameters", "no rope_theta"),
    ("dots3_note_text", {"use_dsa": False}, "use_dsa", "layer_types"),
    ("dots3_note_text", {"per_layer_config": []}, "per_layer_config", "object"),
    ("dots3_note_text", {"per_layer_config": {"2": {}}}, "per_layer_config", "'2'"),
    ("dots3_note_text", {"per_layer_config": {"-1": {}}}, "per_layer_config", "'-1'"),
    ("dots3_note_text", {"per_layer_config": {"one": {}}}, "per_layer_config", "'one'"),
    ("dots3_note_text", {"per_layer_config": {"1": 3}}, "per_layer_config", "layer 1"),
    (
        "dots3_note_text",
        {"per_layer_config": {"1": {"hidden_size": 8}}},
        "per_layer_config",
        "hidden_size",
    ),
    (
        "dots3_note_text",
        {"per_layer_config": {"1": {"v_head_dim": "8"}}},
        "per_layer_config",
        "v_head_dim",
    ),
    (
        "deepseek_v32",
        {
            "partial_rotary_factor": 0.5,
            "rope_parameters": TURNS | {"rope_type": "linear", "factor": 2.0},
        },
        "partial_rotary_factor",
        "0.5",
    ),
    ("glm_moe_dsa", {"indexer_types": ["shared", "full"]}, "indexer_types", "first layer"),
    ("glm_moe_dsa", {"indexer_types": ["full", "half"]}, "indexer_types", "half"),
    (
        "glm_moe_dsa",
        {"index_topk_freq": 2, "index_skip_topk_offset": 0},
        "index_topk_freq",
        "first",
    ),
    ("glm_moe_dsa", {"index_topk_pattern": "SF"}, "index_topk_pattern", "first layer"),
    ("glm_moe_dsa", {"index_topk_pattern": "FX"}, "index_topk_pattern", "FX"),
    ("glm_moe_dsa", {"index_topk_pattern": "F"}, "index_topk_pattern", "2 layers"),
    # transformers takes the words of a list as they are, so F and S would be no "shared".
    ("glm_moe_dsa", {"index_topk_pattern": ["F", "S"]}, "index_topk_pattern", "full or shared"),
    ("glm_moe_dsa", {"index_topk_pattern": ["full", 0]}, "index_topk_pattern", "full or shared"),
    ("stablelm", {"head_dim": 16}, "head_dim", "8"),
    ("mistral4", {"mlp_layer_types": ["dense", "sparse"]}, "mlp_layer_types", "first_k_dense"),
    ("hy_v3", {"num_shared_experts": 0}, "num_shared_experts", "1 or more"),
    ("hy_v3", {"first_k_dense_replace": 0}, "first_k_dense_replace", "mlp_layer_types"),
    ("laguna", {"first_k_dense_replace": 2}, "first_k_dense_replace", "mlp_layer_types"),
    (
        "laguna",
        {"first_k_dense_replace": 1, "mlp_layer_types": ["sparse", "sparse"]},
        "first_k_dense_replace",
        "mlp_layer_types",
    ),
    ("gemma4_text", {"hidden_size_per_layer_input": 16}, "hidden_size_per_layer_input", "16"),
    ("gemma4_text", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention", "all"),
    ("gemma4_text", {"num_kv_shared_layers": 1}, "num_kv_shared_layers", "each kind"),
    ("gemma4_text", {"num_kv_shared_layers": 3}, "num_kv_shared_layers", "each kind"),
    ("gemma4_text", {"per_layer_config": []}, "per_layer_config", "object"),
    ("gemma4_text", {"per_layer_config": {"one": {}}}, "per_layer_config", "'one'"),
    ("gemma4_text", {"per_layer_config": {"2": {}}}, "per_layer_config", "'2'"),
    ("gemma4_text", {"final_logit_softcapping": 0.0}, "final_logit_softcapping", "above 0"),
    ("beam", {"final_logit_softcapping": 0.0}, "final_logit_softcapping", "above 0"),
    (
        "gemma4_text",
        {"rope_parameters": BOTH | {SLIDING: LINEAR | {"partial_rotary_factor": 0.5}}},
        "rope_parameters.sliding_attention.partial_rotary_factor",
        "0.5",
    ),
    ("gemma4_text", {"per_layer_config": {"1": {"v_dim": 4}}}, "per_layer_config", "v_dim"),
    ("gemma4_text", {"per_layer_config": {"1": {"head_dim": 0}}}, "per_layer_config", "head_dim"),
    ("gemma4_text", {"rope_parameters": {FULL: TURNS}}, "rope_parameters", SLIDING),
    ("gemma4_text", GEMMA_EXPERTS | {"rms_norm_eps": 1e-5}, "rms_norm_eps", "1e-05"),
    ("minimax_m3_vl_text", {"rotary_dim": 8}, "rotary_dim", "partial_rotary_factor"),
    ("laguna", {"rope_parameters": BOTH | {FULL: None}}, "rope_parameters", "no rope_theta"),
    (
        "beam",
        {"rope_parameters": BOTH | {FULL: TURNS | {"partial_rotary_factor": 0.5}}},
        "rope_parameters",
        "partial_rotary_factor",
    ),
    *(
        (family, rope | {name: value}, name, "rope_parameters")
        for family in ("laguna", "mellum", "beam")
        for rope in ({}, {"rope_parameters": BOTH})
        for name, value in (
            ("rope_theta", 1e4),
            ("partial_rotary_factor", 0.5),
            ("rope_scaling", {"type": "linear", "factor": 2.0}),
        )
    ),
    *(
        (family, {"rope_parameters": value}, "rope_parameters", what)
        for family in ("laguna", "mellum", "beam")
        for value, what in (
            (TURNS, FULL),
            ({FULL: TURNS}, SLIDING),
            (BOTH | {FULL: {"rope_type": "default"}}, "no rope_theta"),
        )
    ),
]


@pytest.mark.parametrize(("family", "changes", "field", "message"), REFUSED)
def test_a_field_that_would_give_another_model_is_refused(
    tmp_path: Path, family: str, changes: Plain, field: str, message: str
) -> None:
    with pytest.raises(SpaceError) as caught:
        read(tmp_path, family, changes)
    assert caught.value.path == field
    assert field in str(caught.value)
    assert message in str(caught.value)


ACCEPTED: list[tuple[str, Plain]] = [
    *((family, {}) for family in FAMILIES),
    ("dots3_note_text", FULL_DOTS),
    ("dots3_note_text", FULL_DOTS | {"per_layer_config": None}),
    ("dots3_note_text", FULL_DOTS | {"rope_parameters": {INDEXED: TURNS, FULL: TURNS}}),
    ("dots3_note_text", FULL_DOTS | {"rope_parameters": TURNS | {"rope_theta": 3e4}}),
    (
        "dots3_note_text",
        {
            "layer_types": [INDEXED, SLIDING],
            "sliding_window": 8,
            "per_layer_config": {"1": {"kv_lora_rank": 24, "v_head_dim": 16}},
        },
    ),
    ("glm_moe_dsa", {"indexer_types": None}),
    ("glm_moe_dsa", {"index_topk_freq": 1, "index_skip_topk_offset": 2}),
    ("glm_moe_dsa", {"index_topk_freq": 4, "index_skip_topk_offset": 2}),
    ("glm_moe_dsa", {"index_topk_pattern": "FF"}),
    ("glm_moe_dsa", {"index_topk_pattern": "FS"}),
    ("glm_moe_dsa", {"index_topk_pattern": ["full", "shared"]}),
    ("glm_moe_dsa", {"indexer_types": ["full", "shared"]}),
    ("glm_moe_dsa", {"index_topk_freq": 2, "index_skip_topk_offset": 1}),
    ("glm_moe_dsa", {"indexer_types": ["full", "full"], "index_topk_freq": 4}),
    ("glm_moe_dsa", {"rope_parameters": TURNS | {"partial_rotary_factor": 0.5}}),
    ("deepseek_v32", {"rope_parameters": TURNS | {"partial_rotary_factor": 0.5}}),
    ("deepseek_v32", {"partial_rotary_factor": 0.5}),
    ("stablelm", {"head_dim": 8}),
    ("stablelm", {"head_dim": None, "rope_parameters": TURNS}),
    ("mistral4", {"first_k_dense_replace": 1, "mlp_layer_types": ["dense", "sparse"]}),
    ("hy_v3", {"first_k_dense_replace": 1}),
    ("gemma4_text", GEMMA_EXPERTS),
    ("gemma4_text", {"global_head_dim": 24, "rope_parameters": BOTH}),
    ("gemma4_text", {"attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    ("gemma4_text", {"per_layer_config": {"1": {"head_dim": 16, "num_key_value_heads": 4}}}),
    ("gemma4_text", {"layer_types": [FULL, SLIDING]}),
    ("gemma4_text", {"per_layer_config": None, "global_head_dim": 24}),
    ("gemma4_text", {"per_layer_config": {}}),
    ("gemma4_text", {"final_logit_softcapping": None}),
    ("gemma4_text", {"layer_types": [FULL, FULL], "num_kv_shared_layers": 1}),
    ("minimax_m3_vl_text", {"rope_parameters": TURNS | {"partial_rotary_factor": 0.5}}),
    ("minimax_m3_vl_text", RELEASED_M3),
    ("gemma4_text", {"rope_parameters": BOTH | {SLIDING: TURNS | {"partial_rotary_factor": 0.5}}}),
    ("minimax_m3_vl_text", {"mlp_layer_types": ["dense", "sparse"], "rotary_dim": 16}),
    ("laguna", {"first_k_dense_replace": None}),
    ("laguna", {"first_k_dense_replace": 0, "mlp_layer_types": ["sparse", "sparse"]}),
    ("laguna", {"rope_parameters": BOTH}),
    ("laguna", {"rope_theta": None}),
    ("laguna", {"layer_types": [FULL, FULL], "rope_parameters": {FULL: TURNS}}),
    ("mellum", {"rope_parameters": BOTH}),
    ("beam", {"rope_parameters": BOTH}),
    ("beam", {"rope_parameters": BOTH | {SLIDING: None}}),
]


@pytest.mark.parametrize(("family", "changes"), ACCEPTED)
def test_an_accepted_configuration_has_the_sizes_and_thetas_of_transformers(
    tmp_path: Path, family: str, changes: Plain
) -> None:
    hf = pytest.importorskip("transformers")
    whole, layers = read(tmp_path, family, changes)
    ours = Architecture.parse({**whole, "blocks": groups_of(layers)}).build()
    fields = json.loads((tmp_path / "config.json").read_text())
    family = fields.pop("model_type")
    config = hf.CONFIG_MAPPING[family](**fields)
    mapping = hf.MODEL_FOR_CAUSAL_LM_MAPPING
    is_mistral = family == "mistral4"  # the one family without a place in the mapping
    theirs = (hf.Mistral4ForCausalLM if is_mistral else mapping[type(config)])(config)
    weights = {k: v for k, v in theirs.named_parameters() if "e_score_correction" not in k}
    weights |= {n: x for n, x in theirs.named_buffers() if n.endswith("layer_scalar")}
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in weights.values())
    rotary = theirs.model.rotary_emb
    for block, kind in zip(layers, getattr(config, "layer_types", None) or [""] * 2, strict=True):
        name = next((n for n in (f"{kind}_inv_freq", "inv_freq") if hasattr(rotary, n)), None)
        mixer = block["mixer"]
        share = mixer["rope"].get("partial_rotary_factor", 1.0)
        if name is None:
            assert share == 0
            continue
        width = mixer.get("rope_dim") or mixer["head_dim"] * share
        frequencies = getattr(rotary, name)
        assert len(frequencies) == width // 2
        if "scaling" not in mixer["rope"]:
            theta = mixer["rope"]["theta"]
            wanted = [theta ** (-2 * i / width) for i in range(len(frequencies))]
            assert frequencies.tolist() == pytest.approx(wanted)
