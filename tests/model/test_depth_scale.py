"""The depth scale: where norms undo it, and where it acts."""

from __future__ import annotations

import pytest
import torch
from exact import assert_same_function

from moenas.model.architecture import Architecture
from moenas.records import Plain

MIXER: Plain = {"kind": "attention", "head_dim": 8}
DENSE: Plain = {"kind": "dense", "d_ff": 16}
MOE: Plain = {"kind": "moe", "n_experts": 4, "d_expert": 8}
PLAIN: Plain = {"mixer": MIXER, "ffn": DENSE, "repeat": 3}


def pair(block: Plain, **fields: object) -> tuple[Architecture, Architecture]:
    """The model without the depth scale, and with it."""
    plain = {"vocab_size": 40, "d_model": 16, "norm_eps": 0.0, "blocks": [block]} | fields
    one, other = (Architecture.parse(plain | {"depth_scale": on}) for on in (False, True))
    return one, other


INERT: dict[str, tuple[Plain, Plain]] = {
    "pre": (PLAIN, {}),
    "sandwich": (PLAIN, {"norm_position": "sandwich"}),
    "layernorm": (PLAIN, {"norm": "layernorm_bias"}),
    "multipliers": (PLAIN, {"residual_multiplier": 0.3, "skip_multiplier": 1.5}),
    "a part of its own place": (PLAIN | {"ffn_norm": "sandwich"}, {}),
    "parallel": (PLAIN | {"parallel": True}, {}),
    "factors of blocks": (PLAIN | {"block_scale": True}, {}),
    "a shortcut": (PLAIN | {"shortcut": MOE, "shortcut_input": "stream"}, {}),
}


@pytest.mark.parametrize("name", INERT)
def test_norms_without_an_eps_undo_the_scale(name: str) -> None:
    one, other = pair(INERT[name][0], **INERT[name][1])
    assert one.fingerprint == other.fingerprint
    assert_same_function(one, other)
    # As written, not in canonical form.
    models = [architecture.build(seed=1).eval() for architecture in (one, other)]
    text = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(models[1](text), models[0](text), rtol=1e-4, atol=1e-4)


STREAM: Plain = {"router": {"top_k": 2, "logits": {"kind": "linear", "input": "stream"}}}
ACTIVE: dict[str, tuple[Plain, Plain]] = {
    "an eps": (PLAIN, {"norm_eps": 0.1}),
    "post": (PLAIN, {"norm_position": "post"}),
    "output": (PLAIN, {"norm_position": "output"}),
    "dyt": (PLAIN, {"norm": "dyt"}),
    "the place of a part": (PLAIN | {"ffn_norm": "output"}, {}),
    "a late shortcut": (PLAIN | {"shortcut": MOE, "shortcut_delay": 1}, {}),
    "a router of the stream": (PLAIN | {"ffn": MOE | STREAM}, {}),
}


@pytest.mark.parametrize("name", ACTIVE)
def test_elsewhere_the_scale_acts(name: str) -> None:
    one, other = pair(ACTIVE[name][0], **ACTIVE[name][1])
    assert one.fingerprint != other.fingerprint
    text = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(1))
    models = [architecture.build(seed=1).eval() for architecture in (one, other)]
    for model in models:  # larger weights, so that routers choose by what they read
        for block in model.blocks:
            for weight in block.parameters():
                weight.data.mul_(2)
    assert (models[0](text) - models[1](text)).abs().max() > 1e-4


def test_with_an_eps_it_is_that_of_each_part() -> None:
    """The norm of part i has i times the eps, to the last norm of the model."""
    one, other = pair(PLAIN, norm_eps=0.01)
    plain, scaled = one.build(seed=1).eval(), other.build(seed=1).eval()
    norms = [norm for block in plain.blocks for norm in (block.norm1, block.norm2)]
    for i, norm in enumerate([*norms, plain.norm], start=1):
        norm.eps *= i
    text = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(plain(text), scaled(text), rtol=1e-4, atol=1e-5)
