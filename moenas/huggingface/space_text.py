"""An architecture as the text of a space file, with comments that propose holes."""

from __future__ import annotations

from typing import Any

from moenas.grammar.brief import brief
from moenas.huggingface.layer_groups import groups_of
from moenas.records import Plain
from moenas.resources import scalar

INLINE = 64
"""Most characters of a component that is written on one line."""


def space_text(whole: Plain, layers: list[Plain], title: list[str], objectives: list[str]) -> str:
    """Return a space file of one point.

    A component that several blocks use stands once, under `layers`. A comment beside a value
    proposes a hole for it.
    """
    architecture = brief({**whole, "blocks": groups_of(layers)})
    architecture["tie_embeddings"] = whole.get("tie_embeddings", True)
    names: dict[str, Plain] = {}
    blocks = _named(architecture.pop("blocks"), names)
    lines = [f"# {line}" for line in title]
    lines += ["# A comment `hole:` proposes a hole: write it in place of the value before it.", ""]
    writer = _Writer()
    if names:
        lines += ["layers:", *writer.mapping(names, 1), ""]
    lines += ["architecture:", *writer.mapping({**architecture, "blocks": blocks}, 1), ""]
    lines += [f"objectives: [{', '.join(objectives)}]", ""]
    return "\n".join(lines)


def _named(blocks: list[Plain], names: dict[str, Plain]) -> list[Plain]:
    """Replace components that several blocks use by names, and collect their definitions."""
    parts: list[Plain] = []
    _collect(blocks, parts)
    shared = [part for i, part in enumerate(parts) if part in parts[:i]]
    known: list[tuple[str, Plain]] = []
    for part in shared:
        if part not in [p for _, p in known]:
            known.append((_unused(_name(part), [n for n, _ in known]), part))
    names |= dict(known)
    return [_replaced(block, known) for block in blocks]


def _collect(blocks: list[Plain], parts: list[Plain]) -> None:
    for block in blocks:
        _collect(block.get("blocks", []), parts)
        parts += [p for n in ("mixer", "ffn", "shortcut") if isinstance(p := block.get(n), dict)]


def _replaced(block: Plain, known: list[tuple[str, Plain]]) -> Plain:
    if "blocks" in block:
        return {**block, "blocks": [_replaced(inner, known) for inner in block["blocks"]]}
    names = {
        part: name
        for part in ("mixer", "ffn", "shortcut")
        for name, definition in known
        if block.get(part) == definition
    }
    return {**block, **names}


def _name(part: Plain) -> str:
    if part["kind"] == "attention":
        return "local_attention" if part.get("window") or part.get("chunk") else "full_attention"
    names = {"moe": "experts", "dense": "network", "latent_attention": "latent"}
    return names.get(part["kind"], f"{part['kind']}_layer")


def _unused(name: str, taken: list[str]) -> str:
    unused, i = name, 1
    while unused in taken:
        i += 1
        unused = f"{name}_{i}"
    return unused


class _Writer:
    """Writes YAML in block style; the first value of each kind gets a comment with a hole."""

    def __init__(self) -> None:
        self.proposed: set[str] = set()

    def mapping(self, plain: Plain, depth: int, experts: int = 0) -> list[str]:
        """Return the lines of a mapping."""
        lines, pad = [], "  " * depth
        experts = plain.get("n_experts", experts)
        for name, value in plain.items():
            if isinstance(value, dict) and not _fits(value):
                lines += [f"{pad}{name}:", *self.mapping(value, depth + 1, experts)]
            elif name == "blocks":
                lines += [f"{pad}blocks:", *self.sequence(value, depth + 1)]
            else:
                lines.append(self.commented(f"{pad}{name}: {_flow(value)}", name, plain, experts))
        return lines

    def sequence(self, blocks: list[Plain], depth: int) -> list[str]:
        """Return the lines of a list of blocks."""
        lines, pad = [], "  " * depth
        for block in blocks:
            inner = self.mapping(block, depth + 1)
            lines += [f"{pad}- {inner[0].lstrip()}", *inner[1:]]
        return lines

    def commented(self, line: str, name: str, plain: Plain, experts: int) -> str:
        """Return a line with the hole that its value may become."""
        hole = _hole(name, plain, experts)
        if hole is None or name in self.proposed:
            return line
        self.proposed.add(name)
        return f"{line:<40}  # hole: {hole}"


def _hole(name: str, plain: Plain, experts: int) -> str | None:
    """Return a hole around a value that keeps the architecture valid, or None."""
    value = plain[name]
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    options: list[int] = []
    if name in ("d_expert", "d_ff"):
        options = [value // 2, value] if value % 16 == 0 else []
    elif name == "n_kv_heads":
        options = sorted({value, plain.get("n_heads", value)})
    elif name == "top_k":
        options = [x for x in (value // 2, value, 2 * value) if 2 <= x <= experts or x == value]
        options = [] if "selection" in plain else options
    elif name == "repeat" and value > 1:
        return f"{{int: [{max(1, value // 2)}, {value}]}}"
    return f"{{choice: [{', '.join(map(str, options))}]}}" if len(options) > 1 else None


def _fits(value: Plain) -> bool:
    holes = {"top_k", "d_expert", "d_ff", "n_kv_heads", "n_heads"} & set(value)
    return not holes and len(_flow(value)) <= INLINE


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return value if isinstance(scalar(value), str) else f"'{value}'"
    return repr(value)
