"""Run a search method on the recorded table, in simulated time, with any number of workers."""

from __future__ import annotations

import heapq
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from replay.table import RUNGS, Table

from moenas import Space
from moenas.search.neighbours import point

Params = dict[str, Any]
FREE_REPEATS = 50
"""Repeated proposals in a row that cost nothing. After them each worker asks only once."""


@dataclass(frozen=True)
class Proposal:
    """A candidate that a method wants to train."""

    number: int
    """The method's own number of the candidate."""
    params: Params
    """Hole -> value."""


class Method(Protocol):
    """A search method: a sampler, and its decisions at the rungs."""

    def ask(self) -> Proposal | None:
        """Propose a candidate; None if it has none now."""

    def goes_on(self, number: int, rung: int, values: Mapping[str, float]) -> bool:
        """Decide at a rung before the last; a candidate that does not go on frees its worker."""

    def resumed(self, *, at_end: bool) -> int | None:
        """Return a candidate that did not go on and trains on now; None if there is none.

        `at_end`: the method has no more proposals.
        """

    def tell(self, number: int, values: Mapping[str, float]) -> None:
        """Take in the values of a candidate that is trained to its end."""


class TrainsToTheEnd:
    """A method, or a part of one, that stops no candidate."""

    def goes_on(self, number: int, rung: int, values: Mapping[str, float]) -> bool:
        """Go on at every rung."""
        return True

    def resumed(self, *, at_end: bool) -> int | None:
        """Resume nothing."""
        return None


@dataclass
class Progress:
    """What a run has found."""

    found: list[tuple[float, str]] = field(default_factory=list)
    """Compute at the end of each candidate that is trained to its end, and its fingerprint."""
    started: int = 0
    """Candidates that were begun."""
    repeats: int = 0
    """Proposals of architectures that were proposed before."""
    filled: int = 0
    """Candidates that were drawn at random because the method repeated itself."""


class Simulation:
    """One run: workers that are always busy, a clock, and a method.

    Compute is training FLOPs. All workers have one speed, so the time of a candidate is its FLOPs.
    A repeated proposal of a finished or running architecture costs nothing, but without the `cache`
    it is trained again. A worker whose method repeats itself trains a new architecture, drawn at
    random. The method learns its values once it proposes that architecture.
    """

    def __init__(
        self,
        table: Table,
        space: Space,
        method: Method,
        workers: int,
        *,
        seed: int = 0,
        cache: bool = True,
    ) -> None:
        self.table, self.space, self.method, self.workers = table, space, method, workers
        self.progress, self._cache = Progress(), cache
        self._spent, self._now = 0.0, 0.0
        self._events: list[tuple[float, int, Proposal | None, str, int]] = []
        """End of a rung, tie break, candidate, fingerprint, rung. None for one drawn at random."""
        self._count = 0
        self._values: dict[str, Mapping[str, float]] = {}
        """Fingerprint -> values of the candidates that are trained to their end."""
        self._paused: dict[int, tuple[Proposal, str, int]] = {}
        """Candidate that did not go on -> what `_push` needs to train it on."""
        self._waiting: dict[str, list[int]] = {}
        """Fingerprint of a running candidate -> repeated proposals that wait for its values."""
        self._asks_left = FREE_REPEATS
        self._random = random.Random(seed)

    def run(self, budget: float) -> Progress:
        """Run until the started work has used up `budget` training FLOPs."""
        while True:
            while len(self._events) < self.workers and self._spent < budget:
                if not (self._resume() or self._start() or self._resume_last()):
                    break
            if not self._events:
                return self.progress
            self._next()

    def _resume(self, *, at_end: bool = False) -> bool:
        """Train a candidate on that did not go on; False if the method has none now."""
        number = self.method.resumed(at_end=at_end)
        if number is None:
            return False
        self._push(*self._paused.pop(number))
        return True

    def _resume_last(self) -> bool:
        """Do so after the last proposal, once no candidate is in training."""
        return not self._events and self._resume(at_end=True)

    def _start(self) -> bool:
        """Start one candidate; False if the method has none now."""
        for _ in range(max(1, self._asks_left)):
            proposal = self.method.ask()
            if proposal is None:
                return False
            self._asks_left -= 1
            drawn = point(self.space, 0, proposal.params)
            assert drawn is not None, "the space has no requirement, so every point is feasible"
            fingerprint = drawn.architecture.fingerprint
            known, running = fingerprint in self._values, fingerprint in self._waiting
            self.progress.repeats += known or running
            if self._cache and known:
                self.method.tell(proposal.number, self._values[fingerprint])
            elif self._cache and running:
                self._waiting[fingerprint].append(proposal.number)
            else:
                self._asks_left = FREE_REPEATS
                self._begin(proposal, fingerprint)
                return True
        return self._fill()

    def _fill(self) -> bool:
        """Start a random architecture that is new; False if a thousand draws give none."""
        for _ in range(1000):
            drawn = point(self.space, self._random.getrandbits(48))
            assert drawn is not None
            fingerprint = drawn.architecture.fingerprint
            is_new = fingerprint not in self._values and fingerprint not in self._waiting
            if is_new and fingerprint in self.table:
                self.progress.filled += 1
                self._begin(None, fingerprint)
                return True
        return False

    def _begin(self, proposal: Proposal | None, fingerprint: str) -> None:
        self.progress.started += 1
        self._waiting.setdefault(fingerprint, [])
        self._push(proposal, fingerprint, 1)

    def _push(self, proposal: Proposal | None, fingerprint: str, rung: int) -> None:
        step = self.table.training_flops(fingerprint) / RUNGS
        self._spent += step
        event = (self._now + step, self._count, proposal, fingerprint, rung)
        heapq.heappush(self._events, event)
        self._count += 1

    def _next(self) -> None:
        """Handle the rung that ends next."""
        self._now, _, proposal, fingerprint, rung = heapq.heappop(self._events)
        values = self.values(fingerprint, rung)
        if rung < RUNGS:
            if proposal is None or self.method.goes_on(proposal.number, rung, values):
                self._push(proposal, fingerprint, rung + 1)
            else:
                self._paused[proposal.number] = proposal, fingerprint, rung + 1
            return
        self._values[fingerprint] = values
        # At the end of a run some workers are idle.
        spent = min(self._now * self.workers, self._spent)
        self.progress.found.append((spent, fingerprint))
        own = [] if proposal is None else [proposal.number]
        for number in (*own, *self._waiting.pop(fingerprint, [])):
            self.method.tell(number, values)

    def values(self, fingerprint: str, rung: int) -> dict[str, float]:
        """Return the values of the objectives, with the loss at a rung."""
        row = self.table.row(fingerprint)
        exact = {o.name: float(row[o.name]) for o in self.space.objectives if o.name in row}
        return exact | {"val_loss": self.table.losses(fingerprint)[rung - 1]}
