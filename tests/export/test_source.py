"""A model's file is written from the live model: enough to run, nothing that it does not use."""

from __future__ import annotations

import ast
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from moenas import resources
from moenas.errors import InputError
from moenas.export import source

GUEST = '''"""A small model."""
from __future__ import annotations
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING
import torch
import torch.nn.functional as F
from torch import nn
from moenas.model.layers.linear import on_cuda
from moenas.records import Cost
if TYPE_CHECKING:
    from collections.abc import Sequence

# Keeps the root away from 0.
EPSILON = 1e-6
"""Added to the mean square."""

UNUSED = 3


@dataclass
class Seen:
    mean: float


class Norm(nn.Module):
    """Root mean square."""

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width) * scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * self.weight


class Other(nn.Module):
    """Never built."""


def squash(x: torch.Tensor, act: str) -> torch.Tensor:
    return F.relu(x) if act == "relu" else x / math.sqrt(2)


class Feed(nn.Module):
    def __init__(self, width: int, act: str, bound: float | None = None) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(width, width) / width)
        self.act, self.bound = act, bound

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shaped(x @ self.matrix)

    def shaped(self, x: torch.Tensor) -> torch.Tensor:
        # Faster there.
        if on_cuda(x):
            return Other()(x)
        self.seen = Seen(0.0)
        return squash(x, self.act)

    # Only costs need this.
    @property
    def cost(self) -> Cost:
        return Cost()


class Net(nn.Module):
    def __init__(self, width: int, blocks: Sequence[nn.Module], last: nn.Module) -> None:
        super().__init__()
        self.blocks, self.last = nn.ModuleList(blocks), last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)

    def others(self) -> list[Other]:
        return [m for m in self.modules() if isinstance(m, Other)]
'''


def load(tmp_path: Path, text: str = GUEST) -> ModuleType:
    path = tmp_path / "guest.py"
    path.write_text(text)
    return resources.load_module(path)


def written(guest: ModuleType, make: Any, methods: tuple[str, ...] = ("forward",)) -> str:
    expression, classes = source.record(make)
    closure = source.SourceClosure.of(classes, methods)
    imports = source.import_lines(closure.imports)
    definitions = "\n\n\n".join(closure.texts())
    built = expression.written(0, len("model = "))
    return f"from __future__ import annotations\n{imports}\n{definitions}\nmodel = {built}\n"


def net(guest: ModuleType, acts: list[str]) -> Any:
    def make() -> Any:
        blocks = [guest.Feed(8, act, bound=0.5) for act in acts]
        return guest.Net(8, blocks, guest.Norm(8, scale=2.0))

    return make


def test_the_text_builds_an_equal_model(tmp_path: Path) -> None:
    guest = load(tmp_path)
    make = net(guest, ["relu", "relu", "none", "none", "relu"])
    alone = resources.load_module(tmp_path / "alone.py", written(guest, make))
    x = torch.linspace(-1, 1, 16).view(2, 8)
    assert torch.equal(alone.model(x), make()(x))
    assert type(alone.model) is not guest.Net


def test_only_what_is_used_is_lifted(tmp_path: Path) -> None:
    guest = load(tmp_path)
    text = written(guest, net(guest, ["relu"]))
    tree = ast.parse(text)
    names = [n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    assert names == ["Seen", "squash", "Feed", "Norm", "Net"]
    assert "UNUSED" not in text
    assert "moenas" not in text
    assert "Other" not in text
    assert "Only costs need this" not in text
    assert "on_cuda" not in text
    assert "Faster there" not in text
    assert '# Keeps the root away from 0.\nEPSILON = 1e-6\n"""Added to' in text
    assert "def shaped" in text  # forward mentions it
    for line in ("import math", "from torch import nn", "from collections.abc import Sequence"):
        assert f"\n{line}\n" in f"\n{text}"


def test_a_method_that_is_asked_for_brings_its_needs(tmp_path: Path) -> None:
    guest = load(tmp_path)
    text = written(guest, net(guest, ["relu"]), ("forward", "others"))
    assert "class Other" in text


def test_equal_neighbours_become_a_loop(tmp_path: Path) -> None:
    guest = load(tmp_path)
    one, _ = source.record(net(guest, ["relu"] * 7))
    feed = 'Feed(width=8, act="relu", bound=0.5)'
    assert one.flat() == (
        f"Net(width=8, blocks=[{feed} for _ in range(7)], last=Norm(width=8, scale=2.0))"
    )
    two, _ = source.record(net(guest, ["relu", "relu", "none"]))
    other = feed.replace("relu", "none")
    assert f"blocks=[*[{feed} for _ in range(2)], {other}]" in two.flat()


@pytest.mark.parametrize(
    "word", ["it's", 'say "x"', '");import os#', "\\", "\n", "\u00e9", "\U0001f600"]
)
def test_words_are_quoted_safely(tmp_path: Path, word: str) -> None:
    guest = load(tmp_path)
    expression, _ = source.record(lambda: guest.Feed(8, word))
    call = ast.parse(expression.flat(), mode="eval").body
    assert isinstance(call, ast.Call)
    assert ast.literal_eval(call.keywords[1].value) == word


@pytest.mark.parametrize("value", [float("inf"), float("nan"), {"a": 1}, nn.Linear(2, 2), object()])
def test_arguments_that_have_no_text_are_refused(tmp_path: Path, value: object) -> None:
    guest = load(tmp_path)
    with pytest.raises(InputError, match=r"Feed\(act=\.\.\.\) is given .* cannot be exported"):
        source.record(lambda: guest.Feed(8, value))


def test_an_inherited_constructor_is_recorded_as_its_own(tmp_path: Path) -> None:
    text = GUEST + "\n\nclass Louder(Feed):\n    pass\n\n\nclass Loudest(Louder):\n    pass\n"
    guest = load(tmp_path, text)

    def make() -> Any:
        blocks = [kind(8, "relu") for kind in (guest.Feed, guest.Loudest, guest.Louder)]
        return guest.Net(8, blocks, guest.Norm(8))

    expression, _ = source.record(make)
    calls = ", ".join(f'{kind}(width=8, act="relu")' for kind in ("Feed", "Loudest", "Louder"))
    assert f"blocks=[{calls}]" in expression.flat()


def test_constructors_are_restored(tmp_path: Path) -> None:
    guest = load(tmp_path)
    before = guest.Feed.__init__, guest.Other.__dict__.get("__init__")
    source.record(net(guest, ["relu"]))
    assert (guest.Feed.__init__, guest.Other.__dict__.get("__init__")) == before


def test_two_definitions_of_one_name_are_refused(tmp_path: Path) -> None:
    guest = load(tmp_path)
    (tmp_path / "two").mkdir()
    twin = load(tmp_path / "two", GUEST + "\n# a twin\n")
    with pytest.raises(InputError, match=r"'Feed' is defined in .* and in .*; rename"):
        written(
            guest,
            lambda: guest.Net(8, [guest.Feed(8, "relu"), twin.Feed(8, "relu")], guest.Norm(8)),
        )
