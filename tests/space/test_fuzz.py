"""Space files with faults give a space or an error of the user's, soon and in bounded memory."""

from __future__ import annotations

import json
import time
import tracemalloc

import pytest
from fuzz import mutated, outcome

from moenas.report.space_check import check_report
from moenas.space.space import Space


@pytest.mark.parametrize("start", range(0, 240, 60))
def test_a_faulty_file_gives_a_space_or_an_error_of_the_user(start: int) -> None:
    outcomes = [outcome(mutated(seed)) for seed in range(start, start + 60)]
    said = [text for text, _, _ in outcomes]
    assert any(text.startswith("True") for text in said)
    assert any("fuzz.yaml:" in text for text in said)
    assert max(took for _, took, _ in outcomes) < 10  # under 2 s on a machine of its own
    assert max(peak for _, _, peak in outcomes) < 4 * 2**30


def test_equal_seeds_give_equal_texts() -> None:
    assert [mutated(seed) for seed in range(20)] == [mutated(seed) for seed in range(20)]
    assert len({mutated(seed) for seed in range(200)}) > 190


DEEP = """
architecture:
  vocab_size: 256
  d_model: {choice: [64, 96]}
  blocks:
    - repeat: 1000
      mixer: {kind: attention, head_dim: 16}
      ffn: {kind: moe, n_experts: {choice: [4, 8]}, d_expert: 32, router: {top_k: {choice: [1, 2]}}}
objectives: [active_params]
data: pydoc
"""


def test_a_thousand_layers_are_checked_in_seconds() -> None:
    began = time.process_time()
    report = check_report(Space.parse(DEEP, "deep.yaml"), 200)
    assert report["feasible"] == 200
    assert time.process_time() - began < 4  # 1.2 s on a machine of its own


def test_layers_that_cannot_be_are_refused_before_they_are_written_out() -> None:
    group = "{mixer: {kind: attention, head_dim: 8}}"
    for _ in range(3):
        group = f"{{repeat: 1000, blocks: [{group}]}}"
    text = f"architecture: {{vocab_size: 9, d_model: 8, blocks: [{group}]}}\nobjectives: [params]"
    tracemalloc.start()
    said, _, _ = outcome(text.replace("[params]", "[total_params]"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "1,000,000,000 layers" in said
    assert peak < 2**26


@pytest.mark.parametrize("field", ["rope_dim", "nope_dim", "v_dim", "n_heads"])
def test_a_number_worked_out_for_each_element_of_a_head_has_a_bound(field: str) -> None:
    mixer = {"kind": "latent_attention", "n_heads": 2, "kv_rank": 8, "nope_dim": 8, "rope_dim": 8}
    scaling = {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    mixer |= {"v_dim": 8, "rope": {"scaling": scaling}, field: 8 * 10**14}
    layer = {"vocab_size": 9, "d_model": 8, "blocks": [{"mixer": mixer}]}
    text = json.dumps({"architecture": layer, "objectives": ["total_params"]})
    tracemalloc.start()
    said, seconds, _ = outcome(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert field in said
    assert "from" in said
    assert seconds < 5
    assert peak < 2**26
