"""The memory that a candidate needs, against what is measured, and what a device has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from wide_space import point

from moenas.data import loading
from moenas.errors import NoRoomError
from moenas.evaluate import footprint
from moenas.evaluate.memory import peak_bytes
from moenas.evaluate.training import train
from moenas.model.architecture import Architecture
from moenas.space.sections import Recipe
from moenas.space.space import Space

CPU = torch.device("cpu")
RECIPE = Recipe(tokens=2 * 8 * 64, batch=8, context=64, lr=1e-3, max_dead=None, dtype="float32")


def drawn(number: int) -> Architecture | None:
    drawn = point(number)
    return None if drawn is None else Architecture.parse(drawn[0])


def large() -> Architecture:
    space = Space.load("zoo/qwen3_30b_a3b")
    return space.architecture(space.draw(_First()))


class _First:
    def suggest_categorical(self, name: str, choices: object) -> object:
        raise AssertionError("a published model has no holes")

    suggest_int = suggest_float = suggest_categorical


def difference(architecture: Architecture, recipe: Recipe = RECIPE) -> float:
    """Return by how much the estimate differs from the measured peak, as a share of it."""
    corpus = loading.load({"kind": "pydoc"})
    estimate = footprint.training_bytes(architecture, recipe, CPU)
    model = architecture.build(CPU, 0)
    held = model.state_dict(keep_vars=True).values()
    peak = peak_bytes(lambda: list(train(model, corpus, recipe, 0)), held, CPU)
    return abs(estimate - peak) / peak


@pytest.mark.parametrize("number", [5, 16, 33])
def test_the_estimate_is_the_measured_peak(number: int) -> None:
    architecture = drawn(number)
    assert architecture is not None
    assert difference(architecture) < 0.002


def test_a_mixture_in_bfloat16_has_an_estimate() -> None:
    """On a CPU the rows of its experts are rounded up by the routing, which no estimate knows."""
    mixture = {"kind": "moe", "n_experts": 8, "d_expert": 64, "router": {"top_k": 2}}
    group = {"repeat": 2, "mixer": {"kind": "attention", "head_dim": 16}, "ffn": mixture}
    architecture = Architecture.parse({"vocab_size": 256, "d_model": 64, "blocks": [group]})
    recipe = replace(RECIPE, tokens=2 * 16 * 128, batch=16, context=128, dtype="bfloat16")
    assert difference(architecture, recipe) < 0.05


@pytest.mark.slow
def test_the_estimate_is_the_measured_peak_for_parts_of_every_kind() -> None:
    architectures = [a for a in map(drawn, range(60)) if a is not None]
    assert len(architectures) > 25
    assert max(map(difference, architectures)) < 0.002


def test_a_step_keeps_less_than_the_quick_bound_says() -> None:
    for architecture in filter(None, map(drawn, range(100, 108))):
        cost = architecture.cost(RECIPE.context)
        kept = footprint.training_bytes(architecture, RECIPE, CPU) - 16 * cost.params
        tokens = RECIPE.batch * RECIPE.context
        assert kept < footprint.KEPT * tokens * cost.flops_per_token


def test_what_does_not_fit_is_refused_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "free_bytes", lambda device: 8 * 2**30)
    with pytest.raises(NoRoomError, match=r"at least 455\.\d GiB .* has 8\.0 GiB free") as error:
        footprint.require_fit(large(), RECIPE, CPU, training=True)
    assert error.value.kind == "out_of_memory"
    with pytest.raises(NoRoomError, match=r"the model needs 113\.\d GiB"):
        footprint.require_fit(large(), RECIPE, CPU, training=False)


def test_activations_count_and_sharers_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = drawn(5)
    assert architecture is not None
    exact = footprint.training_bytes(architecture, RECIPE, CPU)
    monkeypatch.setattr(footprint, "free_bytes", lambda device: exact)
    assert footprint.fit(architecture, RECIPE, CPU, training=True).fits
    shared = footprint.fit(architecture, RECIPE, CPU, training=True, sharers=2)
    assert not shared.fits
    assert "for each of 2 candidates at a time" in str(shared)
    monkeypatch.setattr(footprint, "free_bytes", lambda device: exact - 1)
    assert not footprint.fit(architecture, RECIPE, CPU, training=True).fits


def test_a_candidate_fits_beside_others_that_have_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = drawn(5)
    assert architecture is not None
    exact = footprint.training_bytes(architecture, RECIPE, CPU)
    monkeypatch.setattr(footprint, "free_bytes", lambda device: exact)
    monkeypatch.setattr(footprint, "all_bytes", lambda device: 2 * exact)
    footprint.require_fit(architecture, RECIPE, CPU, training=True, sharers=2)
    for short in (lambda: 2 * exact - 2, lambda: None):
        monkeypatch.setattr(footprint, "all_bytes", lambda device, short=short: short())
        with pytest.raises(NoRoomError, match="free for each of 2 candidates at a time"):
            footprint.require_fit(architecture, RECIPE, CPU, training=True, sharers=2)
    monkeypatch.setattr(footprint, "free_bytes", lambda device: exact - 1)
    monkeypatch.setattr(footprint, "all_bytes", lambda device: 4 * exact)
    with pytest.raises(NoRoomError):
        footprint.require_fit(architecture, RECIPE, CPU, training=True, sharers=2)


def test_the_limits_of_control_groups_count(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("5:memory:/job\n0::/job/step\n3:cpu:/x\n")
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "job" / "memory.max").write_text("1000\n")
    (tmp_path / "job" / "memory.current").write_text("700\n")
    (tmp_path / "job" / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    (tmp_path / "job" / "step" / "memory.max").write_text("max\n")
    (tmp_path / "job" / "step" / "memory.current").write_text("600\n")
    old = tmp_path / "memory" / "job"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("2000\n")
    (old / "memory.usage_in_bytes").write_text("100\n")
    assert sorted(footprint._groups(str(tmp_path), str(own))) == [450, 1900]
    assert list(footprint._groups(str(tmp_path / "none"), str(own))) == []


def test_this_machine_has_some_memory() -> None:
    free = footprint.free_bytes(CPU)
    assert free is not None
    assert 2**20 < free < 2**50
    whole = footprint.all_bytes(CPU)
    assert whole is not None
    assert 2**20 < whole < 2**50
