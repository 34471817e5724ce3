"""The formats of an export: a trained trial becomes a folder, whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from moenas.errors import InputError
from moenas.export import folder, programs, transformers_folder
from moenas.export.trained_trial import Archive, TrainedTrial, trained_trial

WRITERS: dict[str, Callable[[TrainedTrial, Path], None]] = {
    "folder": folder.write,
    "transformers": transformers_folder.write,
    "torch_export": programs.write_torch_export,
    "onnx": programs.write_onnx,
}
"""Format -> the function that writes a trained trial into an empty folder and checks it."""
NOTES = {
    "folder": (
        "checked: {folder} gives the same logits to the last bit without moenas",
        "next: python {folder}/model.py",
    ),
    "transformers": (
        "checked: {folder}/config.json describes the architecture of the trial",
        "next: AutoModelForCausalLM.from_pretrained('{folder}')",
    ),
    "torch_export": (
        "checked: {folder}/model.pt2 gives the same logits without moenas",
        "next: torch.export.load('{folder}/model.pt2').module()",
    ),
    "onnx": (
        "checked: {folder}/model.onnx gives the same logits in onnxruntime",
        "next: onnxruntime.InferenceSession('{folder}/model.onnx')",
    ),
}
"""Format -> the message about a finished export."""


def export(
    store: Archive,
    study: str,
    trial: int,
    out: Path,
    *,
    format: str = "folder",
    allow_code: bool = False,
) -> Path:
    """Write a trained trial in a format into the folder `out`, and check the folder.

    On any error `out` is as it was. With `allow_code` the Python files that the database holds
    for the study are run; see `user_parts.load_stored`.

    Raises:
        NotFoundError: if there is no such study or trial, or its weights are gone.
        InputError: if the trial has no trained weights, the format cannot hold its architecture,
            or `out` is in use or cannot be written.
        MoenasError: if the export computes other logits.
    """
    if format not in WRITERS:
        raise InputError(f"format: {format!r} is unknown; moenas writes {', '.join(WRITERS)}")
    _check_free(out)
    trained = trained_trial(store, study, trial, allow_code=allow_code)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as draft:
            path = Path(draft, "export")
            path.mkdir()
            WRITERS[format](trained, path)
            os.rename(path, out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from None
    return out


def _check_free(out: Path) -> None:
    """Refuse a target that holds anything."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out}: is not a folder; name one that does not exist yet")
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: is not empty; name another folder, or remove this one first")
