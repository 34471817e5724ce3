"""What is measured of the routing, against counts by hand."""

from __future__ import annotations

import math

import pytest
import torch

from moenas.routing import routing_health


@pytest.mark.parametrize(
    ("load", "max_vio", "cv", "entropy", "dead"),
    [
        ([5, 5, 5, 5], 0.0, 0.0, 1.0, 0),
        ([20, 0, 0, 0], 3.0, math.sqrt(3), 0.0, 3),
        ([10, 10, 0, 0], 1.0, 1.0, 0.5, 2),
        ([1999, 2000, 1, 4000], 1.0, None, None, 1),
        ([7], 0.0, 0.0, 1.0, 0),
    ],
)
def test_routing_health(
    load: list[int], max_vio: float, cv: float | None, entropy: float | None, dead: int
) -> None:
    found = routing_health(torch.tensor(load))
    assert sum(found["load"]) == pytest.approx(1, abs=1e-5)
    assert found["max_vio"] == pytest.approx(max_vio, abs=1e-9)
    assert found["dead"] == dead
    assert cv is None or found["cv"] == pytest.approx(cv, abs=1e-9)
    assert entropy is None or found["entropy"] == pytest.approx(entropy, abs=1e-9)
