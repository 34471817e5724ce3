"""Small models of transformers and ours, from the zoo's files: one's weights give the other's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from families import FAMILIES, VOCABULARY, Family
from latest import LATEST
from others import OTHERS
from recent import RECENT
from variants import VARIANTS
from weights import Weights, from_one, rows_of, to_ours, to_theirs

from moenas.grammar.sampling import RandomSuggest
from moenas.model.architecture import Architecture, Model
from moenas.space.space import Space

ZOO = Path(__file__).parents[2] / "spaces" / "zoo"
MODELS = FAMILIES | VARIANTS | OTHERS | RECENT | LATEST


def ours_of(family: Family) -> Model:
    return written_architecture(family).build().eval()  # layer by layer as in the file


def architecture_of(name: str) -> Architecture:
    return written_architecture(MODELS[name])


def written_architecture(family: Family) -> Architecture:
    overrides = [f"{name}={value}" for name, value in family.overrides.items()]
    if "\n" in family.zoo:
        space = Space.parse(family.zoo, "space.yaml")
    else:
        space = Space.load(ZOO / f"{family.zoo}.yaml", overrides)
    return Architecture.parse(space.draw(RandomSuggest(0)))


def theirs_of(family: Family) -> Any:
    model = family.build().eval()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")  # a loop, where ours is one grouped product
    return model


def randomise(weights: Weights, seed: int) -> None:
    """Draw all weights so that logits are of the order of 1 and no two experts score alike."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in weights.items():
        drawn = torch.empty(tensor.shape).normal_(generator=generator)
        if name.endswith(("up_bias.weight", "up_proj_bias")):  # beyond the limits of gates
            drawn *= 6
        elif tensor.dim() > 1:
            drawn *= tensor.shape[-1] ** -0.5
        elif name.endswith("mixer.dt_bias"):  # softplus of it to either side of dt_floor
            drawn = 2 * drawn - 6
        elif name.endswith(("norm.weight", "layer_scalar", ".scale")):
            drawn = 1 + 0.3 * drawn
        else:
            drawn *= 0.3
        tensor.copy_(drawn)


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", ["to ours", "to theirs"])
@torch.no_grad()
def test_the_logits_agree(name: str, way: str) -> None:
    family = MODELS[name]
    ours, theirs = ours_of(family), theirs_of(family)
    state = {n: x for n, x in theirs.state_dict().items() if not n.endswith(family.constants)}
    if theirs.config.tie_word_embeddings:
        del state["lm_head.weight"]
    rows = rows_of(family.table, state, len(ours.blocks))
    if way == "to ours":
        randomise(state, 1)
        for _, names, form in rows:
            if form is from_one:
                state[names[0]] -= 1
        ours.load_state_dict(to_ours(rows, state))
    else:
        randomise(ours.state_dict(), 2)
        missing, unknown = theirs.load_state_dict(
            to_theirs(rows, ours.state_dict(), state), strict=False
        )
        assert [n for n in missing if not n.endswith(("lm_head.weight", *family.constants))] == []
        assert unknown == []
    wanted = theirs(tokens()).logits
    assert wanted.std() > 0.01
    torch.testing.assert_close(ours(tokens()), wanted, rtol=0, atol=family.tolerance)
