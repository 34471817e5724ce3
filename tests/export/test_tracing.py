"""Exported modules under torch.export and torch.compile, in float32 with open lengths."""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from moenas.export.folder import model_source
from moenas.model.architecture import Architecture
from moenas.records import Plain

pytestmark = pytest.mark.integration

ATTENTION: Plain = {"kind": "attention", "head_dim": 16, "n_kv_heads": 1, "qk_norm": "head"}
FFNS: dict[str, Plain] = {
    "dense": {"kind": "dense", "d_ff": 32},
    "moe": {"kind": "moe", "n_experts": 4, "d_expert": 32, "router": {"top_k": 2}},
    "shared": {
        "kind": "moe",
        "n_experts": 4,
        "d_expert": 32,
        "n_shared_experts": 1,
        "n_zero_experts": 2,
        "expert_bias": True,
        "router": {"top_k": 2, "score": "sigmoid", "balance": "bias", "weight_on": "input"},
    },
}


def exported(name: str, folder: Path) -> nn.Module:
    """Return a module of the file that an export writes, without moenas's own classes."""
    layer = {"repeat": 2, "mixer": ATTENTION, "ffn": FFNS[name]}
    moa = {"mixer": {"kind": "moa", "n_experts": 4, "n_kv_heads": 1, "head_dim": 16}}
    plain = {"vocab_size": 64, "d_model": 32, "blocks": [layer, *([moa] if name == "moe" else [])]}
    path = folder / f"model_{name}.py"
    path.write_text(model_source(Architecture.parse(plain)))
    spec = importlib.util.spec_from_file_location(f"exported_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    model: nn.Module = module.build()
    return model.eval()


def tokens(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(64, (batch, length), generator=generator)


@pytest.mark.parametrize(
    "name",
    [name if name == "shared" else pytest.param(name, marks=pytest.mark.slow) for name in FFNS],
)
@torch.no_grad()
def test_a_module_exports_with_open_batch_and_length(name: str, tmp_path: Path) -> None:
    model = exported(name, tmp_path)
    sizes = {0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=4096)}
    program = torch.export.export(model, (tokens(3, 19),), dynamic_shapes=(sizes,))
    for batch, length in ((3, 19), (1, 2), (2, 70)):
        logits = program.module()(tokens(batch, length))
        assert torch.allclose(logits, model(tokens(batch, length)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FFNS)
def test_a_module_can_be_copied_after_a_step_of_training(name: str, tmp_path: Path) -> None:
    model: Any = exported(name, tmp_path).train()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        loss = model.loss(tokens(2, 16), tokens(2, 16).roll(1, 1))
        (loss if name == "dense" else loss + model.auxiliary_loss()).backward()
        optimizer.step()
        averaged.update_parameters(model)
    again = copy.deepcopy(model)
    torch.testing.assert_close(again.eval()(tokens(2, 9)), model.eval()(tokens(2, 9)))
    late = AveragedModel(model)  # a copy is made here, after training
    late.update_parameters(model)
    torch.testing.assert_close(late(tokens(2, 9)), model(tokens(2, 9)))
    mean = averaged.module
    assert any(
        not torch.equal(a, b) for a, b in zip(mean.parameters(), model.parameters(), strict=True)
    )
    assert torch.isfinite(averaged(tokens(2, 9))).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", FFNS)
@torch.no_grad()
def test_a_module_compiles_whole_with_open_batch_and_length(name: str, tmp_path: Path) -> None:
    model = exported(name, tmp_path)
    compiled = torch.compile(model, dynamic=True, fullgraph=True)
    for batch, length in ((3, 19), (2, 70)):
        logits = compiled(tokens(batch, length))
        assert torch.allclose(logits, model(tokens(batch, length)), atol=1e-5, rtol=0)


@pytest.mark.slow
@torch.no_grad()
def test_a_dense_module_converts_to_onnx_with_open_batch_and_length(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="no onnxscript: pip install onnx onnxscript")
    reference = pytest.importorskip("onnx.reference")
    model = exported("dense", tmp_path)
    sizes = {0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=4096)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch and of onnxscript
        program: Any = torch.onnx.export(
            model, (tokens(3, 19),), dynamo=True, dynamic_shapes=(sizes,), verbose=False
        )
    graph = program.model_proto
    evaluator = reference.ReferenceEvaluator(graph)
    for batch, length in ((3, 19), (2, 40)):
        given = tokens(batch, length)
        (logits,) = evaluator.run(None, {graph.graph.input[0].name: given.numpy()})
        assert torch.allclose(torch.from_numpy(logits), model(given), atol=1e-5, rtol=0)


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ONNX line runs where onnxscript is installed; elsewhere the rest of the block runs."""
    page = (Path(__file__).parents[2] / "docs" / "tracing.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    lines = block.splitlines()
    if importlib.util.find_spec("onnxscript") is None:
        lines = [line for line in lines if "torch.onnx" not in line]
    assert len(lines) >= 6
    net = exported("dense", tmp_path)
    module: Any = types.ModuleType("model")
    module.load = lambda: net
    monkeypatch.setitem(sys.modules, "model", module)
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch and of onnxscript
        exec("\n".join(lines), names)
    assert torch.equal(names["program"].module()(tokens(2, 40)), net(tokens(2, 40)))
