"""Calibrations: models of a space are measured, and a predictor of their latency is stored."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from moenas.errors import CandidateError, InputError, MoenasError, SpaceError, StorageError
from moenas.evaluate import devices
from moenas.evaluate.job import versions
from moenas.evaluate.latency import PHASES, workload_of
from moenas.evaluate.matching import open_corpus
from moenas.evaluate.untrained_latency import measure_untrained
from moenas.failures import is_out_of_memory, located
from moenas.grammar.component import changed
from moenas.grammar.sampling import RandomSuggest
from moenas.predict.block_latency import BlockLatency, error_bound, predicted, workload_terms
from moenas.records import Calibration, Plain
from moenas.resources import sha256
from moenas.space.objective import Measurement, Objective
from moenas.store import calibrations
from moenas.store.store import Store

if TYPE_CHECKING:
    import torch

    from moenas.data.corpus import Corpus
    from moenas.model.architecture import Architecture
    from moenas.space.space import Space

MODELS, FEWEST = 40, 6
"""Whole models that are measured, and the fewest that a calibration is made of."""
FEWEST_OUTSIDE = 3
"""Models outside the fit: two for the interval, and one that tests it."""
COVERAGE = 0.9
"""Wanted probability that the interval contains the latency of a further model."""
POOL = 200
"""Draws from which the models are taken."""
DRAWS = 100
"""Random architectures whose latencies are predicted for a range."""
TRIES = 50
"""Draws for each model that is wanted, in search of one that is new and feasible."""
TOLD_S = 10.0
"""Seconds between two reports of the draws, which take minutes in a large space."""

Progress = Callable[[int, int, str], None]
"""Is told how many of how many models are drawn or measured, and a line on the latest."""


def parts_digest(space: Space) -> str:
    """Return the digest of what the models of a space are made of.

    These are the architecture with its holes, shared layers, and files of components.
    """
    plain = space.plain()
    parts = {name: plain.get(name) for name in ("use", "layers", "architecture")}
    return sha256(json.dumps(parts, sort_keys=True).encode())


def latency_objectives(space: Space) -> list[Objective]:
    """Return the shipped objectives of a space that a calibration can predict."""
    return [o for o in space.objectives if o.name in PHASES and not o.from_user]


def device_of(space: Space, name: str | None = None) -> torch.device:
    """Return the device of a name, or the one that the candidates of a space run on here.

    Raises:
        InputError: if there is no such device here.
    """
    if name is None:
        return devices.of_candidates(space.search.gpus)
    if name not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: give cpu or cuda")
    if name == "cuda" and not devices.has_gpu():
        raise InputError("--device cuda: PyTorch sees no GPU here; give --device cpu")
    return devices.named(name)


# --- calibrate -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Measured:
    """One model and its measurements."""

    architecture: Architecture
    latencies: dict[str, Measurement]


def calibrate(
    space: Space,
    *,
    storage: str | None = None,
    device: str | None = None,
    models: int = MODELS,
    progress: Progress | None = None,
) -> list[Calibration]:
    """Measure models of a space on this device; store and return a calibration for each latency.

    A third of the models set the interval, and a quarter test it. Both are random draws, and are
    not in the fit. The fit has the other models, chosen from many draws so that their numbers of
    parameters lie evenly among them. It also has a model of one block for each different block of
    these models.

    Raises:
        InputError: if no objective of the space is a latency, the device is not here, or the
            database cannot be made. Also if the space has fewer than FEWEST different feasible
            models that fit the device. Nothing is written.
    """
    objectives, chosen = latency_objectives(space), device_of(space, device)
    if not objectives:
        raise InputError(
            f"{space.name}: no objective is a latency; `moenas calibrate` predicts"
            f" {' and '.join(PHASES)}, so add one of them to the objectives"
        )
    Store.known(
        storage, space.name
    )  # a database that cannot be made is found before the measurements
    corpus, began = open_corpus(space), time.monotonic()
    sample = list(_sample(space, max(models, POOL), progress))
    if len(sample) < FEWEST:
        raise InputError(
            f"{space.name}: {len(sample)} different feasible models in many draws; a calibration is"
            f" made of at least {FEWEST}"
        )
    in_fit, blocks, others = _groups(sample, min(models, len(sample)))
    # The models of the fit and those outside it are spread over the same time.
    todo = _interleaved([*in_fit, *blocks], others)
    measured = {
        one.architecture.fingerprint: one
        for one in _measured(space, corpus, todo, objectives, chosen, progress=progress)
    }
    groups = [
        [measured[a.fingerprint] for a in group if a.fingerprint in measured]
        for group in (in_fit, blocks, others)
    ]
    n_models = len(groups[0]) + len(groups[2])
    if n_models < FEWEST or len(groups[2]) < FEWEST_OUTSIDE or not groups[0]:
        raise InputError(
            f"{space.name}: {n_models} models could be measured on this device; a"
            f" calibration is made of at least {FEWEST}"
        )
    seconds = time.monotonic() - began
    made = [_fitted(space, objective, chosen, groups, seconds) for objective in objectives]
    store = Store.open(storage, create=True)
    for one in made:
        calibrations.add(store, one)
    return made


def _measured(
    space: Space,
    corpus: Corpus,
    todo: Sequence[Architecture],
    objectives: Sequence[Objective],
    device: torch.device,
    *,
    progress: Progress | None,
) -> Iterator[_Measured]:
    """Measure models one after another; those that do not fit the device are left out."""
    for number, architecture in enumerate(todo, start=1):
        try:
            latencies = measure_untrained(space, corpus, architecture, objectives, device)
        except MoenasError as error:
            if not isinstance(error, CandidateError):
                raise
            line = f"left out: {error}"
        except (Exception, SystemExit) as error:  # code of a user's component may call sys.exit
            if not is_out_of_memory(error):
                raise InputError(f"{space.name}: {located(error)}") from error
            line = f"left out: {error}"
        else:
            yield _Measured(architecture, latencies)
            line = ", ".join(
                f"{name} {measurement.value:.4g} ms"
                f" (spread {100 * measurement.details['spread']:.1f} %)"
                for name, measurement in latencies.items()
            )
        if progress is not None:
            progress(number, len(todo), f"{line} | {architecture.describe()}")


def _groups(
    sample: Sequence[Architecture], count: int
) -> tuple[list[Architecture], list[Architecture], list[Architecture]]:
    """Return the models of the fit, its models of one block, and the models outside the fit.

    Together the first and the last are `count` models. Those outside the fit are random, as the
    interval asks for; the choice of those in the fit needs not be.
    """
    n_others = count // 4 + count // 3
    in_fit = _spread(sample[n_others:], count - n_others)
    others = list(sample[:n_others])
    return in_fit, list(_single_blocks(in_fit, others)), others


def _sample(space: Space, count: int, progress: Progress | None = None) -> Iterator[Architecture]:
    """Draw different feasible architectures, at most `count`; tell now and then how many."""
    seen, told = set[str](), time.monotonic()
    for seed in range(count * TRIES):
        if progress is not None and time.monotonic() - told >= TOLD_S:
            progress(len(seen), count, "different models drawn")
            told = time.monotonic()
        try:
            architecture = space.drawn(RandomSuggest(seed))
        except SpaceError:
            continue
        broken = any(amount > 0 for amount in space.violations(architecture).values())
        if broken or architecture.fingerprint in seen:
            continue
        seen.add(architecture.fingerprint)
        yield architecture
        if len(seen) == count:
            return


def _spread(models: Sequence[Architecture], count: int) -> list[Architecture]:
    """Return some models, evenly spaced in the order of their parameters, both ends included."""
    ordered = sorted(models, key=lambda model: model.cost(2).params)
    step = (len(ordered) - 1) / max(1, count - 1)
    return [ordered[round(i * step)] for i in range(min(count, len(ordered)))]


def _single_blocks(
    models: Sequence[Architecture], others: Sequence[Architecture]
) -> Iterator[Architecture]:
    """Yield a model of one block for each different block of some models, at most one for each.

    None equals a whole model or one of the `others`, which stay outside the fit. A block that
    reads another one cannot stand alone, and is left to the whole models.
    """
    seen = {model.fingerprint for model in (*models, *others)}
    for model in models:
        for layer in model.canonical().layers:
            try:
                single = changed(model, blocks=(changed(layer, shortcut_delay=0),)).canonical()
                single = type(model).parse(single.plain()).canonical()
            except SpaceError:
                continue
            if single.fingerprint not in seen:
                seen.add(single.fingerprint)
                yield single
                break


def _interleaved(
    first: Sequence[Architecture], second: Sequence[Architecture]
) -> list[Architecture]:
    """Return both sequences as one, each spread evenly over it."""
    placed = [((i + 0.5) / len(group), a) for group in (first, second) for i, a in enumerate(group)]
    return [architecture for _, architecture in sorted(placed, key=lambda pair: pair[0])]


def _fitted(
    space: Space,
    objective: Objective,
    device: torch.device,
    groups: Sequence[Sequence[_Measured]],
    seconds: float,
) -> Calibration:
    """Fit the predictor of one latency to the models and the blocks of the fit, and test it."""
    models, blocks, others = groups
    workload = workload_of(objective.name, space.measure, device)
    settings = workload.plain()

    def ratio(one: _Measured) -> float:
        return float(one.latencies[objective.name].details["ratio"])

    in_fit = [*models, *blocks]
    sums = BlockLatency.fit(
        [workload_terms(one.architecture, settings) for one in in_fit], [ratio(o) for o in in_fit]
    )
    n_interval = math.ceil(len(others) * 4 / 7)  # a third of all models to a quarter of them
    held_out: list[Plain] = [
        {
            "fingerprint": one.architecture.fingerprint,
            "predicted": sums.predict(workload_terms(one.architecture, settings)),
            "measured": ratio(one),
            "spread": one.latencies[objective.name].details["spread"],
            "role": "interval" if number < n_interval else "test",
        }
        for number, one in enumerate(others)
    ]
    errors = [math.log(row["predicted"] / row["measured"]) for row in held_out[:n_interval]]
    log_error, coverage = error_bound(errors, COVERAGE)
    references = [
        one.latencies[objective.name].details["reference_ms"] for one in [*in_fit, *others]
    ]
    return Calibration(
        objective=objective.name,
        unit=objective.unit,
        workload=workload.key,
        settings=settings,
        space=space.name,
        parts_sha256=parts_digest(space),
        device=devices.device_info(device, workload.threads, workload.dtype),
        versions=versions(),
        reference_ms=statistics.median(references),
        coefficients=sums.coefficients,
        highest=sums.highest,
        log_error=log_error,
        coverage=coverage,
        fitted={"models": len(models), "blocks": len(blocks)},
        held_out=held_out,
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=seconds,
    )


# --- what is stored ------------------------------------------------------------------------------


def stored_calibration(
    space: Space, objective: Objective, storage: str | None, device: torch.device
) -> Calibration | None:
    """Return the calibration of an objective for this space, this device and these settings."""
    key = workload_key(space, objective, device)
    try:
        return calibrations.of_workload(Store.open(storage), parts_digest(space), key)
    except StorageError:  # there is no database yet
        return None


def workload_key(space: Space, objective: Objective, device: torch.device) -> str:
    """Return the key of the workload of a latency of a space on a device."""
    return workload_of(objective.name, space.measure, device).key


def predicted_latency(space: Space, storage: str | None, n_draws: int = DRAWS) -> list[Plain]:
    """Return the predicted range of each latency over random feasible architectures of a space.

    A row without a calibration for this device and these settings has `missing` instead.
    """
    drawn: list[Architecture] = []
    rows: list[Plain] = []
    for objective in latency_objectives(space):
        device = device_of(space)
        calibration = stored_calibration(space, objective, storage, device)
        row: Plain = {"objective": objective.name, "unit": objective.unit, "missing": None}
        if calibration is None:
            rows.append({**row, "missing": _missing(space, objective, storage, device)})
            continue
        drawn = drawn or [a for a in space.feasible(n_draws) if not isinstance(a, str)]
        drawn = drawn or [space.require_feasible()]
        ordered = sorted((predicted(calibration, a) for a in drawn), key=lambda one: one.value)
        named = {
            "smallest": ordered[0],
            "median": ordered[len(ordered) // 2],
            "largest": ordered[-1],
        }
        row |= {
            name: {"value": one.value, "low": one.low, "high": one.high}
            for name, one in named.items()
        }
        row |= calibration_summary(calibration)
        rows.append(row | {"drawn": len(ordered), "beyond": sum(bool(o.beyond) for o in ordered)})
    return rows


def calibration_summary(calibration: Calibration) -> Plain:
    """Return what a calibration is of, and how well it predicts models that it did not use."""
    return {
        "device": calibration.device["name"],
        "settings": calibration.settings,
        "made_at": calibration.made_at,
        "fitted_models": calibration.fitted["models"],
        "fitted_blocks": calibration.fitted["blocks"],
        "coverage": calibration.coverage,
        "factor": calibration.factor,
        "tested": len(calibration.tested),
        "covered": calibration.covered,
        "median_error": calibration.median_error,
    }


def _missing(space: Space, objective: Objective, storage: str | None, device: torch.device) -> str:
    """Say that there is no calibration, and for what there is one."""
    wanted = workload_key(space, objective, device)
    text = f"no calibration for [{wanted}]"
    try:
        others = calibrations.workloads(Store.open(storage), parts_digest(space), objective.name)
    except StorageError:
        others = []
    return f"{text}; there is one for [{others[0]}], which is not used" if others else text
