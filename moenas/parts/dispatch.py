"""Where rows of tokens go so that each expert's lie together, and which find room."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Shapes: T tokens, E experts, K experts chosen for a token, N slots (a slot is one token at one of
# its experts; N = T K where every token chooses K).


def sort_slots(
    experts: Tensor, n_experts: int, kept: Tensor | None, multiple: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Lay out rows so that those of each expert lie together, `multiple` times a whole number.

    Returns the slot in each row (N,), the end of each expert's rows (E,), int32, and which rows
    are empty (N, 1), or None if none are. Slots that are not `kept` have no row.
    """
    slots = experts.flatten()
    if kept is not None:
        slots = slots.masked_fill(~kept.flatten(), n_experts)  # sorts behind the last expert
    slots, order = slots.sort(stable=True)
    numbers = torch.arange(n_experts, device=slots.device)
    ends = torch.searchsorted(slots, numbers, right=True, out_int32=True)
    if multiple == 1:
        return order, ends, None if kept is None else (slots == n_experts).unsqueeze(-1)
    counts = ends.diff(prepend=ends.new_zeros(1))
    new_ends = ((counts + multiple - 1) // multiple * multiple).cumsum(0, dtype=torch.int32)
    moved = F.pad(new_ends - ends, (1, 0))  # (E + 1,): how far the rows of each expert move
    rows = torch.arange(slots.numel(), device=slots.device) + moved[slots]
    room = slots.numel() + n_experts * (multiple - 1)
    slot = order.new_zeros(room).scatter(0, rows, order)
    filled = torch.zeros_like(slot, dtype=torch.bool).scatter(0, rows, slots < n_experts)
    return slot, new_ends, ~filled.unsqueeze(-1)


def row_multiple(x: Tensor, experts: Tensor, n_experts: int) -> int:
    """Return what the rows of an expert are rounded up to: at most a sixteenth of the mean load.

    oneDNN compiles a kernel (2 ms) for each number of rows it has not seen, and routing makes new
    ones at every step. Unrounded, these products in bfloat16 took 6 times as long as in float32,
    which needs no such kernels (Xeon with AMX, torch 2.13).
    """
    if x.device.type != "cpu" or x.dtype == torch.float32:
        return 1
    return 1 << max(0, (experts.numel() // (16 * n_experts)).bit_length() - 1)


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
