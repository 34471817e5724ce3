"""Fill a table that is not complete yet: predicted losses for the points that were not trained.

A Gaussian process for each rung predicts the loss, and the residual of a recorded row stands for
the noise. A benchmark says which share of its table is predicted.
"""

from __future__ import annotations

import random

import numpy as np
import pandas as pd
from replay.table import COSTS, RUNGS, Table

from moenas import Space
from moenas.grammar.enumeration import enumerate_points
from moenas.predict.features import Encoder, features
from moenas.predict.surrogate import Surrogate
from moenas.search.neighbours import held_point


def filled(table: Table, space: Space) -> tuple[Table, float]:
    """Return the table with a row for every point of the space, and the predicted share."""
    points = [held_point(space, params) for params in enumerate_points(space.tree, 20_000)]
    architectures = {p.architecture.fingerprint: p.architecture for p in points if p is not None}
    costs = {key: space.cost(one) for key, one in architectures.items()}
    rows = {key: features(one, costs[key]) for key, one in architectures.items()}
    encoder = Encoder(list(rows.values()))
    known = [key for key in architectures if key in table]
    missing = [key for key in architectures if key not in table]
    if not missing:
        return table, 0.0
    x = encoder.encode([rows[key] for key in known])
    wanted = encoder.encode([rows[key] for key in missing])
    losses = np.array([table.losses(key) for key in known])
    predicted, residuals = np.empty((len(missing), RUNGS)), np.empty_like(losses)
    for rung in range(RUNGS):
        surrogate = Surrogate(x, losses[:, rung])
        predicted[:, rung] = surrogate.predict(wanted)[0]
        residuals[:, rung] = losses[:, rung] - surrogate.predict(x)[0]
    draw = random.Random(0)
    noisy = predicted + residuals[[draw.randrange(len(known)) for _ in missing]]
    added = [
        {"fingerprint": key, "seed": 0, "trial": -1, "train_loss": float(loss[-1])}
        | {name: getattr(costs[key], name) for name in COSTS}
        | {f"loss_{rung}": float(value) for rung, value in enumerate(loss, 1)}
        for key, loss in zip(missing, noisy, strict=True)
    ]
    both = pd.concat([table.rows, pd.DataFrame(added)], ignore_index=True)
    return Table(both, table.tokens), len(missing) / len(architectures)
