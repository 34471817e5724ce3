"""Exports in the layout of Hugging Face: transformers loads them and computes the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import safetensors.torch
import transformers as hf
from test_models import MODELS, architecture_of, randomise, tokens
from trained_shelf import Shelf

from moenas.errors import InputError
from moenas.export.formats import export
from moenas.export.published_layouts import LAYOUTS
from moenas.huggingface.config_writers import WRITERS
from moenas.huggingface.family_matching import family_config
from moenas.model.architecture import Architecture
from moenas.records import Plain

FAMILY = {
    "mixtral_8x7b": "mixtral",
    "phi_3_5_moe": "phimoe",
    "qwen3_30b_a3b": "qwen3_moe",
    "olmoe_1b_7b": "olmoe",
    "deepseek_v3": "deepseek_v3",
    "kimi_k2": "deepseek_v3",
    "deepseek_v2": "deepseek_v2",
    "deepseek_v2_lite": "deepseek_v2",
    "gpt_oss_20b": "gpt_oss",
    "glm_4_5": "glm4_moe",
    "granite_3_0_1b_a400m": "granitemoe",
    "hunyuan_a13b": "hunyuan_v1_moe",
    "minimax_m2": "minimax_m2",
    "qwen1_5_moe_a2_7b": "qwen2_moe",
    "ernie_4_5_21b_a3b": "ernie4_5_moe",
    "flex_olmo": "flex_olmo",
    "solar_open_100b": "glm4_moe",
    "aria": "ernie4_5_moe",
    "glm_4_7_flash": "deepseek_v3",
    "qwen3_next_80b_a3b": "qwen3_next",
    "llama_4_scout": "llama4_text",
    "llama_4_maverick": "llama4_text",
    "deepseek_v32": "deepseek_v32",
    "glm_moe_dsa": "deepseek_v32",
    "glm_moe_dsa_shared": "glm_moe_dsa",
    "exaone_moe": "exaone_moe",
    "hy_v3": "glm4_moe",
    "mellum": "mellum",
    "granitemoeshared": "granitemoeshared",
    "granitemoe_swa": "granitemoe_swa",
    "granite_4_0_h_tiny": "granitemoehybrid",
    "jamba_v0_1": "jamba",
    "lfm2_8b_a1b": "lfm2_moe",
    "minimax_m3": "minimax_m3_vl_text",
    "minimax_m3_sparse": "minimax_m3_vl_text",
    "gemma4": "gemma4_text",
    "gemma4_dense": "gemma4_text",
    "flint": "flint",
    "laguna": "laguna",
    "laguna_by_element": "laguna",
    "kolibri1": "kolibri1",
    "beam": "beam",
    "mimo_v2_flash": "mimo_v2_flash",
    "trinity_mini": "afmoe",
    "command": "cohere2_moe",
    "axk1": "axk1",
    "nemotron_3_nano": "nemotron_h",
    "kimi_linear_48b_a3b": "kimi_linear",
    "ling_hybrid": "bailing_hybrid",
    "qwen3_5_35b_a3b": "qwen3_next",
}
"""Model of the parity tests -> the first family of the writers that equals it."""

ATTENTION: Plain = {"kind": "attention", "head_dim": 16, "n_heads": 4, "n_kv_heads": 2}
DENSE: Plain = {"kind": "dense", "d_ff": 40}
EXPERTS: Plain = {"kind": "moe", "n_experts": 8, "d_expert": 24}
BIASED: Plain = {"score": "sigmoid", "normalize": True, "balance": "bias"}
LATENT: Plain = {
    "kind": "latent_attention",
    "n_heads": 4,
    "q_rank": 24,
    "kv_rank": 16,
    "nope_dim": 16,
    "rope_dim": 8,
    "v_dim": 8,
}
LLAMA3 = {
    "kind": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 8,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
YARN = {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}


def layers(mixer: Plain, *ffns: Plain, **whole: Any) -> Architecture:
    blocks = [{"mixer": mixer, "ffn": ffn} for ffn in ffns]
    return Architecture.parse({"vocab_size": 256, "d_model": 32, **whole, "blocks": blocks})


OWN = {
    "llama": layers(ATTENTION | {"rope": {"scaling": LLAMA3}}, DENSE, DENSE),
    "mistral": layers(ATTENTION | {"window": 5, "rope": {"theta": 500.0}}, DENSE, DENSE),
    # A LayerNorm without a bias: biases of 0 are written.
    "stablelm": layers(
        ATTENTION | {"n_heads": 2, "qkv_bias": True, "rope": {"partial_rotary_factor": 0.5}},
        DENSE,
        DENSE,
        norm="layernorm",
    ),
    "qwen2": layers(ATTENTION | {"qkv_bias": True}, DENSE, DENSE, tie_embeddings=False),
    "qwen3": layers(ATTENTION | {"qk_norm": "head", "rope": {"scaling": YARN}}, DENSE, DENSE),
    # The capacity and the loss act in training alone.
    "mixtral": layers(ATTENTION, EXPERTS | {"router": {"capacity_factor": 1.25, "z_coef": 0.1}}),
    "qwen3_moe": layers(
        ATTENTION | {"qk_norm": "head", "window": 6},
        EXPERTS | {"router": {"preset": "switch"}},
        DENSE,
        EXPERTS | {"router": {"preset": "switch"}},
    ),
    "dots1": layers(ATTENTION | {"qk_norm": "head", "window": 6}, EXPERTS | {"router": BIASED}),
    # No bias and no shared expert: a bias of 0 and matrices of width 0 are written.
    "glm4_moe": layers(
        ATTENTION | {"rope": {"partial_rotary_factor": 0.5}},
        DENSE,
        EXPERTS | {"router": BIASED | {"balance": "aux_loss"}},
    ),
    "deepseek_v3": layers(
        LATENT | {"scale": 0.4, "rope": {"scaling": YARN | {"attention_factor": 1.5}}},
        EXPERTS | {"router": BIASED},
    ),
    "glm4_moe_lite": layers(
        LATENT, EXPERTS | {"router": BIASED}, DENSE, EXPERTS | {"router": BIASED}
    ),
    "hy_v3": layers(
        ATTENTION | {"qk_norm": "head", "qkv_bias": True, "out_bias": True},
        EXPERTS | {"router": BIASED | {"scale": 2.0}, "n_shared_experts": 2},
        DENSE,
    ),
    "deepseek_v2": layers(
        LATENT | {"q_rank": None}, EXPERTS | {"router": {"normalize": False, "top_k": 3}}
    ),
}
"""Family -> an architecture that no released model has."""


def written(folder: Path, architecture: Architecture, **changes: Any) -> tuple[Path, Any]:
    """Export a trial with random weights; return the folder and our model."""
    shelf = Shelf(folder / "runs")
    shelf.add(0, architecture, scale=lambda model: randomise(model.state_dict(), 2), **changes)
    out = export(shelf, "tiny", 0, folder / "out", format="transformers")
    model = architecture.canonical().build().eval()
    weights = (folder / "runs").rglob("*.safetensors")
    model.load_state_dict(safetensors.torch.load_file(next(weights)))
    return out, model


@torch.no_grad()
def check_with_transformers(out: Path, model: Any, tolerance: float = 1e-5) -> None:
    theirs, report = hf.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    wanted = model(tokens())
    assert wanted.std() > 0.01
    torch.testing.assert_close(theirs.eval()(tokens()).logits, wanted, rtol=0, atol=tolerance)
    prompt = tokens()[:1, :4]
    continued = theirs.generate(prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(continued[0, 4:], model.generate(prompt, 8)[0, -8:])
    # transformers writes the model back under the same names, in the same shapes.
    theirs.save_pretrained(out / "again")
    ours, again = (
        safetensors.torch.load_file(p / "model.safetensors") for p in (out, out / "again")
    )
    assert {n: x.shape for n, x in ours.items()} == {n: x.shape for n, x in again.items()}
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def family_of(out: Path) -> str:
    return str(json.loads((out / "config.json").read_text())["model_type"])


@pytest.mark.parametrize("name", FAMILY)
def test_published_families_load_with_the_same_logits(name: str, tmp_path: Path) -> None:
    out, model = written(tmp_path, architecture_of(name))
    assert family_of(out) == FAMILY[name]
    check_with_transformers(out, model, MODELS[name].tolerance)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("family", OWN)
def test_new_architectures_load_with_the_same_logits(family: str, tmp_path: Path) -> None:
    out, model = written(tmp_path, OWN[family])
    assert family_of(out) == family
    check_with_transformers(out, model)


def test_a_parallel_stablelm_loads_with_the_same_logits(tmp_path: Path) -> None:
    block = {"mixer": ATTENTION | {"n_heads": 2}, "ffn": DENSE, "parallel": True}
    plain = {"vocab_size": 256, "d_model": 32, "norm": "layernorm_bias", "blocks": [block, block]}
    out, model = written(tmp_path, Architecture.parse(plain))
    assert family_of(out) == "stablelm"
    check_with_transformers(out, model)


def test_every_family_with_a_writer_has_names_of_weights_and_a_test() -> None:
    assert set(WRITERS) == set(LAYOUTS)
    assert set(WRITERS) == {*FAMILY.values(), *OWN}


def test_the_class_of_a_family_is_the_one_of_transformers() -> None:
    for family, (name, _) in WRITERS.items():
        config = hf.CONFIG_MAPPING[family]
        assert hf.MODEL_FOR_CAUSAL_LM_MAPPING[config].__name__ == name


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (
            layers(ATTENTION, EXPERTS, EXPERTS, DENSE, norm="layernorm"),
            "nearest is qwen3_moe: norm is layernorm, the family has rmsnorm; layers 0-2"
            " mixer.qk_norm is none, the family has head",
        ),
        (
            layers({"kind": "mamba", "d_inner": 64}, DENSE),
            "nearest is jamba: the number of attention layers is 0, the family has 1 or more; layer 0"
            " mixer.inner_norm is false",
        ),
        (  # Mixtral would make the weight of the one expert 1
            layers(ATTENTION, EXPERTS | {"router": {"preset": "switch"}}),
            "nearest is qwen3_moe: layer 0 mixer.qk_norm is none, the family has head",
        ),
        (
            layers(ATTENTION, EXPERTS | {"activation": "relu2"}),
            "nearest is mixtral: layer 0 ffn.activation is relu2, the family has swiglu",
        ),
        (
            Architecture.parse(
                {
                    "vocab_size": 256,
                    "d_model": 32,
                    "blocks": [{"mixer": ATTENTION}, {"mixer": ATTENTION}],
                }
            ),
            "ffn is null",
        ),
    ],
)
def test_an_architecture_without_a_family_is_refused(
    architecture: Architecture, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as refused:
        written(tmp_path, architecture)
    assert message in str(refused.value)
    assert str(refused.value).startswith("study 'tiny', trial 0: no family of Hugging Face")
    assert "--format folder" in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_the_byte_tokenizer_writes_and_reads_bytes(tmp_path: Path) -> None:
    out, _ = written(tmp_path, OWN["llama"])
    tokenizer = hf.AutoTokenizer.from_pretrained(out)
    text = "def f(x):\n\treturn  'Gr\u00fc\u00dfe, \u4e16\u754c \U0001f642'  # \r\x00\x7f"
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert [
        tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(i)) for i in range(256)
    ] == [*range(256)]


def test_the_lines_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, model = written(tmp_path, OWN["llama"])
    card = (out / "README.md").read_text()
    assert "layout of the family `llama`" in card
    monkeypatch.chdir(out)
    exec("\n".join(line[4:] for line in card.splitlines() if line.startswith("    ")), {})
    prompt = torch.tensor([list(b"def ")])
    expected = bytes(model.generate(prompt, 100)[0].tolist()).decode("utf-8", "replace")
    assert capsys.readouterr().out.removesuffix("\n") == expected


def test_context_and_moenas_data_are_written(tmp_path: Path) -> None:
    out, _ = written(tmp_path, OWN["llama"])
    config = json.loads((out / "config.json").read_text())
    assert config["max_position_embeddings"] == 64
    data = json.loads((out / "moenas.json").read_text())
    assert data["fingerprint"] == OWN["llama"].fingerprint
    assert family_config(OWN["llama"], 7)["max_position_embeddings"] == 7
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "moenas.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
