"""The output of `moenas check` on a space: its size, its costs, its corpus and some draws."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from moenas.grammar.summary import counted, one_line, short
from moenas.records import Plain, training_flops
from moenas.report.summary import table

if TYPE_CHECKING:
    from moenas.data.corpus import Corpus
    from moenas.space.space import Space

DRAWS, DRAWN_LAYERS = 200, 20_000
"""Random architectures that `check` looks at, and how many layers they have in all."""
SHOWN_DRAWS = 3
SHOWN_POINTS = 10**40
"""From this many points on, the number of digits is printed in place of the number."""
COSTS = ("params", "active_params", "flops_per_token")
COMPUTE_OPTIMAL = 20
"""Tokens a parameter of compute-optimal dense models: Hoffmann et al., 2022, arXiv 2203.15556,
section 3."""


def check_report(space: Space, n_draws: int | None = None) -> Plain:
    """Describe a space by exact counts and by `n_draws` random architectures.

    None draws DRAWS, or fewer where they have more than DRAWN_LAYERS layers in all.

    A space of one point gives its exact costs as plain integers; others give {min, max} over the
    drawn architectures that meet every requirement.

    Raises:
        SpaceError: if none of 1000 drawn architectures is valid and meets the requirements.
        DataError: if the corpus cannot be read, or the space cannot be trained on it.
    """
    from moenas.data import description
    from moenas.evaluate.matching import notes, open_corpus, room
    from moenas.grammar.counting import most_layers
    from moenas.space.effects import without_effect
    from moenas.space.feasibility import RARE

    if n_draws is None:
        n_draws = max(1, min(DRAWS, DRAWN_LAYERS // max(1, most_layers(space.tree))))
    corpus = open_corpus(space)
    single = space.size == 1 and space.continuous == 0
    tries = list(space.feasible(1 if single else n_draws))
    drawn = [draw for draw in tries if not isinstance(draw, str)]
    refused = Counter(draw for draw in tries if isinstance(draw, str))
    shown = drawn or [space.require_feasible()]
    checked: Plain = {
        "name": space.name,
        "valid": True,
        "points": space.size if space.size < SHOWN_POINTS else about(space.size),
        "continuous": space.continuous,
        "holes": [hole.name for hole in space.holes],
        "objectives": [o.name for o in space.objectives],
        "context": space.train.context,
        "drawn": 1 if single else n_draws,
        "feasible": len(drawn),
        "refused": dict(refused.most_common()),
        "binding": None if len(drawn) >= RARE * len(tries) else _binding(space, n_draws),
    }
    costs = [space.cost_record(architecture) for architecture in shown]
    for name in costs[0]:
        values = [cost[name] for cost in costs]
        checked[name] = values[0] if single else {"min": min(values), "max": max(values)}
    checked["corpus"] = description.report(space.data, corpus)
    checked["bigram_loss"] = corpus.bigram_loss
    checked["tokens_per_parameter"] = _tokens_per_parameter(space, costs)
    checked["notes"] = [
        *_epochs(space, corpus, costs),
        *without_effect(space.tree),
        *notes(space, corpus),
        *room(space, shown),
    ]
    checked["draws"] = [
        {**{name: cost[name] for name in COSTS}, "architecture": one_line(architecture.plain())}
        for cost, architecture in zip(costs, shown[:SHOWN_DRAWS], strict=False)
    ]
    return checked


def _binding(space: Space, n_draws: int) -> str | None:
    """Say which requirement binds, where nearly all draws are infeasible."""
    from moenas.space.feasibility import binding

    binding_requirement = binding(space, n_draws)
    return None if binding_requirement is None else str(binding_requirement)


def about(count: int) -> str:
    """Say how many digits a number has: about 10^384."""
    return f"about 10^{int(math.log10(count))}"


def _tokens_per_parameter(space: Space, costs: list[dict[str, int]]) -> Plain | None:
    """Return training tokens over active parameters, the range over some costs."""
    if all(objective.needs != "training" for objective in space.objectives):
        return None
    recipe = space.train
    if recipe.has_time_budget:
        return None
    ratios = [
        recipe.for_candidate(int(training_flops(cost))).tokens / max(1, cost["active_params"])
        for cost in costs
    ]
    return {"min": min(ratios), "max": max(ratios)}


def _epochs(space: Space, corpus: Corpus, costs: list[dict[str, int]]) -> list[str]:
    """Say how often training reads the corpus at most, if a budget decides it."""
    recipe = space.train
    if recipe.budget is None or recipe.has_time_budget:
        return []
    most = max(recipe.for_candidate(int(training_flops(cost))).tokens for cost in costs)
    if most <= len(corpus.train):
        return []
    return [
        f"data: up to {most:,} tokens of training are drawn from {len(corpus.train):,}: each is"
        f" seen up to {most / len(corpus.train):.1f} times"
    ]


def check_text(checked: Plain) -> str:
    """Lay out what `check_report` found."""
    from moenas.data.description import line as corpus_line

    points = checked["points"]
    if isinstance(points, int):
        more = f" ({about(points)})" if points >= 10**9 else ""
        points = f"{counted(points, 'point')}{more}"
    else:
        points = f"{points} points"
    if checked["continuous"]:
        points += f" times {checked['continuous']} continuous ranges"
    lines = [f"{checked['name']}: valid; {points}, {counted(len(checked['holes']), 'hole')}"]
    lines.append(f"objectives: {', '.join(checked['objectives'])}")
    context = f"FLOPs at a context of {checked['context']} tokens"
    if not isinstance(checked["params"], dict):
        lines += [f"{name}: {checked[name]:,}" for name in COSTS]
        lines[-1] += f" ({context})"
    else:
        lines.append(f"{checked['feasible']} of {checked['drawn']} random draws are feasible")
        lines += [
            f"  refused {n} times: {text}" for text, n in list(checked["refused"].items())[:5]
        ]
        lines += [f"  {checked['binding']}"] if checked["binding"] else []
        if checked["feasible"]:
            lines.append(f"over the feasible draws ({context}):")
        else:
            lines.append(f"of the first feasible one that further draws gave ({context}):")
        for name in COSTS:
            low, high = checked[name]["min"], checked[name]["max"]
            lines.append(f"  {name:<16} {short(low):>7} to {short(high)}")
    lines.append(corpus_line(checked["corpus"]))
    ratio = checked["tokens_per_parameter"]
    if ratio is not None and ratio["max"] < COMPUTE_OPTIMAL:
        lines.append(_training(ratio))
    if checked["bigram_loss"] is not None:
        loss = checked["bigram_loss"]
        lines.append(f"a bigram of the corpus has a held-out loss of {loss:.4g} nats a token")
    lines += checked["notes"]
    lines += ["for example:", table(checked["draws"])]
    return "\n".join(lines)


def _training(ratio: Plain) -> str:
    """Return the line on the training tokens of a parameter, beside those that are usual."""
    low, high = (f"{ratio[end]:.2g}" for end in ("min", "max"))
    return (
        f"training: {low if low == high else f'{low} to {high}'} tokens for each active parameter;"
        f" compute-optimal training of dense models takes {COMPUTE_OPTIMAL} (Hoffmann et al., 2022)"
    )
