"""Points of the wide space: drawn by number, with one hole changed, and what a model makes of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moenas.architecture import Architecture, Model
from moenas.component import Component, Scalar, fields
from moenas.draws import RandomSuggest
from moenas.errors import SpaceError
from moenas.records import Plain
from moenas.space import Space


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
    found: Plain = {} if component.kind is None else {"kind": component.kind}
    known = fields(type(component))
    for name in rng.sample(list(known), len(known)):
        value = getattr(component, name)
        if value == known[name].default and rng.random() < 0.7:
            continue
        if isinstance(value, Component):
            found[name] = respelled(value, rng)
        elif isinstance(value, tuple):
            found[name] = [respelled(item, rng) for item in value]
        else:
            whole = isinstance(value, int) and not isinstance(value, bool)
            found[name] = float(value) if whole and rng.random() < 0.5 else value
    return dict(sorted(found.items(), key=lambda _: rng.random()))


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


@torch.no_grad()
def stir(model: Model, seed: int) -> None:
    """Move every parameter away from its start, so that zeros and ones hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(0.4 * noise + (parameter if parameter.dim() == 1 else 0))


def trail(model: Model, length: int, steps: int = 2) -> dict[str, Tensor]:
    """Return all that two steps of training and evaluation show of a model.

    Logits in evaluation, the loss in training, gradients with the auxiliary losses in them (of
    which only the slope matters), and buffers after each step of gradient descent.
    """
    found: dict[str, Tensor] = {}
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 + step)
        tokens = torch.randint(model.vocab_size, (2, length), generator=generator)
        with torch.no_grad():
            found[f"{step} logits"] = model.eval()(tokens)
        torch.manual_seed(step)
        model.train().zero_grad()
        loss = model.loss(tokens, tokens.roll(-1, 1))
        (loss + model.auxiliary_loss()).backward()
        found[f"{step} loss"] = loss.detach()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    found[f"{step} {name}"] = parameter.grad.clone()
                    parameter -= 0.02 * parameter.grad
        model.after_step()
        buffers = {f"{step} buffer {name}": b.clone() for name, b in model.named_buffers()}
        found |= buffers
    return found


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
