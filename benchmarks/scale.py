"""Cost per trial of a study with empty evaluations, by its number of trials, beside Optuna's loop.

    OMP_NUM_THREADS=1 python benchmarks/scale.py [--trials 100 1000 10000] [--postgresql]
    OMP_NUM_THREADS=1 python benchmarks/scale.py --workers 1000 --trials 4000

Each number is the mean over the last 100 trials before a size. It counts CPU milliseconds of the
process, so that other work of the machine does not count. The sampler is `random`:
`benchmarks/asks.py` measures the cost of others. Optuna's loop asks for, draws and tells the same
parameters and values in a database of its own; it stores no architecture, evaluation or front. With
`--workers` a pool answers in simulated time. The clock also runs while the driver computes. The
share of the time that workers are busy is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna

from moenas import Space, run
from moenas.cli.commands import app
from moenas.model.architecture import Architecture
from moenas.records import Evaluation, Job
from moenas.search.trials import OptunaTrials
from moenas.store.store import Store
from moenas.study.events import Event
from moenas.study.publishing import DashboardPublisher
from moenas.workers.replay_pool import ReplayPool

SPACE = """
name: scale
architecture:
  vocab_size: 256
  d_model: {int: [64, 512], step: 8}
  norm: {choice: [rmsnorm, layernorm]}
  blocks:
    - repeat: {int: [2, 16]}
      mixer: {kind: attention, head_dim: 8, n_kv_heads: {choice: [1, 2, 4]}, n_heads: 4}
      ffn:
        kind: moe
        n_experts: {choice: [8, 16, 32]}
        d_expert: {int: [64, 1024]}
        activation: {choice: [swiglu, geglu, gelu, relu2]}
        n_shared_experts: {choice: [0, 1]}
        router:
          top_k: {choice: [1, 2, 4]}
          score: {choice: [softmax, sigmoid]}
          balance: {choice: [aux_loss, bias]}
require: [params < 1e12]
objectives: [val_loss, decode_ms, flops_per_token]
data: stdlib
search: {sampler: random, seed: 0}
"""
"""A space of 11 holes, so large that random draws hardly repeat."""
WINDOW = 100
"""Trials before a size whose mean is printed."""
SECONDS = 30.0
"""Mean duration of an evaluation in simulated time."""
PHASES = {"ask": (OptunaTrials, "ask", "draw"), "tell": (OptunaTrials, "tell", "set_constraints"),
          "record": (Store, "record", "add_candidate", "start_attempt")}  # fmt: skip


def values(trial: int, params: int) -> dict[str, float]:
    """Return made-up values of the three objectives."""
    rng = random.Random(trial)
    loss = 4.0 + rng.random() - params / 1e9
    return {"val_loss": loss, "decode_ms": 1 + rng.random(), "flops_per_token": 2.0 * params}


def recorded(job: Job) -> tuple[Evaluation, float]:
    """Return an evaluation without work, and the seconds that it takes in simulated time."""
    architecture = Architecture.parse(job.architecture)
    cost = architecture.cost(1024)
    made = Evaluation(
        study=job.study,
        trial=job.trial,
        attempt=job.attempt,
        status="complete",
        fingerprint=architecture.fingerprint,
        values=values(job.trial, cost.params),
        cost=cost.plain(),
        seed=job.seed,
    )
    return made, random.Random(job.trial).uniform(0.5, 1.5) * SECONDS


class ClockedPool(ReplayPool):
    """A replay whose clock also runs while the driver computes.

    Making up an evaluation is the work of a worker, so the clock stands still meanwhile.
    """

    def __init__(self, workers: int) -> None:
        super().__init__(recorded, workers)
        self._computed = time.process_time()
        self.busy: list[tuple[float, float]] = []
        """Start and end of each job, in simulated seconds."""

    def _tick(self) -> None:
        computed = time.process_time()
        self.now += computed - self._computed
        self._computed = computed

    def submit(self, job: Job) -> None:
        """Take a job; it starts when the driver has come to it."""
        self._tick()
        super().submit(job)
        self.busy.append(
            (
                self.now,
                max(end for end, number, _ in self._running if number == self._submitted - 1),
            )
        )
        self._computed = time.process_time()

    def wait(self, timeout: float) -> list[Any]:
        """Return the job that ends next; it waits where the driver is late."""
        self._tick()
        before, finished = self.now, super().wait(timeout)
        self.now = max(before, self.now)
        return finished

    def busy_share(self) -> float:
        """Return the share of the time that workers compute, once all have started."""
        starts = sorted(start for start, _ in self.busy)
        first, last = starts[self.capacity - 1], starts[-1]
        inside = sum(max(0.0, min(end, last) - max(start, first)) for start, end in self.busy)
        return inside / (self.capacity * (last - first))


class Stopwatch:
    """CPU seconds of each trial and of each phase; phases are methods of the driver's parts."""

    def __init__(self) -> None:
        self.phases: Counter[str] = Counter()
        self.marks: list[tuple[float, Counter[str]]] = []

    def __call__(self, event: Event) -> None:
        """Note the end of a trial."""
        if event.evaluation is not None:
            self.marks.append((time.process_time(), Counter(self.phases)))

    def timed(self, phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method that adds its time to a phase."""

        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                self.phases[phase] += time.process_time() - began

        return call

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Time the phases meanwhile."""
        stock = []
        for phase, (cls, *names) in PHASES.items():
            for name in names:
                stock.append((cls, name, getattr(cls, name)))
                setattr(cls, name, self.timed(phase, getattr(cls, name)))
        try:
            yield
        finally:
            for cls, name, method in stock:
                setattr(cls, name, method)

    def last(self) -> dict[str, float]:
        """Return the mean milliseconds of the last trials, in all and by phase."""
        (began, before), (ended, after) = (
            self.marks[-1 - min(WINDOW, len(self.marks) - 1)],
            self.marks[-1],
        )
        n = min(WINDOW, len(self.marks) - 1)
        spent = {"total": ended - began, **{name: after[name] - before[name] for name in PHASES}}
        return {name: 1000 * seconds / n for name, seconds in spent.items()}


def optuna_loop(url: str, space: Space, sizes: list[int]) -> dict[int, float]:
    """Return size -> CPU milliseconds of a trial in Optuna's own loop."""
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(storage=url, sampler=sampler, directions=["minimize"] * 3)
    marks, seconds_at = [time.process_time()], {}
    for number in range(max(sizes)):
        trial = study.ask()
        space.draw(trial)
        study.tell(trial, list(values(number, 10**6).values()))
        marks.append(time.process_time())
        if number + 1 in sizes:
            n = min(WINDOW, number + 1)
            seconds_at[number + 1] = 1000 * (marks[-1] - marks[-1 - n]) / n
    return seconds_at


def median_ms(call: Callable[[], Any]) -> float:
    """Return the median of five calls, in CPU milliseconds."""
    times = []
    for _ in range(5):
        began = time.process_time()
        call()
        times.append(1000 * (time.process_time() - began))
    return statistics.median(times)


def status(url: str) -> None:
    """Run `moenas status` in this process."""
    with contextlib.redirect_stdout(io.StringIO()):
        app(["status", "scale", "--storage", url], standalone_mode=False)


def growth(url: str, other: str, sizes: list[int]) -> None:
    """Print the cost per trial at each size."""
    space, watch = Space.parse(SPACE, "scale.yaml"), Stopwatch()
    rows = {}
    for size in sizes:
        with watch.measuring():
            run(space, storage=url, pool=ReplayPool(recorded, 4), trials=size, listeners=[watch])
        store = Store.open(url)
        front = median_ms(lambda store=store: store.front_view("scale"))  # type: ignore[misc]
        rows[size] = {**watch.last(), "front": front, "status": median_ms(lambda: status(url))}
        store.engine.dispose()
        print(f"{size} trials: {rows[size]}", file=sys.stderr, flush=True)
    loop = optuna_loop(other, space, sizes)
    print("| trials | ask | record | tell | all | Optuna's loop | front query | moenas status |")
    print("| --: " * 8 + "|")
    for size, row in rows.items():
        cells = [
            row["ask"],
            row["record"],
            row["tell"],
            row["total"],
            loop[size],
            row["front"],
            row["status"],
        ]
        print(f"| {size:,} | {' | '.join(f'{cell:.1f}' for cell in cells)} |")


def utilisation(url: str, workers: int, trials: int) -> None:
    """Print the share of the time that simulated workers are busy."""
    pool = ClockedPool(workers)
    run(Space.parse(SPACE, "scale.yaml"), storage=url, pool=pool, trials=trials)
    share = pool.busy_share()
    print(f"{workers:,} simulated workers, evaluations of {SECONDS:g} s: {share:.1%} busy")


@contextlib.contextmanager
def databases(postgresql: bool) -> Iterator[tuple[str, str]]:
    """Yield the URLs of two empty databases, on PostgreSQL in a private server of the tests."""
    with tempfile.TemporaryDirectory() as folder:
        if not postgresql:
            yield f"sqlite:///{folder}/moenas.db", f"sqlite:///{folder}/optuna.db"
            return
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        import postgres

        programs = postgres.server_programs()
        if programs is None:
            sys.exit("no PostgreSQL here: apt-get install postgresql, or the test extras")
        with postgres.Server(programs) as server:
            with postgres.psycopg.connect(
                host=str(server.folder), user="moenas", dbname="postgres", autocommit=True
            ) as connection:
                connection.execute("CREATE DATABASE optuna")
            yield server.url, server.url.replace("/postgres?", "/optuna?")


def main() -> None:
    """Print the table, or the share of busy workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--workers", type=int)
    parser.add_argument("--postgresql", action="store_true")
    given = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    DashboardPublisher.publish = lambda self: None  # type: ignore[method-assign]  # not of a trial
    with databases(given.postgresql) as (url, other):
        if given.workers:
            utilisation(url, given.workers, max(given.trials))
        else:
            growth(url, other, sorted(given.trials))


if __name__ == "__main__":
    main()
