"""A trained trial becomes a folder that runs with torch alone, and proves it before it is left."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import safetensors.torch
import torch

import moenas
from moenas.data import tokenizer_file
from moenas.errors import InputError, MoenasError, NotFoundError
from moenas.evaluate.threads import cpu_threads
from moenas.export import source
from moenas.grammar import user_parts
from moenas.model.architecture import Architecture, Model, initialise
from moenas.model.moe.experts import MoE
from moenas.records import Evaluation, Plain, StudyRecord
from moenas.store.weights import FILE, read_weights
from moenas.terminal import command

TOKENIZER = "tokenizer.json"
"""The tokenizer of the corpus, for the library tokenizers; there if the study has one."""
FORMAT = 1
"""Version of the layout of config.json."""
ENTRY = ("forward", "loss", "generate", "new_cache")
"""Methods of a model that an export keeps; further methods stay if these mention them."""
ROUTED = ("auxiliary_loss", "after_step")
"""Methods that training a model with experts needs as well."""
CHECK_BATCH, CHECK_TOKENS = 2, 48
"""Size of the batch whose logits must agree."""


class Archive(Protocol):
    """What an export reads from the store."""

    @property
    def runs(self) -> Path:
        """The folder that the weights lie in."""

    def study(self, name: str) -> StudyRecord:
        """Return a study; raise NotFoundError if there is none of this name."""

    def evaluation(self, name: str, trial: int) -> Evaluation | None:
        """Return the result of a trial, or None if there is none yet."""

    def architecture(self, name: str, trial: int) -> Plain:
        """Return the canonical architecture of a trial."""


def export(store: Archive, study: str, trial: int, out: Path, *, allow_code: bool = False) -> Path:
    """Write model.py, config.json, model.safetensors and README.md into the folder `out`.

    A process in which moenas cannot be imported loads the folder before it gets its name: it must
    compute the same logits to the last bit. On any error `out` is as it was.
    With `allow_code` the Python files that the database holds for the study are run; see
    `user_parts.load_stored`.

    Raises:
        NotFoundError: if there is no such study or trial, or its weights are gone.
        InputError: if the trial has no trained weights, or `out` is in use or cannot be written.
        MoenasError: if the logits differ.
    """
    record = store.study(study)
    evaluation = _trained(store, study, trial)
    _check_free(out)
    user_parts.load_stored(record.space, allow_code=allow_code)
    architecture = Architecture.parse(store.architecture(study, trial))
    weights = read_weights(store.runs, study, trial, str(evaluation.weights_sha256))
    config = _config(record, evaluation, architecture)
    texts = {
        "model.py": model_source(architecture, is_bytes=_is_bytes(record)),
        "config.json": json.dumps(config, indent=2, allow_nan=False) + "\n",
        "README.md": _readme(config, architecture),
    }
    tokenizer = tokenizer_file.stored(record.data)
    if tokenizer is not None:
        texts[TOKENIZER] = tokenizer
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as draft:
            folder = Path(draft, "export")
            folder.mkdir()
            for name, text in texts.items():
                (folder / name).write_text(text, encoding="utf-8")
            (folder / FILE).write_bytes(weights)
            check(folder, architecture, weights)
            os.rename(folder, out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from None
    return out


def _trained(store: Archive, study: str, trial: int) -> Evaluation:
    """Return the evaluation of a complete trial with weights."""
    evaluation, listed = store.evaluation(study, trial), command(["front", study])
    if evaluation is None:
        raise NotFoundError(
            f"study '{study}' has no result for trial {trial}; `{listed}` lists trials"
            " that have one"
        )
    if evaluation.status != "complete":
        raise InputError(
            f"study '{study}', trial {trial}: is {evaluation.status} and has no trained model;"
            f" `{listed}` lists trials that have one"
        )
    if evaluation.weights_sha256 is None:
        raise InputError(
            f"study '{study}', trial {trial}: was not trained, because no objective of the study"
            " needs training; add val_loss to its objectives"
        )
    return evaluation


def _check_free(out: Path) -> None:
    """Refuse a target that holds anything."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out}: is not a folder; name one that does not exist yet")
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: is not empty; name another folder, or remove this one first")


# --- model.py ----------------------------------------------------------------------------------


def model_source(architecture: Architecture, *, is_bytes: bool = True) -> str:
    """Return the text of model.py: what this architecture uses, `build`, `load` and a sample."""
    expression, classes = source.record(architecture.build)
    methods = [*ENTRY, *(ROUTED if MoE in classes else ())]
    closure = source.SourceClosure.of([*classes, initialise], methods)
    taken = sorted(set(closure.found) & {"DTYPES", "build", "load", "read_safetensors"})
    if taken:
        raise InputError(f"'{taken[0]}' is a name that model.py uses itself; rename the part's")
    loader = _LOADER.replace("BUILD", expression.written(4, 12))
    body = "\n\n\n".join([*closure.texts(), loader, _SAMPLE[is_bytes]])
    imports = source.import_lines(closure.imports | _LOADER_IMPORTS)
    described = architecture.describe().replace("\\", "/").replace('"', "'")
    header = _HEADER.format(
        architecture="\n".join(textwrap.wrap(f"{described}.", source.WIDTH - 1)),
        name=architecture.fingerprint,
    )
    text = f"{header}\nfrom __future__ import annotations\n\n{imports}\n\n\n{body}"
    _check_imports(text)
    return text


def _check_imports(text: str) -> None:
    """Make sure that the text is Python and imports torch and the standard library alone."""
    for node in ast.walk(ast.parse(text)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "."]
        for name in names:
            if name.partition(".")[0] not in source.LIBRARIES:
                raise InputError(f"model.py would import {name}; only torch is allowed")


_HEADER = '''"""A trained language model, exported by moenas.

{architecture}

Needs torch and nothing else. In this folder:

    import torch, model
    net = model.load()
    logits = net(torch.tensor([[72, 105]]))  # (batch, tokens) -> (batch, tokens, vocabulary)

`python model.py` prints a sample. config.json holds the same architecture (fingerprint
{name}) and how the model was trained; model.safetensors holds the weights.
"""
'''

_LOADER_IMPORTS = {
    ("json", "", "json"),
    ("math", "", "math"),
    ("pathlib", "Path", "Path"),
    ("torch", "", "torch"),
}

_LOADER = '''\
def build(seed: int = 0) -> Model:
    """Build the model with fresh weights, ready to be trained."""
    model = BUILD
    initialise(model, seed)
    return model


def load(folder: str | Path = Path(__file__).parent, device: str = "cpu") -> Model:
    """Build the model and give it the trained weights of a folder."""
    model = build()
    model.load_state_dict(read_safetensors(Path(folder) / "model.safetensors"))
    return model.eval().to(device)


DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file: the length of a JSON header in 8 bytes, the header, the data."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    if not 8 <= start <= len(data):
        raise ValueError(f"{path}: the header is cut short")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__":
            continue
        dtype, shape, (low, high) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        count = math.prod(shape)
        if not 0 <= low < high <= len(data) - start or high - low != count * dtype.itemsize:
            raise ValueError(f"{path}: the data of '{name}' lie outside the file")
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=start + low)
        tensors[name] = flat.reshape(shape).clone()
    return tensors'''


_SAMPLE = {
    True: """\
if __name__ == "__main__":
    net = load()
    prompt = torch.tensor([list(b"def ")])
    tokens = net.generate(prompt, 200)[0].tolist()
    text = bytes(token for token in tokens if token < 256).decode("utf-8", "replace")
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters, a sample:\\n{text}")
""",
    False: """\
if __name__ == "__main__":
    net = load()
    tokens = net.generate(torch.tensor([[0]]), 50)[0].tolist()
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters, sampled tokens: {tokens}")
""",
}


# --- the check ---------------------------------------------------------------------------------

_CHECK_SCRIPT = """\
import json, sys

class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "moenas":
            raise ImportError("an exported model must not need moenas")

sys.meta_path.insert(0, Wall())
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import model
tokens = torch.tensor(json.load(sys.stdin))
with torch.no_grad():
    sys.stdout.buffer.write(model.load()(tokens).numpy().tobytes())
"""


def check(folder: Path, architecture: Architecture, weights: bytes) -> None:
    """Compare the logits of the folder, in a process without moenas, with those of our model.

    Both compute in float32 on one CPU thread.

    Raises:
        MoenasError: if the folder cannot be loaded, or one bit differs.
    """
    size = CHECK_BATCH, CHECK_TOKENS
    tokens = (torch.arange(size[0] * size[1]) * 7919 % architecture.vocab_size).view(size)
    with cpu_threads(1), torch.no_grad():
        ours = _model(architecture, weights)(tokens).numpy()
    done = subprocess.run(
        [sys.executable, "-P", "-B", "-c", _CHECK_SCRIPT, str(folder.resolve())],
        input=json.dumps(tokens.tolist()).encode(),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        reason = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"]
        raise MoenasError(f"the exported model does not run: {reason[-1]}")
    if done.stdout == ours.tobytes():
        return
    theirs = np.frombuffer(done.stdout, dtype=np.float32).reshape(ours.shape)
    raise MoenasError(
        f"the exported model computes other logits, off by up to {np.abs(theirs - ours).max():.3g}"
    )


def _model(architecture: Architecture, weights: bytes) -> Model:
    """Build the model and give it trained weights.

    Raises:
        MoenasError: if the weights belong to another set of parameters.
    """
    model = architecture.build()
    try:
        model.load_state_dict(safetensors.torch.load(weights))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise MoenasError(
            f"the stored weights do not fit moenas {moenas.__version__}: {reason}"
        ) from None
    return model.eval()


# --- config.json and README.md -----------------------------------------------------------------


def _is_bytes(record: StudyRecord) -> bool:
    return bool(record.data.get("is_bytes", False))


def _config(record: StudyRecord, evaluation: Evaluation, architecture: Architecture) -> Plain:
    """Gather all that is known of the trial; every number says its unit."""
    data = {key: value for key, value in record.data.items() if key not in ("files", "tokenizer")}
    meaning = "token i is the byte i" if _is_bytes(record) else "ids of the given token arrays"
    if record.data.get("tokenizer"):
        meaning = f"ids of {TOKENIZER}"
    values = {
        info["name"]: {
            "value": evaluation.values[info["name"]],
            **{key: info[key] for key in ("unit", "direction", "doc")},
            **evaluation.measurements.get(info["name"], {}),
        }
        for info in record.objectives
    }
    return {
        "format": FORMAT,
        "study": record.name,
        "trial": evaluation.trial,
        "fingerprint": architecture.fingerprint,
        "vocab_size": architecture.vocab_size,
        "architecture": architecture.plain(),
        "values": values,
        "metrics": evaluation.metrics,
        "cost": evaluation.cost,
        "training": {
            **record.space["train"],
            "lr": evaluation.metrics.get("lr"),
            "seed": evaluation.seed,
        },
        "data": {**data, "section": record.space["data"], "tokens": meaning},
        "device": evaluation.device,
        "versions": {**evaluation.versions, "exported_by": moenas.__version__},
        "weights": {"file": FILE, "sha256": evaluation.weights_sha256},
    }


def _words(text: object) -> str:
    """Put a text from outside on one line, as code that Markdown leaves alone."""
    return "`" + " ".join(str(text).replace("`", "'").split()) + "`"


def _table(title: str, rows: Mapping[str, object]) -> str:
    lines = [
        "| {} | {} |".format(*(str(x).replace("|", "\\|") for x in row)) for row in rows.items()
    ]
    return "\n".join([f"| {title} | |", "|---|---|", *lines])


def _readme(config: Plain, architecture: Architecture) -> str:
    """Write the card of the model."""
    training, data, device = config["training"], config["data"], config["device"]
    values = {
        _words(name): f"{x['value']:.6g} {x['unit']} ({x['direction']}): {x['doc']}"
        for name, x in config["values"].items()
    }
    cost, bigram = config["cost"], data.get("bigram_loss")
    facts = {
        "architecture": architecture.describe(),
        "fingerprint": _words(config["fingerprint"]),
        "parameters": f"{cost['params']:,}, of which {cost['active_params']:,} act on a token",
        "trained on": f"{training['tokens']:,} tokens of {_words(data['name'])},"
        f" seed {training['seed']}",
        "tokens": f"{data['tokens']}; a vocabulary of {config['vocab_size']:,}",
        "held-out bigram loss": "not known"
        if bigram is None
        else f"{bigram:.4g} nats/token, reached by knowing the previous token alone",
        "data digest": _words(data["sha256"]),
        "device": _words(device.get("name", "unknown")),
        "versions": _words(", ".join(f"{k} {v}" for k, v in config["versions"].items())),
    }
    return _CARD.format(
        trial=config["trial"],
        study=_words(config["study"]),
        values=_table("objective", values),
        facts=_table("what", facts),
        tokenizer=_TOKENIZER_CARD if TOKENIZER in data["tokens"] else "",
    )


_TOKENIZER_CARD = """\
- `tokenizer.json`: the tokenizer, for the library tokenizers:
  `tokenizers.Tokenizer.from_file("tokenizer.json").encode("a text").ids`.
"""
_CARD = """\
# Trial {trial} of the study {study}

A language model with its trained weights. It needs PyTorch 2.13 or newer, and nothing else.

## Use

    import torch, model        # run Python in this folder

    net = model.load()
    logits = net(torch.tensor([[72, 105]]))  # (batch, tokens) -> (batch, tokens, vocabulary)
    tokens = net.generate(torch.tensor([[72, 105]]), 100)

`python model.py` prints a sample.

## Numbers

Measured by moenas when the trial ran, on the device named below.

{values}

## Origin

{facts}

## Files

- `model.py`: the architecture, a reader of the weights, `build()` and `load()`.
- `model.safetensors`: the weights in float32.
- `config.json`: the architecture as data, every number above, the recipe and the data.
{tokenizer}"""
