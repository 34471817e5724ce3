"""The format `folder`: PyTorch source, weights and a README, which need torch alone."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch

from moenas.errors import InputError, MoenasError
from moenas.evaluate.threads import cpu_threads
from moenas.export import source
from moenas.export.card import TOKENIZER, readme, trial_data
from moenas.export.trained_trial import TrainedTrial, model_with
from moenas.model.architecture import Architecture, initialise
from moenas.model.mixers.block_indexer import BlockSelection
from moenas.model.mixers.token_indexer import IndexedSelection
from moenas.model.moe.routed_layer import RoutedLayer
from moenas.store.weights import FILE

FINETUNE = "finetune.py"
"""The script that trains an exported model further; it is copied as it is."""
ENTRY = ("forward", "loss", "generate", "stream", "new_cache")
"""Methods of a model that an export keeps; further methods stay if these mention them."""
ROUTED = ("auxiliary_loss", "after_step")
"""Methods that training a model with experts or token indexers needs as well."""
CHECK_BATCH, CHECK_TOKENS = 2, 48
"""Size of the batch whose logits must agree."""


def write(trial: TrainedTrial, folder: Path) -> None:
    """Write model.py, finetune.py, config.json, model.safetensors and README.md into a folder.

    A process in which moenas cannot be imported loads the folder: it must compute the same logits
    to the last bit.

    Raises:
        MoenasError: if the logits differ.
    """
    data = trial_data(trial)
    source_text = model_source(trial.architecture, is_bytes=trial.is_bytes)
    loop = _ROUTED_LOOP if "def auxiliary_loss(" in source_text else _PLAIN_LOOP
    about = _BYTE_DATA if trial.is_bytes else _TEXT_DATA if trial.tokenizer else _ID_DATA
    use = _USE.format(data=about, loop=loop)
    files = _FILES + (_TOKENIZER_FILE if trial.tokenizer is not None else "")
    texts = {
        "model.py": source_text,
        "config.json": json.dumps(data, indent=2, allow_nan=False) + "\n",
        "README.md": readme(data, trial.architecture, intro=_INTRO, use=use, files=files),
    }
    if trial.tokenizer is not None:
        texts[TOKENIZER] = trial.tokenizer
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / FILE).write_bytes(trial.weights)
    shutil.copyfile(Path(__file__).with_name(FINETUNE), folder / FINETUNE)
    check(folder, trial.architecture, trial.weights)


_INTRO = (
    "A language model with its trained weights. It needs PyTorch 2.13 or newer, and nothing else."
)
_USE = """\
    import torch, model        # run Python in this folder

    net = model.load()
    logits = net(torch.tensor([[72, 105]]))  # (batch, tokens) -> (batch, tokens, vocabulary)
    tokens = net.generate(torch.tensor([[72, 105]]), 100)

`python model.py` prints a sample. `generate` takes the most likely token each time, or draws:

    prompt = torch.tensor([[72, 105]])
    tokens = net.generate(prompt, 100, temperature=0.8, top_p=0.95, stop=[10], seed=0)
    for token in net.stream(prompt, 100, temperature=0.8):   # (batch, 1) as soon as it is known
        print(token.item(), end=" ", flush=True)

`top_p` draws from the nucleus alone. A token of `stop` ends a sequence.

## Fine-tune

`python finetune.py data.txt --out tuned --steps 200` trains the model further and writes a folder
like this one. {data} Its default learning rate is a tenth of the rate of the training. A step of
your own training loop does this:

    net.train()
    loss = net.loss(inputs, targets)           # (batch, tokens) each; nats a token{loop}"""
_ROUTED_LOOP = """
    (loss + net.auxiliary_loss()).backward()   # with the balance losses of the routers
    optimizer.step()
    net.after_step()                           # moves selection biases by the load of this step"""
_PLAIN_LOOP = """
    loss.backward()
    optimizer.step()"""
_BYTE_DATA = "The data are a text file, whose bytes are the tokens."
_TEXT_DATA = "The data are a text, which takes the library tokenizers, or token ids in a .npy file."
_ID_DATA = "The data are token ids in a .npy file, which takes numpy."
_FILES = """\
- `model.py`: the architecture, a reader of the weights, `build()` and `load()`.
- `model.safetensors`: the weights in float32.
- `finetune.py`: trains the model further.
- `config.json`: the architecture as data, every number above, the recipe and the data."""
_TOKENIZER_FILE = """
- `tokenizer.json`: the tokenizer, for the library tokenizers:
  `tokenizers.Tokenizer.from_file("tokenizer.json").encode("a text").ids`."""


# --- model.py ----------------------------------------------------------------------------------


def model_source(architecture: Architecture, *, is_bytes: bool = True) -> str:
    """Return the text of model.py: what this architecture uses, `build`, `load` and a sample."""
    expression, classes = source.record(architecture.build)
    further = any(issubclass(x, RoutedLayer | IndexedSelection | BlockSelection) for x in classes)
    methods = [*ENTRY, *(ROUTED if further else ())]
    closure = source.SourceClosure.of([*classes, initialise], methods)
    taken = sorted(set(closure.keys) & {"DTYPES", "build", "load", "read_safetensors"})
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

class BlockMoenas:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "moenas":
            raise ImportError("an exported model must not need moenas")

sys.meta_path.insert(0, BlockMoenas())
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import model
tokens = torch.tensor(json.load(sys.stdin))
with torch.no_grad():
    sys.stdout.buffer.write(model.load()(tokens).numpy().tobytes())
"""


def check(folder: Path, architecture: Architecture, weights: bytes) -> None:
    """Compare the logits of the folder, in a process without moenas, with the logits of our model.

    Both compute in float32 on one CPU thread.

    Raises:
        MoenasError: if the folder cannot be loaded, or one bit differs.
    """
    size = CHECK_BATCH, CHECK_TOKENS
    tokens = (torch.arange(size[0] * size[1]) * 7919 % architecture.vocab_size).view(size)
    with cpu_threads(1), torch.no_grad():
        ours = model_with(architecture, weights)(tokens).numpy()
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
