"""Fields of recent models in exports: the source alone, and a trace with an open length."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

from moenas.export.folder import model_source
from moenas.export.programs import trace
from moenas.model.architecture import Architecture
from moenas.records import Plain

LATENT: Plain = {"kind": "latent_attention", "n_heads": 2, "q_rank": 6, "kv_rank": 5, "nope_dim": 8}
LATENT |= {"rope_dim": 4, "v_dim": 8, "window": 6, "rope_norm": True, "floor_scale": 3}
LATENT |= {"sinks": True}
LATENT |= {"indexer": {"n_heads": 3, "head_dim": 8, "top_k": 4}}
SHARED: Plain = {k: v for k, v in LATENT.items() if k != "indexer"} | {"index_shared": True}
ATTENTION: Plain = {"kind": "attention", "head_dim": 8, "output_gate": "head", "gate_bias": True}
ATTENTION |= {"gate_activation": "softplus", "floor_scale": 3, "scale_growth": "power"}
EXPERTS: Plain = {"kind": "moe", "n_experts": 4, "d_expert": 8}
ROUTER: Plain = {"router": {"bias_on": "logits", "balance": "bias"}, "activated_limit": 0.5}
BLOCKS: Plain = {"kind": "attention", "head_dim": 8, "n_kv_heads": 1, "sinks": True}
BLOCKS |= {"block_indexer": {"head_dim": 8, "block": 2, "top_blocks": 3}}
DENSE: Plain = {"kind": "dense", "d_ff": 16}
ARCHITECTURE: Plain = {
    "vocab_size": 40,
    "d_model": 16,
    "depth_scale": True,
    "blocks": [
        {"mixer": LATENT, "ffn": EXPERTS | ROUTER, "ffn_norm": "sandwich"},
        {"mixer": SHARED, "ffn": DENSE},
        {"mixer": BLOCKS, "ffn": DENSE},
        {"mixer": ATTENTION, "ffn": DENSE, "shortcut": EXPERTS}
        | {"shortcut_input": "stream", "sum_norm": True, "block_scale": True},
    ],
}


@torch.no_grad()
def test_an_export_and_a_trace_have_the_logits_of_the_model(tmp_path: Path) -> None:
    architecture = Architecture.parse(ARCHITECTURE)
    model = architecture.build(seed=1).eval()
    (tmp_path / "exported.py").write_text(model_source(architecture))
    spec = importlib.util.spec_from_file_location("exported_fields", tmp_path / "exported.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    exported, program = module.build().eval(), trace(model)
    exported.load_state_dict(model.state_dict())
    for length in (1, 4, 5, 13):
        tokens = torch.randint(40, (2, length), generator=torch.Generator().manual_seed(length))
        wanted = model(tokens)
        assert torch.equal(exported(tokens), wanted)
        torch.testing.assert_close(program.module()(tokens), wanted, rtol=1e-4, atol=1e-5)
    del sys.modules[spec.name]
