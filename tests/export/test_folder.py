"""An exported folder computes the same as the trained model where there is no moenas."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tokenizers
import torch
from trained_shelf import Shelf

from moenas.data import loading as data
from moenas.data import tokenizer_file
from moenas.errors import InputError, MoenasError, NotFoundError
from moenas.evaluate.job import evaluate
from moenas.export import folder as exporting
from moenas.export.folder import model_source
from moenas.export.formats import export
from moenas.model.architecture import Architecture
from moenas.records import Job, Plain
from moenas.resources import load_module
from moenas.space.sections import Protocol, Recipe
from moenas.store.store import Store
from moenas.store.weights import weights_path, write_weights
from moenas.testing.parts import random_architecture

pytestmark = pytest.mark.integration

FILES = ["README.md", "config.json", "finetune.py", "model.py", "model.safetensors"]

STRANGER = """
import hashlib, importlib.util, json, sys
class BlockMoenas:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("moenas", "safetensors"):
            raise ImportError(f"{name} is walled off")
sys.meta_path.insert(0, BlockMoenas())
import torch
torch.set_num_threads(1)
found = []
for place in json.load(sys.stdin):
    spec = importlib.util.spec_from_file_location("exported", place + "/model.py")
    model = importlib.util.module_from_spec(spec)
    sys.modules["exported"] = model
    spec.loader.exec_module(model)
    net = model.load(place)
    tokens = torch.arange(60).view(3, 20) * 11 % net.vocab_size
    with torch.no_grad():
        logits = net(tokens)
        found.append([
            hashlib.sha256(logits.numpy().tobytes()).hexdigest(),
            net.loss(tokens, tokens.roll(1, 1)).item().hex(),
            net.generate(tokens[:, :4], 8).tolist(),
        ])
assert "moenas" not in sys.modules and "safetensors" not in sys.modules
print(json.dumps(found))
"""


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "runs")


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the seconds of the check where another test has it."""
    monkeypatch.setattr(exporting, "check", lambda *_: None)


def small() -> Architecture:
    return random_architecture(3, vocab_size=256)


@pytest.mark.usefixtures("unchecked", "one_thread")
def test_logits_agree_to_the_last_bit_without_moenas(shelf: Shelf, tmp_path: Path) -> None:
    wanted, places, described = [], [], ""
    for seed in (*range(19), 29, 41):
        architecture = random_architecture(seed, vocab_size=256).canonical()
        described += json.dumps(architecture.plain())
        net = shelf.add(seed, architecture)
        out = export(shelf, "tiny", seed, tmp_path / str(seed))
        places.append(str(out))
        tokens = torch.arange(60).view(3, 20) * 11 % 256
        with torch.no_grad():
            logits = hashlib.sha256(net(tokens).numpy().tobytes()).hexdigest()
            loss = net.loss(tokens, tokens.roll(1, 1)).item().hex()
            wanted.append([logits, loss, net.generate(tokens[:, :4], 8).tolist()])
    words = "dense moe rmsnorm layernorm sigmoid softmax swiglu geglu gelu relu2 bias aux_loss head"
    for word in [*words.split(), '"tie_embeddings": true', '"n_shared_experts": 1']:
        assert word in described
    done = subprocess.run(
        [sys.executable, "-c", STRANGER],
        input=json.dumps(places),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == wanted


@pytest.mark.parametrize("seed", range(8))
def test_model_py_holds_what_is_used_and_no_more(seed: int, tmp_path: Path) -> None:
    architecture = random_architecture(seed, vocab_size=256)
    text = model_source(architecture)
    tree = ast.parse(text)
    defined: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            defined[ast.unparse(target)] = node
    for name, own in defined.items():
        others = (n for s in tree.body if s is not own for n in ast.walk(s))
        assert any(isinstance(n, ast.Name) and n.id == name for n in others), f"unused: {name}"
    (tmp_path / "model.py").write_text(text)
    module = load_module(tmp_path / "model.py")
    built = {
        cls.__name__
        for m in module.build().modules()
        for cls in type(m).__mro__
        if cls.__module__ == module.__name__
    }
    classes = {n for n, node in defined.items() if isinstance(node, ast.ClassDef)}
    modules = {n for n in classes if issubclass(getattr(module, n), torch.nn.Module)}
    # Experts names the class of its biases, and blocks the classes of layers that are told more,
    # whether there are any or not. The loss of an indexer is added to the losses of routers.
    named = {"ExpertBias", "LayerIndexed", "ReadsInputs"}
    if "IndexedSelection" in built:
        named |= {
            "ExpertSelection",
            "Gating",
            "LoadBalancer",
            "RoutedLayer",
            "RouterInput",
            "Weights",
        }
    assert built <= modules <= built | named
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= {"torch", *sys.stdlib_module_names}
    fresh, ours = module.build(seed=7).state_dict(), architecture.build(seed=7)
    assert all(torch.equal(fresh[name], tensor) for name, tensor in ours.state_dict().items())


def test_layers_that_read_earlier_ones_still_do(tmp_path: Path) -> None:
    """Keys, tables of biases and experts of heads: logits and what is generated with a cache."""
    own = {"kind": "attention", "head_dim": 8, "n_kv_heads": 1}
    table = {"kind": "t5", "num_buckets": 8, "max_distance": 12}
    heads = {"kind": "moa", "n_experts": 4, "head_dim": 8, "out_bias": True}
    mixers: list[Plain] = [
        own | {"position_bias": table, "v_norm": True, "k_eq_v": True},
        heads,
        own | {"position_bias": table | {"shared": True}, "kv_source": 1},
        own | {"position_bias": {"kind": "alibi"}, "rope": {"partial_rotary_factor": 0.0}},
    ]
    experts: Plain = {"kind": "moe", "n_experts": 4, "d_expert": 8, "out_bias": True}
    blocks = [*({"mixer": m} for m in mixers), {"ffn": experts}]
    architecture = Architecture.parse({"vocab_size": 40, "d_model": 16, "blocks": blocks})
    (tmp_path / "model.py").write_text(model_source(architecture))
    alone = load_module(tmp_path / "model.py").build(seed=3).eval()
    model = architecture.build(seed=3).eval()
    tokens = torch.arange(40).view(2, 20) * 7 % 40
    with torch.no_grad():
        assert torch.equal(alone(tokens), model(tokens))
    assert torch.equal(alone.generate(tokens, 6), model.generate(tokens, 6))


def test_the_folder_is_whole(shelf: Shelf, tmp_path: Path) -> None:
    architecture = small()
    shelf.add(4, architecture)
    out = tmp_path / "new" / "out"
    assert export(shelf, "tiny", 4, out) == out
    assert sorted(p.name for p in out.iterdir()) == FILES
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    config = json.loads((out / "config.json").read_text())
    assert config["format"] == 1
    assert Architecture.parse(config["architecture"]).fingerprint == config["fingerprint"]
    assert config["fingerprint"] == architecture.fingerprint
    assert config["values"]["val_loss"]["value"] == 2.5
    assert config["values"]["val_loss"]["unit"] == "nats/token"
    assert config["data"]["section"] == {"kind": "pydoc"}
    assert config["training"]["tokens"] == 4096
    card = (out / "README.md").read_text()
    for words in ("2.5 nats/token", "`A CPU`", "4,096 tokens of `pydoc`", "model.load()"):
        assert words in card
    assert "{" not in card.replace("{kind", "")
    done = subprocess.run(
        [sys.executable, "-B", "model.py"], cwd=out, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{architecture.cost(1).params:,} parameters, a sample:\ndef ")


@pytest.mark.usefixtures("unchecked")
def test_the_tokenizer_of_the_study_is_in_the_folder(shelf: Shelf, tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, "a"))
    made.save(str(tmp_path / "tokenizer.json"))
    shelf.data |= {
        "is_bytes": False,
        "tokenizer": tokenizer_file.read(str(tmp_path / "tokenizer.json")).manifest(),
    }
    shelf.add(3, small())
    out = export(shelf, "tiny", 3, tmp_path / "out")
    again = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    assert again.get_vocab() == made.get_vocab()
    config = json.loads((out / "config.json").read_text())
    assert config["data"]["tokens"] == "ids of tokenizer.json"
    assert "tokenizer" not in config["data"]
    assert "tokenizer.json" in (out / "README.md").read_text()


@pytest.mark.usefixtures("unchecked")
def test_an_empty_folder_is_taken(shelf: Shelf, tmp_path: Path) -> None:
    shelf.add(0, small())
    (tmp_path / "out").mkdir()
    export(shelf, "tiny", 0, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == FILES


def test_refusals_leave_everything_as_it_was(shelf: Shelf, tmp_path: Path) -> None:
    shelf.add(2, small())
    shelf.add(3, small(), status="failed", values={})
    shelf.add(4, small(), status="infeasible", values={})
    shelf.add(5, small(), weights_sha256=None)
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "precious").write_text("x")
    file.write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(map(str, tmp_path.rglob("*")))
    cases: list[tuple[str, int, Path, type[Exception], str]] = [
        ("other", 2, tmp_path / "out", NotFoundError, "no study 'other'"),
        (
            "tiny",
            9,
            tmp_path / "out",
            NotFoundError,
            "no result for trial 9; `moenas front tiny` lists",
        ),
        ("tiny", 3, tmp_path / "out", InputError, "trial 3: is failed and has no trained model"),
        ("tiny", 4, tmp_path / "out", InputError, "is infeasible"),
        ("tiny", 5, tmp_path / "out", InputError, "was not trained.*add val_loss"),
        ("tiny", 2, full, InputError, "is not empty; name another folder"),
        ("tiny", 2, file, InputError, "is not a folder"),
        ("tiny", 2, tmp_path / "link", InputError, "is not a folder"),
        ("tiny", 2, file / "out", InputError, "cannot be written: "),
    ]
    for study, trial, out, error, message in cases:
        with pytest.raises(error, match=message):
            export(shelf, study, trial, out)
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_weights_that_changed_are_refused(shelf: Shelf, tmp_path: Path) -> None:
    shelf.add(2, small())
    path = weights_path(shelf.runs, "tiny", 2)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="not the weights that trial 2 ended with"):
        export(shelf, "tiny", 2, tmp_path / "out")
    path.unlink()
    with pytest.raises(NotFoundError, match="MOENAS_RUNS"):
        export(shelf, "tiny", 2, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_of_another_architecture_are_refused(shelf: Shelf, tmp_path: Path) -> None:
    shelf.add(2, small())
    shelf.architectures[2] = random_architecture(4, vocab_size=256).canonical().plain()
    with pytest.raises(MoenasError, match="do not fit moenas"):
        export(shelf, "tiny", 2, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            ("F.linear(x, weight.to", "F.linear(1.001 * x, weight.to"),
            "computes other logits, off by up to",
        ),
        (("import torch\n", "import torch\nimport moenas\n"), "must not need moenas"),
    ],
)
def test_the_check_finds_a_folder_that_differs(
    shelf: Shelf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: tuple[str, str],
    message: str,
) -> None:
    def wrong(architecture: Architecture, *, is_bytes: bool) -> str:
        return model_source(architecture, is_bytes=is_bytes).replace(*changed)

    shelf.add(2, small())
    monkeypatch.setattr(exporting, "model_source", wrong)
    with pytest.raises(MoenasError, match=message):
        export(shelf, "tiny", 2, tmp_path / "out")
    assert os.listdir(tmp_path) == ["runs"]


HOSTILE = '"""\n`); import os #\n| x |\n{study}\\'


@pytest.mark.usefixtures("unchecked")
def test_words_from_outside_stay_words(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "runs", name=HOSTILE, data={"name": "../`{x}` | z\n# y", "sha256": ""})
    shelf.add(0, small())
    out = export(shelf, HOSTILE, 0, tmp_path / "out")
    assert "import os" not in (out / "model.py").read_text()
    assert json.loads((out / "config.json").read_text())["study"] == HOSTILE
    assert (out / "README.md").read_text().splitlines()[0].startswith("# Trial 0 of the study `")
    card = (out / "README.md").read_text()
    assert "\n# y" not in card
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert all(row.replace("\\|", "").count("|") == 3 for row in rows)


def test_the_reader_refuses_broken_files(shelf: Shelf, tmp_path: Path) -> None:
    shelf.add(0, small())
    model = load_module(tmp_path / "model.py", model_source(small()))
    good = weights_path(shelf.runs, "tiny", 0).read_bytes()
    size = 8 + int.from_bytes(good[:8], "little")
    header = json.loads(good[8:size])
    name = next(iter(header))

    def packed(**changes: Any) -> bytes:
        text = json.dumps({**header, name: {**header[name], **changes}}).encode()
        return len(text).to_bytes(8, "little") + text + good[size:]

    low, high = header[name]["data_offsets"]
    broken = {
        "empty": b"",
        "short": good[:4],
        "long header": (1 << 60).to_bytes(8, "little") + good[8:],
        "cut": good[:-1],
        "beyond": packed(data_offsets=[low + (1 << 30), high + (1 << 30)]),
        "negative": packed(data_offsets=[low - (1 << 30), high - (1 << 30)]),
        "shape": packed(shape=[1 << 40]),
    }
    for content in broken.values():
        (tmp_path / "broken").write_bytes(content)
        with pytest.raises(ValueError, match=r"cut short|outside the file"):
            model.read_safetensors(tmp_path / "broken")
    (tmp_path / "broken").write_bytes(packed())
    read = model.read_safetensors(tmp_path / "broken")
    wanted = safetensors.torch.load(good)
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[n], wanted[n]) for n in wanted)


@pytest.mark.usefixtures("unchecked")
def test_the_stored_validation_loss_comes_out_again(tmp_path: Path) -> None:
    section: Plain = {"kind": "pydoc"}
    corpus = data.load(section)
    recipe = Recipe(tokens=2048, context=64, batch=8, val_tokens=2048)
    store = Store.open(f"sqlite:///{tmp_path}/moenas.db", create=True)
    record = Shelf(tmp_path).study("tiny")
    space = {"train": recipe.plain(), "data": section}
    store.create_study(replace(record, space=space, data=corpus.manifest))
    architecture = random_architecture(6, vocab_size=256).canonical()
    plain, cost = architecture.plain(), architecture.cost(64).plain()
    store.add_candidate("tiny", 0, architecture.fingerprint, plain, cost)
    job = Job(
        study="tiny",
        trial=0,
        attempt=store.start_attempt("tiny", 0),
        architecture=plain,
        objectives={"val_loss": None},
        data=section,
        data_sha256=corpus.sha256,
        train=recipe.plain(),
        measure=Protocol().plain(),
        seed=5,
    )
    evaluation, weights = evaluate(job)
    assert weights is not None, evaluation.failure
    write_weights(store.runs, "tiny", 0, weights)
    store.record(evaluation)

    out = export(store, "tiny", 0, tmp_path / "out")

    config = json.loads((out / "config.json").read_text())
    net = load_module(out / "model.py").load(out)
    kept = data.load(config["data"]["section"])
    keys = ("context", "batch", "val_tokens")
    batches = list(kept.val_batches(*(config["training"][key] for key in keys)))
    with torch.inference_mode():
        total = sum(net.loss(*batch).item() * batch[1].numel() for batch in batches)
    loss = total / sum(batch[1].numel() for batch in batches)
    assert loss == pytest.approx(config["values"]["val_loss"]["value"], rel=1e-6)
    assert config["training"]["lr"] == evaluation.metrics["lr"]


def test_a_script_here_with_the_name_of_a_module_is_not_taken_for_it(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.add(0, random_architecture(1, vocab_size=256).canonical())
    for name in ("tokenize", "json", "random", "torch"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('not yours')\n")
    monkeypatch.chdir(tmp_path)
    assert export(shelf, "tiny", 0, tmp_path / "out").is_dir()
