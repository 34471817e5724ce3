"""An architecture in one line, and big numbers in few characters; for tables, hovers and notes."""

from __future__ import annotations

from moenas.records import Plain


def one_line(architecture: Plain) -> str:
    """Describe a canonical architecture: `96d rmsnorm, 3x(attention 16/2kv, moe 8e top2 d128)`."""
    groups = [(_block(group), group["repeat"]) for group in architecture["blocks"]]
    return f"{architecture['d_model']}d {architecture['norm']}, {' + '.join(_folded(groups))}"


def _folded(groups: list[tuple[str, int]]) -> list[str]:
    """Write groups of equal layers; what repeats as a pattern is written once: 12x[a, 3x b]."""
    found = []
    while groups:
        best, times = 1, 1
        for size in range(2, len(groups) // 2 + 1):
            if groups[size] != groups[0]:
                continue
            n = 1
            while groups[n * size : (n + 1) * size] == groups[:size]:
                n += 1
            if n > 1 and n * size > best * times:
                best, times = size, n
        texts = [f"{repeat}x({text})" for text, repeat in groups[:best]]
        found.append(texts[0] if times == 1 else f"{times}x[{', '.join(texts)}]")
        del groups[: best * times]
    return found


def _block(group: Plain) -> str:
    parts = ((group["mixer"], _mixer), (group["ffn"], _ffn), (group.get("shortcut"), _shortcut))
    between = " | " if group.get("parallel") else ", "
    return between.join(write(part) for part, write in parts if part is not None)


def _mixer(mixer: Plain) -> str:
    if mixer["kind"] == "moa":
        heads = f"{mixer['n_experts']}e top{mixer['router']['top_k']} {mixer['n_kv_heads']}kv"
        return " ".join(["moa", heads, *_routed(mixer["router"])])
    units = _HEADS if "n_kv_heads" in mixer or "kv_rank" in mixer else _STATE_HEADS
    heads = "/".join(f"{mixer[key]}{unit}" for key, unit in units if mixer.get(key) is not None)
    words = [mixer["kind"], heads]
    words += [f"{word}{mixer[key]}" for key, word in _WORDS if mixer.get(key) is not None]
    bias = mixer.get("position_bias")
    words += [] if bias is None else [bias["kind"]]
    return " ".join(word for word in words if word)


_HEADS = (("n_heads", "q"), ("n_kv_heads", "kv"))
_STATE_HEADS = (("n_heads", "h"), ("n_key_heads", "key"))
_WORDS = (
    ("window", "window "),
    ("chunk", "chunk "),
    ("kv_source", "keys of -"),
    ("kv_rank", "rank "),
    ("d_inner", "d"),
    ("d_state", "state "),
)


def _ffn(ffn: Plain) -> str:
    if ffn["kind"] == "product_key":
        return f"product_key {ffn['n_keys']}x{ffn['n_keys']} {ffn['n_heads']}h top{ffn['top_k']}"
    if ffn["kind"] != "moe":
        return f"{ffn['kind']} {ffn.get('d_ff', '')} {ffn.get('activation', '')}".strip()
    router = ffn["router"]
    words = [f"moe {ffn['n_experts']}e top{router['top_k']} d{ffn['d_expert']}"]
    if ffn.get("n_shared_experts"):
        words.append(f"+{ffn['n_shared_experts']} shared d{ffn['d_shared']}")
    if ffn.get("n_zero_experts"):
        words.append(f"+{ffn['n_zero_experts']} {ffn['zero_kind']}")
    return " ".join([*words, str(ffn["activation"]), *_routed(router)])


def _routed(router: Plain) -> list[str]:
    """Return the words of a router."""
    words = [_kind(router["score"])]
    if "selection" in router and _kind(router["selection"]) != "top_k":
        words.append(_kind(router["selection"]))
    if "balance" in router and _kind(router["balance"]) != "none":
        words.append(_kind(router["balance"]))
    if router.get("capacity_factor") is not None:
        words.append(f"cf{router['capacity_factor']:g}")
    return words


def _kind(component: Plain | str) -> str:
    """Return the kind of a component; earlier versions stored the kinds of a router as words."""
    return component if isinstance(component, str) else str(component["kind"])


def _shortcut(ffn: Plain) -> str:
    return f"shortcut {_ffn(ffn)}"


def compact(value: float) -> str:
    """Write a measured number in few characters: 1.23M from 10,000 on, else 4 digits."""
    return short(value) if abs(value) >= 1e4 else f"{value:.4g}"


def short(number: float) -> str:
    """Write a count in few characters: 1.23M, 46.7B, 812."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.4g}"
