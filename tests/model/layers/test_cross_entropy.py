"""The cross entropy by pieces and its gradients equal the ones of all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_cuda import NoCollisions, cuda_forms
from torch import Tensor, nn

from moenas.evaluate.causality import _InFloat64
from moenas.model import head
from moenas.model.head import Head
from moenas.model.layers import cross_entropy
from moenas.model.layers.cross_entropy import piece_length

D_MODEL, VOCAB, BATCH, LENGTH = 12, 37, 3, 23


def losses(made: Head, dtype: torch.dtype, *, trained: bool = True) -> list[list[Tensor]]:
    """Return loss and gradients by all logits, then by pieces."""
    torch.manual_seed(0)
    embedding = nn.Parameter(torch.randn(VOCAB, D_MODEL))
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.5)
    x = torch.randn(BATCH, LENGTH, D_MODEL)
    if dtype == torch.float64:
        made.double()
        embedding.data, x = embedding.data.double(), x.double()
    x = x.to(dtype).requires_grad_()
    targets = torch.randint(VOCAB, (BATCH, LENGTH))
    leaves = [x, embedding if made.weight is None else made.weight]
    leaves += [] if made.bias is None else [made.bias]
    each = []
    for form in (torch.enable_grad(), cuda_forms()):
        with form, _InFloat64() if dtype == torch.float64 else torch.enable_grad():
            if not trained:
                with torch.no_grad():
                    each.append([made.loss(x, embedding, targets)])
                continue
            loss = made.loss(x, embedding, targets)
            with NoCollisions():
                each.append([loss.detach(), *torch.autograd.grad(3 * loss, leaves)])
    return each


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    shares = cross_entropy._log_shares

    def noted(products: Tensor, shape: Any) -> Any:
        sizes.append(products.numel())
        return shares(products, shape)

    monkeypatch.setattr(cross_entropy, "_log_shares", noted)
    monkeypatch.setattr(cross_entropy, "PIECE", 10 * VOCAB)
    monkeypatch.setattr(head, "MANY_LOGITS", 1)
    monkeypatch.delattr(nn, "LinearCrossEntropyOptions", raising=False)
    return sizes


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("multiplier", [1.0, 0.7])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_it_is_that_of_all_logits(
    tied: bool, biased: bool, multiplier: float, softcap: float | None, small: list[int]
) -> None:
    made = Head(VOCAB, None if tied else D_MODEL, biased, multiplier, softcap)
    for a, b in zip(*losses(made, torch.float64), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert max(small) == 10 * VOCAB
    assert sum(small) == BATCH * LENGTH * VOCAB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_types_are_those_of_all_logits(dtype: torch.dtype) -> None:
    plain, pieces = losses(Head(VOCAB, D_MODEL, True, 0.7, 2.0), dtype)
    rtol = 1e-5 if dtype == torch.float32 else 0.03
    for a, b in zip(plain, pieces, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= rtol * a.norm()


def test_no_gradient_is_worked_out_where_none_is_wanted() -> None:
    made = Head(VOCAB, D_MODEL, False, 1.0, None)
    (plain,), (pieces,) = losses(made, torch.float64, trained=False)
    torch.testing.assert_close(plain, pieces, rtol=1e-12, atol=1e-12)
    assert not pieces.requires_grad


def test_pieces_are_whole_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "PIECE", 1 << 26)
    assert piece_length(50_257) == 1280
    assert piece_length(10**6) == 67
    assert piece_length(10**9) == 1
