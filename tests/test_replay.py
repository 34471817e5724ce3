"""The recorded table, and the simulation that compares search methods on it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from replay.effects import expected
from replay.methods import Random, Stopping
from replay.rivals import OptunaMethod, RayTuneMethod, SyneTuneMethod
from replay.simulate import FREE_REPEATS, Method, Proposal, Simulation
from replay.table import COSTS, FOLDER, RUNGS, Table, save, write

from moenas import Space
from moenas.model.architecture import Architecture
from moenas.search.neighbours import point


@pytest.fixture(scope="module")
def space() -> Space:
    return Space.load(FOLDER / "space.yaml", ["objectives=[val_loss, flops_per_token]"])


def made_up(space: Space, count: int) -> tuple[Table, list[dict[str, Any]]]:
    """A table of different architectures, whose losses fall at each rung; and their points."""
    points = {
        p.architecture.fingerprint: p for seed in range(9 * count) if (p := point(space, seed))
    }
    chosen = dict(list(points.items())[:count])
    rows = [
        {"fingerprint": key, "seed": 0}
        | {"flops_per_token": space.cost(p.architecture).flops_per_token}
        | {f"loss_{rung}": 3.0 - rung / 10 for rung in range(1, RUNGS + 1)}
        for key, p in chosen.items()
    ]
    return Table(pd.DataFrame(rows), tokens=10), [p.params for p in chosen.values()]


def test_latencies_stay_when_the_table_is_written_again(space: Space, tmp_path: Path) -> None:
    table, _ = made_up(space, 3)
    rows, file = table.rows.assign(trial=range(3)), tmp_path / "table.parquet"
    write(rows.to_dict("records"), {"train": {"tokens": 10}}, file)
    timed = pd.read_parquet(file).assign(decode_ratio=[0.5, float("nan"), 0.7], decode_spread=0.02)
    timed.attrs["latency"] = {"device": {"name": "some CPU"}}
    save(timed, file)
    write(rows[::-1].to_dict("records"), {"train": {"tokens": 20}}, file)
    again = pd.read_parquet(file)
    assert again.attrs == {"train": {"tokens": 20}, "latency": {"device": {"name": "some CPU"}}}
    pd.testing.assert_frame_equal(again, timed)


def test_the_digest_of_a_table_is_of_what_a_replay_reads(space: Space) -> None:
    table, _ = made_up(space, 3)
    costs = dict.fromkeys(COSTS, 1.0) | {"flops_per_token": table.rows["flops_per_token"]}
    whole = table.rows.assign(**costs)
    same, other = whole.assign(decode_ratio=0.5), whole.assign(loss_1=2.0)
    digest = Table(whole, 10).digest()
    assert Table(same, 10).digest() == digest != Table(other, 10).digest()


class Listed(Random):
    """Proposes given points in order, and stops each candidate at a rung."""

    def __init__(self, points: list[dict[str, Any]], last_rung: int = RUNGS) -> None:
        self.points, self.last_rung = points, last_rung
        self.asked = 0
        self.told: dict[int, Mapping[str, float]] = {}

    def ask(self) -> Proposal | None:
        if self.asked == len(self.points):
            return None
        self.asked += 1
        return Proposal(self.asked - 1, self.points[self.asked - 1])

    def goes_on(self, number: int, rung: int, values: Mapping[str, float]) -> bool:
        assert values["val_loss"] == pytest.approx(3.0 - rung / 10)
        return rung < self.last_rung

    def tell(self, number: int, values: Mapping[str, float]) -> None:
        self.told[number] = values


def test_every_row_is_its_architecture_with_falling_losses() -> None:
    table = Table.load()
    assert table.rows.attrs["train"]["tokens"] == 98_304
    rows = table.rows
    assert not rows.duplicated(["fingerprint", "seed"]).any()
    assert rows.groupby("seed")["fingerprint"].nunique().to_dict() == {0: 983, 1: 99, 2: 99}
    assert set(rows["fingerprint"]) == set(rows.loc[rows["seed"] == 0, "fingerprint"])
    assert rows["decode_ratio"].between(0.1, 2.0).all()
    assert rows["decode_spread"].between(0.0, 0.05).all()
    for row in table.rows.sample(20, random_state=0).to_dict("records"):
        architecture = Architecture.parse(json.loads(row["architecture"]))
        assert architecture.fingerprint == row["fingerprint"]
        cost = architecture.cost(128)
        assert (cost.params, cost.flops_per_token) == (row["params"], row["flops_per_token"])
        losses = table.losses(row["fingerprint"])
        assert losses[0] > losses[3] > losses[-1] > 1.0


def test_the_loss_of_an_architecture_is_the_mean_over_its_seeds() -> None:
    table = Table.load()
    repeated = table.rows.loc[table.rows["seed"] == 2, "fingerprint"]
    for key in repeated.sample(10, random_state=0):
        losses = [float(table.row(key, seed)[f"loss_{RUNGS}"]) for seed in range(3)]
        assert len(set(losses)) == 3
        assert table.mean_loss(key) == pytest.approx(sum(losses) / 3)


def test_one_worker_ends_each_candidate_at_the_sum_of_the_flops(space: Space) -> None:
    table, points = made_up(space, 5)
    method = Listed(points)
    progress = Simulation(table, space, method, workers=1).run(budget=1e18)
    flops = [table.training_flops(key) for _, key in progress.found]
    assert [spent for spent, _ in progress.found] == pytest.approx(np.cumsum(flops))
    assert [method.told[i]["val_loss"] for i in range(5)] == pytest.approx([2.2] * 5)


def test_a_stopped_candidate_costs_its_rungs_and_is_not_found(space: Space) -> None:
    table, points = made_up(space, 3)
    run = Simulation(table, space, Listed(points, last_rung=2), workers=1)
    assert run.run(budget=1e18).found == []
    assert run._spent == pytest.approx(sum(table.rows["flops_per_token"]) * 3 * 10 * 2 / RUNGS)


def test_a_repeat_costs_nothing_and_is_told(space: Space) -> None:
    table, points = made_up(space, 2)
    method = Listed([points[0], points[0], points[1], points[0]])
    progress = Simulation(table, space, method, workers=2).run(budget=1e18)
    assert (progress.started, progress.repeats, len(method.told)) == (2, 2, 4)
    assert progress.found[-1][0] == pytest.approx(
        sum(table.training_flops(key) for _, key in progress.found)
    )


def test_a_worker_whose_method_repeats_itself_trains_a_random_architecture(space: Space) -> None:
    table, points = made_up(space, 4)
    repeats = [points[0]] * (FREE_REPEATS + 10)
    method = Listed([*points[:2], *repeats])
    progress = Simulation(table, space, method, workers=3).run(budget=1e18)
    assert (progress.started, progress.filled) == (4, 2)
    assert {key for _, key in progress.found} == set(table.rows["fingerprint"])
    assert len(method.told) == 2 + progress.repeats


def test_without_the_cache_a_repeat_is_trained_again(space: Space) -> None:
    table, points = made_up(space, 2)
    method = Listed([points[0], points[0], points[1], points[0]])
    progress = Simulation(table, space, method, workers=2, cache=False).run(budget=1e18)
    assert (progress.started, progress.repeats, len(method.told)) == (4, 2, 4)
    flops = [table.training_flops(key) for _, key in progress.found]
    assert len(flops) == 4
    assert progress.found[-1][0] == pytest.approx(sum(flops))


@pytest.mark.parametrize("method", [Random, Stopping, OptunaMethod, RayTuneMethod, SyneTuneMethod])
def test_a_method_has_what_the_simulation_calls(method: type[Method]) -> None:
    for name in ("ask", "goes_on", "resumed", "tell"):
        wanted, has = (inspect.signature(getattr(cls, name)) for cls in (Method, method))
        assert list(has.parameters) == list(wanted.parameters)


def test_no_stored_curve_is_above_the_limit() -> None:
    results = json.loads((FOLDER.parent / "results" / "search.json").read_text())
    for run in results["runs"]:
        limit = np.array(results["limits"][str(run["workers"])])
        assert (np.array(run["curve"]) <= limit + 1e-4).all(), run["method"]


def test_the_judge_averages_noise_away() -> None:
    rng = np.random.default_rng(0)
    points = [
        {"a": a, "b": b, "c": c, "d": d}
        for a in range(5) for b in range(5) for c in range(5) for d in range(5)
    ]  # fmt: skip
    truth = np.array([0.1 * p["a"] - 0.05 * p["b"] + 0.03 * p["a"] * (p["c"] == 2) for p in points])
    estimates, error = expected(points, truth + rng.normal(0, 0.05, len(points)))
    assert error == pytest.approx(0.05, rel=0.25)
    assert np.sqrt(np.mean((estimates - truth) ** 2)) < 0.025
