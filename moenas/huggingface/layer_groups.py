"""Layers of a model as groups and repeated patterns of a space file, and back."""

from __future__ import annotations

from moenas.records import Plain

LONGEST_PATTERN = 32
"""Most layers of a repeated pattern."""


def groups_of(layers: list[Plain]) -> list[Plain]:
    """Write layers as groups: equal neighbours with `repeat`, patterns with `blocks`."""
    known: list[Plain] = []
    numbers = []
    for layer in layers:
        if layer not in known:
            known.append(layer)
        numbers.append(known.index(layer))
    return _groups(numbers, known)


def _groups(numbers: list[int], known: list[Plain]) -> list[Plain]:
    groups, i = [], 0
    while i < len(numbers):
        period, repeats = _longest_repetition(numbers[i:])
        pattern = numbers[i : i + period]
        i += period * repeats
        repeat = {} if repeats == 1 else {"repeat": repeats}
        if period == 1:
            groups.append({**repeat, **known[pattern[0]]})
        else:
            groups.append({**repeat, "blocks": _groups(pattern, known)})
    return groups


def _longest_repetition(numbers: list[int]) -> tuple[int, int]:
    """Return period and repeats of the pattern at the start that covers most layers."""
    best = (1, 1)
    for period in range(1, min(LONGEST_PATTERN, len(numbers) // 2) + 1):
        pattern, repeats = numbers[:period], 1
        while numbers[period * repeats : period * (repeats + 1)] == pattern:
            repeats += 1
        if repeats > 1 and period * repeats > best[0] * best[1]:
            best = (period, repeats)
    return best


def layers_of(groups: list[Plain]) -> list[Plain]:
    """Write out groups, one layer an item; the inverse of `groups_of`."""
    layers = []
    for group in groups:
        inner = layers_of(group["blocks"]) if group.get("blocks") else [_layer(group)]
        layers += inner * group.get("repeat", 1)
    return layers


def _layer(group: Plain) -> Plain:
    return {name: value for name, value in group.items() if name not in ("repeat", "blocks")}
