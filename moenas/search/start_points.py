"""Architectures that a study evaluates first, each as a point of its space."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import optuna

from moenas.errors import InputError, LocatedError, SourceLocation, SpaceError
from moenas.grammar import tree as grammar
from moenas.grammar.nodes import Tree
from moenas.grammar.tree_match import Match, matches
from moenas.model.architecture import Architecture
from moenas.resources import Node
from moenas.search.points import HeldAnswers
from moenas.space.architecture_file import read_architecture
from moenas.store.store import Store

if TYPE_CHECKING:
    from moenas.space.space import Space

SOURCE = "enqueued_from"
"""Attribute of an Optuna trial: the source of its point."""
FIXED = "fixed_params"
"""Attribute in which Optuna holds the parameters of an enqueued trial."""
STUDY = "study:"
"""Begins the name of a study whose front is meant."""
MATCHES = 200
"""Matches of one architecture whose fingerprints are compared."""


@dataclass(frozen=True)
class StartPoint:
    """One architecture as a point of a space."""

    source: str
    """Where it is from: `zoo/olmoe_1b_7b`, a path, or `study:NAME trial 3`."""
    params: dict[str, Any]
    """Hole -> value, under the names that Optuna sees."""
    fingerprint: str


def start_points(
    space: Space,
    refs: Sequence[str],
    open_store: Callable[[], Store],
    marks: Sequence[SourceLocation] = (),
) -> list[StartPoint]:
    """Return the points of `space` that give some architectures, each architecture once.

    `refs` are names, paths, or `study:NAME` for the front of a study in the store, which is opened
    only for such a ref. `marks` say where the refs are written.

    Raises:
        InputError: if a ref cannot be read, or its architecture is not one of the space; it names
            the value that differs.
    """
    by_fingerprint: dict[str, StartPoint] = {}
    for i, ref in enumerate(refs):
        mark = marks[i] if i < len(marks) else None
        try:
            for point in _points(space, ref, open_store):
                by_fingerprint.setdefault(point.fingerprint, point)
        except LocatedError:
            raise
        except InputError as error:
            if mark is None:
                raise
            path = f"search.start_from.{i}"
            raise SpaceError(str(error), location=mark, path=path) from None
    return list(by_fingerprint.values())


def enqueue(study: optuna.Study, points: Sequence[StartPoint]) -> tuple[list[int], int]:
    """Let Optuna ask for some points next; a point that a trial was enqueued with is left out.

    Returns the number of the trial of each point, and how many trials there were before.
    """
    before = [t.system_attrs.get(FIXED) for t in study.get_trials(deepcopy=False)]
    for point in points:
        if point.params not in before:
            study.enqueue_trial(point.params, user_attrs={SOURCE: point.source})
    fixed = [t.system_attrs.get(FIXED) for t in study.get_trials(deepcopy=False)]
    return [fixed.index(point.params) for point in points], len(before)


def _points(space: Space, ref: str, open_store: Callable[[], Store]) -> Iterator[StartPoint]:
    """Yield the points of one ref."""
    if not ref.startswith(STUDY):
        file = read_architecture(ref)
        yield _point(space, ref, file.architecture, trees=[file.tree])
        return
    name, store = ref.removeprefix(STUDY), open_store()
    view = store.front_view(name)
    if not view.members:
        raise InputError(f"study '{name}' has no complete trial, so it has no front")
    study = optuna.load_study(study_name=name, storage=store.optuna_storage())
    params = {trial.number: trial.params for trial in study.get_trials(deepcopy=False)}
    for member in view.members:
        architecture = Architecture.parse(view.architectures[member.trial]).canonical()
        source = f"{ref} trial {member.trial}"
        yield _point(space, source, architecture, params=params.get(member.trial))


def _point(
    space: Space,
    source: str,
    architecture: Architecture,
    *,
    trees: Sequence[Tree] = (),
    params: Mapping[str, Any] | None = None,
) -> StartPoint:
    """Return the point whose architecture has the fingerprint of another one.

    `params` are those that gave it in a space that may be the same one. `trees` hold it as it is
    written. Its canonical form is tried last.

    Raises:
        SpaceError: if there is none, naming the first value that differs.
        InputError: if it breaks a requirement.
    """
    canonical = grammar.read(Architecture, Node.wrap(architecture.plain()))
    tried = [matches(space.tree, tree) for tree in (*trees, canonical)]
    nearest: Match | None = None
    for match in chain([Match(params or {})], *(islice(each, MATCHES) for each in tried)):
        if nearest is None and match.mismatches:
            nearest = match
        made = _architecture(space, match.answers)
        if made is None or made[0].fingerprint != architecture.fingerprint:
            continue
        if broken := [text for text, by in space.violations(made[0]).items() if by > 0]:
            raise InputError(f"{source}: breaks the requirement {', '.join(broken)}")
        return StartPoint(source, made[1], architecture.fingerprint)
    raise _outside(source, nearest, space)


def _architecture(
    space: Space, answers: Mapping[str, Any]
) -> tuple[Architecture, dict[str, Any]] | None:
    """Return the canonical architecture of some answers, and those of them that are asked for."""
    held = HeldAnswers(answers, space.former_fields)
    try:
        architecture = space.drawn(held)
    except (SpaceError, LookupError, ValueError):
        return None
    return architecture, held.answers


def _outside(source: str, nearest: Match | None, space: Space) -> InputError:
    """Return the error of an architecture that is not in the space."""
    if nearest is None:
        return InputError(f"{source}: its fields do not go together in the space '{space.name}'")
    error = nearest.error()
    return SpaceError(
        f"{source} is not in the space '{space.name}': {error.message}",
        location=error.location,
        path=error.path,
    )
