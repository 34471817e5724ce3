"""A latency predictor that adds up over the blocks of a model, with an interval."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from moenas.predict.features import WHOLE_NAMES

if TYPE_CHECKING:
    from moenas.model.architecture import Architecture
    from moenas.records import Calibration, Plain

Array = NDArray[np.float64]
Terms = dict[str, float]
"""What the time of a pass is a sum of: term -> its amount in one model."""

MODEL, LAYERS = "model", "layers"
"""The terms of what a pass takes once, and once for each layer."""
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Ridge penalties that leave-one-out errors choose from."""


def latency_terms(architecture: Architecture, batch: int, context: int, tokens: int) -> Terms:
    """Return the terms of one pass of a model: the sum over its blocks, and the head.

    The pass has `tokens` new tokens in `batch` sequences, each of which sees `context` tokens. Each
    kind of part has three terms: the floating-point operations, the weights that are read at most,
    and the bytes of the key-value cache. A word of a block, such as `block.ffn.activation=gelu`,
    counts the blocks that hold it. A number, such as `block.ffn.n_experts`, is the sum over the
    blocks.
    """
    layers = architecture.canonical().layers
    terms = defaultdict[str, float](float, {MODEL: 1.0, LAYERS: float(len(layers))})
    rest = architecture.cost(context)
    flops, weights = rest.flops_per_token, rest.params
    for layer in layers:
        for name, part in layer.parts.items():
            cost = part.cost(architecture.d_model, context)
            flops, weights = flops - cost.flops_per_token, weights - cost.params
            place = f"{name}.{part.kind}"
            terms[f"{place}.flops"] += cost.flops_per_token * tokens
            terms[f"{place}.weights"] += min(cost.params, cost.active_params * tokens)
            terms[f"{place}.cache"] += cost.kv_bytes_per_token * context * batch
    terms["head.flops"], terms["head.weights"] = flops * tokens, weights
    for layer_names in architecture.names():
        for name, value in layer_names.items():
            if name.startswith(WHOLE_NAMES):
                key, amount = (f"{name}={value}", 1.0) if isinstance(value, str) else (name, value)
                terms[key] += float(amount)
    return dict(terms)


def workload_terms(architecture: Architecture, settings: Plain) -> Terms:
    """Return the terms of a model under a workload: {phase, batch, context}.

    A decoding step has one new token for each sequence, which sees itself and `context` others.
    """
    batch, context = int(settings["batch"]), int(settings["context"])
    if settings["phase"] == "decode":
        return latency_terms(architecture, batch, context + 1, batch)
    return latency_terms(architecture, batch, context, batch * context)


@dataclass(frozen=True)
class BlockLatency:
    """A sum over the terms of a model; no coefficient is below 0, so no prediction is."""

    coefficients: Terms
    """Term -> time of one unit of it."""
    highest: Terms
    """Term -> its largest amount in the models of the fit."""

    @classmethod
    def fit(cls, rows: Sequence[Terms], values: Sequence[float]) -> BlockLatency:
        """Fit non-negative coefficients to the latencies of some models, all above 0.

        The sum of squared relative errors is least, with a ridge penalty (scipy's `nnls`; Lawson
        and Hanson, Solving Least Squares Problems, chapter 23). The penalty is the one in PENALTIES
        with the least leave-one-out error.
        """
        names = sorted({name for row in rows for name, amount in row.items() if amount})
        matrix = np.array([[row.get(name, 0.0) for name in names] for row in rows])
        matrix /= np.array(values)[:, None]
        scales = np.linalg.norm(matrix, axis=0)
        matrix /= scales
        best = min(PENALTIES, key=lambda penalty: _left_out_error(matrix, penalty))
        solution = _solve(matrix, best) / scales
        coefficients = {n: float(c) for n, c in zip(names, solution, strict=True) if c > 0}
        highest = {name: max(row.get(name, 0.0) for row in rows) for name in names}
        return cls(coefficients, highest)

    def predict(self, terms: Terms) -> float:
        """Return the predicted latency of a model, in the unit of the fit."""
        return math.fsum(c * terms.get(name, 0.0) for name, c in self.coefficients.items())

    def beyond(self, terms: Terms) -> list[str]:
        """Return the terms of a model that are larger than in any model of the fit."""
        return [
            name
            for name, amount in terms.items()
            if amount > self.highest.get(name, 0.0) * (1 + 1e-9)
        ]


def _solve(matrix: Array, penalty: float) -> Array:
    """Return the x >= 0 with the least |matrix x - 1|^2 + penalty |x|^2."""
    n_rows, n_columns = matrix.shape
    below = np.sqrt(penalty) * np.eye(n_columns)
    target = np.concatenate((np.ones(n_rows), np.zeros(n_columns)))
    solution: Array = nnls(np.concatenate((matrix, below)), target)[0]
    return solution


def _left_out_error(matrix: Array, penalty: float) -> float:
    """Return the mean squared relative error of rows that the fit leaves out, one at a time."""
    errors = []
    for i in range(len(matrix)):
        solution = _solve(np.delete(matrix, i, axis=0), penalty)
        errors.append(float(matrix[i] @ solution) - 1.0)
    return float(np.square(errors).mean())


def error_bound(errors: Sequence[float], coverage: float) -> tuple[float, float]:
    """Return the bound of the absolute error of a further model, and its coverage.

    `errors` has an error for each of n models outside the fit. The bound is the k-th smallest
    absolute error with k = ceil((n + 1) coverage): A further model of the same distribution lies
    within it with at least this probability, whatever the distribution (split conformal prediction,
    Lei et al., arXiv 1604.04173, section 2.2). Too few models give the largest error, and k / (n +
    1).

    Raises:
        ValueError: without an error.
    """
    ordered = sorted(abs(error) for error in errors)
    if not ordered:
        raise ValueError("no model outside the fit")
    n = len(ordered)
    wanted = math.ceil((n + 1) * coverage - 1e-9)
    k = min(wanted, n)
    return ordered[k - 1], coverage if k == wanted else k / (n + 1)


@dataclass(frozen=True)
class Predicted:
    """The predicted latency of one model."""

    value: float
    """Milliseconds, at the reference time that it was asked for."""
    low: float
    high: float
    """The interval, which has the coverage of the calibration."""
    beyond: tuple[str, ...]
    """Terms that are larger than in any model of the fit: there the interval has no coverage."""


def predicted(
    calibration: Calibration, architecture: Architecture, reference_ms: float | None = None
) -> Predicted:
    """Return the latency of a model by a calibration.

    `reference_ms` is the reference time of a study; None takes the calibration's.
    """
    terms = workload_terms(architecture, calibration.settings)
    sums = BlockLatency(calibration.coefficients, calibration.highest)
    scale = calibration.reference_ms if reference_ms is None else reference_ms
    value = scale * sums.predict(terms)
    return Predicted(value, *calibration.interval(value), tuple(sums.beyond(terms)))
