"""The formats `torch_export` and `onnx`: a traced pass with open batch and length.

A tracer runs a pass on symbols and writes down its operations. A part whose operations depend on
the length of a sequence has no such form; the error names it.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from moenas.errors import InputError, MoenasError
from moenas.evaluate.threads import cpu_threads
from moenas.export.card import TOKENIZER, readme, trial_data
from moenas.export.trained_trial import TrainedTrial
from moenas.model.architecture import Architecture

EXAMPLE = (3, 19)
"""Batch and length of the pass that is traced; any others do."""
CHECKED = ((2, 48), (1, 1), (3, 7))
"""Batches and lengths whose logits are compared."""
TOLERANCE = 1e-5
"""Largest difference of a logit, relative to the largest logit or to 1."""
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def write_torch_export(trial: TrainedTrial, folder: Path) -> None:
    """Write model.pt2, moenas.json and README.md into an empty folder.

    A process without moenas loads the program: its logits must be equal up to TOLERANCE.

    Raises:
        InputError: if a part of the architecture cannot be traced; it names the part.
        MoenasError: if the logits differ.
    """
    program = traced_program(trial)
    with quiet():
        torch.export.save(program, folder / "model.pt2")
    write_texts(trial, folder, intro=_PT2_INTRO, use=_PT2_USE, files=_PT2_FILES)
    compare(trial, folder, _PT2_SCRIPT)


def write_onnx(trial: TrainedTrial, folder: Path) -> None:
    """Write model.onnx, moenas.json and README.md into an empty folder.

    A process with onnxruntime and without moenas runs the model; see `write_torch_export`.

    Raises:
        InputError: if a package is missing, or a part of the architecture cannot be converted.
        MoenasError: if the logits differ.
    """
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"format onnx needs {', '.join(missing)}: pip install 'moenas[onnx]'")
    program = traced_program(trial)
    try:
        converted = onnx_program(program)
    except Exception as error:  # torch raises several types for what it cannot convert
        raise untraceable(trial, "onnx", error, convert) from None
    with quiet():
        converted.save(folder / "model.onnx")
    write_texts(trial, folder, intro=_ONNX_INTRO, use=_ONNX_USE, files=_ONNX_FILES)
    compare(trial, folder, _ONNX_SCRIPT)


# --- tracing --------------------------------------------------------------------------------------


def traced_program(trial: TrainedTrial) -> ExportedProgram:
    """Trace a trial's model; the program maps tokens (B, S), int64, to float32 logits (B, S, V)."""
    try:
        return trace(trial.model(), trial.architecture.max_positions)
    except Exception as error:  # torch raises several types for what it cannot trace
        raise untraceable(trial, "torch_export", error, trace) from None


def trace(model: nn.Module, longest: int | None = None) -> ExportedProgram:
    """Trace a model with open batch and length, up to `longest` tokens."""
    sizes = {0: Dim("batch", min=1), 1: Dim("length", min=1, max=longest)}
    tokens = torch.zeros(EXAMPLE, dtype=torch.int64)
    with quiet(), torch.no_grad():
        return torch.export.export(model, (tokens,), dynamic_shapes=(sizes,))


def onnx_program(program: ExportedProgram) -> Any:
    """Convert a traced program to ONNX, with the names `tokens` and `logits`."""
    with quiet():
        return torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=["tokens"],
            output_names=["logits"],
        )


def convert(model: nn.Module, longest: int | None = None) -> Any:
    """Trace a model and convert it to ONNX."""
    return onnx_program(trace(model, longest))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what the tracer and the converter say of themselves from the user."""
    former = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(former)


def untraceable(
    trial: TrainedTrial, format: str, error: Exception, attempt: Callable[..., Any]
) -> InputError:
    """Build the error that names the parts of a model that a format cannot hold.

    Each different part is tried alone, as the only layer of a model.
    """
    whole = {k: v for k, v in trial.architecture.canonical().plain().items() if k != "blocks"}
    parts: dict[str, list[str]] = {}
    for i, layer in enumerate(trial.architecture.canonical().layers):
        for name, part in layer.parts.items():
            key = json.dumps({"mixer" if name == "mixer" else "ffn": part.plain()})
            parts.setdefault(key, []).append(f"layer {i} {name}")
    failed = []
    for key, places in parts.items():
        block = json.loads(key)
        try:
            attempt(Architecture.parse({**whole, "blocks": [block]}).build().eval())
        except Exception:
            (part,) = block.values()
            failed.append(f"{part['kind']} ({', '.join(places)})")
    reason = str(error).strip().splitlines() or [type(error).__name__]
    what = ", ".join(failed) or f"the model: {reason[0]}"
    return InputError(
        f"{trial.name}: format {format} cannot hold {what}, whose operations depend on the"
        " length of a sequence. `--format folder` exports every architecture"
    )


# --- the check ------------------------------------------------------------------------------------

_BLOCK_IMPORTS = """\
import json, sys

class BlockImports:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FORBIDDEN:
            raise ImportError("an exported model must not need " + name)

sys.meta_path.insert(0, BlockImports())
import numpy
batches = [numpy.array(batch, dtype=numpy.int64) for batch in json.load(sys.stdin)]
"""
_PT2_SCRIPT = (
    "FORBIDDEN = ['moenas']\n"
    + _BLOCK_IMPORTS
    + """\
import torch
torch.set_num_threads(1)
net = torch.export.load(sys.argv[1] + "/model.pt2").module()
with torch.no_grad():
    for batch in batches:
        sys.stdout.buffer.write(net(torch.from_numpy(batch)).numpy().tobytes())
"""
)
_ONNX_SCRIPT = (
    "FORBIDDEN = ['moenas', 'torch']\n"
    + _BLOCK_IMPORTS
    + """\
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
net = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", options)
for batch in batches:
    sys.stdout.buffer.write(net.run(["logits"], {"tokens": batch})[0].tobytes())
"""
)


def compare(trial: TrainedTrial, folder: Path, script: str) -> None:
    """Compare the logits of a script that runs the folder with the logits of the model.

    Raises:
        MoenasError: if the script fails, or a logit differs by more than TOLERANCE.
    """
    model, ours = trial.model(), list[np.ndarray[Any, Any]]()
    batches = [example_tokens(size, trial.architecture) for size in CHECKED]
    with cpu_threads(1), torch.no_grad():
        ours = [model(tokens).numpy().ravel() for tokens in batches]
    done = subprocess.run(
        [sys.executable, "-P", "-B", "-W", "ignore", "-c", script, str(folder.resolve())],
        input=json.dumps([tokens.tolist() for tokens in batches]).encode(),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        reason = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"]
        raise MoenasError(f"the exported model does not run: {reason[-1]}")
    wanted, theirs = np.concatenate(ours), np.frombuffer(done.stdout, dtype=np.float32)
    worst = np.abs(theirs - wanted).max() if theirs.shape == wanted.shape else np.inf
    if not worst <= TOLERANCE * max(1.0, float(np.abs(wanted).max())):
        raise MoenasError(f"the exported model computes other logits, off by up to {worst:.3g}")


def example_tokens(size: tuple[int, int], architecture: Architecture) -> Tensor:
    """Return tokens (B, S) that differ, with a length that the model takes."""
    batch, length = size[0], min(size[1], architecture.max_positions or size[1])
    return (torch.arange(batch * length) * 7919 % architecture.vocab_size).view(batch, length)


# --- README.md ------------------------------------------------------------------------------------


def write_texts(trial: TrainedTrial, folder: Path, *, intro: str, use: str, files: str) -> None:
    """Write moenas.json, README.md, and the tokenizer of the study if it has one."""
    data = trial_data(trial)
    text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    (folder / "moenas.json").write_text(text, encoding="utf-8")
    if trial.tokenizer is not None:
        (folder / TOKENIZER).write_text(trial.tokenizer, encoding="utf-8")
        files += f"\n- `{TOKENIZER}`: the tokenizer, for the library tokenizers."
    card = readme(data, trial.architecture, intro=intro, use=use, files=files)
    (folder / "README.md").write_text(card, encoding="utf-8")


_DATA_FILE = """
- `moenas.json`: the architecture as data, every number above, the recipe and the data."""
_PT2_INTRO = """\
A language model with its trained weights, as a program of `torch.export`. It needs PyTorch 2.13 or
newer, and nothing else. Batch and length are open. It has no cache: each pass reads all tokens."""
_PT2_USE = """\
    import torch

    net = torch.export.load("model.pt2").module()   # run Python in this folder
    tokens = torch.tensor([[72, 105]])              # (batch, tokens), int64
    for _ in range(20):
        new = net(tokens)[:, -1:].argmax(dim=-1)    # logits: (batch, tokens, vocabulary)
        tokens = torch.cat((tokens, new), dim=1)
    print(tokens[0].tolist())"""
_PT2_FILES = "- `model.pt2`: the program with its weights in float32." + _DATA_FILE
_ONNX_INTRO = """\
A language model with its trained weights, in ONNX. Batch and length are open. It has no cache: each
pass reads all tokens. Every expert computes every token, so a pass takes longer than in PyTorch."""
_ONNX_USE = """\
    import numpy, onnxruntime

    net = onnxruntime.InferenceSession("model.onnx")   # run Python in this folder
    tokens = numpy.array([[72, 105]])                  # (batch, tokens), int64
    for _ in range(20):
        (logits,) = net.run(["logits"], {"tokens": tokens})   # (batch, tokens, vocabulary)
        tokens = numpy.concatenate((tokens, logits[:, -1:].argmax(-1)), axis=1)
    print(tokens[0].tolist())"""
_ONNX_FILES = """\
- `model.onnx`: the graph with its weights in float32; input `tokens`, output `logits`.""" + (
    _DATA_FILE
)
