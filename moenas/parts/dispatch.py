"""Where rows of tokens go so that each expert's lie together, and which find room."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Shapes: T tokens, E experts, K experts chosen for a token, N slots (a slot is one token at one of
# its experts; N = T K where every token chooses K).


class Rows(NamedTuple):
    """Where slots lie so that those of each expert are together."""

    slot: Tensor
    """(N,) the slot in each row."""
    ends: Tensor
    """(E,) the end of each expert's rows, int32."""
    empty: Tensor | None = None
    """(N, 1) which rows hold no slot; None: every row holds one."""
    all_read: bool = True
    """Whether the last expert's rows end with the last row. A grouped product does not write what
    lies behind them."""


def sort_slots(experts: Tensor, n_experts: int, kept: Tensor | None, multiple: int) -> Rows:
    """Lay out rows so that those of each expert lie together, `multiple` times a whole number.

    Slots that are not `kept` have no row of an expert. With a multiple over 1 the host waits for
    the number of rows.
    """
    slots = experts.flatten()
    if kept is not None:
        slots = slots.masked_fill(~kept.flatten(), n_experts)  # sorts behind the last expert
    slots, order = slots.sort(stable=True)
    numbers = torch.arange(n_experts, device=slots.device)
    ends = torch.searchsorted(slots, numbers, right=True, out_int32=True)
    if multiple == 1:
        empty = None if kept is None else (slots == n_experts).unsqueeze(-1)
        return Rows(order, ends, empty, kept is None)
    counts = ends.diff(prepend=ends.new_zeros(1))
    new_ends = ((counts + multiple - 1) // multiple * multiple).cumsum(0, dtype=torch.int32)
    moved = (new_ends - ends).roll(1)  # how far the rows of each expert move
    moved[0] = 0
    order, slots = order[: int(ends[-1])], slots[: int(ends[-1])]
    rows = torch.arange(slots.numel(), device=slots.device) + moved[slots]
    slot = order.new_zeros(int(new_ends[-1])).scatter(0, rows, order)
    empty = torch.ones_like(slot, dtype=torch.bool).index_fill(0, rows, False)
    return Rows(slot, new_ends, empty.unsqueeze(-1))


def row_multiple(x: Tensor, experts: Tensor, n_experts: int) -> int:
    """Return what the rows of an expert are rounded up to: at most 1 in 8 of the mean load.

    oneDNN compiles a kernel (2 ms) for each number of rows it has not seen, and routing makes new
    ones at every step. On a Xeon with AMX and torch 2.13 the median step of 64 experts, 8 for each
    of 2048 tokens, took 293 ms with rows rounded to 1 in 32 of the mean load, and 164 ms with
    these. float32 needs no such kernels.
    """
    if x.device.type != "cpu" or x.dtype == torch.float32 or torch.compiler.is_compiling():
        return 1
    return 1 << max(0, (experts.numel() // (8 * n_experts)).bit_length() - 1)


def grouped(rows: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """Return each of `rows` (N, D) times the matrix of its group, (N, F).

    Group e of `stack` (E, D, F) has the rows from the end of the one before to `ends[e]`. While a
    compiler or an exporter traces, torch's grouped product has shapes for bfloat16 alone; any other
    type then takes E products of all rows.
    """
    if not torch.compiler.is_compiling() or rows.dtype == torch.bfloat16:
        return F.grouped_mm(rows, stack, offs=ends)
    place = torch.arange(rows.shape[0], device=rows.device)
    y = rows.new_zeros(rows.shape[0], stack.shape[-1])
    for e in range(stack.shape[0]):
        inside = place < ends[e] if e == 0 else (place >= ends[e - 1]) & (place < ends[e])
        y = torch.where(inside.unsqueeze(-1), rows @ stack[e], y)
    return y


def within_capacity(experts: Tensor, n_experts: int, capacity: int) -> Tensor:
    """Return which slots of `experts` (B, S, K) are among the first `capacity` at their expert.

    Each sequence counts for itself and slots come in the order of the tokens, all of a token's
    slots before those of the next: what comes later never takes the place of what came earlier.
    """
    batch = torch.arange(experts.shape[0], device=experts.device).view(-1, 1, 1)
    slots, order = (experts + n_experts * batch).flatten().sort(stable=True)
    places = torch.arange(slots.numel(), device=slots.device) - torch.searchsorted(slots, slots)
    kept = torch.empty_like(slots, dtype=torch.bool).scatter(0, order, places < capacity)
    return kept.view_as(experts)
