"""What `moenas check` prints of a space: its size, its costs, its corpus and some draws."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from moenas.grammar.summary import one_line, short
from moenas.records import Plain, training_flops
from moenas.report.summary import table

if TYPE_CHECKING:
    from moenas.data.corpus import Corpus
    from moenas.space.space import Space

DRAWS, DRAWN_LAYERS = 200, 20_000
"""Random architectures that `check` looks at, and how many layers they have in all."""
SHOWN_DRAWS = 3
SHOWN_POINTS = 10**40
"""From this many points on, their number is told by its digits."""
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
    drawn = [found for found in tries if not isinstance(found, str)]
    refused = Counter(found for found in tries if isinstance(found, str))
    shown = drawn or [space.require_feasible()]
    found: Plain = {
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
        found[name] = values[0] if single else {"min": min(values), "max": max(values)}
    found["corpus"] = description.report(space.data, corpus)
    found["bigram_loss"] = corpus.bigram_loss
    found["tokens_per_parameter"] = _tokens_per_parameter(space, costs)
    found["notes"] = [
        *_epochs(space, corpus, costs),
        *without_effect(space.tree),
        *notes(space, corpus),
        *room(space, shown),
    ]
    found["draws"] = [
        {**{name: cost[name] for name in COSTS}, "architecture": one_line(architecture.plain())}
        for cost, architecture in zip(costs, shown[:SHOWN_DRAWS], strict=False)
    ]
    return found


def _binding(space: Space, n_draws: int) -> str | None:
    """Say which requirement binds, where nearly all draws are infeasible."""
    from moenas.space.feasibility import binding

    found = binding(space, n_draws)
    return None if found is None else str(found)


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


def check_text(found: Plain) -> str:
    """Lay out what `check_report` found."""
    from moenas.data.description import line as corpus_line

    points = found["points"]
    if isinstance(points, int):
        more = f" ({about(points)})" if points >= 10**9 else ""
        points = f"{points:,} points{more}"
    else:
        points = f"{points} points"
    if found["continuous"]:
        points += f" times {found['continuous']} continuous ranges"
    lines = [f"{found['name']}: valid; {points}, {len(found['holes'])} holes"]
    lines.append(f"objectives: {', '.join(found['objectives'])}")
    context = f"FLOPs at a context of {found['context']} tokens"
    if not isinstance(found["params"], dict):
        lines += [f"{name}: {found[name]:,}" for name in COSTS]
        lines[-1] += f" ({context})"
    else:
        lines.append(f"{found['feasible']} of {found['drawn']} random draws are feasible")
        lines += [f"  refused {n} times: {text}" for text, n in list(found["refused"].items())[:5]]
        lines += [f"  {found['binding']}"] if found["binding"] else []
        if found["feasible"]:
            lines.append(f"over the feasible draws ({context}):")
        else:
            lines.append(f"of the first feasible one that further draws gave ({context}):")
        for name in COSTS:
            low, high = found[name]["min"], found[name]["max"]
            lines.append(f"  {name:<16} {short(low):>7} to {short(high)}")
    lines.append(corpus_line(found["corpus"]))
    ratio = found["tokens_per_parameter"]
    if ratio is not None and ratio["max"] < COMPUTE_OPTIMAL:
        lines.append(
            f"training: {ratio['min']:.2g} to {ratio['max']:.2g} tokens for each active parameter;"
            f" compute-optimal training of dense models takes {COMPUTE_OPTIMAL} (Hoffmann et al.,"
            " 2022)"
        )
    if found["bigram_loss"] is not None:
        loss = found["bigram_loss"]
        lines.append(f"a bigram of the corpus has a held-out loss of {loss:.4g} nats a token")
    lines += found["notes"]
    lines += ["for example:", table(found["draws"])]
    return "\n".join(lines)
