"""The front of a study: its members as rows, and how their numbers were measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moenas.grammar.summary import one_line, short
from moenas.pareto import is_exact
from moenas.records import Evaluation, Plain, View
from moenas.report.seed_report import caption, seed_report, with_seeds
from moenas.report.summary import bigram_loss, cell, spans
from moenas.store.row_readers import FrontView, as_front

if TYPE_CHECKING:
    from moenas.store.store import Store


def front_report(store: Store, name: str) -> Plain:
    """Return the front of a study, best first objective first, and how it was measured."""
    view, seeds = store.front_view(name), seed_report(store, name)
    return {
        "study": view.study.name,
        "directions": view.study.directions,
        "hypervolume": view.summary.hypervolume,
        "reference_point": view.study.reference_point,
        "members": [
            {
                "trial": evaluation.trial,
                "values": {o["name"]: evaluation.values[o["name"]] for o in view.study.objectives},
                "params": evaluation.cost.get("params", 0),
                "active_params": evaluation.cost.get("active_params", 0),
                "fingerprint": evaluation.fingerprint,
                "has_weights": evaluation.weights_sha256 is not None,
                "architecture": view.architectures[evaluation.trial],
            }
            for evaluation in view.members
        ],
        "caption": [*front_caption(view), *caption(seeds)],
        "seeds": seeds,
    }


def front_rows(front: Plain, *, short_form: bool = False) -> list[Plain]:
    """Return one row for each member of `front_report`.

    In the short form counts and the architecture take a few characters each. A study with
    replicates has their columns as well.
    """
    rows: list[Plain] = []
    for member in front["members"]:
        row: Plain = {"trial": member["trial"], **member["values"]}
        if short_form:
            row |= {"params": short(member["params"]), "active": short(member["active_params"])}
            row |= {"architecture": one_line(member["architecture"])}
        else:
            row |= {key: member[key] for key in ("params", "active_params", "fingerprint")}
            row |= {"architecture": member["architecture"]}
        rows.append(row)
    return with_seeds(rows, front["seeds"], short_form=short_form)


def front_caption(view: View | FrontView) -> list[str]:
    """Say how the numbers of a front were measured."""
    view = as_front(view)
    done, name = view.summary.counts.get("complete", 0), view.study.name
    lines = [f"{len(view.members)} of {done} complete trials are on the front of '{name}'"]
    units = [f"{o['name']} in {o['unit']}" for o in view.study.objectives if o["unit"]]
    lines += [", ".join(units)] if view.members and units else []
    loss = bigram_loss(view.summary)
    if loss is not None and view.members:
        lines.append(
            f"a bigram, which knows only the previous token, has a held-out loss of {loss:.4g} nats"
        )
    if view.members and not is_exact(len(view.study.objectives)):
        volume = cell(view.summary.hypervolume)
        lines.append(f"hypervolume {volume}, approximate as for all of more than 5 objectives")
    ahead = [e.trial for e in view.members if looks_ahead(e)]
    if ahead:
        lines.append(
            f"not causal (`allow_acausal`), so their losses are not comparable: {spans(ahead)}"
        )
    if view.summary.devices:
        lines.append(f"measured on {', '.join(view.summary.devices)}")
    return lines


def looks_ahead(evaluation: Evaluation) -> bool:
    """Whether a model was given leave to look at later tokens, so that its loss means little."""
    return evaluation.metrics.get("causal") == 0
