"""The additive predictor of latency: its terms, its fit and the bound of its error."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moenas.model.architecture import Architecture
from moenas.predict.block_latency import (
    LAYERS,
    MODEL,
    BlockLatency,
    error_bound,
    latency_terms,
    predicted,
    workload_terms,
)
from moenas.records import Calibration

DECODE = {"phase": "decode", "batch": 4, "context": 32}


def model(repeat: int = 1, **ffn: Any) -> Architecture:
    layer = {
        "repeat": repeat,
        "mixer": {"kind": "attention", "head_dim": 8},
        "ffn": ffn if "kind" in ffn else {"kind": "dense", "d_ff": 64} | ffn,
    }
    return Architecture.parse({"vocab_size": 256, "d_model": 32, "blocks": [layer]})


def mixture(repeat: int = 1) -> Architecture:
    return model(repeat, kind="moe", n_experts=16, d_expert=8, router={"top_k": 2})


def test_terms_add_up_over_the_layers() -> None:
    one, two, three = (latency_terms(model(n), 4, 33, 4) for n in (1, 2, 3))
    for name in one.keys() - {"architecture.n_layers"}:
        assert three[name] - two[name] == pytest.approx(two[name] - one[name])
    assert [terms[LAYERS] for terms in (one, two, three)] == [1, 2, 3]
    assert one[MODEL] == three[MODEL] == 1


@pytest.mark.parametrize("architecture", [model(2), mixture(3)])
def test_operations_of_all_terms_are_those_of_the_cost(architecture: Architecture) -> None:
    terms = latency_terms(architecture, 4, 33, 8)
    flops = sum(amount for name, amount in terms.items() if name.endswith(".flops"))
    assert flops == 8 * architecture.cost(33).flops_per_token


def test_a_pass_of_few_tokens_reads_few_experts() -> None:
    one, many = (latency_terms(mixture(), 1, 33, tokens) for tokens in (1, 100))
    cost = mixture().layers[0].parts["ffn"].cost(32, 33)
    assert one["ffn.moe.weights"] == cost.active_params < cost.params
    assert many["ffn.moe.weights"] == cost.params


def test_a_decoding_step_has_one_token_a_sequence_and_a_prompt_all_of_them() -> None:
    assert workload_terms(model(), DECODE) == latency_terms(model(), 4, 33, 4)
    prefill = DECODE | {"phase": "prefill"}
    assert workload_terms(model(), prefill) == latency_terms(model(), 4, 32, 128)


def test_an_additive_latency_is_predicted_beyond_the_models_of_the_fit() -> None:
    def latency(repeat: int, d_ff: int) -> float:
        return 1.0 + repeat * (0.5 + d_ff / 100)

    points = [(repeat, d_ff) for repeat in (1, 2, 3) for d_ff in (16, 32, 64, 128)]
    rows = [latency_terms(model(repeat, d_ff=d_ff), 4, 33, 4) for repeat, d_ff in points]
    fitted = BlockLatency.fit(rows, [latency(*point) for point in points])
    assert min(fitted.coefficients.values()) > 0
    new = latency_terms(model(4, d_ff=96), 4, 33, 4)
    assert fitted.predict(new) == pytest.approx(latency(4, 96), rel=0.03)
    assert "ffn.dense.flops" not in fitted.beyond(rows[0])
    assert LAYERS in fitted.beyond(new)


def test_the_predictions_of_noise_are_not_negative() -> None:
    draw = random.Random(0)
    rows = [latency_terms(model(n, d_ff=draw.choice([16, 64])), 4, 33, 4) for n in (1, 2, 3, 4)]
    fitted = BlockLatency.fit(rows, [draw.uniform(0.1, 10) for _ in rows])
    assert all(fitted.predict(row) >= 0 for row in rows)


@given(st.lists(st.floats(0.001, 10), min_size=2, max_size=60, unique=True), st.floats(0.1, 0.95))
def test_the_bound_covers_the_wanted_share_of_models_left_out(
    errors: list[float], coverage: float
) -> None:
    """Each error in turn belongs to the new model: the premise of conformal prediction."""
    inside, said = 0, 1.0
    for i, new in enumerate(errors):
        bound, said = error_bound([e for j, e in enumerate(errors) if j != i], coverage)
        inside += new <= bound
    assert said <= coverage
    assert inside / len(errors) >= said - 1e-9
    if math.ceil(len(errors) * coverage - 1e-9) < len(errors):
        assert said == coverage


def test_the_bound_needs_a_model() -> None:
    with pytest.raises(ValueError, match="no model outside the fit"):
        error_bound([], 0.9)


def test_a_prediction_follows_the_reference_time_of_a_study() -> None:
    rows = [workload_terms(model(n), DECODE) for n in (1, 2, 3)]
    fitted = BlockLatency.fit(rows, [1.0, 2.0, 3.0])
    calibration = Calibration(
        objective="decode_ms",
        unit="ms/step",
        workload="w",
        settings=DECODE,
        space="s",
        parts_sha256="0",
        device={},
        versions={},
        reference_ms=10.0,
        coefficients=fitted.coefficients,
        highest=fitted.highest,
        log_error=math.log(2),
        coverage=0.9,
        fitted={"models": 3, "blocks": 0},
        held_out=[],
        made_at="",
        seconds=0.0,
    )
    own, of_study = predicted(calibration, model(2)), predicted(calibration, model(2), 5.0)
    assert own.value == pytest.approx(20.0, rel=0.05)
    assert of_study.value == own.value / 2
    assert (own.low, own.high) == (own.value / 2, own.value * 2)
    assert predicted(calibration, model(4)).beyond
    assert Calibration.parse(calibration.plain()) == calibration
