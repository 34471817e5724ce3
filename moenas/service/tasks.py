"""Tasks of a server with PyTorch, in a process of their own: checks, reports, exports, devices."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from moenas.errors import InputError, LocatedError, SourceLocation
from moenas.records import Plain
from moenas.service.space_rules import (
    SpaceRules,
    require_allowed,
    require_data_below,
    require_start_names,
)
from moenas.store.submissions import require_study_name

SOURCE = "space.yaml"
"""What errors call the text of a space."""
ARCHITECTURE_FILE = "architecture.yaml"
"""What errors call the text of an architecture."""


def warm() -> bool:
    """Import what the other tasks need, which takes seconds."""
    import moenas.report.summary
    import moenas.study.launch  # noqa: F401

    return True


def check_space(
    text: str,
    overrides: tuple[str, ...],
    rules: SpaceRules,
    *,
    storage: str,
    draws: int | None = None,
) -> Plain:
    """Return what `moenas check` says of a space: report and estimate.

    Raises:
        InputError: if the space is not valid or not allowed.
    """
    from moenas.report.space_check import check_report
    from moenas.space.space import Space
    from moenas.study.calibration import predicted_latency
    from moenas.study.estimate import estimate

    require_allowed(text, SOURCE, overrides, rules)
    space = Space.parse(text, SOURCE, overrides)
    require_data_below(space.data, rules)
    report = check_report(space, draws)
    report["latency"] = predicted_latency(space, storage)
    return report | {"estimate": estimate(space, storage=storage).plain()}


def check_submission(
    text: str, overrides: tuple[str, ...], rules: SpaceRules, *, storage: str
) -> Plain:
    """Check all that a run checks before it writes; return the study's name and trials.

    Raises:
        InputError: if the study cannot be run.
    """
    from moenas.space.space import Space
    from moenas.study.launch import check_start

    require_allowed(text, SOURCE, overrides, rules)
    space = Space.parse(text, SOURCE, overrides)
    require_data_below(space.data, rules)
    require_study_name(space.name)
    check_start(space, storage, elsewhere=True)  # the driver knows where its workers are
    return {"name": space.name, "trials": space.search.trials}


def study_report(study: str, *, storage: str, allow_code: bool) -> Plain:
    """Return the report of a study, as `moenas report` gives it."""
    from moenas.study.insights import insights
    from moenas.study.launch import load_study

    return insights(load_study(study, storage), allow_code=allow_code)


def study_figures(study: str, *, storage: str) -> dict[str, Plain]:
    """Return the figures of a study as plotly.js takes them; without a finished trial, none."""
    from moenas.report.figures import figures
    from moenas.store.store import Store

    store = Store.open(storage)
    if not store.count(study):
        return {}
    drawn = figures(store.view(study))
    return {name: json.loads(figure.to_json()) for name, figure in drawn.items()}


def export_trial(
    study: str, trial: int, out: str, format: str, *, storage: str, allow_code: bool
) -> str:
    """Export a trained trial in a format into a new folder."""
    from moenas.export.formats import export
    from moenas.store.store import Store

    store, folder = Store.open(storage), Path(out)
    return str(export(store, study, trial, folder, format=format, allow_code=allow_code))


def enqueue(
    study: str, architectures: tuple[str | tuple[str, str], ...], rules: SpaceRules, *, storage: str
) -> list[Plain]:
    """Let a study evaluate architectures next: shipped names, `study:NAME`, or (name, text).

    Raises:
        InputError: if one is not in the space of the study.
    """
    from moenas.study import maintenance

    require_start_names([each for each in architectures if isinstance(each, str)])
    references, name_of = [], dict[str, str]()
    with tempfile.TemporaryDirectory() as folder:
        for each in architectures:
            if isinstance(each, str):
                references.append(each)
                continue
            name, text = each
            require_allowed(text, name, (), rules)
            path = Path(folder, f"{len(references)}.yaml")
            path.write_text(text, encoding="utf-8")
            references.append(str(path))
            name_of[str(path)] = name
        try:
            return maintenance.enqueue(study, references, storage=storage, names=name_of)
        except InputError as error:
            raise _with_names(error, name_of) from None


def _with_names(error: InputError, name_of: Mapping[str, str]) -> InputError:
    """Return the error with the names of architectures in place of temporary paths."""

    def named(text: str) -> str:
        for path, name in name_of.items():
            text = text.replace(path, name)
        return text

    if not isinstance(error, LocatedError) or error.location is None:
        return type(error)(named(str(error)))
    place = error.location
    location = SourceLocation(named(place.source), place.line, place.column)
    return type(error)(named(error.message), location=location, path=error.path)


def devices() -> list[Plain]:
    """Return the devices of this machine: the CPU and each GPU that PyTorch sees."""
    from moenas.evaluate.devices import seen_devices

    return seen_devices()
