"""The fit of a space: one width, solved after each draw so that the cost is the target."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from moenas.errors import SpaceError
from moenas.grammar.nodes import Fit, Tree, fits
from moenas.grammar.sampling import Answers, drawn
from moenas.model.architecture import Architecture
from moenas.records import Cost


def read_one_fit(tree: Tree) -> Fit | None:
    """Return the fit of a space, or None.

    Raises:
        SpaceError: at a second fit. One in a named layer is one fit in all its uses.
    """
    first: Fit | None = None
    for fit in fits(tree):
        if first is not None and fit.mark != first.mark:
            raise SpaceError(
                f"a second fit, beside the fit of {first.path}; a space has one: give a number or a"
                " range here",
                location=fit.mark,
                path=fit.path,
            )
        first = fit
    return first


def fit_cost(fit: Fit, cost: Cost) -> int:
    """Return the cost that a fit is about."""
    return cost.plain()["params" if fit.cost == "total_params" else fit.cost]


def solve(tree: Tree, fit: Fit, answers: Answers, cost_of: Callable[[Architecture], Cost]) -> None:
    """Set the width of the fit to the one whose cost is nearest to the target.

    The cost grows with the width. So doubling and bisection find the first width that reaches the
    target. This width or the one before it is the nearest. A draw without the field stays as it is.

    Raises:
        SpaceError: if the fields do not go together at a width that is tried.
    """

    def amount(n: int) -> int:
        answers.fitted = n * fit.step
        return fit_cost(fit, cost_of(cast(Architecture, drawn(tree, answers))))

    least, most = fit.low // fit.step, fit.high // fit.step
    first = amount(least)
    if not answers.has_fit or first >= fit.target:
        return
    below, above = least, min(2 * least, most)
    while above < most and amount(above) < fit.target:
        below, above = above, min(2 * above, most)
    # The cost at `below` is under the target, and that at `above` reaches it or is the largest.
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if amount(middle) < fit.target else (below, middle)
    under, over = fit.target - amount(below), abs(amount(above) - fit.target)
    answers.fitted = (below if under <= over else above) * fit.step
