"""What a study says of its space: importances of holes, effects of values, growth of the front."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import optuna

from moenas.errors import InputError
from moenas.grammar import user_parts
from moenas.predict.effects import LevelEffect, level_effects, named_levels
from moenas.records import Evaluation, FrontPoint, Plain
from moenas.search.importance import surrogate_importances
from moenas.study.maintenance import stored_space

if TYPE_CHECKING:
    from moenas.space.space import Space
    from moenas.study.launch import Study

MIN_COMPLETE = 8
"""Complete candidates that importances and effects need at least."""
GROWTH = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Shares of the evaluated candidates at which the hypervolume is told."""


def insights(study: Study, *, allow_code: bool = False) -> Plain:
    """Return what a study says of its space, as plain data.

    `objectives` has for each objective the importance of each hole and the effects of its values.
    The importance `ped_anova` is Optuna's (Watanabe et al., arXiv 2304.10255). The importance
    `surrogate` is the deviation of the predicted objective while the hole alone takes other values,
    averaged over candidates, in the objective's unit. An effect compares models of equal active
    parameters; see `predict.effects`. Objectives that equal a cost have no effects.

    Raises:
        InputError: if the study needs Python files that are neither allowed nor here.
    """
    record, view = study.record, study.view
    user_parts.load_stored(record.space, allow_code=allow_code)
    params = {t.number: t.params for t in study.optuna.get_trials(deepcopy=False)}
    own = [e for e in view.evaluations if e.status == "complete" and not e.is_copy]
    trained = {e.trial for e in own}
    rows = [(e, params[e.trial]) for e in own if params.get(e.trial)]
    space = _space(study)
    exact = [] if space is None else [o.name for o in space.objectives if o.exact is not None]
    return {
        "study": study.name,
        "evaluations": dict(Counter(e.status for e in view.evaluations if not e.is_copy)),
        "space": _coverage(space, [params.get(e.trial, {}) for e in view.evaluations]),
        "requirements": _requirements(view.evaluations),
        "front": _growth([point for point in view.history if point.trial in trained]),
        "objectives": {
            name: {
                "importance": _importances(study, space, rows, name),
                "effects": [] if name in exact else _effects(rows, name),
            }
            for name in (record.directions if len(rows) >= MIN_COMPLETE else ())
        },
    }


Rows = Sequence[tuple[Evaluation, Mapping[str, Any]]]
"""Complete candidates, each with its drawn parameters."""


def _space(study: Study) -> Space | None:
    """Return the space of a study; None if files that it names are not here."""
    try:
        return stored_space(study.record)
    except InputError:
        return None


def _coverage(space: Space | None, drawn: Sequence[Mapping[str, Any]]) -> Plain:
    """Say how many points the space has, and which share of them was drawn."""
    points = len({repr(sorted(params.items())) for params in drawn if params})
    size = None if space is None or space.continuous else space.size
    return {"points": size, "drawn": points, "share": points / size if size else None}


def _requirements(evaluations: Sequence[Evaluation]) -> list[Plain]:
    """Return how often each requirement was broken, most often first."""
    broken = Counter(name for e in evaluations for name, by in e.violations.items() if by > 0)
    return [{"requirement": name, "broken": count} for name, count in broken.most_common()]


def _growth(history: Sequence[FrontPoint]) -> list[Plain]:
    """Return the hypervolume after parts of the complete candidates."""
    found = []
    for share in GROWTH if history else ():
        at = history[math.ceil(share * len(history)) - 1]
        last = history[-1].hypervolume
        found.append(
            {
                "complete": math.ceil(share * len(history)),
                "members": at.size,
                "hypervolume": at.hypervolume,
                "share": at.hypervolume / last if last else None,
            }
        )
    return found


# --- effects -----------------------------------------------------------------------------------


def _effects(rows: Rows, objective: str) -> list[Plain]:
    """Return the effect of each level of each hole on an objective."""
    found = []
    for hole in _holes(rows):
        there = [(e, params[hole]) for e, params in rows if hole in params]
        levels = named_levels([value for _, value in there])
        if len(there) < MIN_COMPLETE or len(set(levels)) < 2:
            continue
        values = [e.values[objective] for e, _ in there]
        sizes = [float(e.cost.get("active_params", 1)) for e, _ in there]
        effects = level_effects(values, sizes, levels)
        found += [{"hole": hole, **asdict(effect)} for effect in sorted(effects, key=_order)]
    return found


def _order(effect: LevelEffect) -> tuple[float, str]:
    """Order levels that are numbers by their size, others by name."""
    try:
        return float(effect.level.split(" to ")[0]), ""
    except ValueError:
        return math.inf, effect.level


def _holes(rows: Rows) -> list[str]:
    """Return the holes that any candidate has, in the order of the space."""
    return list(dict.fromkeys(hole for _, params in rows for hole in params))


# --- importances -------------------------------------------------------------------------------


def _importances(study: Study, space: Space | None, rows: Rows, objective: str) -> list[Plain]:
    """Return the importances of all holes for an objective, the largest of the surrogate first."""
    by_optuna = _ped_anova(study, objective)
    by_surrogate = dict[str, float]()
    if space is not None:
        known = [(params, e.values[objective]) for e, params in rows]
        by_surrogate = surrogate_importances(space, known, objective)
    found: list[Plain] = [
        {"hole": hole, "ped_anova": by_optuna.get(hole), "surrogate": by_surrogate.get(hole)}
        for hole in _holes(rows)
    ]
    return sorted(found, key=lambda row: -(row["surrogate"] or row["ped_anova"] or 0.0))


def _ped_anova(study: Study, objective: str) -> dict[str, float]:
    """Return Optuna's importances, as shares that add up to 1."""
    directions = study.record.directions
    index = list(directions).index(objective)
    sign = 1.0 if directions[objective] == "minimize" else -1.0
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of each target, for it cannot see a direction
        found = evaluator.evaluate(study.optuna, target=lambda trial: sign * trial.values[index])
    total = sum(found.values())
    return {name: value / total for name, value in found.items()} if total else found
