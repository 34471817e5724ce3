"""Record benchmarks/moe_table: train every point of its space, a tenth of them with three seeds.

    python benchmarks/record.py FOLDER [--workers 2] [--points 1000]
    python benchmarks/record.py FOLDER --write

FOLDER holds the database and the weights, up to 10 GB. The command goes on where it stopped: the
studies are ordinary ones, and `moenas status` shows them. On two CPU cores it takes hours.
`--write` writes the table of what there is so far, and trains nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
from replay.table import COSTS, FILE, FOLDER, RUNGS, write

from moenas import Space, load_study, run
from moenas.errors import InputError
from moenas.records import Evaluation, Plain, RoutingRow

NAME = "moe_table"
SEEDS = (1, 2)
"""Seeds beside 0, of initial weights and order of data."""
SHARE = 10
"""One candidate in so many is trained with every seed."""


def study_name(seed: int) -> str:
    """Return the name of the study of a seed."""
    return NAME if seed == 0 else f"{NAME}_seed{seed}"


def space(seed: int = 0) -> Space:
    """Return the space of the table, as the study of a seed."""
    overrides = [f"name={study_name(seed)}", f"search.seed={seed}"]
    return Space.load(FOLDER / "space.yaml", overrides if seed else [])


def repeated(storage: str) -> dict[int, Plain]:
    """Return trial -> architecture of the candidates that every seed trains: every tenth trial."""
    view = load_study(NAME, storage=storage).view
    complete = {e.trial for e in view.evaluations if e.status == "complete" and not e.is_copy}
    return {
        trial: plain
        for trial, plain in view.architectures.items()
        if trial % SHARE == 0 and trial in complete
    }


def record_seed(seed: int, folder: Path, storage: str, workers: int) -> None:
    """Train the repeated candidates with another seed."""
    files = []
    for trial, architecture in repeated(storage).items():
        # JSON is YAML: each file is a space without holes.
        files.append(folder / "repeated" / f"{trial}.yaml")
        files[-1].parent.mkdir(exist_ok=True)
        text = json.dumps({"architecture": architecture, "objectives": ["val_loss"]})
        files[-1].write_text(text, encoding="utf-8")
    other = space(seed).with_search(start_from=tuple(map(str, files)))
    run(other, storage=storage, workers=workers, trials=len(files))


FACTS = ("train", "data", "measure")
"""Sections of the space that the metadata repeat."""


def holes(architecture: Plain) -> dict[str, Any]:
    """Return the choices of the space as columns; a dense model has none of a mixture's."""
    group = architecture["blocks"][0]
    ffn = group["ffn"]
    router = ffn.get("router", {})
    return {
        "d_model": architecture["d_model"],
        "norm": _kind(architecture["norm"]),
        "n_layers": group["repeat"],
        "ffn": ffn["kind"],
        "activation": _kind(ffn["activation"]),
        "d_ff": ffn.get("d_ff"),
        "n_experts": ffn.get("n_experts"),
        "d_expert": ffn.get("d_expert"),
        "n_shared_experts": ffn.get("n_shared_experts"),
        "top_k": router.get("top_k"),
        "score": _kind(router.get("score")),
        "balance": _kind(router.get("balance")),
    }


def _kind(value: Any) -> Any:
    return value["kind"] if isinstance(value, dict) else value


def routing(rows: list[RoutingRow]) -> dict[str, float | None]:
    """Return means over the MoE layers, in validation."""
    names = ("max_vio", "cv", "entropy", "dead", "logit_rms")
    return {name: fmean(row[name] for row in rows) if rows else None for name in names}  # type: ignore[literal-required]


def row(evaluation: Evaluation, architecture: Plain) -> dict[str, Any]:
    """Return the row of a trained candidate."""
    losses = [point["val_loss"] for point in evaluation.curve if "val_loss" in point]
    assert len(losses) == RUNGS, f"trial {evaluation.trial} has {len(losses)} losses"
    return {
        "trial": evaluation.trial,
        "seed": evaluation.seed,
        "fingerprint": evaluation.fingerprint,
        **holes(architecture),
        **{name: evaluation.cost[name] for name in COSTS},
        **{f"loss_{rung}": loss for rung, loss in enumerate(losses, 1)},
        "train_loss": evaluation.metrics["train_loss"],
        "lr": evaluation.metrics["lr"],
        **routing(evaluation.routing),
        "train_seconds": evaluation.seconds["train"],
        "architecture": json.dumps(architecture, sort_keys=True),
    }


def rows(storage: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of all seeds that have begun."""
    for seed in (0, *SEEDS):
        try:
            study = load_study(study_name(seed), storage=storage)
        except InputError:
            continue
        view = study.view
        for evaluation in view.evaluations:
            if evaluation.status == "complete" and not evaluation.is_copy:
                yield row(evaluation, view.architectures[evaluation.trial])


def write_table(storage: str) -> None:
    """Write the table, and say how long it is."""
    study = load_study(NAME, storage=storage)
    facts = {name: study.record.space[name] for name in FACTS} | {"versions": study.record.versions}
    table_rows = list(rows(storage))
    write(table_rows, facts)
    print(f"{len(table_rows)} rows, {FILE.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    """Record what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of the database and the weights")
    parser.add_argument("--workers", type=int, default=2, help="candidates trained at a time")
    parser.add_argument("--points", type=int, help="points to train with the first seed; else all")
    parser.add_argument("--write", action="store_true", help="write the table, train nothing")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = given.folder.resolve()
    storage = f"sqlite:///{folder}/moe_table.db"
    if given.write:
        write_table(storage)
        return
    run(space(), storage=storage, workers=given.workers, trials=given.points)
    for seed in SEEDS:
        record_seed(seed, folder, storage, given.workers)


if __name__ == "__main__":
    main()
