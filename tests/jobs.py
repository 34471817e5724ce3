"""Jobs over a tiny architecture and a small corpus, and what two evaluations are compared by."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moenas.data import loading as data
from moenas.data.section import parse
from moenas.model.architecture import Architecture
from moenas.records import Evaluation, Job
from moenas.resources import Node
from moenas.space.sections import Protocol, Recipe

MIXER = {"kind": "attention", "head_dim": 8, "n_kv_heads": 1}
ROUTER = {"top_k": 2, "balance": "bias"}
MOE = {"kind": "moe", "n_experts": 4, "d_expert": 16, "router": ROUTER}
PLAIN = {
    "vocab_size": 256,
    "d_model": 16,
    "blocks": [
        {"mixer": MIXER, "ffn": {"kind": "dense", "d_ff": 32}},
        {"mixer": MIXER, "ffn": MOE},
    ],
}
RECIPE = Recipe(tokens=8 * 4 * 16, context=16, batch=4, val_tokens=256, dtype="float32")
PROTOCOL = Protocol(
    decode_batch=2, decode_context=8, prefill_tokens=16, min_repeats=3, max_repeats=3
)
GUEST = '''"""A guest's number."""
direction = "minimize"
unit = "things"
needs = "{needs}"


def measure(subject):
    return {result}
'''

MakeJob = Callable[..., Job]


def guest(result: str, needs: str = "cost") -> str:
    return GUEST.format(result=result, needs=needs)


def job_maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeJob:
    """Make jobs over a small file of text; anything can be replaced."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} green bottles, then {i - 1}.\n" for i in range(999, 0, -1)))
    section = parse(Node.wrap({"files": [str(text)]}))

    def make(*objectives: str, guests: dict[str, str] | None = None, **changes: Any) -> Job:
        wanted: dict[str, str | None] = dict.fromkeys(objectives)
        job = Job(
            study="bottles",
            trial=3,
            attempt=1,
            architecture=Architecture.parse(PLAIN).canonical().plain(),
            objectives={**wanted, **(guests or {})},
            data=section,
            data_sha256=data.load(section).sha256,
            train=RECIPE.plain(),
            measure=PROTOCOL.plain(),
            seed=0,
        )
        return replace(job, **changes)

    return make


def without_times(evaluation: Evaluation) -> dict[str, Any]:
    """All of an evaluation but what differs between two runs.

    safetensors writes the metadata in another order each time, so the digest differs too.
    """
    plain = evaluation.plain()
    for name in ("seconds", "weights_sha256"):
        del plain[name]
    plain["metrics"].pop("tokens_per_second", None)
    for row in plain["curve"]:
        del row["seconds"]
    return plain
