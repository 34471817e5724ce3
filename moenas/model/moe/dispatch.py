"""Dispatch: rows of tokens sorted by expert, and the capacity of the experts."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moenas.model.layers.linear import on_cuda

# Shapes: T tokens, E experts, K experts chosen for a token, N slots (a slot is one token at one of
# its experts; N = T K where every token chooses K).


MOST_GROUPS = 1023
"""Matrices that one grouped product takes on CUDA."""


class ExpertRows(NamedTuple):
    """Rows of slots, sorted by expert."""

    slot: Tensor
    """(N,) the slot in each row."""
    ends: Tensor
    """(E,) the end of each expert's rows, int32."""
    empty: Tensor | None = None
    """(N, 1) which rows hold no slot; None: every row holds one."""
    all_read: bool = True
    """Whether the last expert's rows end with the last row. A grouped product does not write what
    lies behind them."""


def sort_slots(experts: Tensor, n_experts: int, kept: Tensor | None, multiple: int) -> ExpertRows:
    """Lay out rows so that the rows of each expert lie together, `multiple` times a whole number.

    Slots that are not `kept` have no row of an expert. With a multiple over 1 the host waits for
    the number of rows.
    """
    # 1. The expert of each slot (N,); slots that are not kept sort behind the last expert.
    slots = experts.flatten()
    if on_cuda(experts):
        slots = slots.to(smallest_integer(n_experts))  # a radix sort passes over each byte
    if kept is not None:
        slots = slots.masked_fill(~kept.flatten(), n_experts)
    # 2. A stable sort by expert: `order` (N,) is the slot of each row, `ends` (E,) where the rows
    #    of each expert end.
    slots, order = slots.sort(stable=True)
    expert_ids = torch.arange(n_experts, device=slots.device, dtype=slots.dtype)
    ends = torch.searchsorted(slots, expert_ids, right=True, out_int32=True)
    if multiple == 1:
        empty = None if kept is None else (slots == n_experts).unsqueeze(-1)
        return ExpertRows(order, ends, empty, kept is None)
    # 3. Round the rows of each expert up to the multiple; `moved` (E,) is how far they move.
    counts = ends.diff(prepend=ends.new_zeros(1))
    new_ends = ((counts + multiple - 1) // multiple * multiple).cumsum(0, dtype=torch.int32)
    moved = (new_ends - ends).roll(1)
    moved[0] = 0
    # 4. Scatter the kept slots to their rows; the other rows are empty.
    order, slots = order[: int(ends[-1])], slots[: int(ends[-1])]
    rows = torch.arange(slots.numel(), device=slots.device) + moved[slots]
    slot = order.new_zeros(int(new_ends[-1])).scatter(0, rows, order)
    empty = torch.ones_like(slot, dtype=torch.bool).index_fill(0, rows, False)
    return ExpertRows(slot, new_ends, empty.unsqueeze(-1))


def row_multiple(x: Tensor, experts: Tensor, n_experts: int) -> int:
    """Return what the rows of an expert are rounded up to: at most 1 in 8 of the mean load.

    oneDNN compiles a kernel (2 ms) for each number of rows it has not seen, and routing makes new
    ones at every step. On a Xeon with AMX and torch 2.13 the median step of 64 experts, 8 for each
    of 2048 tokens, took 293 ms with rows rounded to 1 in 32 of the mean load. With this rule it
    took 164 ms. float32 needs no such kernels. Subclasses of Tensor may hold no numbers that the
    host could read, such as the fake tensors of a memory estimate. Their rows are not rounded up.
    """
    if x.device.type != "cpu" or x.dtype == torch.float32 or torch.compiler.is_compiling():
        return 1
    if type(x) is not Tensor:
        return 1
    return 1 << max(0, (experts.numel() // (8 * n_experts)).bit_length() - 1)


def traced(x: Tensor) -> bool:
    """Whether a compiler or an exporter traces a pass whose type has no grouped product there.

    torch's grouped product has shapes for bfloat16 alone while it is traced.
    """
    return torch.compiler.is_compiling() and x.dtype != torch.bfloat16


def grouped(rows: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """Return each of `rows` (N, D) times the matrix of its group, (N, F).

    Group e of `stack` (E, D, F) has the rows from the end of the one before to `ends[e]`.
    """
    if on_cuda(rows):
        return grouped_on_cuda(rows, stack, ends)
    return F.grouped_mm(rows, stack, offs=ends)


def within_capacity(experts: Tensor, n_experts: int, capacity: int) -> Tensor:
    """Return which slots of `experts` (B, S, K) are among the first `capacity` at their expert.

    Each sequence counts for itself. Slots come in the order of the tokens, so a later token never
    takes the place of an earlier one.
    """
    batch = torch.arange(experts.shape[0], device=experts.device).view(-1, 1, 1)
    slots = (experts + n_experts * batch).flatten()
    if on_cuda(experts):
        slots = slots.to(smallest_integer(n_experts * len(experts)))
    slots, order = slots.sort(stable=True)
    rank = torch.arange(slots.numel(), device=slots.device) - torch.searchsorted(slots, slots)
    kept = torch.empty_like(slots, dtype=torch.bool).scatter(0, order, rank < capacity)
    return kept.view_as(experts)


# --- on CUDA -----------------------------------------------------------------------------------
# Atomic adds sum floats in an order that differs between runs, so runs would differ. Here every sum
# has one order. The host reads nothing, so a CUDA graph can capture the kernels.


def smallest_integer(largest: int) -> torch.dtype:
    """Return the narrowest type of integers from 0 to `largest`."""
    if largest <= 255:
        return torch.uint8
    return torch.int16 if largest <= 32767 else torch.int32


class TokenRows(NamedTuple):
    """The token of each row, and the rows of each token."""

    token: Tensor
    """(N,) the token of each row."""
    rows: Tensor
    """(N,) the rows of the first token, then the rows of the second, and so on."""
    first: Tensor | None
    """(T,) where the rows of each token begin in `rows`; None: all have equally many."""
    n_tokens: int

    def by_slot(self, slot: Tensor) -> TokenRows:
        """Return the same of rows with `slot` (N,) for slots as tokens, K to a token."""
        return TokenRows(slot, self.rows, None, len(slot))


def inverse(order: Tensor) -> Tensor:
    """Return the permutation (N,) that undoes one."""
    return torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))


def rows_by_token(
    rows: ExpertRows, n_tokens: int, top_k: int, tokens: Tensor | None = None
) -> TokenRows:
    """Return which token each row has, and which rows each of T tokens has.

    The token of each slot is `tokens` (N,), or each token has K slots one after another.
    """
    slot, row = rows.slot, inverse(rows.slot)
    if tokens is None:
        return TokenRows(slot // top_k, row, None, n_tokens)
    by_token, order = tokens.to(smallest_integer(n_tokens)).sort(stable=True)
    token_ids = torch.arange(n_tokens, device=slot.device, dtype=by_token.dtype)
    first = torch.searchsorted(by_token, token_ids)
    token = tokens.index_select(0, slot)
    return TokenRows(token, row.index_select(0, order), first, n_tokens)


def rows_of(x: Tensor, at: TokenRows) -> Tensor:
    """Return for each row its token's of `x` (T, D), (N, D)."""
    rows: Tensor = _GatherRows.apply(x, at)  # type: ignore[no-untyped-call]
    return rows


def sums_of(rows: Tensor, at: TokenRows) -> Tensor:
    """Return for each token the sum of its `rows` (N, D), (T, D)."""
    sums: Tensor = _SumRows.apply(rows, at)  # type: ignore[no-untyped-call]
    return sums


class _GatherRows(torch.autograd.Function):
    """Rows from tokens; the gradient of a token is the sum over its rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: TokenRows) -> Tensor:
        ctx.at = at
        return x.index_select(0, at.token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.at), None


class _SumRows(torch.autograd.Function):
    """Tokens from rows; a row has the gradient of its token."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, at: TokenRows) -> Tensor:
        ctx.at = at
        return _summed(rows, at)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.at.token), None


def _summed(rows: Tensor, at: TokenRows) -> Tensor:
    """Return for each token the sum of its rows; both kernels add up in float32 at least."""
    if at.first is not None:
        return F.embedding_bag(at.rows, rows, at.first, mode="sum")
    taken = rows.index_select(0, at.rows)
    return taken if len(taken) == at.n_tokens else taken.view(at.n_tokens, -1, rows.shape[1]).sum(1)


def one_hot(expert: Tensor, n_experts: int, dtype: torch.dtype) -> Tensor:
    """Return (N, E), 1 at the expert of each row: products with it are lookups, and back sums."""
    return (expert.unsqueeze(-1) == torch.arange(n_experts, device=expert.device)).to(dtype)


def grouped_on_cuda(rows: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """Return `grouped` of any number of matrices, with a gradient of 0 where there are no rows.

    torch takes groups from the first row on. So a later part of the stack begins with the matrix
    before it, whose group is all rows before; its products are not used.
    """
    if gradient_unwritten(rows.device):
        stack = _ZeroWithoutRows.apply(stack, ends)  # type: ignore[no-untyped-call]
    n_experts = len(stack)
    if n_experts <= MOST_GROUPS:
        return F.grouped_mm(rows, stack, offs=ends)
    place = torch.arange(len(rows), device=rows.device).unsqueeze(-1)
    y = rows.new_zeros(len(rows), stack.shape[-1])
    for first in range(0, n_experts, MOST_GROUPS - 1):
        last = min(first + MOST_GROUPS - 1, n_experts)
        before = max(first - 1, 0)
        own = place < ends[last - 1]
        own = own if first == 0 else own & (place >= ends[before])
        part = F.grouped_mm(
            # Rows that are not its own: nothing flows back to them, nor from them.
            rows.masked_fill(~own, 0), stack[before:last], offs=ends[before:last].contiguous()
        )  # fmt: skip
        y = torch.where(own, part, y)
    return y


class _ZeroWithoutRows(torch.autograd.Function):
    """Matrices (E, D, F) as they are; their gradient is 0 where a group has no rows."""

    @staticmethod
    def forward(ctx: Any, stack: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(ends)
        return stack.view_as(stack)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (ends,) = ctx.saved_tensors
        without = ends.diff(prepend=ends.new_zeros(1)) == 0
        return grad.masked_fill(without.view(-1, 1, 1), 0), None


@cache
def gradient_unwritten(device: torch.device) -> bool:
    """Whether a grouped product leaves the gradients of matrices without rows as they were.

    So it is from compute capability 10 on (pytorch issue 172439). This file is written for the fast
    path of capability 9 (H100, H200).
    """
    known = torch.cuda.is_available() and device.type == "cuda"
    return known and torch.cuda.get_device_capability(device)[0] >= 10


def grouped_waits(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a grouped product of this type reads on the host where groups end.

    torch has one that does not for bfloat16 from compute capability 9 on. Where it waits, a step
    with experts cannot be captured in a CUDA graph.
    """
    known = torch.cuda.is_available() and device.type == "cuda"
    old = known and torch.cuda.get_device_capability(device)[0] < 9
    return device.type == "cuda" and (old or dtype != torch.bfloat16)
