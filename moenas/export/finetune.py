"""Trains an exported model further, on a text file or token ids. It needs this folder and torch.

    python finetune.py data.txt --out tuned --steps 200

`tuned` then holds model.py, the tuned model.safetensors, and the other files of this folder.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import shutil
import struct
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
DTYPES = {torch.float32: "F32", torch.int64: "I64"}


def arguments(training: dict[str, Any]) -> argparse.Namespace:
    """Read the command line; defaults come from the training of the model."""
    parser = argparse.ArgumentParser(
        description="Train an exported model further.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("data", type=Path, help="a text, or token ids in a .npy file")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    parser.add_argument("--batch", type=int, default=training["batch"], help="sequences a step")
    parser.add_argument(
        "--lr", type=float, default=0.1 * (training["lr"] or 1e-3), help="learning rate"
    )
    parser.add_argument("--seed", type=int, default=0, help="order of the data")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    return parser.parse_args()


def refuse(reason: str) -> NoReturn:
    """End with one line on stderr and exit code 2."""
    print(reason, file=sys.stderr)
    raise SystemExit(2)


def read_tokens(path: Path, vocab_size: int, is_bytes: bool) -> Tensor:
    """Return the tokens of a file, (N,), int64."""
    if not path.is_file():
        refuse(f"{path}: no such file")
    if is_bytes:
        tokens = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
    elif path.suffix != ".npy" and (HERE / "tokenizer.json").is_file():
        tokenizers: Any = importlib.import_module("tokenizers")
        tokenizer = tokenizers.Tokenizer.from_file(str(HERE / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        text = path.read_text(encoding="utf-8")
        tokens = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    else:
        numpy: Any = importlib.import_module("numpy")
        tokens = torch.from_numpy(numpy.load(path).astype("int64")).flatten()
    if len(tokens) and int(tokens.min()) < 0:
        refuse(f"{path}: token {int(tokens.min())}; tokens are at least 0")
    if len(tokens) and int(tokens.max()) >= vocab_size:
        refuse(f"{path}: token {int(tokens.max())}; the vocabulary has {vocab_size}")
    return tokens


def batches(tokens: Tensor, batch: int, context: int, seed: int) -> Any:
    """Yield inputs and targets (B, S) forever, from random places."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - context, (batch, 1), generator=generator)
        places = starts + torch.arange(context + 1)
        yield tokens[places[:, :-1]], tokens[places[:, 1:]]


def tune(net: Any, data: Any, steps: int, lr: float) -> None:
    """Train a model; it prints the mean cross entropy of each tenth of the steps."""
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    recent: list[float] = []
    for step in range(1, steps + 1):
        inputs, targets = (x.to(net.embedding.device) for x in next(data))
        loss = net.loss(inputs, targets)  # nats a token
        whole = loss
        if hasattr(net, "auxiliary_loss"):  # of the routers: balance and z-loss
            whole = loss + net.auxiliary_loss()
        optimizer.zero_grad()
        whole.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if hasattr(net, "after_step"):  # moves selection biases by the load of this step
            net.after_step()
        recent.append(loss.item())
        if step % max(1, steps // 10) == 0 or step == steps:
            print(f"step {step}: loss {sum(recent) / len(recent):.4f} nats/token", flush=True)
            recent.clear()


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file: the length of a JSON header in 8 bytes, the header, the data."""
    header, offset, chunks = {}, 0, []
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(flat)],
        }
        offset += len(flat)
        chunks.append(ctypes.string_at(flat.data_ptr(), len(flat)))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(chunks))


def main() -> None:
    """Train the model of this folder and write another folder."""
    sys.path.insert(0, str(HERE))
    model: Any = importlib.import_module("model")
    config = json.loads((HERE / "config.json").read_text(encoding="utf-8"))
    training, vocab_size = config["training"], config["vocab_size"]
    options = arguments(training)
    if options.out.exists():
        refuse(f"{options.out}: exists; name a new folder")
    context = training["context"]
    tokens = read_tokens(options.data, vocab_size, config["data"].get("is_bytes", False))
    if len(tokens) <= context:
        refuse(f"{options.data}: {len(tokens)} tokens; more than {context} are needed")
    torch.manual_seed(options.seed)
    net = model.load(HERE, options.device)
    tune(net, batches(tokens, options.batch, context, options.seed), options.steps, options.lr)
    shutil.copytree(HERE, options.out, ignore=shutil.ignore_patterns("__pycache__"))
    write_safetensors(options.out / "model.safetensors", net.state_dict())
    tuning = {"data": options.data.name, "batch": options.batch, "seed": options.seed}
    tuning |= {"steps": options.steps, "lr": options.lr}
    text = json.dumps({**config, "tuning": tuning}, indent=2) + "\n"
    (options.out / "config.json").write_text(text, encoding="utf-8")
    print(f"next: python {options.out / 'model.py'}")


if __name__ == "__main__":
    main()
