"""An architecture in one line, and big numbers in few characters; for tables, hovers and notes."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from moenas.records import Plain

WIDTH = 110
"""Most characters of a description."""


def one_line(architecture: Plain) -> str:
    """Describe a canonical architecture in at most WIDTH characters.

    `96d, 3x(attention 16q/2kv, moe 8e top2 d128 swiglu softmax)`. A part is described where it
    stands first; later it is its kind alone, with a letter where there are several of a kind. A
    pattern that repeats is written once. Where that is too long, the usual words are left out, then
    the order of the layers: `96d: 24 attention 32q/4kv, 8 mamba2 64h; 32 moe 8e top2`.
    """
    many = len(architecture["blocks"]) > MANY
    for level in range(SIZE if not many else 0):
        if len(line := _Description(architecture, level).text()) <= WIDTH:
            return line
    for level in range(LEVELS - 1 if many else 0, LEVELS):
        if len(line := _Description(architecture, level).counts()) <= WIDTH:
            return line
    return line[: WIDTH - 3] + "..."


LEVELS = 5
"""Levels of detail, from every word to the kinds and the experts alone."""

MANY = 64
"""Groups of layers above which only the kinds are counted, as layers drawn one by one differ."""

Words = list[tuple[int, str]]
"""Words of a part, each with the first level that leaves it out."""
ORDINARY, USUAL, SIZE, UNUSUAL, MUST = 1, 2, 3, 4, 5


class _Description:
    """The description of an architecture at one level of detail."""

    def __init__(self, architecture: Plain, level: int) -> None:
        self.architecture = architecture
        self.level = level
        self.names: dict[str, str] = {}
        """A part, as JSON -> its short name."""
        self.said: set[str] = set()
        """Short names of parts that were described."""
        groups = architecture["blocks"]
        parts = {_key(part): part for group in groups for part in _parts(group).values()}
        often = Counter(part["kind"] for part in parts.values())
        numbers: Counter[str] = Counter()
        for key, part in parts.items():
            kind = part["kind"]
            numbers[kind] += 1
            letter = f"-{chr(96 + numbers[kind])}" if 1 < often[kind] <= 26 else ""
            self.names[key] = kind + letter

    def text(self) -> str:
        """Return the whole line."""
        head = " ".join(self._kept(_stream(self.architecture)))
        return f"{head}, {' + '.join(self._folded(list(self.architecture['blocks'])))}"

    def _kept(self, words: Words) -> list[str]:
        return [word for last, word in words if word and self.level < last]

    def counts(self) -> str:
        """Return the whole line without the order of the layers: each part with its number."""
        mixers, networks = Counter[str](), Counter[str]()
        parts: dict[str, Plain] = {}
        for group in self.architecture["blocks"]:
            for name, part in _parts(group).items():
                parts[_key(part)] = part
                (mixers if name == "mixer" else networks)[_key(part)] += group["repeat"]
        lists = [self._counted(numbers, parts) for numbers in (mixers, networks) if numbers]
        head = " ".join(self._kept(_stream(self.architecture)))
        return f"{head}: {'; '.join(lists)}"

    def _counted(self, numbers: Counter[str], parts: dict[str, Plain]) -> str:
        """Write parts with their numbers; a kind is written once in a row."""
        runs, before = [], ""
        for key, number in numbers.items():
            kind, words = parts[key]["kind"], self._kept(_words(parts[key]))
            shown = [] if kind == before and words else [kind]
            runs.append(" ".join([str(number), *shown, *words]))
            before = kind
        return ", ".join(runs)

    def _folded(self, groups: list[Plain]) -> list[str]:
        """Write groups of equal layers; what repeats as a pattern is written once: 12x[a, 3x b]."""
        folded = []
        while groups:
            size, times = _best_fold(groups)
            texts = [self._group(group) for group in groups[:size]]
            folded.append(texts[0] if times == 1 else f"{times}x[{', '.join(texts)}]")
            del groups[: size * times]
        return folded

    def _group(self, group: Plain) -> str:
        repeat, block = group["repeat"], self._block(group)
        if repeat == 1:
            return f"({block})" if ", " in block else block
        return f"{repeat}x({block})" if " " in block else f"{repeat}x {block}"

    def _block(self, group: Plain) -> str:
        parallel = group.get("parallel")
        texts = []
        for name, part in _parts(group).items():
            texts.append(("shortcut " if name == "shortcut" else "") + self._part(part))
        described = any(" " in text for text in texts)
        return (" | " if parallel else ", " if described else "+").join(texts)

    def _part(self, part: Plain) -> str:
        name = self.names[_key(part)]
        if name in self.said:
            return name
        self.said.add(name)
        return " ".join([name, *self._kept(_words(part))])


def _best_fold(groups: list[Plain]) -> tuple[int, int]:
    """Return the size and the number of the repeats that cover most groups from the first."""
    best = (1, 1)
    for size in range(2, len(groups) // 2 + 1):
        times = 1
        while groups[times * size : (times + 1) * size] == groups[:size]:
            times += 1
        if times > 1 and times * size > best[0] * best[1]:
            best = (size, times)
    return best


def _parts(group: Plain) -> dict[str, Plain]:
    """Return the parts of a block by the names of their fields."""
    parts = {name: group.get(name) for name in ("mixer", "ffn", "shortcut")}
    return {name: part for name, part in parts.items() if part is not None}


def _key(part: Plain) -> str:
    return json.dumps(part, sort_keys=True)


_POSITIONS = {"pre": "", "post": "post-norm", "output": "output-norm", "sandwich": "sandwich"}


def _stream(architecture: Plain) -> Words:
    """Return the words of what all layers share."""
    norm, position = architecture["norm"], architecture.get("norm_position", "pre")
    return [
        (MUST, f"{architecture['d_model']}d"),
        (ORDINARY if norm == "rmsnorm" else UNUSUAL, norm),
        (UNUSUAL, _POSITIONS.get(position, position)),
        (UNUSUAL, "learned-positions" if architecture.get("positions") == "learned" else ""),
    ]


def _words(part: Plain) -> Words:
    """Return the words of a part: its sizes, what makes it unusual, then the rest."""
    if part["kind"] == "moe":
        return _experts(part)
    if part["kind"] == "product_key":
        n_keys, heads = part["n_keys"], part["n_heads"]
        return [(SIZE, f"{n_keys}x{n_keys}"), (SIZE, f"{heads}h"), (SIZE, f"top{part['top_k']}")]
    if part["kind"] == "moa":
        router, kv = part["router"], part["n_kv_heads"]
        sizes = [(MUST, f"{part['n_experts']}e"), (MUST, f"top{router['top_k']}")]
        return [*sizes, (SIZE, f"{kv}kv"), *_router(router), *_positions(part)]
    if "d_ff" in part:
        return [(SIZE, str(part["d_ff"])), (USUAL, str(part.get("activation", "")))]
    return _mixer(part)


def _mixer(mixer: Plain) -> Words:
    """Return the words of a mixer, whatever its kind: only fields that it has are asked for."""
    attends = "n_kv_heads" in mixer or "kv_rank" in mixer
    units = (("n_heads", "q"), ("n_kv_heads", "kv")) if attends else (("n_heads", "h"),)
    heads = "/".join(f"{mixer[key]}{unit}" for key, unit in units if mixer.get(key) is not None)
    words: Words = [(SIZE, heads)]
    words += [(rank, f"{word}{mixer[key]}") for key, rank, word in _NUMBERS if mixer.get(key)]
    words += _positions(mixer)
    gate, qk_norm = mixer.get("output_gate"), mixer.get("qk_norm")
    words += [
        (UNUSUAL, "sinks" if mixer.get("sinks") else ""),
        (UNUSUAL, "gate" if gate not in (None, "none") else ""),
        (SIZE, "qk-norm" if qk_norm not in (None, "none") else ""),
    ]
    return words


_NUMBERS = (
    ("n_key_heads", SIZE, "keys "),
    ("window", UNUSUAL, "window "),
    ("chunk", UNUSUAL, "chunk "),
    ("kv_source", UNUSUAL, "keys of -"),
    ("kv_rank", UNUSUAL, "latent "),
    ("d_inner", SIZE, "d"),
    ("d_state", SIZE, "state "),
)


def _positions(mixer: Plain) -> Words:
    """Return how a mixer knows positions, if not by rotary embeddings of all dimensions."""
    bias, rope = mixer.get("position_bias"), mixer.get("rope")
    if bias is not None:
        return [(UNUSUAL, _kind(bias))]
    if "rope" not in mixer:  # an architecture of an earlier version
        former = {"theta": "rope_theta", "partial_rotary_factor": "rope_fraction"}
        rope = {name: mixer[before] for name, before in former.items() if before in mixer}
    is_nope = rope is None or rope.get("theta", 1) is None or rope.get("partial_rotary_factor") == 0
    return [(UNUSUAL, "NoPE" if is_nope else "")]


def _experts(ffn: Plain) -> Words:
    words: Words = [
        (MUST, f"{ffn['n_experts']}e"),
        (MUST, f"top{ffn['router']['top_k']}"),
        (SIZE, f"d{ffn['d_expert']}"),
    ]
    if ffn.get("n_shared_experts"):
        words.append((UNUSUAL, f"+{ffn['n_shared_experts']} shared"))
    if ffn.get("n_zero_experts"):
        words.append((UNUSUAL, f"+{ffn['n_zero_experts']} {ffn['zero_kind']}"))
    if ffn.get("d_latent"):
        words.append((UNUSUAL, f"latent {ffn['d_latent']}"))
    gate = "shared-gate" if ffn.get("shared_gate") else ""
    activation = str(ffn["activation"])
    return [*words, (USUAL, gate), (USUAL, activation), *_router(ffn["router"])]


def _router(router: Plain) -> Words:
    """Return the words of a router: its score, and what is not the plainest of it."""
    score, selection = _kind(router.get("score")), _kind(router.get("selection"))
    balance, capacity = _kind(router.get("balance")), router.get("capacity_factor")
    source = router.get("router_input") or _field(router.get("logits"), "input")
    return [
        (UNUSUAL, "" if selection == "top_k" else selection),
        (UNUSUAL if score != "softmax" else USUAL, score),
        (ORDINARY, "" if balance == "none" else balance),
        (USUAL, "" if capacity is None else f"cf{capacity:g}"),
        (UNUSUAL, "reads-block" if source == "block" else ""),
    ]


def _kind(value: Any) -> str:
    """Return the kind of a component that is a word, or a mapping with a kind; else nothing."""
    return str(value.get("kind", "")) if isinstance(value, dict) else str(value or "")


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def compact(value: float) -> str:
    """Write a measured number in few characters: 1.23M from 10,000 on, else 4 digits."""
    return short(value) if abs(value) >= 1e4 else f"{value:.4g}"


def short(number: float) -> str:
    """Write a count in few characters: 1.23M, 46.7B, 812; from 1e15 on 2.5e+15."""
    if abs(number) >= 999.5e12:
        return f"{number:.3g}"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.4g}"


def counted(number: int, noun: str) -> str:
    """Write a number of things: 1 point, 27,468 points."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a time in its two largest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
