"""A Gaussian process that predicts an objective from the features of an architecture."""

from __future__ import annotations

import copy
import warnings
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

with warnings.catch_warnings():
    # linear_operator compiles functions with torch.jit.script when it is imported.
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=DeprecationWarning)
    from botorch.exceptions.warnings import InputDataWarning, OptimizationWarning
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from gpytorch.mlls import ExactMarginalLogLikelihood
    from gpytorch.settings import max_cholesky_size

Array = NDArray[np.float64]

FITTED = 200
"""Evaluations that hyperparameters are fitted to, at most; all of them condition the process."""
STEPS = 60
"""Steps of the fit at most: it need not converge to rank candidates."""
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
        x, y = self._tensors(features, values)
        chosen = np.random.default_rng(seed).permutation(len(x))[:FITTED]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InputDataWarning)
            warnings.simplefilter("ignore", OptimizationWarning)
            model: Any = SingleTaskGP(x[chosen], y[chosen, None], outcome_transform=None)
            likelihood = ExactMarginalLogLikelihood(model.likelihood, model)
            fit_gpytorch_mll(likelihood, optimizer_kwargs={"options": {"maxiter": STEPS}})
        model.set_train_data(x, y, strict=False)
        self._model = model.eval()

    def given(self, features: Array, values: Array) -> Surrogate:
        """Return the process with the same hyperparameters, conditioned on other values (N,)."""
        other = copy.deepcopy(self)
        other._model.set_train_data(*self._tensors(features, values), strict=False)
        other._model.eval()
        return other

    def predict(self, features: Array) -> tuple[Array, Array]:
        """Return mean and standard deviation (N,) of the value without noise."""
        x, _ = self._tensors(features, np.empty(0))
        with torch.no_grad(), max_cholesky_size(EXACT):
            found = self._model.posterior(x)
        mean, variance = found.mean[:, 0].numpy(), found.variance[:, 0].numpy()
        deviation = np.sqrt(np.maximum(variance, 0.0)) * self._scale
        return mean * self._scale + self._center, cast(Array, deviation)

    def _tensors(self, features: Array, values: Array) -> tuple[torch.Tensor, torch.Tensor]:
        scaled = (values - self._center) / self._scale
        return torch.from_numpy(np.ascontiguousarray(features)), torch.from_numpy(scaled)
