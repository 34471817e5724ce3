"""A Gaussian process that predicts an objective from the features of an architecture."""

from __future__ import annotations

import warnings
from typing import cast

import numpy as np
import torch
from botorch.exceptions import InputDataWarning, OptimizationWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.transforms import Standardize
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.settings import max_cholesky_size
from numpy.typing import NDArray

Array = NDArray[np.float64]

FITTED = 200
"""Evaluations that the hyperparameters are fitted to, at most; all of them condition the process."""
EXACT = 100_000
"""Evaluations up to which gpytorch factorises the whole matrix."""


class Surrogate:
    """A Gaussian process with noise: Matern 5/2, a length scale for each feature.

    BoTorch's priors of the length scales grow with the number of features (Hvarfner et al.,
    arXiv 2402.02229), so a dozen evaluations of thirty features do not overfit.
    """

    def __init__(self, features: Array, values: Array, seed: int = 0) -> None:
        """Fit the process to values (N,) at features (N, D)."""
        self._center, self._scale = float(values.mean()), float(values.std()) or 1.0
        x = torch.from_numpy(np.ascontiguousarray(features))
        y = torch.from_numpy((values - self._center) / self._scale)[:, None]
        chosen = np.random.default_rng(seed).permutation(len(x))[:FITTED]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InputDataWarning)
            warnings.simplefilter("ignore", OptimizationWarning)
            model = SingleTaskGP(x[chosen], y[chosen], outcome_transform=None)
            fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
            model.set_train_data(x, y[:, 0], strict=False)
        self._model = model.eval()

    def predict(self, features: Array) -> tuple[Array, Array]:
        """Return mean and standard deviation (N,) of the value without noise."""
        x = torch.from_numpy(np.ascontiguousarray(features))
        with torch.no_grad(), max_cholesky_size(EXACT):
            found = self._model.posterior(x)
            mean, variance = found.mean[:, 0].numpy(), found.variance[:, 0].numpy()
        deviation = np.sqrt(np.maximum(variance, 0.0)) * self._scale
        return mean * self._scale + self._center, cast(Array, deviation)
