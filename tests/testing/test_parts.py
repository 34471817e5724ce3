"""The shipped contract tests hold for everything that is shipped, and find what breaks them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moenas.errors import InputError
from moenas.grammar.component import Part
from moenas.model.architecture import Architecture
from moenas.model.layer_inputs import LayerInputs
from moenas.model.mixers.mixer import Mixer
from moenas.model.moe.experts import FFN, MoEFFN
from moenas.resources import shipped
from moenas.testing import parts

KINDS = [*Mixer.kinds.values(), *FFN.kinds.values()]
OBJECTIVES = sorted(shipped("objectives").glob("[!_]*.py"))
FIGURES = sorted(shipped("dashboards").glob("[!_]*.py"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_every_kind_of_part_keeps_its_contract(kind: type[Part]) -> None:
    parts.check_part(kind, instances=12)


@pytest.mark.parametrize("path", OBJECTIVES, ids=lambda path: path.stem)
def test_every_objective_keeps_its_contract(path: Path) -> None:
    values = parts.check_objective(path)
    assert list(values) == ["dense", "moe"]


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_every_figure_keeps_its_contract(path: Path) -> None:
    parts.check_figure(path)


def test_a_corpus_keeps_its_contract() -> None:
    parts.check_source({"kind": "pydoc"})


def test_random_architectures_differ_and_are_valid() -> None:
    architectures = [parts.random_architecture(seed, vocab_size=256) for seed in range(40)]
    assert len({a.fingerprint for a in architectures}) > 35
    assert all(a.vocab_size == 256 for a in architectures)
    sparse = parts.random_architecture(0, MoEFFN)
    assert all(layer.ffn.kind == "moe" for layer in sparse.layers)


# --- guests --------------------------------------------------------------------------------------

PART = '''"""A mixer that averages the tokens so far."""
from __future__ import annotations
from dataclasses import dataclass
from typing import Any
import torch
from torch import Tensor, nn
from moenas.grammar.component import setting
from moenas.model.mixers.mixer import Mixer
from moenas.records import Cost


@dataclass(frozen=True, kw_only=True)
class Average(Mixer, kind="average"):
    """Averages."""

    rank: int = setting("width in between", low=8, multiple=8)

    def cost(self, d_model: int, context: int) -> Cost:
        n = 2 * d_model * self.rank
        return Cost(params=n, active_params=n, flops_per_token=2 * n)

    def build(self, d_model: int) -> nn.Module:
        return Averaging(d_model, self.rank)


class Averaging(nn.Module):
    """out(mean of down(x) so far)."""

    def __init__(self, d_model: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(d_model, rank))
        self.out = nn.Parameter(torch.empty(rank, d_model))

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        h = x @ self.down.to(x.dtype)
        total, count = (0, 0) if cache is None or not cache else cache[0]
        sums = h.cumsum(1) + total
        counts = torch.arange(1, x.shape[1] + 1, device=x.device).view(1, -1, 1) + count
        if cache is not None:
            cache[:] = [(sums[:, -1:], counts[:, -1:])]
        return (sums / counts).to(x.dtype) @ self.out.to(x.dtype)

    def new_cache(self, batch: int, context: int) -> list[Any]:
        return []
'''


@pytest.fixture
def kinds() -> Iterator[None]:
    """Forget the kinds that a guest's file adds."""
    before = dict(Mixer.kinds), dict(FFN.kinds)
    yield
    for family, known in zip((Mixer, FFN), before, strict=True):
        family.kinds.clear()
        family.kinds.update(known)


def guest(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "guest.py"
    path.write_text(text)
    return path


@pytest.mark.usefixtures("kinds")
def test_a_guests_part_is_checked(tmp_path: Path) -> None:
    lines = list(parts.check_file(guest(tmp_path, PART)))
    assert len(lines) == 1
    assert "the component 'average' passes the contract test" in lines[0]


READER = '''"""A feed-forward layer that reads the token ids and the stream."""
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import Tensor, nn
from moenas.grammar.component import setting
from moenas.model import FFN, LayerInputs, Linear, ReadsInputs
from moenas.records import Cost


@dataclass(frozen=True, kw_only=True)
class IdScaled(FFN, kind="id_scaled"):
    """Scales the stream by the token id."""

    def cost(self, d_model: int, context: int) -> Cost:
        n = d_model * d_model
        return Cost(params=n, active_params=n, flops_per_token=2 * n)

    def build(self, d_model: int) -> nn.Module:
        return IdScaling(d_model)


class IdScaling(ReadsInputs):
    """out(x + stream) * (id + 1)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.out = Linear(d_model, d_model)

    def run(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        return self(x + inputs.stream, inputs.token_ids)

    def forward(self, x: Tensor, token_ids: Tensor) -> Tensor:
        return self.out(x) * (token_ids % 7 + 1).unsqueeze(-1).to(x.dtype)
'''


@pytest.mark.usefixtures("kinds")
def test_a_users_layer_reads_the_inputs_of_its_pass(tmp_path: Path) -> None:
    lines = list(parts.check_file(guest(tmp_path, READER)))
    assert "the component 'id_scaled' passes" in lines[0]
    plain = {"vocab_size": 8, "d_model": 16, "blocks": [{"ffn": {"kind": "id_scaled"}}]}
    model = Architecture.parse(plain).build(seed=0).eval()
    block, ids = model.blocks[0], torch.tensor([[1, 3]])
    x = model.embedding[ids]
    wanted = x + block.ffn.out(block.norm2(x) + x) * torch.tensor([2.0, 4.0]).view(1, 2, 1)
    torch.testing.assert_close(block(x, LayerInputs(ids)), wanted)


@pytest.mark.usefixtures("kinds")
@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("n = 2 *", "n = 3 *", r"cost\(\) counts \d+ parameters in the model, build\(\) makes"),
        ("active_params=n,", "active_params=n + 10**6,", "more active parameters than parameters"),
        ("h.cumsum(1)", "h.sum(1, keepdim=True)", "depends on a later token"),
        ("cache[:] =", "nothing =", "the output differs when decoding with a cache"),
        ("return (sums / counts)", "return (sums / counts / 0)", "the output is not finite"),
        (
            "h = x @ self.down.to(x.dtype)",
            "h = x @ self.down.detach().to(x.dtype)",
            "no gradient reaches",
        ),
        (
            "Averaging(d_model, self.rank)",
            "Averaging(d_model, torch.tensor(self.rank))",
            r"Averaging\(rank=\.\.\.\) is given tensor",
        ),
        ("sums = h.cumsum(1)", "sums = h.double().cumsum(1) + x", "RuntimeError|TypeError"),
        (
            "    def new_cache(",
            "    def stand(self, layer, n_layers):\n        pass\n\n    def new_cache(",
            "'stand' of Averaging is not read any more; derive from moenas.model.LayerIndexed",
        ),
        (
            "    def build(self",
            "    layer_indexed = True\n\n    def build(self",
            "layer_indexed is True, so Averaging must derive from moenas.model.LayerIndexed",
        ),
    ],
)
def test_a_part_that_breaks_its_contract_is_found(
    tmp_path: Path, right: str, wrong: str, message: str
) -> None:
    assert right in PART
    with pytest.raises(InputError, match=message) as caught:
        list(parts.check_file(guest(tmp_path, PART.replace(right, wrong))))
    assert str(tmp_path / "guest.py") in str(caught.value)


@pytest.mark.usefixtures("kinds")
def test_weights_that_no_seed_sets_are_found(tmp_path: Path) -> None:
    scale = "        self.scale = nn.Parameter(torch.{}(rank))\n"
    text = PART.replace("n = 2 * d_model * self.rank", "n = (2 * d_model + 1) * self.rank")
    text = text.replace("return (sums / counts)", "return (sums / counts * self.scale)")
    place = "        super().__init__()\n"
    list(parts.check_file(guest(tmp_path, text.replace(place, place + scale.format("ones")))))
    Mixer.kinds.pop("average")
    with pytest.raises(InputError, match=r"the seed does not set .*mixer\.scale"):
        list(parts.check_file(guest(tmp_path, text.replace(place, place + scale.format("empty")))))


OBJECTIVE = '''"""Width of the model."""
direction = "minimize"
unit = "channels"
needs = "training"


def measure(subject):
    return subject.architecture.d_model + 0 * subject.training.val_loss
'''


def test_an_objective_of_the_cache_is_measured_on_models_with_a_cache(tmp_path: Path) -> None:
    text = OBJECTIVE.replace("subject.architecture.d_model", "subject.cost.kv_bytes_per_token")
    values = parts.check_objective(guest(tmp_path, text))
    # Two layers, 32 channels of keys and of values, 2 bytes each.
    assert values == {"dense": 256.0, "moe": 256.0}


def test_a_guests_objective_is_checked(tmp_path: Path) -> None:
    (line,) = parts.check_file(guest(tmp_path, OBJECTIVE))
    assert "'guest' passes the contract test; small models: dense" in line
    assert line.endswith(" channels")


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("minimize", "smaller", r"guest\.py:2: direction is 'smaller'"),
        ('"training"', '"cost"', r"guest\.py.*the model is not trained yet"),
        ("+ 0 *", "/ 0 *", r"guest\.py:8: ZeroDivisionError"),
        ("return subject.architecture.d_model + 0 *", "return str, ", "give back a number"),
        ('"""Width of the model."""', "", "docstring is missing"),
    ],
)
def test_an_objective_that_breaks_its_contract_is_found(
    tmp_path: Path, right: str, wrong: str, message: str
) -> None:
    assert right in OBJECTIVE
    with pytest.raises(InputError, match=message):
        list(parts.check_file(guest(tmp_path, OBJECTIVE.replace(right, wrong))))


FIGURE = '''"""Losses."""
from plotly import graph_objects as go


def figure(view):
    return go.Figure(go.Bar(y=[e.values["val_loss"] for e in view.evaluations if e.values]))
'''


def test_a_guests_figure_is_checked(tmp_path: Path) -> None:
    (line,) = parts.check_file(guest(tmp_path, FIGURE))
    assert "the figure 'guest' passes the contract test" in line


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ('"""Losses."""', "", "docstring is missing"),
        ("return go", "go", "'NoneType' object has no attribute 'to_json'"),
        (" if e.values", "", "a study with 8 trials.*KeyError: 'val_loss'"),
        ("def figure(view)", "figure = 3\ndef other(view)", "'figure' is missing"),
    ],
)
def test_a_figure_that_breaks_its_contract_is_found(
    tmp_path: Path, right: str, wrong: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        list(parts.check_file(guest(tmp_path, FIGURE.replace(right, wrong))))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "defines no part .*, no objective .* and no figure .*, nor a sampler"),
        ("def broken(:\n", r"guest\.py:1:12: "),
        ("1 / 0\n", "line 1: ZeroDivisionError"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(parts.check_file(guest(tmp_path, text)))


def test_a_sampler_is_named_with_how_to_use_it(tmp_path: Path) -> None:
    path = guest(
        tmp_path, "from optuna.samplers import RandomSampler\nclass Mine(RandomSampler): ...\n"
    )
    (line,) = parts.check_file(path)
    assert line == f"{path}: 'Mine' is a sampler; a study uses it by search.sampler={path}:Mine"
