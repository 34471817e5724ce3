"""The command line, as a person uses it: from a new file to an exported model, and every mistake."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from command_line import Run, runner

from moenas import resources as refs
from moenas.cli import options
from moenas.huggingface.config import families

pytestmark = pytest.mark.integration

SMALL = """\
architecture:
  vocab_size: 256
  d_model: {choice: [32, 48]}
  blocks:
    - mixer: {kind: attention, head_dim: 16}
      ffn:
        choice:
          - {kind: dense, d_ff: {int: [32, 64], step: 32}}
          - {kind: moe, n_experts: 4, d_expert: 32, router: {top_k: {choice: [1, 2]}}}
objectives: [val_loss, flops_per_token]
data: pydoc
train: {tokens: 2048, context: 32, batch: 4, val_tokens: 512}
search: {sampler: random, trials: 4}
"""


@pytest.fixture
def moenas(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Run:
    """Run the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("MOENAS_STORAGE", "OPTUNA_STORAGE", "MOENAS_RUNS", "MOENAS_SERVER"):
        monkeypatch.delenv(name, raising=False)

    return runner(monkeypatch, capfd)


def test_from_a_space_file_to_an_exported_model(moenas: Run, tmp_path: Path) -> None:
    Path("small.yaml").write_text(SMALL)

    checked = moenas("check", "small.yaml", "-o", "json")
    assert checked.code == 0
    assert json.loads(checked.out)["points"] == 2 * (2 + 2)

    ran = moenas("run", "small.yaml", "--workers", "inline", "-o", "json")
    assert ran.code == 0, ran.err
    members = json.loads(ran.out)
    assert members
    assert set(members[0]) >= {"trial", "val_loss", "flops_per_token", "architecture"}

    again = moenas("run", "small.yaml", "--workers", "inline", "-o", "json")
    assert again.code == 0
    assert json.loads(again.out) == members
    assert "done" in again.err

    status = json.loads(moenas("status", "small", "-o", "json").out)
    assert (status["evaluated"], status["left"]) == (4, 0)
    assert json.loads(moenas("front", "small", "-o", "json").out) == members
    header, *rows = moenas("front", "small", "-o", "csv").out.splitlines()
    assert header.startswith("trial,val_loss,flops_per_token")
    assert len(rows) == len(members)
    assert "val_loss in nats/token" in moenas("front", "small").err

    trial = members[0]["trial"]
    shown = json.loads(moenas("show", "small", trial, "-o", "json").out)
    assert shown["values"]["val_loss"] == members[0]["val_loss"]
    assert "d_model" in moenas("show", "small", trial).out

    exported = moenas("export", "small", trial, "out")
    assert exported.code == 0, exported.err
    assert {p.name for p in Path("out").iterdir()} >= {
        "model.py",
        "config.json",
        "model.safetensors",
        "README.md",
    }
    said = subprocess.run(
        [sys.executable, "model.py"], cwd="out", capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stderr
    assert "small" in moenas("status").out


def test_a_model_is_exported_in_the_layout_of_a_family(moenas: Run) -> None:
    """LayerNorm has no family, which the error says; RMSNorm has one."""
    for norm in ("rmsnorm", "layernorm"):
        text = SMALL.split("      ffn:")[0].replace("{choice: [32, 48]}", f"32\n  norm: {norm}")
        ffn = "      ffn: {kind: moe, n_experts: 4, d_expert: 32, router: {top_k: 2}}\n"
        rest = "objectives" + SMALL.split("objectives")[1]
        Path(f"{norm}.yaml").write_text(text + ffn + rest.replace("trials: 4", "trials: 1"))
        assert moenas("run", f"{norm}.yaml", "--workers", "inline").code == 0
    exported = moenas("export", "rmsnorm", "0", "out", "--format", "transformers")
    assert exported.code == 0, exported.err
    assert exported.out == "out\n"
    assert "AutoModelForCausalLM.from_pretrained('out')" in exported.err
    assert json.loads(Path("out/config.json").read_text())["model_type"] == "mixtral"
    refused = moenas("export", "layernorm", "0", "other", "--format", "transformers")
    assert refused.code == 2
    assert refused.err.startswith("moenas: study 'layernorm', trial 0: no family of Hugging Face")
    assert "The nearest is mixtral: norm is layernorm, the family has rmsnorm." in refused.err
    unknown = moenas("export", "rmsnorm", "0", "other", "--format", "gguf")
    assert (unknown.code, unknown.out) == (2, "")
    assert (
        "'gguf' is unknown; moenas writes folder, transformers, torch_export, onnx" in unknown.err
    )
    assert not Path("other").exists()


def test_architectures_are_enqueued_by_file(moenas: Run) -> None:
    Path("small.yaml").write_text(SMALL)
    one = SMALL.split("objectives")[0].replace("{choice: [32, 48]}", "48")
    moe = "{kind: moe, n_experts: 4, d_expert: 32, router: {top_k: 2}}"
    one = one.split("      ffn:")[0] + f"      ffn: {moe}\n"
    Path("one.yaml").write_text(one)
    first = ("small.yaml", "search.start_from=[one.yaml]", "--workers", "inline")
    assert moenas("run", *first, "--trials", "1").code == 0
    assert "enqueued from one.yaml" in moenas("show", "small", "0").out
    Path("two.yaml").write_text(one.replace("48", "32"))
    result = moenas("enqueue", "small", "two.yaml", "one.yaml", "-o", "json")
    assert result.code == 0, result.err
    rows = [(row["trial"], row["status"]) for row in json.loads(result.out)]
    assert rows == [(1, "enqueued"), (0, "known")]
    Path("three.yaml").write_text(one.replace("n_experts: 4", "n_experts: 8"))
    refused = moenas("enqueue", "small", "three.yaml")
    assert refused.code == 2
    assert refused.err.startswith("moenas: three.yaml:6:35: architecture.blocks.0.ffn.moe.n_expert")
    assert moenas("run", *first, "--trials", "2").code == 0
    assert json.loads(moenas("show", "small", "1", "-o", "json").out)["enqueued_from"] == "two.yaml"


def test_what_was_not_trained_is_not_offered_for_export(moenas: Run) -> None:
    text = SMALL.replace("[val_loss, flops_per_token]", "[active_params, total_params]")
    Path("costs.yaml").write_text(text)
    ran = moenas("run", "costs.yaml", "--workers", "inline")
    assert ran.code == 0, ran.err
    assert "moenas show costs" in ran.err
    assert "export" not in ran.err
    refused = moenas("export", "costs", ran.out.splitlines()[2].split()[0], "out")
    assert refused.code == 2
    assert "was not trained" in refused.err


def test_a_run_says_first_what_is_known_of_its_corpus(moenas: Run) -> None:
    text = SMALL.replace("data: pydoc", "data: {files: [squares.txt]}").replace("2048", "8192")
    Path("small.yaml").write_text(text)
    Path("squares.txt").write_text("".join(f"{i} times {i} is {i * i}\n" for i in range(300)))
    ran = moenas("run", "small.yaml", "--workers", "inline", "--trials", "1")
    assert ran.code == 0, ran.err
    note = ran.err.index("data: 8,192 tokens of training are drawn from")
    assert note < ran.err.index("trial 0")
    assert "moenas export small" in ran.err
    missing = moenas("run", "small.yaml", "data.files=[nowhere.txt]", "--workers", "inline")
    assert missing.code == 2


def test_init_writes_a_file_that_checks_and_a_schema_that_accepts_it(moenas: Run) -> None:
    assert moenas("init", "mine.yaml").code == 0
    text = Path("mine.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=moenas.schema.json\n")
    schema = json.loads(Path("moenas.schema.json").read_text())
    jsonschema.validate(refs.parse_yaml(Path("mine.yaml").read_text(), "mine.yaml").plain, schema)
    assert schema == json.loads(moenas("schema").out)
    assert "valid" in moenas("check", "mine.yaml").out
    refused = moenas("init", "mine.yaml")
    assert refused.code == 2
    assert Path("mine.yaml").read_text() == text
    assert moenas("init", "other.yaml", "--from", "tiny").code == 0
    assert moenas("init", "zoo.yaml", "--from", "mixtral_8x7b").code == 0
    assert "n_experts: 8" in Path("zoo.yaml").read_text()


def test_init_writes_the_model_of_a_configuration_smaller(moenas: Run) -> None:
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 48, "head_dim": 128}
    Path("config.json").write_text(json.dumps(config))
    assert moenas("init", "whole.yaml", "--from", "config.json").code == 0
    assert "30,532,122,624 parameters" in Path("whole.yaml").read_text()  # that of zoo.md
    sizes = ("--shrink", "d_model=128,n_layers=4", "--shrink", "vocab_size=256")
    assert moenas("init", "small.yaml", "--from", ".", *sizes).code == 0
    assert f"The model of {Path.cwd().name} (qwen3_moe)" in Path("small.yaml").read_text()
    plain = refs.parse_yaml(Path("small.yaml").read_text(), "small.yaml").plain["architecture"]
    assert (plain["d_model"], plain["vocab_size"]) == (128, 256)
    (group,) = plain["blocks"]
    assert (group["repeat"], group["ffn"]["n_experts"], group["ffn"]["d_expert"]) == (4, 128, 48)
    mixer = group["mixer"]
    assert mixer["n_heads"] == 8 * mixer["n_kv_heads"]
    assert mixer["n_heads"] * mixer["head_dim"] == 4096 * 128 // 2048


def test_a_field_without_a_counterpart_is_named(moenas: Run) -> None:
    text = '{"model_type": "mixtral",\n "hidden_act": "tanh"}'
    Path("config.json").write_text(text)
    refused = moenas("init", "mine.yaml", "--from", "config.json")
    assert refused.code == 2
    assert 'config.json:2:2: hidden_act: "tanh" has no counterpart' in refused.err
    for given, said in (('{"model_type": "mixtrl"}', "'mixtral'"), ("{", "1:2: not valid JSON")):
        Path("config.json").write_text(given)
        refused = moenas("init", "mine.yaml", "--from", "config.json")
        assert (refused.code, said in refused.err) == (2, True)
    assert os.listdir() == ["config.json"]


@pytest.mark.parametrize("family", sorted(families()))
def test_a_configuration_without_layers_is_refused(moenas: Run, family: str) -> None:
    plain = {"model_type": family, "num_hidden_layers": 0}
    own = {"dbrx": "n_layers", "longcat_flash": "num_layers"}.get(family)
    Path("config.json").write_text(json.dumps(plain))
    refused = moenas("init", "out.yaml", "--from", "config.json")
    assert refused.code == 2, refused.err
    assert "num_hidden_layers: a model has 1 layer or more" in refused.err
    if own:
        Path("config.json").write_text(json.dumps({"model_type": family, own: 0}))
        refused = moenas("init", "out.yaml", "--from", "config.json")
        assert (refused.code, f"{own}: a model has 1 layer or more" in refused.err) == (2, True)
    assert os.listdir() == ["config.json"]


BROKEN = {
    "wrong type": ("d_model: {choice: [32, 48]}", "d_model: wide", "bad.yaml:3:12"),
    "misspelt key": ("vocab_size", "vocabsize", "Did you mean 'vocab_size'"),
    "misspelt section": ("objectives:", "objective:", "Did you mean 'objectives'"),
    "empty choice": ("[32, 48]", "[]", "bad.yaml:3:21"),
    "unknown kind": ("kind: dense", "kind: dens", "Did you mean 'dense'"),
    "broken YAML": ("[32, 48]}", "[32, 48}", "not valid YAML"),
    "alias bomb": ("d_model", "a: &a [1]\n  b: [*a, *a]\n  d_model", "anchors"),
    "tag": ("256", "!!python/name:os.system 256", "tags"),
    "k over n_experts": ("{choice: [1, 2]}", "8", "top_k (8) must be at most n_experts (4)"),
    "never valid width": ("head_dim: 16", "head_dim: 160", "head_dim"),
    "duplicate key": ("data: pydoc", "data: pydoc\ndata: pydoc", "duplicate key"),
    "unreadable data": ("data: pydoc", "data: {files: nowhere.txt}", "nowhere.txt"),
    "unknown data": ("data: pydoc", "data: pydok", "bad.yaml:11:7"),
    "unknown objective": ("val_loss", "val_los", "Did you mean 'val_loss'"),
    "unknown sampler": ("sampler: random", "sampler: randm", "Did you mean 'random'"),
    "negative trials": ("trials: 4", "trials: -4", "search.trials: -4"),
    "bad requirement": ("data:", "require: [parms < 3]\ndata:", "Did you mean 'params'"),
    "code in a requirement": ("data:", "require: ['exit() < 3']\ndata:", "not allowed"),
    "range upside down": (
        "[32, 64], step: 32",
        "[64, 32], step: 32",
        "low (64) is above high (32)",
    ),
    "tokens below a step": ("tokens: 2048", "tokens: 20", "less than one step"),
    "impossible requirement": (
        "data:",
        "require: [params < 10]\ndata:",
        "no architecture satisfies",
    ),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_a_mistake_in_the_file_is_one_line_and_nothing_is_created(
    moenas: Run, mistake: str
) -> None:
    old, new, words = BROKEN[mistake]
    assert old in SMALL
    Path("bad.yaml").write_text(SMALL.replace(old, new, 1))
    for command in ("check", "run"):
        result = moenas(command, "bad.yaml")
        assert result.code == 2, result
        assert words in result.err
        assert result.err.count("\n") == 1
        assert "Traceback" not in result.err
        assert result.out == ""
        assert os.listdir() == ["bad.yaml"]


@pytest.mark.parametrize("command", ["check", "run"])
def test_with_json_an_error_has_fields(moenas: Run, command: str) -> None:
    Path("bad.yaml").write_text(SMALL.replace("d_model: {choice: [32, 48]}", "d_model: wide"))
    result = moenas(command, "bad.yaml", "-o", "json")
    parsed = json.loads(result.out)
    message = parsed.pop("message")
    assert parsed == {
        "error": "SpaceError",
        "path": "architecture.d_model",
        "file": "bad.yaml",
        "line": 3,
        "column": 12,
    }
    assert result.err == f"moenas: bad.yaml:3:12: architecture.d_model: {message}\n"
    assert result.code == 2


def test_with_json_every_error_of_input_has_a_message(moenas: Run) -> None:
    url = "postgresql://u:secret@127.0.0.1:1/x"
    for words in (("status", "small"), ("show", "small", "3", "--storage", url)):
        result = moenas(*words, "-o", "json")
        assert result.code == 2
        parsed = json.loads(result.out)
        assert result.err == f"moenas: {parsed['message']}\n"
        assert parsed["error"] == "StorageError"
        assert "secret" not in result.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "nowhere.yaml"), "no such file"),
        (("run", "tinny"), "Did you mean 'tiny'"),
        (("run", "small.yaml", "train.tokns=3"), "Did you mean 'tokens'"),
        (("run", "small.yaml", "--workers", "many"), "'inline'"),
        (("run", "small.yaml", "--workers", "\u00b2"), "'inline'"),
        (("init", "mine"), "ends in .yaml"),
        (("run", "small.yaml", "--storage", "nonsense"), "nonsense"),
        (("run", "small.yaml", "--storage", "sqlite:////proc/moenas.db"), "/proc/moenas.db"),
        (("run", "small.yaml", "--storage", "sqlite:///small.yaml"), "small.yaml"),
        (("run", "small.yaml", "--storage", "postgresql://u:secret@127.0.0.1:1/x"), "127.0.0.1"),
        (("front", "small"), "moenas.db"),
        (("status", "small"), "moenas.db"),
        (("show", "small", "3"), "moenas.db"),
        (("export", "small", "3", "out"), "moenas.db"),
        (("dashboard",), "moenas.db"),
        (("init", "nowhere/mine.yaml"), "nowhere"),
        (("init", "mine.yaml", "--from", "tinny"), "Did you mean 'tiny'"),
        (("init", "mine.yaml", "--from", "mistralai/Mixtral-8x7B-v0.1"), "'zoo/mixtral_8x7b'"),
        (("init", "mine.yaml", "--shrink", "d_model=64"), "--from"),
        (("init", "mine.yaml", "--from", "mixtral_8x7b", "--shrink", "d_model=x"), "d_model=128"),
        (("init", "mine.yaml", "--from", "gpt_oss_20b", "--shrink", "n_layers=3"), "give 2 or 4"),
        (
            ("init", "mine.yaml", "--from", "dbrx", "--shrink", "d_model=96,d_model=64"),
            "d_model has two values",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    moenas: Run, words: tuple[str, ...], message: str
) -> None:
    Path("small.yaml").write_text(SMALL)
    result = moenas(*words)
    assert result.code == 2, result
    assert message in result.err
    assert "secret" not in result.err
    assert "Traceback" not in result.err
    assert result.err.count("\n") == 1
    assert os.listdir() == ["small.yaml"]


def test_a_budget_of_another_device_is_refused_in_one_line(moenas: Run) -> None:
    budget = "budget: {seconds: 1, device: Abacus}"
    Path("small.yaml").write_text(re.sub(r"\btokens: [\d_]+", budget, SMALL))
    result = moenas("run", "small.yaml", "--workers", "inline")
    assert result.code == 2, result
    assert "counts seconds on 'Abacus'" in result.err
    assert result.err.count("\n") == 1
    assert os.listdir() == ["small.yaml"]


def test_unknown_studies_and_trials_are_named_with_what_there_is(moenas: Run) -> None:
    Path("small.yaml").write_text(SMALL)
    assert moenas("run", "small.yaml", "--workers", "inline", "--trials", "2").code == 0
    for words, message in (
        (("front", "smal"), "Did you mean 'small'"),
        (("show", "small", "7"), "0-2"),
        (("export", "small", "7", "out"), "7"),
        (("export", "smal", "0", "out"), "Did you mean 'small'"),
    ):
        result = moenas(*words)
        assert result.code == 2, result
        assert message in result.err
        assert not Path("out").exists()


def test_a_changed_space_is_refused_with_the_difference(moenas: Run) -> None:
    Path("small.yaml").write_text(SMALL)
    assert moenas("run", "small.yaml", "--workers", "inline", "--trials", "1").code == 0
    before = moenas("status", "small", "-o", "json").out
    refused = moenas("run", "small.yaml", "train.tokens=4096", "--workers", "inline")
    assert refused.code == 2
    assert "train.tokens" in refused.err
    assert "2048" in refused.err
    assert "4096" in refused.err
    assert moenas("status", "small", "-o", "json").out == before


def test_help_needs_no_heavy_library() -> None:
    code = (
        "import sys\nsys.argv = ['moenas', '--help']\nfrom moenas.cli import commands as cli\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'optuna', 'ray', 'pandas', 'sqlalchemy', 'plotly'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_front_is_read_without_torch(moenas: Run) -> None:
    Path("small.yaml").write_text(SMALL)
    assert moenas("run", "small.yaml", "--workers", "inline", "--trials", "1").code == 0
    code = (
        "import sys\nsys.argv = ['moenas', 'front', 'small']\nfrom moenas.cli import commands as cli\n"
        "cli.app(standalone_mode=False)\nassert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_closed_pipe_is_no_traceback(moenas: Run, tmp_path: Path) -> None:
    command = f"{sys.executable} -m moenas schema | head -c 10"
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in ended.stderr


def test_a_hint_can_be_pasted_and_holds_no_password() -> None:
    hint = options.command_line(
        ["run", "a b.yaml"], {"storage": "postgresql://u:secret@h/d", "trials": None}
    )
    assert hint == "moenas run 'a b.yaml' --storage 'postgresql://u:***@h/d'"


def test_a_fault_of_ours_is_two_lines(moenas: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(refs, "find", broken)
    result = moenas("init", "mine.yaml", "--from", "tiny")
    assert result.code == 1
    assert "internal error: ZeroDivisionError: oh" in result.err
    assert "Traceback" not in result.err


def test_a_whole_study_is_listed_copied_packed_compared_renamed_and_deleted(moenas: Run) -> None:
    Path("small.yaml").write_text(SMALL)
    assert moenas("run", "small.yaml", "--workers", "inline").code == 0
    (row,) = json.loads(moenas("list", "-o", "json").out)
    status = json.loads(moenas("status", "small", "-o", "json").out)
    assert (row["study"], row["state"], row["trials"]) == ("small", "finished", 4)
    for field in ("evaluated", "failed", "front", "hypervolume"):
        assert row[field] == status[field]
    assert "finished" in moenas("list").out

    copied = moenas("copy", "small", "--to", "sqlite:///other.db", "--name", "big", "-o", "json")
    assert copied.code == 0, copied.err
    every = sum(status[key] for key in ("complete", "failed", "infeasible", "stopped"))
    assert json.loads(copied.out)["trials"] == every
    other = ("--storage", "sqlite:///other.db")
    assert (
        moenas("front", "big", *other, "-o", "json").out
        == moenas("front", "small", "-o", "json").out
    )
    again = moenas("copy", "small", "--to", "sqlite:///other.db", "--name", "big")
    assert (again.code, "already exists" in again.err) == (2, True)
    missing = moenas("copy", "smal", "--to", "sqlite:///third.db")
    assert (missing.code, Path("third.db").exists()) == (2, False)

    assert moenas("pack", "small", "small.zip").code == 0
    assert moenas("unpack", "small.zip", *other).code == 0
    refused = moenas("unpack", "small.yaml", "--storage", "sqlite:///third.db")
    assert (refused.code, Path("third.db").exists()) == (2, False)
    compared = json.loads(moenas("compare", "small", "big", *other, "-o", "json").out)
    assert compared["coverage"] == {"a": 1.0, "b": 1.0}
    assert compared["hypervolume"]["a"] == compared["hypervolume"]["b"]
    assert "reference point" in moenas("compare", "small", "big", *other).out
    header, *rows = moenas("compare", "small", "big", *other, "-o", "csv").out.splitlines()
    assert header.startswith("front,trial,val_loss")
    assert len(rows) == 2 * row["front"]

    renamed = moenas("rename", "small", "large", *other)
    assert (renamed.code, "name=large" in renamed.err) == (0, True)
    asked = moenas("delete", "large", *other)
    assert (asked.code, "--yes" in asked.err) == (2, True)
    assert moenas("delete", "large", *other, "--yes").code == 0
    assert [r["study"] for r in json.loads(moenas("list", *other, "-o", "json").out)] == ["big"]
    assert moenas("export", "big", compared["members"][0]["trial"], "out", *other).code == 0
    assert moenas("delete", "large", *other, "--yes").code == 2
