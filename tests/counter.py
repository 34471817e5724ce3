"""torch's own FLOP counter over a model on the meta device, with no operator left out in silence."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def grouped_mm_flops(a: list[int], b: list[int], *rest: Any, **named: Any) -> int:
    """Rows (N, D) in groups, each times its matrix of (E, D, F)."""
    return 2 * a[0] * a[1] * b[2]


def triangular_flops(system: list[int], right: list[int], *rest: Any, **named: Any) -> int:
    """The square (Q, Q) with its right sides (Q, N), zeros and all."""
    return 2 * prod(right) * system[-1]


FORMULAS = {aten._grouped_mm: grouped_mm_flops, aten.linalg_solve_triangular: triangular_flops}
"""What torch's counter has no formula for."""

COUNTED = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "linalg_solve_triangular"}
"""Operators with matrix products that may occur: each has a formula, ours or torch's."""

_FREE = """
    __rshift__ _safe_softmax _softmax _to_copy _unsafe_view abs add add_ alias amax arange argmax
    bitwise_and bitwise_not bitwise_or bitwise_xor cat clamp clamp_min clone constant_pad_nd copy_ cos
    cumsum detach div embedding eq exp expand floor_divide full gather ge gelu gt index
    index_add index_select le linalg_vector_norm log lt masked_fill maximum mean mul
    native_layer_norm neg new_zeros ones ones_like permute pow relu remainder rsqrt
    scalar_tensor scatter scatter_add searchsorted select sigmoid silu sin slice softplus sort
    split split_with_sizes sqrt squeeze stack sub sum t tanh topk transpose tril triu unbind
    unsqueeze view where zeros zeros_like
"""
FREE = frozenset(_FREE.split())
"""Operators that move, compare, choose or work element by element, of a row or a table."""


class Seen(TorchDispatchMode):
    """Notes the name of every operator that runs, after all that can be taken apart was."""

    def __init__(self) -> None:
        super().__init__()
        self.names = set[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Note the operator and run it."""
        self.names.add(str(func.overloadpacket).removeprefix("aten."))
        return func(*args, **(kwargs or {}))


def count_on_meta(model: nn.Module, batch: int, context: int) -> int:
    """Return the operations of one pass over `batch` sequences that torch's counter finds.

    The model lies on the meta device. It computes in bfloat16, as grouped_mm has no other there.

    Raises:
        AssertionError: naming operators that stand in no list above.
    """
    seen = Seen()
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    tokens = torch.zeros(batch, context, dtype=torch.int64, device="meta")
    with seen, counter:
        model(tokens, dtype=torch.bfloat16)
    unknown = seen.names - COUNTED - FREE
    assert not unknown, f"operators in no list of tests/counter.py: {' '.join(sorted(unknown))}"
    return int(counter.get_total_flops())
