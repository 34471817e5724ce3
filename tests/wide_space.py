"""Points of the wide space: drawn by number, with one hole changed, and what a model makes of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from moenas.errors import SpaceError
from moenas.grammar.component import Component, fields
from moenas.grammar.conditions import Scalar
from moenas.grammar.sampling import RandomSuggest
from moenas.model import FFN, FeedForward, MoE, MoEFFN
from moenas.model.architecture import Architecture, Model
from moenas.records import Plain
from moenas.space.space import Space


@cache
def wide() -> Space:
    return Space.load("wide")


class Noted(RandomSuggest):
    """Draws at random and notes what was drawn, and from what."""

    def __init__(self, seed: int, forced: Mapping[str, Any] | None = None) -> None:
        super().__init__(seed, forced)
        self.drawn: dict[str, Any] = {}
        self.options: dict[str, list[Any]] = {}

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        self.options[name] = list(choices)
        self.drawn[name] = super().suggest_categorical(name, choices)
        return self.drawn[name]

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        self.options[name] = list(range(low, high + 1, step))
        self.drawn[name] = super().suggest_int(name, low, high, step=step, log=log)
        return int(self.drawn[name])


def point(number: int) -> tuple[Plain, Noted] | None:
    """Return the draw with this number, if it is valid."""
    noted = Noted(number)
    plain = wide().draw(noted)
    try:
        Architecture.parse(plain)
    except SpaceError:
        return None
    return plain, noted


def changed(noted: Noted, seed: int) -> tuple[Plain, str] | None:
    """Return a draw with another answer to one hole, and its name; what hangs on it is new."""
    rng = random.Random(seed)
    name = rng.choice([n for n, options in noted.options.items() if len(options) > 1])
    others = [o for o in noted.options[name] if o != noted.drawn[name]]
    plain = wide().draw(Noted(seed, {**noted.drawn, name: rng.choice(others)}))
    try:
        Architecture.parse(plain)
    except SpaceError:
        return None
    return plain, name


def respelled(component: Component, rng: random.Random) -> Plain:
    """Return plain data of the same component: keys shuffled, some defaults left out, 8 as 8.0."""
    plain: Plain = {} if component.kind is None else {"kind": component.kind}
    known = fields(type(component))
    for name in rng.sample(list(known), len(known)):
        value = getattr(component, name)
        if value == known[name].default and rng.random() < 0.7:
            continue
        if isinstance(value, Component):
            plain[name] = respelled(value, rng)
        elif isinstance(value, tuple):
            plain[name] = [respelled(item, rng) for item in value]
        else:
            whole = isinstance(value, int) and not isinstance(value, bool)
            plain[name] = float(value) if whole and rng.random() < 0.5 else value
    return dict(sorted(plain.items(), key=lambda _: rng.random()))


def scalars(component: Component, path: str = "") -> Iterator[tuple[str, Scalar]]:
    """Yield every scalar field of a component and of those in it, with its path."""
    for name in fields(type(component)):
        value = getattr(component, name)
        if isinstance(value, Component):
            yield from scalars(value, f"{path}{name}.")
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                yield from scalars(item, f"{path}{name}.{i}.")
        else:
            yield f"{path}{name}", value


def tokens_of(architecture: Architecture, length: int, seed: int = 0) -> Tensor:
    """Return (2, length) random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(architecture.vocab_size, (2, length), generator=generator)


def labels(model: Model) -> dict[str, str]:
    """Return the names of parameters and buffers by the numbers of parts in place of blocks.

    They stay the same when a mixer and the ffn after it become one block.
    """
    counts, names = {"norm1": 0, "norm2": 0}, {}
    for i, block in enumerate(model.blocks):
        for part, norm in (("mixer", "norm1"), ("ffn", "norm2")):
            if getattr(block, part) is not None:
                for child in (part, norm):
                    names[f"blocks.{i}.{child}"] = f"{child}.{counts[norm]}"
                counts[norm] += 1
        names[f"blocks.{i}.shortcut"] = f"shortcut.{counts['norm2']}"

    def label(name: str) -> str:
        place = ".".join(name.split(".")[:3])
        return names.get(place, place) + name.removeprefix(place)

    named = (*model.named_parameters(), *model.named_buffers())
    return {name: label(name) for name, _ in named}


@torch.no_grad()
def stir(model: Model, seed: int) -> None:
    """Move every parameter away from its start, so that zeros and ones hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    label = labels(model)
    for _, parameter in sorted((label[n], p) for n, p in model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(0.4 * noise + (parameter if parameter.dim() == 1 else 0))


@torch.no_grad()
def carry(architecture: Architecture, model: Model, canonical: Model) -> None:
    """Give the model of an architecture the weights of its canonical one."""
    for name in ("stem", "norm", "head"):
        copy(getattr(canonical, name), getattr(model, name))
    model.embedding.copy_(canonical.embedding)
    mixers = [[b for b in m.blocks if b.mixer is not None] for m in (canonical, model)]
    for one, other in zip(*mixers, strict=True):
        copy(one.mixer, other.mixer)
        copy(one.norm1, other.norm1)
    fed = [[b for b in m.blocks if b.ffn is not None] for m in (canonical, model)]
    layers = [
        [layer for layer in a.layers if layer.ffn is not None]
        for a in (architecture.canonical(), architecture)
    ]
    for one, other, wanted, layer in zip(*fed, *layers, strict=True):
        copy(one.norm2, other.norm2)
        if layer.shortcut is not None and wanted.shortcut is None:
            split(one.ffn, other.ffn, other.shortcut.ffn)
        elif layer.shortcut is not None and reading_alike(wanted.ffn) != reading_alike(layer.ffn):
            copy(one.ffn, other.shortcut.ffn)
            copy(one.shortcut.ffn, other.ffn)
            norms = [getattr(b.norm2, "after", b.norm2) for b in (one, other)]
            if one.shortcut.after is not None:
                copy(norms[0], other.shortcut.after)
                copy(one.shortcut.after, norms[1])
        else:
            copy(one.ffn, other.ffn)
            copy(one.shortcut, other.shortcut)


def reading_alike(part: FFN) -> FFN:
    """Return a layer in canonical form, whatever its router reads: the block renames that."""
    part = part.canonical()
    if not isinstance(part, MoEFFN):
        return part
    logits = replace(part.router.logits, input="ffn")
    return replace(part, router=replace(part.router, logits=logits))


def copy(source: nn.Module | None, target: nn.Module | None) -> None:
    """Copy parameters and buffers; a norm without parameters may be missing on one side.

    So may a bias on the selection among all experts, which the canonical form does without.
    """
    state = {} if source is None else source.state_dict()
    wanted = {} if target is None else target.state_dict()
    unread = {name for name in wanted.keys() - state.keys() if name.endswith("balance.bias")}
    assert state.keys() == wanted.keys() - unread
    if target is not None:
        target.load_state_dict(state, strict=not unread)


def split(whole: Any, *parts: Any) -> None:
    """Lay the width of a network, or of the shared expert of a mixture, out over two layers."""
    if isinstance(whole, MoE):
        (mixture,) = (part for part in parts if isinstance(part, MoE))
        rest = {k: v for k, v in whole.state_dict().items() if not k.startswith("shared.")}
        assert not mixture.load_state_dict(rest, strict=False).unexpected_keys
        parts = (mixture.shared, *(part for part in parts if part is not mixture))
        whole = whole.shared
    networks = [part for part in parts if part is not None]
    assert all(type(part) is FeedForward for part in (whole, *networks))
    widths = [part.width for part in networks]
    ups = whole.up.weight.unflatten(0, (-1, whole.width)).split(widths, dim=1)
    downs = whole.down.weight.split(widths, dim=1)
    for network, up, down in zip(networks, ups, downs, strict=True):
        network.up.weight.copy_(up.flatten(0, 1))
        network.down.weight.copy_(down)


def trail(model: Model, length: int, steps: int = 2) -> dict[str, Tensor]:
    """Return all that two steps of training and evaluation show of a model.

    Logits in evaluation, the loss in training, gradients with the auxiliary losses in them (of
    which only the slope matters), and buffers after each step of gradient descent.
    """
    recorded: dict[str, Tensor] = {}
    label = labels(model)
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 + step)
        tokens = torch.randint(model.vocab_size, (2, length), generator=generator)
        tokens = tokens.to(model.embedding.device)
        with torch.no_grad():
            recorded[f"{step} logits"] = model.eval()(tokens)
        torch.manual_seed(step)
        model.train().zero_grad()
        loss = model.loss(tokens, tokens.roll(-1, 1))
        (loss + model.auxiliary_loss()).backward()
        recorded[f"{step} loss"] = loss.detach()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    recorded[f"{step} {label[name]}"] = parameter.grad.clone()
                    parameter -= 0.02 * parameter.grad
        model.after_step()
        buffers = {f"{step} buffer {label[name]}": b.clone() for name, b in model.named_buffers()}
        recorded |= buffers
    return recorded


def difference(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> str | None:
    """Return what differs first in two trails, or None; a buffer may be missing in one of them."""
    for name in one.keys() ^ other.keys():
        if " buffer " not in name:
            return name
    for name in one.keys() & other.keys():
        a, b = one[name].float(), other[name].float()
        if a.shape != b.shape or not torch.allclose(
            a, b, tolerance, 0.1 * tolerance, equal_nan=True
        ):
            return name
    return None
