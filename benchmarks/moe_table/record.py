"""Record the table: train every point of space.yaml, and a tenth of them with two more seeds.

    python benchmarks/moe_table/record.py FOLDER [--workers 2]

FOLDER holds the database and the weights, about 15 GB. The command goes on where it stopped: the
studies are ordinary ones, and `moenas status` shows them. On two idle CPU cores it takes hours.
`write.py` makes the table of what there is so far.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import optuna

from moenas import Space, run
from moenas.records import Plain

HERE = Path(__file__).parent
NAME = "moe_table"
SEEDS = (1, 2)
"""Seeds beside 0, of initial weights and order of data."""
SHARE = 10
"""One candidate in so many is trained with every seed."""


def space(seed: int = 0) -> Space:
    """Return the space of the table, as the study of a seed."""
    overrides = [] if seed == 0 else [f"name={NAME}_seed{seed}", f"search.seed={seed}"]
    return Space.load(HERE / "space.yaml", overrides)


def repeated(storage: str) -> list[Plain]:
    """Return the parameters of the candidates that every seed trains: every tenth trial."""
    trials = optuna.load_study(study_name=NAME, storage=storage).trials
    complete = optuna.trial.TrialState.COMPLETE
    return [t.params for t in trials if t.number % SHARE == 0 and t.state == complete]


def record_seed(seed: int, storage: str, workers: int) -> None:
    """Train the repeated candidates with another seed."""
    points, other = repeated(storage), space(seed)
    directions = [objective.direction for objective in other.objectives]
    study = optuna.create_study(
        study_name=other.name, storage=storage, directions=directions, load_if_exists=True
    )
    for point in points:
        study.enqueue_trial(point, skip_if_exists=True)
    run(other, storage=storage, workers=workers, trials=len(points))


def main() -> None:
    """Record what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of the database and the weights")
    parser.add_argument("--workers", type=int, default=2, help="candidates trained at a time")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = f"sqlite:///{given.folder.resolve()}/moe_table.db"
    run(space(), storage=storage, workers=given.workers)
    for seed in SEEDS:
        record_seed(seed, storage, given.workers)


if __name__ == "__main__":
    main()
