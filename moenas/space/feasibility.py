"""The binding requirement: it makes most draws of a space infeasible."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moenas.errors import SpaceError
from moenas.grammar.sampling import RandomSuggest

if TYPE_CHECKING:
    from moenas.space.space import Space

RARE = 0.1
"""Share of feasible draws below which the requirement that binds is named."""


@dataclass(frozen=True)
class Binding:
    """The requirement that binds, over some draws."""

    text: str
    """The requirement, or the target of a fit."""
    drawn: int
    """Draws whose fields go together."""
    breaking: int
    """Draws that break the requirement."""
    alone: int
    """Draws that break no other requirement: they would be feasible without it."""
    nearest: float
    """The smallest violation: the difference of the sides over the larger one."""
    hint: str = ""
    """For a fit: the width and the cost of the nearest draw."""

    def __str__(self) -> str:
        message = (
            f"the requirement that binds is {self.text}: {self.breaking} of {self.drawn} draws"
            f" break it, {self.alone} of them break no other; the nearest misses it by"
            f" {100 * self.nearest:.2g}%"
        )
        return f"{message} ({self.hint})" if self.hint else message


def binding(space: Space, n_draws: int) -> Binding | None:
    """Return the requirement that binds over `n_draws` random draws; None if none is broken.

    It is the one without which most draws become feasible; if there is no such draw, the one that
    most draws break.
    """
    breaking, alone = Counter[str](), Counter[str]()
    nearest: dict[str, tuple[float, int]] = {}
    drawn = 0
    for seed, broken in _broken(space, n_draws):
        drawn += 1
        breaking.update(broken.keys())
        alone.update(broken.keys() if len(broken) == 1 else ())
        for text, amount in broken.items():
            nearest[text] = min(nearest.get(text, (amount, seed)), (amount, seed))
    if not breaking:
        return None
    text = max(breaking, key=lambda name: (alone[name], breaking[name]))
    amount, seed = nearest[text]
    fitted = space.fit is not None and text == space.fit.text
    hint = space.missed_fit(RandomSuggest(seed)).removeprefix(f"{text}: ") if fitted else ""
    return Binding(text, drawn, breaking[text], alone[text], amount, hint)


def _broken(space: Space, n_draws: int) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield the seed of each draw that goes together, and the requirements that it breaks."""
    for seed in range(n_draws):
        try:
            architecture = space.drawn(RandomSuggest(seed))
        except SpaceError:
            continue
        violations = space.violations(architecture)
        yield seed, {text: amount for text, amount in violations.items() if amount > 0}
