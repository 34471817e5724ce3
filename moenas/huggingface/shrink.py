"""A smaller model of the same proportions: widths, heads and experts follow `d_model`."""

from __future__ import annotations

import math
from collections.abc import Iterable

from moenas.errors import InputError, suggestion
from moenas.huggingface.layer_groups import groups_of
from moenas.records import Plain

SIZES = ("d_model", "n_layers", "vocab_size", "n_experts")
"""What `--shrink` sets."""
WIDTHS = ("d_ff", "d_expert", "d_shared", "d_latent", "d_inner")
"""Widths of hidden layers: multiples of 8, proportional to d_model."""
RANKS = ("q_rank", "kv_rank", "dt_rank", "rank")
"""Widths of latents: proportional to d_model."""
HEAD_WIDTHS = ("head_dim", "v_head_dim", "nope_dim", "rope_dim", "v_dim", "key_dim", "value_dim")
"""Widths of a head: with the number of heads they are proportional to d_model."""
CLOSE = 0.1
"""Largest logarithm of the ratio between the total width of heads and the proportional one."""
HEADS = ("n_heads", "n_kv_heads", "n_key_heads")


def read_sizes(words: Iterable[str]) -> dict[str, int]:
    """Read `d_model=128` and the like; commas separate several.

    Raises:
        InputError: at an unknown name, a name with two values, or a value that is not a whole
            number of at least 1.
    """
    sizes: dict[str, int] = {}
    for item in (item for word in words for item in word.split(",")):
        name, _, text = item.partition("=")
        if name not in SIZES:
            near = suggestion(name, SIZES)
            raise InputError(
                f"--shrink {item}: no size '{name}'.{near} There are: {', '.join(SIZES)}."
            )
        if not text.isdecimal() or int(text) < 1:
            raise InputError(f"--shrink {item}: give a whole number of at least 1, as {name}=128")
        if name in sizes:
            raise InputError(f"--shrink {item}: {name} has two values; give one")
        sizes[name] = int(text)
    return sizes


def shrink(whole: Plain, layers: list[Plain], sizes: dict[str, int]) -> tuple[Plain, list[Plain]]:
    """Return an architecture in the given sizes: its fields beside the blocks, and its layers.

    With s = new d_model / old d_model, hidden widths and ranks are multiplied by s. Heads keep
    their number per key-value head; number and width of heads are multiplied by sqrt(s) each,
    so that their product is proportional to d_model. The number of experts, top_k and the depth
    stay unless they are given.

    Raises:
        InputError: if the size is larger than it was, or the pattern of layers does not fit.
    """
    whole = dict(whole)
    for name in ("d_model", "vocab_size"):
        if sizes.get(name, 0) > whole[name]:
            raise InputError(f"--shrink {name}={sizes[name]}: the model has {whole[name]}")
    old = whole["d_model"]
    whole |= {name: sizes[name] for name in ("d_model", "vocab_size") if name in sizes}
    if whole["d_model"] % 8:
        raise InputError(f"--shrink d_model={whole['d_model']}: give a multiple of 8")
    share = whole["d_model"] / old
    if math.isclose(whole.get("embedding_multiplier", 0.0), math.sqrt(old)):
        whole["embedding_multiplier"] = math.sqrt(whole["d_model"])
    if "n_layers" in sizes:
        layers = _shallower(layers, sizes["n_layers"])
    scaled: dict[int, Plain] = {}
    for layer in layers:
        scaled.setdefault(id(layer), _scaled_layer(layer, share, sizes.get("n_experts")))
    return whole, [scaled[id(layer)] for layer in layers]


def _scaled_layer(layer: Plain, share: float, n_experts: int | None) -> Plain:
    return {
        name: _scaled(part, share, n_experts) if isinstance(part, dict) else part
        for name, part in layer.items()
    }


def _scaled(part: Plain, share: float, n_experts: int | None) -> Plain:
    """Return a mixer or a network at another width."""
    scaled = dict(part)
    for name in WIDTHS:
        if part.get(name) and share != 1:
            scaled[name] = _multiple(part[name] * share, 8)
    for name in RANKS:
        if part.get(name) and share != 1:
            scaled[name] = max(1, round(part[name] * share))
    if part.get("n_heads") and share != 1:
        scaled |= _scaled_heads(part, share)
    if n_experts and part.get("n_experts"):
        scaled["n_experts"] = n_experts
    return scaled


def _scaled_heads(part: Plain, share: float) -> Plain:
    """Return numbers and widths of heads; heads per key-value head stay.

    Of all numbers of key-value heads, those whose total width is within CLOSE of the proportion
    count, and of these the one nearest to sqrt(share).
    """
    heads: dict[str, int] = {n: part[n] for n in HEADS if part.get(n)}
    widths: dict[str, int] = {n: part[n] for n in HEAD_WIDTHS if part.get(n)}
    fewest = math.gcd(*heads.values())
    total = sum(widths.values()) * fewest * share

    def fit(count: int) -> tuple[float, float]:
        new = _head_widths(widths, share * fewest / count)
        error = abs(math.log(sum(new.values()) * count / total))
        return max(error, CLOSE), abs(math.log(count / (fewest * math.sqrt(share))))

    count = min(range(1, fewest + 1), key=fit)
    new = _head_widths(widths, share * fewest / count)
    scaled: Plain = {n: value * count // fewest for n, value in heads.items()} | new
    if part.get("scale"):
        scaled["scale"] = part["scale"] * math.sqrt(sum(widths.values()) / sum(new.values()))
    return scaled


def _head_widths(widths: dict[str, int], share: float) -> dict[str, int]:
    return {name: _multiple(width * share, 8) for name, width in widths.items()}


def _multiple(value: float, step: int) -> int:
    return max(step, round(value / step) * step)


def _shallower(layers: list[Plain], n_layers: int) -> list[Plain]:
    """Return fewer layers: every group and pattern keeps its share, and occurs at least once.

    Raises:
        InputError: if no number of repeats gives so many layers.
    """
    if n_layers > len(layers):
        raise InputError(f"--shrink n_layers={n_layers}: the model has {len(layers)}")
    groups = _patterns(layers)
    sizes = [len(pattern) for pattern, _ in groups]
    ideal = [max(1, round(times * n_layers / len(layers))) for _, times in groups]
    repeats = _repeats(sizes, ideal, n_layers)
    if repeats is None:
        possible = [n for n in range(1, len(layers) + 1) if _repeats(sizes, ideal, n)]
        below = [n for n in possible if n < n_layers][-1:]
        above = [n for n in possible if n > n_layers][:1]
        near = " or ".join(map(str, [*below, *above]))
        raise InputError(
            f"--shrink n_layers={n_layers}: the layers follow patterns of {sizes}; give {near}"
        )
    return [layer for (pattern, _), n in zip(groups, repeats, strict=True) for layer in pattern * n]


def _patterns(layers: list[Plain]) -> list[tuple[list[Plain], int]]:
    """Return the repeated patterns in their order, each with its number of repeats."""
    patterns, i = [], 0
    for group in groups_of(layers):
        repeats = group.get("repeat", 1)
        size = _n_layers(group) // repeats
        patterns.append((layers[i : i + size], repeats))
        i += size * repeats
    return patterns


def _n_layers(group: Plain) -> int:
    inner = sum(map(_n_layers, group["blocks"])) if "blocks" in group else 1
    return int(group.get("repeat", 1)) * inner


def _repeats(sizes: list[int], ideal: list[int], n_layers: int) -> list[int] | None:
    """Return repeats with the given sum of layers, by changes of the largest groups first."""
    repeats = list(ideal)
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i] * ideal[i])
    for i in order:
        rest = n_layers - sum(s * r for s, r in zip(sizes, repeats, strict=True))
        repeats[i] = max(1, repeats[i] + int(rest / sizes[i]))
    total = sum(s * r for s, r in zip(sizes, repeats, strict=True))
    return repeats if total == n_layers else None
