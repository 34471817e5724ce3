"""The contract of an objective: one measured number, defined by one file of `objectives/`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast

from moenas import resources
from moenas.checked import DETAILS_BYTES, plain_json, real
from moenas.errors import CandidateError, InputError, NotFoundError, suggestion
from moenas.former import FORMER
from moenas.records import Cost, Evaluation, ObjectiveInfo, Plain

Direction = Literal["minimize", "maximize"]
Needs = Literal["cost", "model", "training"]

DIRECTIONS = ("minimize", "maximize")
NEEDS = ("cost", "model", "training")


@dataclass(frozen=True)
class Measurement:
    """A value together with how it came about."""

    value: float
    details: Plain = field(default_factory=dict)
    """A JSON object: ratio, spread, n ... Stored beside the value."""


@dataclass(frozen=True)
class Objective:
    """One objective file, loaded and found to be complete."""

    name: str
    direction: Direction
    unit: str
    needs: Needs
    """What the subject must have: its cost, its built model, or its trained model."""
    doc: str
    """First line of the file's docstring."""
    path: str
    source: str = field(repr=False)
    from_user: bool
    """The file did not come with moenas, so a job carries its text."""
    function: Callable[[Any], object] = field(repr=False, compare=False)
    exact: str | None = None
    """The field of `Cost` that the value equals; None if it must be measured."""

    def exact_value(self, cost: Cost) -> float | None:
        """Return the value that follows from the cost alone; None if it must be measured."""
        return None if self.exact is None else float(getattr(cost, self.exact))

    def measure(self, subject: Any) -> Measurement:
        """Measure a subject; a plain number becomes a measurement without details.

        Raises:
            CandidateError: naming file and line. The returned value is not a finite number of a
                size below 1e150, or the details are not a JSON object of at most 64 KiB. What
                `measure` itself raises goes through.
        """
        measured = self.function(subject)
        value, details = (
            (measured.value, measured.details)
            if isinstance(measured, Measurement)
            else (measured, {})
        )
        place = f"{self.path}:{_line(self.source, 'measure')}: measure"
        try:
            number = real(value)
        except Exception as error:
            raise CandidateError(f"{place} gave {error}") from None
        try:
            plain = plain_json(details, DETAILS_BYTES)
        except Exception as error:
            raise CandidateError(f"{place} gave details that are not JSON: {error}") from None
        if not isinstance(plain, dict):
            raise CandidateError(f"{place} gave details that are not a JSON object")
        return Measurement(number, plain)

    def info(self) -> ObjectiveInfo:
        """Return what a study stores of the objective."""
        return ObjectiveInfo(self.name, self.direction, self.unit, self.doc, meaning(self.source))


def meaning(source: str) -> str:
    """Return the SHA-256 of what Python code does: without comments, docstrings and layout.

    Modules count by their former names, under which older studies hold their digests.
    """
    tree = ast.parse(source)
    # A declaration for the sampler: it changes no value.
    tree.body = [node for node in tree.body if not _declares_exact(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            node.module = FORMER.get(node.module, node.module)
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                body[0].value = ast.Constant("")
    return resources.sha256(ast.unparse(tree).encode())


def _declares_exact(node: ast.stmt) -> bool:
    """Whether a statement is `exact = ...`."""
    targets = node.targets if isinstance(node, ast.Assign) else []
    return any(isinstance(t, ast.Name) and t.id == "exact" for t in targets)


def load_objective(ref: str, source: str | None = None) -> Objective:
    """Load an objective by name or path, or from a source text that came with a job.

    A file defines: a docstring, `direction = "minimize" | "maximize"`, `unit = "ms"`,
    `needs = "cost" | "model" | "training"`, and `measure(subject)`, which returns a number or a
    `Measurement`.

    Raises:
        NotFoundError: if there is no such file.
        InputError: `file:line: what is missing or wrong; what would be right`.
    """
    path = Path(f"{ref}.py") if source is not None else resources.find("objectives", ".py", ref)
    return _read(
        path, resources.read_text(path) if source is None else source, from_user=_is_from_user(path)
    )


def shipped_objective(name: str) -> Objective:
    """Load an objective that came with moenas, whatever the folder here holds under its name."""
    path = resources.shipped("objectives") / f"{name}.py"
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.py"))
        raise NotFoundError(f"no shipped objective '{name}'.{suggestion(name, known)}")
    return _read(path, resources.read_text(path), from_user=False)


def apply_reference_times(evaluation: Evaluation, reference_ms: Mapping[str, float]) -> Evaluation:
    """Express latencies by the reference times that a study has fixed.

    Two candidates that run side by side may each time the reference model before either is
    recorded. Their paired ratios stay; value = ratio * reference_ms is computed again for each
    measurement whose `reference_key` is fixed.
    """
    values, measurements = dict(evaluation.values), dict(evaluation.measurements)
    for name, details in evaluation.measurements.items():
        fixed = reference_ms.get(details.get("reference_key", ""))
        if fixed is not None:
            values[name] = details["ratio"] * fixed
            measurements[name] = details | {"reference_ms": fixed}
    return dataclasses.replace(evaluation, values=values, measurements=measurements)


def _is_from_user(path: Path) -> bool:
    return path.resolve().parent != resources.shipped("objectives").resolve()


def _read(path: Path, source: str, *, from_user: bool) -> Objective:
    """Load a file and check it against the contract."""
    module = resources.load_module(path, source)
    doc = (module.__doc__ or "").strip()
    if not doc:
        raise InputError(
            f"{path}:1: the docstring is missing; its first line says what the objective is"
        )
    direction = _word(module, path, source, "direction", DIRECTIONS)
    needs = _word(module, path, source, "needs", NEEDS)
    unit = getattr(module, "unit", None)
    if not isinstance(unit, str):
        line = _line(source, "unit")
        given = "is missing" if unit is None else f"is {unit!r}"
        raise InputError(f'{path}:{line}: unit {given}; write unit = "ms", or unit = "" for none')
    return Objective(
        name=path.stem,
        direction=cast(Direction, direction),
        unit=unit,
        needs=cast(Needs, needs),
        doc=doc.splitlines()[0],
        path=str(path),
        source=source,
        from_user=from_user,
        function=_measure(module, path, source),
        exact=_exact(module, path, source),
    )


def _exact(module: ModuleType, path: Path, source: str) -> str | None:
    """Return the field of `Cost` that a file declares its value to equal."""
    if getattr(module, "exact", None) is None:
        return None
    return _word(module, path, source, "exact", tuple(Cost().plain()))


def _word(module: ModuleType, path: Path, source: str, name: str, words: tuple[str, ...]) -> str:
    """Return a module's constant that must be one of some words."""
    given_word = getattr(module, name, None)
    if isinstance(given_word, str) and given_word in words:
        return given_word
    given = "is missing" if given_word is None else f"is {given_word!r}"
    near = suggestion(str(given_word), words) if given_word is not None else ""
    raise InputError(
        f"{path}:{_line(source, name)}: {name} {given};{near} write {name} = "
        + " or ".join(f'"{word}"' for word in words)
    )


def _measure(module: ModuleType, path: Path, source: str) -> Callable[[Any], object]:
    """Return the function `measure` of a module; it must accept one argument."""
    function = getattr(module, "measure", None)
    place = f"{path}:{_line(source, 'measure')}: measure"
    if function is None:
        raise InputError(f"{place} is missing; write def measure(subject) -> float")
    if not callable(function):
        raise InputError(f"{place} is {function!r}; write def measure(subject) -> float")
    try:
        inspect.signature(function).bind(object())
    except TypeError as error:
        raise InputError(f"{place}: {error}; write def measure(subject) -> float") from None
    return cast(Callable[[Any], object], function)


def _line(source: str, name: str) -> int:
    """Return the line of the last top-level definition of a name, or 1 if there is none."""
    line = 1
    for node in ast.parse(source).body:
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        names = {t.id for t in targets if isinstance(t, ast.Name)}
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if name in names:
            line = node.lineno
    return line
