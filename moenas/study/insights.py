"""Insights of a study: importances of holes, effects of values, growth of the front."""

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
from moenas.predict.level_effects import MIN_CANDIDATES, EvaluatedDraws, drawn_holes, hole_effects
from moenas.predict.rank_agreement import rank_agreements
from moenas.records import Evaluation, FrontPoint, Plain
from moenas.report.seed_report import seed_report
from moenas.search.importance import surrogate_importances
from moenas.store import rungs
from moenas.study.maintenance import stored_space

if TYPE_CHECKING:
    from moenas.space.space import Space
    from moenas.study.launch import Study

GROWTH = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Shares of the evaluated candidates at which the hypervolume is told."""


def insights(study: Study, *, allow_code: bool = False) -> Plain:
    """Return what a study says of its space, as plain data.

    `objectives` has for each objective the importance of each hole and the effects of its values.
    The importance `ped_anova` is Optuna's (Watanabe et al., arXiv 2304.10255). The importance
    `surrogate` is the deviation of the predicted objective while the hole alone takes other values,
    averaged over candidates, in the objective's unit. An effect compares models of equal active
    parameters; see `predict.level_effects`. Objectives that equal a cost have no effects. `rungs`
    has the rank correlation of the losses at each rung with the final ones; see
    `predict.rank_agreement`. `seeds` has the noise between seeds, if finalists were replicated;
    see `predict.seed_noise`.

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
    known = [(params, e.values) for e, params in rows]
    importances = {} if space is None else surrogate_importances(space, known)
    exact = [] if space is None else [o.name for o in space.objectives if o.exact is not None]
    return {
        "study": study.name,
        "evaluations": dict(Counter(e.status for e in view.evaluations if not e.is_copy)),
        "space": _coverage(space, _drawn(view.evaluations, params)),
        "requirements": _requirements(view.evaluations),
        "rungs": _rungs(study),
        "seeds": seed_report(study.store, study.name),
        "front": _growth([point for point in view.history if point.trial in trained]),
        "objectives": {
            name: {
                "importance": _importances(study, rows, name, importances.get(name, {})),
                "effects": [asdict(x) for x in ([] if name in exact else hole_effects(rows, name))],
            }
            for name in (record.directions if len(rows) >= MIN_CANDIDATES else ())
        },
    }


def _space(study: Study) -> Space | None:
    """Return the space of a study; None if files that it names are not here."""
    try:
        return stored_space(study.record)
    except InputError:
        return None


def _drawn(evaluations: Sequence[Evaluation], params: Mapping[int, Plain]) -> list[Plain]:
    """Return the drawn parameters of trials; the one point of a space without holes has none."""
    drawn = [(params.get(e.trial, {}), e.fingerprint) for e in evaluations]
    return [own for own, fingerprint in drawn if own or fingerprint]


def _coverage(space: Space | None, drawn: Sequence[Mapping[str, Any]]) -> Plain:
    """Say how many points the space has, and which share of them was drawn."""
    points = len({repr(sorted(params.items())) for params in drawn})
    size = None if space is None or space.continuous else space.size
    return {"points": size, "drawn": points, "share": points / size if size else None}


def _requirements(evaluations: Sequence[Evaluation]) -> list[Plain]:
    """Return how often each requirement was broken, most often first."""
    broken = Counter(name for e in evaluations for name, by in e.violations.items() if by > 0)
    return [{"requirement": name, "broken": count} for name, count in broken.most_common()]


def _rungs(study: Study) -> list[Plain]:
    """Return how well the losses at each rung rank candidates as the final ones do."""
    results = study.store.rung_results(study.name)
    final = rungs.final_losses(study.store, study.name)
    return [asdict(agreement) for agreement in rank_agreements(results, final).values()]


def _growth(history: Sequence[FrontPoint]) -> list[Plain]:
    """Return the hypervolume after parts of the complete candidates."""
    rows = []
    counts = sorted({math.ceil(share * len(history)) for share in GROWTH}) if history else []
    for count in counts:
        at = history[count - 1]
        last = history[-1].hypervolume
        rows.append(
            {
                "complete": count,
                "members": at.size,
                "hypervolume": at.hypervolume,
                "share": at.hypervolume / last if last else None,
            }
        )
    return rows


# --- importances -------------------------------------------------------------------------------


def _importances(
    study: Study, rows: EvaluatedDraws, objective: str, by_surrogate: Mapping[str, float]
) -> list[Plain]:
    """Return the importances of all holes for an objective, the largest of the surrogate first."""
    by_optuna = _ped_anova(study, objective)
    importances: list[Plain] = [
        {"hole": hole, "ped_anova": by_optuna.get(hole), "surrogate": by_surrogate.get(hole)}
        for hole in drawn_holes(rows)
    ]
    return sorted(importances, key=lambda row: -(row["surrogate"] or row["ped_anova"] or 0.0))


def _ped_anova(study: Study, objective: str) -> dict[str, float]:
    """Return Optuna's importances, as shares that add up to 1."""
    directions = study.record.directions
    index = list(directions).index(objective)
    sign = 1.0 if directions[objective] == "minimize" else -1.0
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of each target, for it cannot see a direction
        importances = evaluator.evaluate(
            study.optuna, target=lambda trial: sign * trial.values[index]
        )
    total = sum(importances.values())
    return {name: value / total for name, value in importances.items()} if total else importances
