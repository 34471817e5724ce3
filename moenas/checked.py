"""The check of a worker's result: it must be an evaluation of the job."""

from __future__ import annotations

import json
import math
import numbers
import re
from collections.abc import Mapping
from typing import Any

from moenas.errors import FAILURE_KINDS
from moenas.failures import MESSAGE, TRACEBACK, clean
from moenas.records import Evaluation, Failure, Job, Plain

LARGEST = 1e150
"""Bound of a value's size: sums of squares and volumes of two such values stay finite."""
DETAILS_BYTES = 64 * 1024
"""Size of the details of one objective as JSON."""
ROWS_BYTES = 64 * 2**20
"""Size of the curve or of the routing as JSON."""
SMALL_BYTES = 64 * 1024
"""Size of any other field as JSON."""
MAX_ROWS = 100_000
DEPTH = 50
TIMED = ("reference_key", "reference_ms", "ratio")
"""Details of a measured latency, by which a study expresses values on one reference time."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


def real(value: object) -> float:
    """Return a number, numpy's and torch's scalars too, as a float of moderate size.

    Raises:
        ValueError: if it is no number, a truth value or a text, or is not finite or too large.
    """
    if hasattr(value, "item") and not isinstance(value, float):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{_shown(value)}; give back a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{number}; give back a finite number")
    if abs(number) >= LARGEST:
        raise ValueError(f"{number:.3g}; give back a number below {LARGEST:g} in size")
    return number


def plain_json(value: object, limit: int) -> Any:
    """Return a copy of plain data with nothing but JSON's own types, as text at most `limit` long.

    Raises:
        ValueError: if it is something else, deeper than 50 levels, or larger.
    """
    copied = _copied(value, DEPTH, [limit])
    size = len(json.dumps(copied))
    if size > limit:
        raise ValueError(f"{size} bytes as JSON, over {limit}")
    return copied


def _copied(value: object, depth: int, left: list[int]) -> Any:
    """Copy plain data; `left` counts the characters down, so that the copy stays small."""
    left[0] -= len(value) if isinstance(value, str) else 1
    if left[0] < 0:
        raise ValueError("too large")
    if depth == 0:
        raise ValueError(f"nested deeper than {DEPTH} levels")
    if hasattr(value, "item") and not isinstance(value, float):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode().replace("\0", "?")
    if isinstance(value, numbers.Integral):
        if abs(int(value)) >= 2**63:
            raise ValueError("an integer of more than 64 bits")
        return int(value)
    if isinstance(value, numbers.Real):
        if not math.isfinite(value):
            raise ValueError(f"{float(value)} is not a finite number")
        return float(value)
    if isinstance(value, list | tuple):
        return [_copied(one, depth - 1, left) for one in value]
    if isinstance(value, Mapping):
        if bad := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"the key {_shown(bad[0])} is not a text")
        return {
            _copied(key, depth, left): _copied(one, depth - 1, left) for key, one in value.items()
        }
    raise ValueError(f"{_shown(value)} is not JSON")


def _shown(value: object) -> str:
    """Show a value from another process in a message."""
    try:
        return clean(repr(value), 100)
    except BaseException:
        return f"a {type(value).__name__}"


def checked_evaluation(sent: object, job: Job) -> Evaluation:
    """Return what a worker sent as the evaluation of a job, a JSON object, if it is one.

    Raises:
        ValueError: saying which field is wrong and how.
    """
    if not isinstance(sent, Mapping):
        raise ValueError(f"not an evaluation but {_shown(sent)}")
    for name in ("study", "trial", "attempt"):
        received, wanted = sent.get(name), getattr(job, name)
        if type(received) is not type(wanted) or received != wanted:
            raise ValueError(f"{name} is {_shown(received)}, but the job has {_shown(wanted)}")
    status = sent.get("status")
    if status not in ("complete", "failed", "paused"):
        raise ValueError(f"status is {_shown(status)}; a worker says complete, failed or paused")
    if status == "paused" and job.rung_limits is None:
        raise ValueError("paused, and the job has no rung to pause at")
    failure = _failure(sent.get("failure")) if status == "failed" else None
    if status != "failed" and sent.get("failure") is not None:
        raise ValueError(f"{status}, and yet with a failure")
    values = _values(sent.get("values", {}), job, status)
    digest = sent.get("weights_sha256")
    if digest is not None and not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
        raise ValueError(f"weights_sha256 is {_shown(digest)}, not a SHA-256 in hexadecimal")
    return Evaluation(
        study=job.study,
        trial=job.trial,
        attempt=job.attempt,
        status=status,
        fingerprint=_object_of(sent, "fingerprint", str, ""),
        values=values,
        measurements=_measurements(sent.get("measurements", {}), values),
        metrics=_numbers(sent, "metrics"),
        curve=_rows(sent, "curve"),
        routing=_rows(sent, "routing"),
        cost=_whole_numbers(sent, "cost"),
        seconds=_numbers(sent, "seconds"),
        device=_object_of(sent, "device", dict, {}),
        versions=_texts(sent, "versions"),
        data=_object_of(sent, "data", dict, {}),
        seed=job.seed,
        failure=failure,
        weights_sha256=digest,
    )


def _failure(sent: object) -> Failure:
    """Return the failure of a failed evaluation."""
    if not isinstance(sent, Mapping):
        raise ValueError(f"failed, and its failure is {_shown(sent)}")
    texts = {name: sent.get(name, "") for name in ("kind", "message", "traceback", "cause")}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"failure.{name} is {_shown(text)}, not a text")
    if texts["kind"] not in FAILURE_KINDS:
        kinds = ", ".join(FAILURE_KINDS)
        raise ValueError(f"failure.kind is {_shown(texts['kind'])}, not one of {kinds}")
    limits = {"message": MESSAGE, "traceback": TRACEBACK, "cause": MESSAGE}
    short = {name: clean(texts[name], limit) for name, limit in limits.items()}
    return Failure.parse({"kind": texts["kind"], **short})


def _values(sent: object, job: Job, status: str) -> dict[str, float]:
    """Return objective -> value, for all objectives of the job if it is complete."""
    if not isinstance(sent, Mapping):
        raise ValueError(f"values is {_shown(sent)}, not an object")
    values = {}
    for name, value in sent.items():
        if not isinstance(name, str) or name not in job.objectives:
            raise ValueError(f"values: {_shown(name)} is no objective of the study")
        if value is None:
            continue
        try:
            values[name] = real(value)
        except ValueError as error:
            raise ValueError(f"values: {name}: {error}") from None
    missing = [name for name in job.objectives if name not in values]
    if status == "complete" and missing:
        raise ValueError(f"values: complete, and without a value of {', '.join(missing)}")
    return values


def _measurements(sent: object, values: Mapping[str, float]) -> dict[str, Plain]:
    """Return objective -> details; details of a latency must be numbers that a study can use."""
    if not isinstance(sent, Mapping):
        raise ValueError(f"measurements is {_shown(sent)}, not an object")
    measurements = {}
    for name, details in sent.items():
        if not isinstance(name, str) or name not in values:
            raise ValueError(f"measurements: {_shown(name)} has no value")
        try:
            plain = plain_json(details, DETAILS_BYTES)
            if not isinstance(plain, dict):
                raise ValueError(f"{_shown(details)} is not an object")
            if "reference_key" in plain:
                require_timed(plain)
        except ValueError as error:
            raise ValueError(f"measurements: {name}: {error}") from None
        measurements[name] = plain
    return measurements


def require_timed(details: Plain) -> None:
    """Raise ValueError if details with a `reference_key` do not describe a timed latency."""
    key = details["reference_key"]
    if not isinstance(key, str) or not 0 < len(key) <= 1000:
        raise ValueError(f"reference_key is {_shown(key)}, not a short text")
    for name in ("reference_ms", "ratio"):
        if not real(details.get(name)) > 0:
            raise ValueError(f"{name} is {_shown(details[name])}; a time is over 0")


def _object_of(sent: Mapping[str, Any], name: str, cls: type, default: Any) -> Any:
    """Return a small field of one type."""
    try:
        value = plain_json(sent.get(name, default), SMALL_BYTES)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not isinstance(value, cls):
        raise ValueError(f"{name} is {_shown(value)}, not a {cls.__name__}")
    return value


def _numbers(sent: Mapping[str, Any], name: str) -> dict[str, float]:
    """Return a field of names and numbers."""
    try:
        return {key: real(value) for key, value in _object_of(sent, name, dict, {}).items()}
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _whole_numbers(sent: Mapping[str, Any], name: str) -> dict[str, int]:
    numbers = _object_of(sent, name, dict, {})
    if bad := [key for key, value in numbers.items() if type(value) is not int]:
        raise ValueError(f"{name}: {bad[0]} is {_shown(numbers[bad[0]])}, not a whole number")
    return dict(numbers)


def _texts(sent: Mapping[str, Any], name: str) -> dict[str, str]:
    texts = _object_of(sent, name, dict, {})
    if bad := [key for key, value in texts.items() if not isinstance(value, str)]:
        raise ValueError(f"{name}: {bad[0]} is {_shown(texts[bad[0]])}, not a text")
    return dict(texts)


def _rows(sent: Mapping[str, Any], name: str) -> list[Any]:
    """Return a field of rows."""
    rows = sent.get(name, [])
    if not isinstance(rows, list) or len(rows) > MAX_ROWS:
        raise ValueError(f"{name} is not a list of at most {MAX_ROWS} rows")
    try:
        plain_rows = plain_json(rows, ROWS_BYTES)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not all(isinstance(row, dict) for row in plain_rows):
        raise ValueError(f"{name}: a row is not an object")
    return list(plain_rows)
