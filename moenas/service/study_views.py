"""Responses on studies and trials from stored rows, without PyTorch."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator

from moenas.errors import InputError, NotFoundError
from moenas.grammar.summary import one_line
from moenas.records import Evaluation, Plain
from moenas.report.front_report import front_report
from moenas.report.summary import (
    command_state,
    queued_summary,
    status_report,
    study_summary,
    trial_report,
)
from moenas.service import front_schemas, schemas
from moenas.service.sessions import Identity
from moenas.service.study_actions import allowed_actions
from moenas.store import row_readers, study_events, submissions
from moenas.store.activity import last_activity
from moenas.store.store import Store
from moenas.store.submissions import ListedStudy, StudyFilter


def cursor(study: ListedStudy) -> str:
    """Return the place behind a study in the list, as text for a URL."""
    return base64.urlsafe_b64encode(f"{study.created_at}|{study.study}".encode()).decode()


def read_cursor(text: str | None) -> tuple[str, str] | None:
    """Return (created_at, name) of a cursor.

    Raises:
        InputError: if it is not one.
    """
    if text is None:
        return None
    try:
        created, bar, name = base64.urlsafe_b64decode(text).decode().partition("|")
    except (binascii.Error, ValueError):
        bar = ""
    if not bar:
        raise InputError("cursor: not one that `next` of a page gave")
    return created, name


def study_row(store: Store, study: ListedStudy) -> Plain:
    """Return the fields of `schemas.Study`."""
    own = study.submission
    return {
        "name": study.study,
        "state": own.state if own is not None else command_state(store, study.study),
        "submitted": own is not None,
        "user": own.user_name if own is not None else None,
        "priority": own.priority if own is not None else None,
        "trials": study.trials,
        "evaluations": study.evaluations,
        "created_at": study.created_at,
        "started_at": own.started_at if own is not None else None,
        "ended_at": own.ended_at if own is not None else None,
        "reason": own.reason if own is not None else None,
        "restarts": own.restarts if own is not None else 0,
        "driver_running": own.driver_running if own is not None else False,
    }


def study_page(
    store: Store,
    wanted: StudyFilter,
    *,
    after: tuple[str, str] | None,
    limit: int,
    with_summary: bool = False,
) -> schemas.StudyPage:
    """Return a page of the list of studies."""
    studies = store.query(lambda c: submissions.page(c, wanted, after=after, limit=limit + 1))
    plain = [study_row(store, each) for each in studies[:limit]]
    if with_summary:
        newest = store.query(last_activity)
        for row, each in zip(plain, studies, strict=False):
            row["summary"] = _summary(store, each, row["state"], newest)
    rows = [schemas.Study(**row) for row in plain]
    more = len(studies) > limit
    return schemas.StudyPage(studies=rows, next=cursor(studies[limit - 1]) if more else None)


def _summary(store: Store, study: ListedStudy, state: str, newest: dict[str, str]) -> Plain:
    """Return the fields of `schemas.StudySummary`."""
    if study.study in newest:
        return study_summary(store.summary(study.study), state, newest[study.study])
    assert study.submission is not None
    return queued_summary(study.submission)


def listed(store: Store, name: str) -> ListedStudy:
    """Return a study as the list has it.

    Raises:
        NotFoundError: if there is none of this name.
    """
    own = store.query(lambda c: submissions.find(c, name))
    if store.knows(name):
        record = store.study(name)
        created = own.submitted_at if own is not None else record.created_at
        trials = own.trials if own is not None else record.trials
        return ListedStudy(name, trials, created, store.count(name), own)
    if own is None:
        store.study(name)  # raises NotFoundError with a suggestion
        raise NotFoundError(f"no study '{name}'")
    return ListedStudy(name, own.trials, own.submitted_at, 0, own)


def study_detail(store: Store, name: str, user: Identity) -> schemas.StudyDetail:
    """Return one study, whole, with what a user may do with it.

    Raises:
        NotFoundError: if there is none of this name.
    """
    # Read first: whoever waits for events after it misses no change of the state.
    newest = store.query(study_events.newest).get(name, 0)
    study = listed(store, name)
    own = study.submission
    objectives: list[Plain] = []
    progress: Plain = {}
    space, overrides = ("", []) if own is None else (own.space_text, own.overrides)
    begun = store.knows(name)
    if begun:
        record = store.study(name)
        space, overrides = record.space_text, record.overrides
        keys = schemas.Objective.model_fields
        objectives = [{key: o[key] for key in keys} for o in record.objectives]
        said = status_report(store, name)
        progress = {key: said[key] for key in schemas.Progress.model_fields}
    row = study_row(store, study)
    return schemas.StudyDetail(
        **row,
        actions=allowed_actions(study, row["state"], user, begun=begun),
        objectives=[schemas.Objective(**o) for o in objectives],
        overrides=overrides,
        space=space,
        progress=schemas.Progress(**progress),
        last_event=newest,
    )


def begun(store: Store, name: str) -> bool:
    """Say whether a study has rows of its own; a queued one has none yet.

    Raises:
        NotFoundError: if there is no such study, queued or not.
    """
    if store.knows(name):
        return True
    listed(store, name)
    return False


def trial_page(
    store: Store, name: str, *, after: int, limit: int, with_params: bool
) -> schemas.TrialPage:
    """Return a page of the finished trials of a study."""
    if not begun(store, name):
        return schemas.TrialPage(trials=[], next=None)
    names = list(store.study(name).directions)
    evaluations = store.read(
        name, lambda c: row_readers.evaluations_after(c, name, after, limit + 1)
    )
    on_front = set(store.front(name))
    params = _params(store, name) if with_params else {}
    rows = [_trial_row(e, names, on_front, params) for e in evaluations[:limit]]
    more = len(evaluations) > limit
    return schemas.TrialPage(trials=rows, next=rows[-1].trial if more else None)


def _params(store: Store, name: str) -> dict[int, Plain]:
    """Return trial -> the drawn values, from Optuna's rows."""
    storage = store.optuna_storage(serving=True)
    trials = storage.get_all_trials(storage.get_study_id_from_name(name), deepcopy=False)
    return {trial.number: trial.params for trial in trials}


def _trial_row(
    evaluation: Evaluation, names: list[str], on_front: set[int], params: dict[int, Plain]
) -> schemas.TrialRow:
    return schemas.TrialRow(
        trial=evaluation.trial,
        status=evaluation.status,
        values={name: evaluation.values.get(name) for name in names},
        cost={key: float(value) for key, value in evaluation.cost.items()},
        failure=evaluation.failure.kind if evaluation.failure else None,
        message=evaluation.failure.message if evaluation.failure else None,
        seconds=evaluation.seconds.get("total"),
        on_front=evaluation.trial in on_front,
        has_weights=evaluation.weights_sha256 is not None,
        params=params.get(evaluation.trial, {}),
    )


def trial(store: Store, name: str, number: int) -> schemas.Trial:
    """Return everything that is stored of one trial.

    Raises:
        NotFoundError: if the study has no such finished trial.
    """
    if not begun(store, name):
        raise NotFoundError(f"study '{name}' has no finished trial {number}; it has none yet")
    report = trial_report(store, name, number)
    return schemas.Trial(**report, summary=one_line(report["architecture"]))


def front(store: Store, name: str) -> front_schemas.Front:
    """Return the front of a study; it is empty before a first complete trial."""
    if not begun(store, name):
        caption = [f"study '{name}' has not begun"]
        return front_schemas.Front(
            study=name,
            directions={},
            hypervolume=None,
            reference_point={},
            members=[],
            caption=caption,
            seeds=None,
        )
    report = front_report(store, name)
    for member in report["members"]:
        member["summary"] = one_line(member["architecture"])
    return front_schemas.Front(**report)


def front_csv(front: front_schemas.Front) -> Iterator[dict[str, object]]:
    """Yield the rows of the front as a table: the architecture in one line."""
    for member in front.members:
        yield {
            "trial": member.trial,
            **member.values,
            "params": member.params,
            "active_params": member.active_params,
            "fingerprint": member.fingerprint,
            "architecture": member.summary,
        }


def history(store: Store, name: str) -> front_schemas.History:
    """Return the front after each complete trial."""
    points = store.history(name) if begun(store, name) else []
    return front_schemas.History(
        points=[front_schemas.HistoryPoint(**point.plain()) for point in points]
    )
