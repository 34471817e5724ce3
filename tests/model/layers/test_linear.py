"""What a module calls its weights, over every kind of part, and copies of a model in training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from wide_space import point, tokens_of

from moenas.evaluate.optimizer import AdamW
from moenas.model.architecture import Architecture
from moenas.model.layers.linear import matrices
from moenas.space.sections import Recipe


@cache
def architectures() -> list[Architecture]:
    return [
        Architecture.parse(architecture[0])
        for architecture in map(point, range(150))
        if architecture is not None
    ]


def small() -> list[Architecture]:
    return architectures()[:12]


def test_every_module_with_parameters_tells_which_are_weights() -> None:
    kinds: dict[type[nn.Module], set[str]] = {}
    for architecture in architectures():
        for module in architecture.outline().modules():
            own = [name for name, _ in module.named_parameters(recurse=False)]
            if own:
                kinds.setdefault(type(module), set()).update(own)
    assert len(kinds) > 20
    for kind, names in kinds.items():
        told = vars(kind).get("matrices")
        assert told is not None, f"{kind.__name__} does not tell its matrices"
        assert set(told) >= {
            n for n in names if n in ("weight",) and "Norm" not in kind.__name__
        } - {n for n in names if kind.__name__ in ("DynamicTanh", "ExpertBias")}


def test_matrices_decay_and_biases_do_not_however_they_are_stacked() -> None:
    for architecture in architectures():
        model = architecture.outline()
        optimizer = AdamW(model, Recipe(lr=1e-3))
        decaying = {id(p) for p in [*optimizer.matrices, optimizer.embedding]}
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                where = f"{type(module).__name__}.{name}"
                if weight.dim() < 2 or type(module).__name__ == "ExpertBias":
                    assert id(weight) not in decaying, where
                elif name not in ("log_rate",):
                    assert id(weight) in decaying, where
        together = [*optimizer.matrices, *optimizer.vectors, optimizer.embedding]
        assert len({id(p) for p in together}) == len(list(model.parameters())) == len(together)


def test_a_module_that_tells_nothing_has_its_matrices_by_their_axes() -> None:
    module = nn.Linear(3, 2)
    assert [id(p) for p in matrices(module)] == [id(module.weight)]


def graphs(value: Any, seen: set[int]) -> Iterator[str]:
    """Yield what hangs on a graph among the attributes of modules, however deep."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if value.grad_fn is not None:
            yield str(tuple(value.shape))
    elif isinstance(value, nn.Module):
        for inner in vars(value).values():
            yield from graphs(inner, seen)
    elif isinstance(value, dict):
        for inner in value.values():
            yield from graphs(inner, seen)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from graphs(inner, seen)
    elif is_dataclass(value):
        for field in fields(value):
            yield from graphs(getattr(value, field.name), seen)


def test_a_model_can_be_copied_and_averaged_in_the_middle_of_training() -> None:
    for architecture in small():
        model, tokens = architecture.build().train(), tokens_of(architecture, 17)
        (model.loss(tokens[:, :-1], tokens[:, 1:]) + model.auxiliary_loss()).backward()
        twin = copy.deepcopy(model)
        model.after_step()
        assert list(graphs(model, set())) == []
        averaged = AveragedModel(model)
        averaged.update_parameters(model)
        with torch.no_grad():
            wanted = model.eval()(tokens)
            assert torch.equal(averaged.module.eval()(tokens), wanted)
            twin.after_step()
            assert torch.equal(twin.eval()(tokens), wanted)
