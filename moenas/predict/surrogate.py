"""A Gaussian process that predicts an objective from the features of an architecture."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

Array = NDArray[np.float64]

FITTED = 200
"""Evaluations that hyperparameters are fitted to, at most; all of them condition the process."""
STEPS = 60
"""Steps of the fit at most: it need not converge to rank candidates."""
JITTER = 1e-6
"""Added to the diagonal of the covariance of standardised values."""
LENGTH_SPREAD = math.sqrt(3)
NOISE_CENTER, NOISE_SPREAD = -4.0, 1.0
"""Normal prior of the logarithm of the noise variance of standardised values."""
LENGTH_BOUNDS, NOISE_BOUNDS = (-5.0, 10.0), (-9.0, 2.0)
"""Bounds of the logarithms of length scales and noise variance."""


class Surrogate:
    """A Gaussian process with noise: Matern 5/2 kernel, a length scale for each feature.

    The hyperparameters have the largest posterior density. The logarithm of a length scale has a
    normal prior with mean sqrt(2) + log(D) / 2 and deviation sqrt(3) for D features (Hvarfner et
    al., arXiv 2402.02229). So a dozen evaluations of thirty features do not overfit.
    """

    def __init__(self, features: Array, values: Array, seed: int = 0) -> None:
        """Fit the process to values (N,) at features (N, D)."""
        self._center, self._scale = float(values.mean()), float(values.std()) or 1.0
        x, y = self._tensors(features, values)
        chosen = np.random.default_rng(seed).permutation(len(x))[:FITTED]
        self._lengths, self._noise = _fit(x[chosen], y[chosen])
        self._condition(x, y)

    @classmethod
    def unfitted(cls, features: Array, values: Array) -> Surrogate:
        """Return the process for values (N,), N from 0, that are too few to fit it to.

        Each length scale is sqrt(D), as the distance of two random points grows with it. The noise
        is that of its prior. The scale is the standard deviation of the values, and 1 where there
        is none.
        """
        self = cls.__new__(cls)
        self._center = float(values.mean()) if len(values) else 0.0
        self._scale = (float(values.std(ddof=1)) if len(values) > 1 else 0.0) or 1.0
        n_features = features.shape[1]
        self._lengths = torch.full((n_features,), math.sqrt(n_features), dtype=torch.float64)
        self._noise = torch.tensor(math.exp(NOISE_CENTER), dtype=torch.float64)
        self._condition(*self._tensors(features, values))
        return self

    def given(self, features: Array, values: Array, variances: Array | None = None) -> Surrogate:
        """Return the process with the same hyperparameters, conditioned on other values (N,).

        `variances` (N,) are of further noise, for values that are less exact than others.
        """
        other = copy.copy(self)
        x, y = self._tensors(features, values)
        more = None if variances is None else torch.from_numpy(variances / self._scale**2)
        other._condition(x, y, more)
        return other

    @property
    def noise(self) -> float:
        """Standard deviation of the noise of a value."""
        return float(self._noise.sqrt()) * self._scale

    def predict(self, features: Array) -> tuple[Array, Array]:
        """Return mean and standard deviation (N,) of the value without noise."""
        x, _ = self._tensors(features, np.empty(0))
        cross = _matern(x, self._x, self._lengths)
        mean = cross @ self._weights
        solved = torch.linalg.solve_triangular(self._root, cross.T, upper=False)
        variance = (1.0 - solved.square().sum(dim=0)).clamp_min(0.0)
        deviation: Array = variance.sqrt().numpy() * self._scale
        center: Array = mean.numpy() * self._scale + self._center
        return center, deviation

    def _condition(self, x: Tensor, y: Tensor, more: Tensor | None = None) -> None:
        """Keep what a prediction needs: the root of the covariance (N, N), its solution (N,).

        `more` (N,) are the variances of further noise.
        """
        self._x = x
        noise = self._noise if more is None else self._noise + more
        self._root = _root(x, self._lengths, noise)
        self._weights = torch.cholesky_solve(y[:, None], self._root)[:, 0]

    def _tensors(self, features: Array, values: Array) -> tuple[Tensor, Tensor]:
        scaled = (values - self._center) / self._scale
        return torch.from_numpy(np.ascontiguousarray(features)), torch.from_numpy(scaled)


def _matern(a: Tensor, b: Tensor, lengths: Tensor) -> Tensor:
    """Return the Matern 5/2 covariance (N, M) of points a (N, D) and b (M, D), variance 1."""
    scaled_a, scaled_b = a / lengths, b / lengths
    squares = scaled_a.square().sum(1)[:, None] + scaled_b.square().sum(1)[None]
    # Equal points round to less than 0, where a square root has no gradient.
    distance = (squares - 2 * scaled_a @ scaled_b.T).clamp_min(1e-15).sqrt() * math.sqrt(5)
    covariance: Tensor = (1 + distance + distance.square() / 3) * (-distance).exp()
    return covariance


def _root(x: Tensor, lengths: Tensor, noise: Tensor) -> Tensor:
    """Return the Cholesky factor (N, N) of the covariance with noise, () or (N,)."""
    eye = torch.eye(len(x), dtype=x.dtype)
    root: Tensor = torch.linalg.cholesky(_matern(x, x, lengths) + (noise + JITTER) * eye)
    return root


def _fit(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return length scales (D,) and noise variance of the largest posterior density."""
    n_features = x.shape[1]
    length_center = math.sqrt(2) + 0.5 * math.log(max(1, n_features))
    start = np.full(n_features + 1, length_center)
    start[-1] = NOISE_CENTER

    def loss(point: Array) -> tuple[float, Array]:
        """Return the negative logarithm of the posterior density, and its gradient."""
        logs = torch.tensor(point, requires_grad=True)
        with torch.enable_grad():
            root = _root(x, logs[:-1].exp(), logs[-1].exp())
            solved = torch.linalg.solve_triangular(root, y[:, None], upper=False)
            fit = 0.5 * solved.square().sum() + root.diagonal().log().sum()
            length_prior = ((logs[:-1] - length_center) / LENGTH_SPREAD).square().sum() / 2
            noise_prior = ((logs[-1] - NOISE_CENTER) / NOISE_SPREAD).square() / 2
            negative = fit + length_prior + noise_prior
            (gradient,) = torch.autograd.grad(negative, logs)
        return float(negative.detach()), gradient.numpy()

    bounds = [LENGTH_BOUNDS] * n_features + [NOISE_BOUNDS]
    options = {"maxiter": STEPS}
    optimum = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    logs = torch.tensor(optimum.x)
    return logs[:-1].exp(), logs[-1].exp()
