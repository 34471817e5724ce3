"""Actions that a user may take on a study now: rules of the routes and the pages."""

from __future__ import annotations

from typing import get_args

from moenas.service.sessions import Identity
from moenas.store.access_tokens import ROLES
from moenas.store.submissions import Action, ListedStudy, Submission


def may_change(user: Identity, submission: Submission | None) -> bool:
    """Say whether a user may change a study: one of their own, or any for an admin.

    `submission` is None for a study of a command, which only an admin may change.
    """
    if user.role == "admin":
        return True
    may_submit = ROLES.index(user.role) >= ROLES.index("submitter")
    return may_submit and submission is not None and submission.user_name == user.user_name


def allowed_actions(study: ListedStudy, state: str, user: Identity, *, begun: bool) -> list[Action]:
    """Return what a user may do with a study in its state.

    `begun` says whether the study has rows of its own, which takes in architectures that are
    enqueued. No server looks after a study of a command: it can be deleted once it does not run.
    """
    own = study.submission
    if not may_change(user, own):
        return []
    if own is None:
        return [] if state == "running" else ["delete"]
    actions: tuple[Action, ...] = get_args(Action)
    return [each for each in actions if own.allows(each) and (begun or each != "enqueue")]
