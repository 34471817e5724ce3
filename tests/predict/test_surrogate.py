"""The Gaussian process: it predicts unseen points, and is unsure far from seen ones."""

from __future__ import annotations

import numpy as np
import pytest

from moenas.predict.surrogate import Surrogate


def made(n: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    x = draw.random((n, 6))
    return x, 3 + np.sin(3 * x[:, 0]) + x[:, 1] ** 2 + 0.02 * draw.standard_normal(n)


def test_it_predicts_values_that_it_has_not_seen() -> None:
    x, y = made(90)
    mean, deviation = Surrogate(x[:60], y[:60]).predict(x[60:])
    error = np.abs(mean - y[60:])
    assert error.mean() < 0.25 * y.std()
    # Nine of ten errors lie within three deviations, noise of the values included.
    assert (error < 3 * np.hypot(deviation, 0.02)).mean() > 0.9


def test_more_values_change_the_mean_and_lower_the_deviation() -> None:
    x, y = made(60)
    fitted = Surrogate(x[:20], y[:20])
    before, wide = fitted.predict(x[20:])
    after, narrow = fitted.given(x, y).predict(x[20:])
    assert (narrow < wide).all()
    assert np.abs(after - y[20:]).mean() < np.abs(before - y[20:]).mean()
    again, _ = fitted.predict(x[20:])
    assert again == pytest.approx(before), "given() leaves the process as it was"


def test_a_value_with_more_noise_moves_the_mean_less() -> None:
    x, y = made(40)
    fitted, wrong = Surrogate(x[:30], y[:30]), np.append(y[:30], y[30] + 1)
    exact, _ = fitted.given(x[:31], wrong).predict(x[30:31])
    variances = np.append(np.zeros(30), 4.0)
    noisy, deviation = fitted.given(x[:31], wrong, variances).predict(x[30:31])
    before, wide = fitted.predict(x[30:31])
    assert abs(noisy[0] - before[0]) < 0.2 * abs(exact[0] - before[0])
    assert deviation[0] < wide[0]


@pytest.mark.parametrize("n", [0, 1, 5])
def test_a_process_of_few_values_knows_where_it_has_not_looked(n: int) -> None:
    x, y = made(60)
    unfitted = Surrogate.unfitted(x[:n], y[:n])
    mean, deviation = unfitted.predict(x)
    assert np.isfinite(mean).all()
    assert (deviation[n:] > 0).all()
    if n == 0:
        assert (mean == 0).all()
        assert (deviation == 1).all()
    else:
        assert deviation[:n].max() < deviation[n:].min()


def test_equal_values_are_no_error() -> None:
    x, _ = made(12)
    mean, _ = Surrogate(x, np.full(12, 2.5)).predict(x)
    assert mean == pytest.approx(np.full(12, 2.5))
