"""Trained models of a study in Python: loaded, and exported in every format."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from moenas.errors import InputError, NotFoundError
from moenas.export.formats import NOTES, WRITERS
from moenas.resources import load_module
from moenas.space.space import Space
from moenas.study.launch import load_study, run

SPACE = """
name: one
architecture:
  vocab_size: 256
  d_model: 32
  blocks: [{mixer: {kind: attention, head_dim: 16}, ffn: {kind: dense, d_ff: 64}}]
objectives: [val_loss]
data: {files: [corpus.txt]}
train: {tokens: 2048, context: 32, batch: 4, val_tokens: 512}
search: {sampler: random, trials: 1}
"""


@pytest.mark.usefixtures("study_folder")
def test_a_study_loads_and_exports_its_models() -> None:
    run(Space.parse(SPACE, "one.yaml"), workers="inline")
    study = load_study("one")
    model = study.load_model(0)
    assert not model.training
    tokens = torch.arange(64).view(2, 32)
    folder = study.export(0, "out")
    assert folder == Path("out")
    with torch.no_grad():
        exported = load_module(Path("out/model.py")).load(Path("out"))(tokens)
        assert torch.equal(exported, model(tokens))
        untrained = study.architecture(0).build().eval()
        assert not torch.equal(untrained(tokens), exported)
    study.export(0, "hf", format="transformers")
    assert Path("hf/tokenizer.json").is_file()
    with pytest.raises(InputError, match="'gguf' is unknown"):
        study.export(0, "other", format="gguf")
    with pytest.raises(NotFoundError, match="no result for trial 7"):
        study.load_model(7)


def test_the_service_and_the_command_line_know_every_format() -> None:
    schemas = pytest.importorskip("moenas.service.schemas")
    assert set(WRITERS) == set(NOTES) == set(get_args(schemas.ExportFormat))
