"""Samplers are built by name, never replay after a restart, and keep away from what is forbidden."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution

from moenas.errors import InputError
from moenas.search import samplers
from moenas.search.samplers import BUILDERS, Setup, derived_seed, make
from moenas.space.sections import SAMPLERS

CONDITIONAL = Setup(seed=7, conditional=True)


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def draw(trial: optuna.Trial) -> tuple[float, float]:
    """A conditional space with two objectives."""
    x = trial.suggest_float("x", 0.0, 1.0)
    kind = trial.suggest_categorical("kind", ["dense", "moe"])
    n = trial.suggest_int(f"{kind}.n", 1, 8)
    return x, (1 - x) ** 2 + 0.1 * n


def proposals(name: str, breaks: tuple[int, ...] = (), trials: int = 24) -> list[dict[str, Any]]:
    """The parameters of a study that is resumed at some trials."""
    study = optuna.create_study(directions=["minimize"] * 2, sampler=make(name, CONDITIONAL, 0))
    for number in range(trials):
        if number in breaks:
            storage, called = study._storage, study.study_name
            study = optuna.load_study(study_name=called, storage=storage, sampler=None)
        study.sampler = make(name, CONDITIONAL, number)
        trial = study.ask()
        values = draw(trial)
        trial.set_constraint("c", -1.0)
        study.tell(trial, values)
    return [t.params for t in study.trials]


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n != "gp"])
def test_a_resumed_study_asks_what_an_uninterrupted_one_asks(name: str) -> None:
    whole = proposals(name)
    assert proposals(name, breaks=(5, 17)) == whole
    assert len({repr(p) for p in whole}) > 20, "a restart, or the next trial, replays candidates"


def test_qmc_draws_what_the_first_trial_lacks_anew_for_each_trial() -> None:
    """The first trial has `dense.n` or `moe.n`, and the other one is no part of the sequence."""
    drawn = proposals("qmc", trials=40)
    lacking = ({"dense.n", "moe.n"} - set(drawn[0])).pop()
    values = [params[lacking] for params in drawn if lacking in params]
    assert len(values) > 10
    assert len(set(values)) > 4


def test_qmc_repeats_no_point_and_leaves_none_out() -> None:
    """Every block of 16 points of a Sobol' sequence has one in each sixteenth of an axis."""
    study = optuna.create_study()
    points = []
    for number in range(17):
        study.sampler = make("qmc", CONDITIONAL, number)
        if number in (5, 9):  # a run that was killed has asked for this trial already
            space = {"x": FloatDistribution(0, 1)}
            study.sampler.sample_relative(study, study.get_trials(deepcopy=False)[-1], space)
        trial = study.ask()
        points.append(trial.suggest_float("x", 0, 1))
        study.tell(trial, 0.0)
    assert sorted(int(16 * x) for x in points[1:]) == list(range(16))


def test_seeds_differ_by_study_and_by_trial() -> None:
    seeds = {derived_seed(seed, trial) for seed in range(20) for trial in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_tpe_keeps_away_from_what_breaks_a_constraint() -> None:
    """Infeasible trials have no values and are PRUNED; the region is left all the same."""
    study = optuna.create_study(directions=["minimize"] * 2)
    broken = []
    for number in range(80):
        study.sampler = make("tpe", CONDITIONAL, number)
        trial = study.ask()
        x, cost = draw(trial)
        # What is good for the first objective is forbidden, so values alone would lead there.
        trial.set_constraint("x is at least 0.6", 0.6 - x)
        broken.append(x < 0.6)
        if broken[-1]:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, [x, cost])
    assert sum(broken[:10]) >= 3, "the first draws are random, 6 of 10 break it"
    assert sum(broken[40:]) <= 10, "of 40; a sampler that does not learn breaks it 24 times"


def test_gp_proposes_after_its_random_start() -> None:
    whole = proposals("gp", trials=12)
    assert len({repr(p) for p in whole}) == 12


def test_the_names_that_a_space_accepts_are_those_that_are_built() -> None:
    assert set(SAMPLERS) == set(BUILDERS)


def test_an_unknown_sampler_gets_a_suggestion() -> None:
    with pytest.raises(InputError, match=r"no sampler 'tpee'\. Did you mean 'tpe'\?"):
        samplers.check("tpee")


def test_a_guest_s_sampler_is_found_by_file_and_class(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from optuna.samplers import RandomSampler\nclass Mine(RandomSampler): pass\n")
    samplers.check(f"{file}:Mine")
    assert type(make(f"{file}:Mine", CONDITIONAL, 3)).__name__ == "Mine"
    with pytest.raises(InputError, match="no class 'Yours' derived from"):
        samplers.check(f"{file}:Yours")
    with pytest.raises(InputError, match="cannot be read"):
        samplers.check(f"{tmp_path}/none.py:Mine")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def __init__(self): super().__init__()", "TypeError: .* is called with a seed"),
        ("def __init__(self, seed): raise SystemExit(0)", "SystemExit: 0"),
    ],
)
def test_a_class_that_cannot_be_made_is_refused(tmp_path: Path, body: str, said: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        f"from optuna.samplers import RandomSampler\nclass Mine(RandomSampler):\n    {body}\n"
    )
    with pytest.raises(InputError, match=rf"mine\.py: Mine\(seed=0\) raised {said}"):
        samplers.check(f"{path}:Mine")
