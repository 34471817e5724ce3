"""Programs of torch.export and ONNX: other batches and lengths, without moenas, the same logits."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from trained_shelf import Shelf

from moenas.errors import InputError, MoenasError
from moenas.export import programs
from moenas.export.formats import export
from moenas.model.architecture import Architecture
from moenas.records import Plain

pytestmark = pytest.mark.integration

needs_onnx = pytest.mark.skipif(
    any(__import__("importlib").util.find_spec(name) is None for name in programs.ONNX_PACKAGES),
    reason="pip install 'moenas[onnx]'",
)
FORMATS = ["torch_export", pytest.param("onnx", marks=needs_onnx)]

ATTENTION: Plain = {"kind": "attention", "head_dim": 16, "n_kv_heads": 1}
DENSE: Plain = {"kind": "dense", "d_ff": 32}


def routed(top_k: int = 2, **fields: Any) -> Plain:
    return {"kind": "moe", "n_experts": 4, "d_expert": 32, "router": {"top_k": top_k, **fields}}


PARTS: list[Plain] = [
    {"mixer": ATTENTION | {"window": 5, "qk_norm": "head"}, "ffn": routed()},
    {
        "mixer": ATTENTION | {"sinks": True, "softcap": 3.0},
        "ffn": routed(score="sigmoid", balance="bias", weight_on="input")
        | {"n_shared_experts": 1, "n_zero_experts": 2, "expert_bias": True},
    },
    {"mixer": {"kind": "moa", "n_experts": 4, "head_dim": 8}},
    {"mixer": ATTENTION | {"chunk": 5}, "ffn": routed(preset="threshold")},
    {"mixer": {"kind": "short_conv"}, "ffn": routed(selection="hash", score="uniform")},
    {"mixer": ATTENTION | {"position_bias": {"kind": "t5"}}},
    {"mixer": ATTENTION | {"position_bias": {"kind": "alibi"}}, "ffn": DENSE},
]
"""Parts whose passes look at lengths or sort tokens when they are not traced."""


SMALL: list[Plain] = [{"mixer": ATTENTION, "ffn": routed()}]


def randomise(model: torch.nn.Module) -> None:
    """Draw weights that give logits of the order of 1."""
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        drawn = torch.empty(tensor.shape).normal_(generator=generator)
        matrix = tensor.dim() > 1
        tensor.copy_(drawn * tensor.shape[-1] ** -0.5 if matrix else 1 + 0.3 * drawn)


def shelved(tmp_path: Path, blocks: list[Plain], **whole: Any) -> Shelf:
    shelf = Shelf(tmp_path / "runs")
    architecture = Architecture.parse({"vocab_size": 64, "d_model": 32, **whole, "blocks": blocks})
    shelf.model = shelf.add(0, architecture, scale=randomise)
    return shelf


RUN = {
    "torch_export": """
import sys, json, torch
net = torch.export.load(sys.argv[1] + "/model.pt2").module()
for batch in json.load(sys.stdin):
    print(json.dumps(net(torch.tensor(batch)).tolist()))
assert "moenas" not in sys.modules
""",
    "onnx": """
import sys, json, numpy, onnxruntime
net = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx")
for batch in json.load(sys.stdin):
    print(json.dumps(net.run(None, {"tokens": numpy.array(batch)})[0].tolist()))
assert "moenas" not in sys.modules and "torch" not in sys.modules
""",
}
FILE = {"torch_export": "model.pt2", "onnx": "model.onnx"}


@pytest.mark.parametrize("format", ["torch_export", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_program_gives_the_same_logits_at_any_batch_and_length(
    format: str, tmp_path: Path
) -> None:
    shelf = shelved(tmp_path, PARTS)
    out = export(shelf, "tiny", 0, tmp_path / "out", format=format)
    assert sorted(p.name for p in out.iterdir()) == ["README.md", FILE[format], "moenas.json"]
    generator = torch.Generator().manual_seed(1)
    sizes = ((4, 33), (1, 1), (1, 90), (2, 2))
    batches = [torch.randint(64, size, generator=generator) for size in sizes]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN[format], str(out)],
        input=json.dumps([batch.tolist() for batch in batches]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for batch, line in zip(batches, done.stdout.splitlines(), strict=True):
        with torch.no_grad():
            wanted = shelf.model(batch)
        torch.testing.assert_close(torch.tensor(json.loads(line)), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_the_lines_of_the_readme_run(
    format: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shelf = shelved(tmp_path, SMALL, vocab_size=128)
    out = export(shelf, "tiny", 0, tmp_path / "out", format=format)
    card = (out / "README.md").read_text()
    monkeypatch.chdir(out)
    exec("\n".join(line[4:] for line in card.splitlines() if line.startswith("    ")), {})
    wanted = shelf.model.generate(torch.tensor([[72, 105]]), 20)[0].tolist()
    assert json.loads(capsys.readouterr().out) == wanted


def test_a_length_beyond_learned_positions_is_refused(tmp_path: Path) -> None:
    whole = {"positions": "learned", "max_positions": 256}
    shelf = shelved(tmp_path, [{"mixer": ATTENTION, "ffn": DENSE}], **whole)
    out = export(shelf, "tiny", 0, tmp_path / "out", format="torch_export")
    net = torch.export.load(out / "model.pt2").module()
    assert net(torch.zeros(1, 256, dtype=torch.int64)).shape == (1, 256, 64)
    with pytest.raises(AssertionError, match="256"):
        net(torch.zeros(1, 257, dtype=torch.int64))


@pytest.mark.parametrize("format", FORMATS)
def test_a_part_that_cannot_be_traced_is_named(format: str, tmp_path: Path) -> None:
    delta = {"kind": "gated_delta", "n_heads": 2, "key_dim": 8, "value_dim": 8}
    blocks = [
        {"mixer": ATTENTION, "ffn": routed()},
        {"mixer": delta, "ffn": routed()},
        {"mixer": delta, "ffn": DENSE},
    ]
    with pytest.raises(InputError) as refused:
        export(shelved(tmp_path, blocks), "tiny", 0, tmp_path / "out", format=format)
    assert re.match(
        r"study 'tiny', trial 0: format torch_export cannot hold gated_delta \(layer 1 mixer, layer 2"
        r" mixer\), whose operations depend on the length",
        str(refused.value),
    )
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = shelved(tmp_path, SMALL)
    monkeypatch.setattr(programs, "ONNX_PACKAGES", ("torch", "no_such_onnx"))
    with pytest.raises(InputError, match=r"needs no_such_onnx: pip install 'moenas\[onnx\]'"):
        export(shelf, "tiny", 0, tmp_path / "out", format="onnx")


def test_the_check_finds_other_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = programs.trace

    def other(model: Any, longest: int | None = None) -> Any:
        with torch.no_grad():
            model.embedding.mul_(1.01)
        return real(model, longest)

    monkeypatch.setattr(programs, "trace", other)
    with pytest.raises(MoenasError, match="computes other logits, off by up to"):
        export(shelved(tmp_path, SMALL), "tiny", 0, tmp_path / "out", format="torch_export")
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    shelf = shelved(tmp_path, SMALL)
    with pytest.raises(InputError, match="'gguf' is unknown; moenas writes folder, transformers"):
        export(shelf, "tiny", 0, tmp_path / "out", format="gguf")
