"""Which family of Hugging Face has an architecture: its config.json, or the nearest and why not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from moenas.errors import InputError, LocatedError
from moenas.huggingface.config import config_of
from moenas.huggingface.config_writers import WRITERS
from moenas.huggingface.families import model_of
from moenas.huggingface.layer_fields import Layers
from moenas.huggingface.layer_groups import groups_of, layers_of
from moenas.model.architecture import Architecture
from moenas.records import Plain
from moenas.resources import parse_yaml

TRAINING_FIELDS = ("balance", "loss_reduce", "z_coef", "entropy_coef", "capacity_factor")
"""Fields of a router that change no logit in evaluation, beside the bias of `balance`."""
BIASED = ("bias", "bias_and_loss", "quantile")
"""Kinds of balancing whose bias selects experts in evaluation, too."""
KIND_WEIGHT, REFUSED_WEIGHT = 8, 100
"""Fields that another kind of part, or sizes that the family refuses, count as in a ranking."""
NULLABLE = ("sliding_window", "q_lora_rank", "attention_value_scale", "final_logit_softcapping")
"""Fields whose null is no absence: families have other defaults."""
CACHED = ("attention", "latent_attention")
"""Mixers by whose cache transformers counts tokens: 5.23 runs no model without one of them."""
SHOWN = 6
"""Most differences that an error lists."""


@dataclass(frozen=True)
class Difference:
    """A field that a family cannot have as the architecture has it."""

    path: str
    ours: object
    theirs: object
    layers: tuple[int, ...] = ()
    """Numbers of the layers; empty: of the whole model."""
    weight: int = 1
    """How far it takes the family from the architecture."""

    def __str__(self) -> str:
        where = f"layer{'s' * (len(self.layers) > 1)} {_ranges(self.layers)} " * bool(self.layers)
        return f"{where}{self.path} is {_shown(self.ours)}, the family has {_shown(self.theirs)}"


def family_config(architecture: Architecture, context: int) -> Plain:
    """Return the config.json of the first family whose model equals an architecture.

    Equal means equal logits in evaluation mode. `context` is the length in tokens of
    `max_position_embeddings`.

    Raises:
        InputError: if no family matches; it names the nearest family and what differs.
    """
    layers = layers_of_architecture(architecture)
    nearest: tuple[int, str, list[Difference]] | None = None
    for family in WRITERS:
        config = written_config(family, layers, context)
        unequal = differences(layers, family, config)
        if not unequal:
            return config
        distance = sum(d.weight for d in unequal)
        if nearest is None or distance < nearest[0]:
            nearest = distance, family, unequal
    assert nearest is not None
    _, family, unequal = nearest
    listed = "; ".join(map(str, unequal[:SHOWN]))
    more = f"; and {len(unequal) - SHOWN} more" if len(unequal) > SHOWN else ""
    raise InputError(
        "no family of Hugging Face that moenas writes has this architecture. The nearest is"
        f" {family}: {listed}{more}. It writes: {', '.join(WRITERS)}"
    )


def layers_of_architecture(architecture: Architecture) -> Layers:
    """Return the canonical fields of an architecture, layer by layer."""
    plain = architecture.canonical().plain()
    blocks = layers_of(plain.pop("blocks"))
    return Layers(plain, [{k: v for k, v in block.items() if k != "vary"} for block in blocks])


def written_config(family: str, layers: Layers, context: int) -> Plain:
    """Return the config.json that the writer of a family makes; see `config_writers`."""
    name, write = WRITERS[family]
    fields = {k: v for k, v in write(layers).items() if v is not None or k in NULLABLE}
    return {
        "architectures": [name],
        "model_type": family,
        **fields,
        "max_position_embeddings": context,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": "float32",
    }


def differences(layers: Layers, family: str, config: Plain) -> list[Difference]:
    """Return where the model of a configuration differs from an architecture."""
    try:
        read = config_of(parse_yaml(json.dumps(config), "config.json"), "config.json")
        whole, blocks = model_of(read)
        theirs = layers_of_architecture(Architecture.parse({**whole, "blocks": groups_of(blocks)}))
    except LocatedError as error:
        return [Difference(error.path or family, "as it is", error.message, weight=REFUSED_WEIGHT)]
    unequal = [
        Difference(*x)
        for x in _unequal("", layers.whole, theirs.whole)
        if x != ("norm", "layernorm", "layernorm_bias")  # a bias of 0 is written
    ]
    if len(theirs.blocks) != len(layers.blocks):
        sizes = len(layers.blocks), len(theirs.blocks)
        return [*unequal, Difference("the number of blocks", *sizes, weight=REFUSED_WEIGHT)]
    if not any(block["mixer"] and block["mixer"]["kind"] in CACHED for block in layers.blocks):
        unequal.append(Difference("the number of attention layers", 0, "1 or more"))
    places: dict[tuple[str, str, str], tuple[Difference, list[int]]] = {}
    for i, (ours, other) in enumerate(zip(layers.blocks, theirs.blocks, strict=True)):
        for path, a, b in _unequal("", _evaluated(ours), _evaluated(other)):
            if path.endswith("router.bias") and b:
                continue  # a bias of 0 is written
            key = path, repr(a), repr(b)
            weight = KIND_WEIGHT if path.endswith(".kind") else 1
            places.setdefault(key, (Difference(path, a, b, weight=weight), []))[1].append(i)
    return unequal + [replace(difference, layers=tuple(at)) for difference, at in places.values()]


def _evaluated(block: Plain) -> Plain:
    """Return a block with what changes logits in evaluation alone."""
    evaluated = dict(block)
    for part in ("mixer", "ffn", "shortcut"):
        if evaluated[part] and "router" in evaluated[part]:
            router = dict(evaluated[part]["router"])
            router["bias"] = router["balance"]["kind"] in BIASED
            router["logits"] = {k: v for k, v in router["logits"].items() if k != "jitter"}
            for name in TRAINING_FIELDS:
                del router[name]
            evaluated[part] = {**evaluated[part], "router": router}
    return evaluated


def _unequal(path: str, ours: object, theirs: object) -> Iterator[tuple[str, object, object]]:
    """Yield the paths of unequal values; of two kinds of a part, the kind alone."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if ours.get("kind") != theirs.get("kind"):
            yield f"{path}.kind", ours.get("kind"), theirs.get("kind")
            return
        for name in {**ours, **theirs}:
            inner = f"{path}.{name}" if path else name
            yield from _unequal(inner, ours.get(name), theirs.get(name))
    elif isinstance(ours, float) and isinstance(theirs, float):
        if not math.isclose(ours, theirs, rel_tol=1e-9):
            yield path, ours, theirs
    elif ours != theirs:
        yield path, ours, theirs


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return str(value.get("kind", "other"))
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _ranges(numbers: tuple[int, ...]) -> str:
    """Write whole numbers in order as `0-3, 5`."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
