"""Space files with faults in them: bytes, structure and values changed at random, by a seed."""

from __future__ import annotations

import copy
import random
import resource
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import yaml

from moenas import resources
from moenas.errors import InputError
from moenas.space.space import Space

NUMBERS = [0, 1, -1, 3, 7, 8, 1000, 10**15, 10**16, -(10**15), 1e-320, 1e308, 0.5, 1e-9]
ODD: list[Any] = [None, True, "", "x", "nan", ".inf", [], {}, [1], {"choice": []}, "1e400"]
WORDS = ["kind", "choice", "int", "float", "log", "step", "preset", "repeat", "vary", "blocks"]
REQUIRED = ["d_model < 9", "1 / 0 < 2", "9e29 * 9e29 * 9e29 < params", "a.b == 'c'", "not (1 < 2)"]


@cache
def sources() -> list[str]:
    """Return the space files that came with moenas."""
    folder = resources.shipped("spaces")
    return [path.read_text() for path in sorted(folder.rglob("*.yaml"))]


def mutated(seed: int) -> str:
    """Return the text of a shipped space with one to four faults; equal seeds, equal texts."""
    rng = random.Random(seed)
    text = rng.choice(sources())
    if rng.random() < 0.3:
        return _bytes(text, rng)
    plain = yaml.safe_load(text)
    for _ in range(rng.randint(1, 4)):
        rng.choice(_CHANGES)(plain, rng)
    return yaml.safe_dump(plain, sort_keys=False)


def _bytes(text: str, rng: random.Random) -> str:
    """Cut, double, swap or replace pieces of the text."""
    for _ in range(rng.randint(1, 4)):
        at, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        end = min(end, at + rng.choice([1, 3, 40]))
        new = rng.choice(["", text[at:end] * 2, *"{}[]:#&*!|>-'\"\t\n\0", "\ud7ff", "<<: "])
        text = text[:at] + new + text[end:]
    return text


def _places(plain: Any, places: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Return (container, key) of everything in some plain data."""
    inner = plain.items() if isinstance(plain, dict) else enumerate(plain)
    for key, value in list(inner):
        places.append((plain, key))
        if isinstance(value, dict | list):
            _places(value, places)
    return places


def _place(plain: Any, rng: random.Random) -> tuple[Any, Any]:
    return rng.choice(_places(plain, []) or [({"x": 1}, "x")])


def _odd(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(NUMBERS + ODD))


def _replace(plain: Any, rng: random.Random) -> None:
    holder, key = _place(plain, rng)
    holder[key] = _odd(rng)


def _delete(plain: Any, rng: random.Random) -> None:
    holder, key = _place(plain, rng)
    del holder[key]


def _rename(plain: Any, rng: random.Random) -> None:
    holder, key = _place(plain, rng)
    if isinstance(holder, dict):
        holder[rng.choice(WORDS)] = holder.pop(key)


def _copy(plain: Any, rng: random.Random) -> None:
    (holder, key), (other, name) = _place(plain, rng), _place(plain, rng)
    other[name] = copy.deepcopy(holder[key])


def _hole(plain: Any, rng: random.Random) -> None:
    holder, key = _place(plain, rng)
    low, high = sorted(rng.sample(NUMBERS, 2), key=float)
    holder[key] = rng.choice(
        [
            {"choice": [holder[key], _odd(rng)]},
            {"choice": list(range(rng.choice([1, 30, 1001])))},
            {"int": [low, high], "log": rng.random() < 0.5},
            {"int": [8, 8 * rng.randint(1, 999)], "step": rng.choice([1, 8, 3])},
            {"float": [low, high], "step": rng.choice(NUMBERS)},
        ]
    )


def _nest(plain: Any, rng: random.Random) -> None:
    blocks = plain.get("architecture") if isinstance(plain, dict) else None
    if isinstance(blocks, dict) and isinstance(blocks.get("blocks"), list):
        for _ in range(rng.randint(1, 5)):
            repeat = rng.choice([2, 40, 1000, {"int": [1, 1000]}, {"choice": [1, 1000]}])
            blocks["blocks"] = [{"repeat": repeat, "blocks": blocks["blocks"]}]


def _vary(plain: Any, rng: random.Random) -> None:
    for holder, key in _places(plain, []):
        if key in ("mixer", "ffn") and isinstance(holder, dict) and rng.random() < 0.5:
            holder["vary"], holder["repeat"] = True, rng.choice([2, 30, 1000])
            return


def _require(plain: Any, rng: random.Random) -> None:
    if isinstance(plain, dict):
        plain["require"] = rng.sample(REQUIRED, rng.randint(1, 2))


_CHANGES: list[Callable[[Any, random.Random], None]] = [
    _replace, _replace, _delete, _rename, _copy, _hole, _hole, _nest, _vary, _require
]  # fmt: skip


def outcome(text: str) -> tuple[str, float, int]:
    """Read a space; return its output, its seconds of CPU and the peak memory in bytes.

    Anything but a space or an InputError goes through: it is a fault.
    """
    began = time.process_time()
    try:
        space = Space.parse(text, "fuzz.yaml")
        said = f"{space.size > 0} {sum(isinstance(x, str) for x in space.feasible(20))}"
    except InputError as error:
        said = str(error)
    took = time.process_time() - began
    return said, took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
