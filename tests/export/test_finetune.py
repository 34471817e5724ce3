"""The script beside an exported model trains it further, without moenas."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from trained_shelf import Shelf

from moenas.data import tokenizer_file
from moenas.export import finetune
from moenas.export import folder as exporting
from moenas.export.formats import export
from moenas.model.architecture import Architecture
from moenas.records import Plain
from moenas.resources import load_module

pytestmark = pytest.mark.integration

TEXT = "".join(f"def add_{i}(x):\n    return x + {i}\n" for i in range(400))
STRANGER = """
import runpy, sys
class BlockImports:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("moenas", "safetensors"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, BlockImports())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An exported model with experts, balanced by a bias and a loss, with its first weights."""
    monkeypatch.setattr(exporting, "check", lambda *_: None)
    return exported(tmp_path, {"is_bytes": True})


def exported(tmp_path: Path, data: Plain) -> Path:
    router = {"top_k": 2, "score": "sigmoid", "balance": {"kind": "bias_and_loss", "rate": 0.01}}
    ffn = {"kind": "moe", "n_experts": 4, "d_expert": 32, "router": router}
    block = {"mixer": {"kind": "attention", "head_dim": 16}, "ffn": ffn}
    plain = {"vocab_size": 256, "d_model": 32, "blocks": [block]}
    shelf = Shelf(tmp_path / "runs")
    shelf.data |= data

    def first(model: Any) -> None:
        model.load_state_dict(Architecture.parse(plain).build(seed=1).state_dict())

    shelf.add(0, Architecture.parse(plain), scale=first)
    return export(shelf, "tiny", 0, tmp_path / "out")


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-B", "-c", STRANGER, str(folder / "finetune.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def loss_of(folder: Path) -> float:
    tokens = torch.tensor(list(TEXT.encode()))[: 65 * 20].view(20, 65)
    net = load_module(folder / "model.py").load(folder)
    with torch.no_grad():
        return float(net.loss(tokens[:, :-1], tokens[:, 1:]))


def test_the_script_lowers_the_loss_and_writes_a_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text(TEXT)
    words = ("--steps", "40", "--batch", "8", "--lr", "0.01", "--out", str(tmp_path / "tuned"))
    done = run(folder, str(tmp_path / "data.txt"), *words)
    assert done.returncode == 0, done.stderr
    tuned = tmp_path / "tuned"
    assert done.stdout.splitlines()[-1] == f"next: python {tuned / 'model.py'}"
    first, *_, last = (float(line.split()[3]) for line in done.stdout.splitlines()[:-1])
    assert last < first
    assert loss_of(tuned) < loss_of(folder) - 1
    assert {p.name for p in tuned.iterdir()} == {p.name for p in folder.iterdir()}
    weights, before = (
        safetensors.torch.load_file(p / "model.safetensors") for p in (tuned, folder)
    )
    assert weights.keys() == before.keys()
    assert not torch.equal(
        weights["blocks.0.ffn.balance.bias"], before["blocks.0.ffn.balance.bias"]
    )
    assert json.loads((tuned / "config.json").read_text())["tuning"] == {
        "data": "data.txt",
        "batch": 8,
        "seed": 0,
        "steps": 40,
        "lr": 0.01,
    }


def test_the_loop_of_the_readme_is_a_step_of_training(folder: Path) -> None:
    lines = (folder / "README.md").read_text().partition("## Fine-tune")[2].splitlines()
    code = "\n".join(line[4:] for line in lines if line.startswith("    "))
    net = load_module(folder / "model.py").load(folder)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    tokens = torch.tensor(list(TEXT.encode()))[:130].view(2, 65)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    exec(
        code,
        {"net": net, "optimizer": optimizer, "inputs": tokens[:, :-1], "targets": tokens[:, 1:]},
    )
    changed = {name for name, x in net.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == set(before)


def test_the_lines_on_generation_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    use = (folder / "README.md").read_text().partition("## Fine-tune")[0]
    code = "\n".join(line[4:] for line in use.splitlines() if line.startswith("    "))
    model = load_module(folder / "model.py")
    names: dict[str, Any] = {"model": model, "torch": torch}
    exec(
        code.replace("import torch, model", "model.load.__defaults__ = (FOLDER, 'cpu')"),
        names | {"FOLDER": folder},
    )
    assert len(capsys.readouterr().out.split()) == 100


@pytest.mark.parametrize(
    ("content", "out", "reason"),
    [
        (None, "new", "data.txt: no such file"),
        (b"short", "new", "5 tokens; more than 64 are needed"),
        (TEXT.encode(), "runs", "exists; name a new folder"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, tmp_path: Path, content: bytes | None, out: str, reason: str
) -> None:
    if content is not None:
        (tmp_path / "data.txt").write_bytes(content)
    done = run(folder, str(tmp_path / "data.txt"), "--out", str(tmp_path / out))
    assert done.returncode == 2
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()


def test_token_ids_come_from_an_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exporting, "check", lambda *_: None)
    folder = exported(tmp_path, {"is_bytes": False})
    assert "token ids in a .npy file" in (folder / "README.md").read_text()
    np.save(tmp_path / "ids.npy", np.frombuffer(TEXT.encode(), dtype=np.uint8).astype(np.uint16))
    ids = finetune.read_tokens(tmp_path / "ids.npy", 256, is_bytes=False)
    assert bytes(ids.tolist()) == TEXT.encode()
    with pytest.raises(SystemExit, match="2"):
        finetune.read_tokens(tmp_path / "ids.npy", 64, is_bytes=False)
    assert "the vocabulary has 64" in capsys.readouterr().err


def test_a_text_is_encoded_by_the_tokenizer_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.setattr(exporting, "check", lambda *_: None)
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    stored = tokenizer_file.read(str(tmp_path / "tokenizer.json")).manifest()
    folder = exported(tmp_path, {"is_bytes": False, "tokenizer": stored})
    assert "takes the library tokenizers" in (folder / "README.md").read_text()
    (tmp_path / "data.txt").write_text("a b b a c " * 200)
    words = ("--steps", "2", "--batch", "2", "--out", str(tmp_path / "tuned"))
    done = run(folder, str(tmp_path / "data.txt"), *words)
    assert done.returncode == 0, done.stderr
    script = load_module(folder / "finetune.py")
    ids = script.read_tokens(tmp_path / "data.txt", 256, False)
    assert ids.tolist() == [0, 1, 1, 0, 2] * 200


def test_weights_are_written_as_safetensors_reads_them(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(4), "c": torch.tensor(2.5)}
    finetune.write_safetensors(tmp_path / "x.safetensors", tensors)
    read = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
