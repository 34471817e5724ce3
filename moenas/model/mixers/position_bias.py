"""Position biases: a term of a score by the distance of its tokens. Kinds: alibi, t5."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moenas.grammar.component import Component, setting

# Shapes: H query heads, S queries, L keys. The distance of a key is the position of the query less
# its own, from 0.


@dataclass(frozen=True, kw_only=True)
class PositionBias(Component):
    """`position_bias`: a number for each head and distance, added to the scores.

    It comes after `scale` and `softcap`. Rotary positions stay unless `rope: {theta: null}` takes
    them out.
    """

    def params(self, n_heads: int) -> int:
        """Return the number of parameters."""
        return 0

    def canonical_within(self, reach: int | None) -> Self:
        """Return the one spelling where a token sees `reach` tokens, itself included; None: all."""
        return self

    def build(self, n_heads: int) -> nn.Module:
        """Build what gives the numbers."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class AlibiBias(PositionBias, kind="alibi"):
    """-distance times a slope of the head's own (ALiBi, arXiv 2108.12409, section 3)."""

    def build(self, n_heads: int) -> nn.Module:
        """Build what gives the numbers."""
        return Alibi(n_heads)


@dataclass(frozen=True, kw_only=True)
class T5Bias(PositionBias, kind="t5"):
    """A learned number for each head and bucket of distances (T5, arXiv 1910.10683, section 2.1).

    Distances below num_buckets / 2 have a bucket each; the other buckets grow by one factor up to
    `max_distance`, behind which all distances share the last.
    """

    num_buckets: int = setting("buckets of distances", default=32, low=2, high=1024)
    max_distance: int = setting(
        "tokens from which on all distances are in the last bucket",
        default=128,
        low=2,
        high=10**6,
    )
    shared: bool = setting(
        "the nearest earlier layer with a table of its own gives the numbers (T5: in all layers"
        " but the first)",
        default=False,
    )

    def invalid(self) -> str | None:
        """Return why the fields do not go together, or None."""
        if self.max_distance <= self.num_buckets // 2:
            return (
                f"max_distance ({self.max_distance}) must be above num_buckets / 2"
                f" ({self.num_buckets // 2})"
            )
        return None

    def params(self, n_heads: int) -> int:
        """Return the number of parameters."""
        return 0 if self.shared else self.num_buckets * n_heads

    def canonical_within(self, reach: int | None) -> Self:
        """Take the usual max_distance, or the smallest, that has the same buckets in reach."""

        def firsts(max_distance: int) -> list[int]:
            firsts = first_distances(self.num_buckets, max_distance)
            return firsts if reach is None else [min(x, reach) for x in firsts]

        own, least = firsts(self.max_distance), self.num_buckets // 2 + 1
        usual = max(T5Bias.max_distance, least)
        if firsts(usual) == own:
            return replace(self, max_distance=usual)
        # The first distance of a bucket never falls as max_distance rises.
        steps = bisect_left(range(least, self.max_distance), own, key=firsts)
        return replace(self, max_distance=least + steps)

    def build(self, n_heads: int) -> nn.Module:
        """Build what gives the numbers."""
        return BucketBias(n_heads, self.num_buckets, self.max_distance, self.shared)


def first_distances(num_buckets: int, max_distance: int) -> list[int]:
    """Return the smallest distance in each bucket from the second on, of T5's causal buckets.

    With e = num_buckets // 2, distance d from e on is in bucket
    `e + floor(ln(d / e) / ln(max_distance / e) (num_buckets - e))`; in whole numbers, so exactly.
    """
    exact = num_buckets // 2
    steps = num_buckets - exact
    firsts = list(range(1, exact + 1))
    for k in range(1, steps):
        wanted = max_distance**k * exact ** (steps - k)
        distance = int(exact * (max_distance / exact) ** (k / steps))
        while distance**steps < wanted:
            distance += 1
        while (distance - 1) ** steps >= wanted:
            distance -= 1
        firsts.append(distance)
    return firsts


def distances(start: int, length: int, first: int, device: torch.device) -> Tensor:
    """Return (S, L) distances of queries from `start` on to keys from `first` on, 0 if later."""
    query = torch.arange(start, start + length, device=device).unsqueeze(-1)
    key = torch.arange(first, start + length, device=device)
    return (query - key).clamp_min(0)


def alibi_slopes(n_heads: int) -> list[float]:
    """Return the slopes of H heads: 2^(-8 / n), 2^(-16 / n), ... for n heads, a power of 2.

    Other numbers of heads have the slopes of the next lower power. Then comes every second slope of
    twice as many heads, as in the released code.
    """
    n = 1 << (n_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (i + 1) / n) for i in range(n)]
    between = [2.0 ** (-4 * (i + 1) / n) for i in range(0, 2 * n, 2)]
    return slopes + between[: n_heads - n]


class Constants:
    """Numbers that are no weights, as a tensor on whatever device they are needed.

    The tensor of another device than the CPU is made at the first use there and kept. So a model
    that was built without values (on the meta device) has them, and later passes copy nothing from
    the host.
    """

    def __init__(self, numbers: list[float] | list[int]) -> None:
        self.numbers = numbers
        self.tensor = torch.tensor(numbers, device="cpu")

    def on(self, device: torch.device) -> Tensor:
        """Return the numbers on a device, fit for training and inference."""
        if torch.compiler.is_compiling():  # what a traced pass makes must not be kept
            return torch.tensor(self.numbers, device=device)
        if self.tensor.device != device:
            with torch.inference_mode(False):
                self.tensor = torch.tensor(self.numbers, device=device)
        return self.tensor


class Alibi(nn.Module):
    """Linear biases of H heads."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.slopes = Constants(alibi_slopes(n_heads))

    def forward(self, far: Tensor, table: Tensor | None = None) -> Tensor:
        """Return (H, S, L) biases at distances (S, L)."""
        return -self.slopes.on(far.device).view(-1, 1, 1) * far


class BucketBias(nn.Module):
    """A table (buckets, H) of biases, its own unless it is `shared`."""

    matrices = ("weight",)

    weight: Tensor | None

    def __init__(self, n_heads: int, num_buckets: int, max_distance: int, shared: bool) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.shared = shared
        self.firsts = Constants(first_distances(num_buckets, max_distance))
        self.weight = None if shared else nn.Parameter(torch.empty(num_buckets, n_heads))

    def forward(self, far: Tensor, table: Tensor | None = None) -> Tensor:
        """Return (H, S, L) biases at distances (S, L).

        `table` (buckets, H) is the table of another layer, if it is shared.
        """
        firsts = self.firsts.on(far.device)
        if torch.compiler.is_compiling():  # ONNX has no search
            buckets = (far.unsqueeze(-1) >= firsts).sum(dim=-1)
        else:
            buckets = torch.searchsorted(firsts, far, right=True)
        weight = table if self.weight is None else self.weight
        if weight is None:
            raise ValueError("a shared position bias needs the table of an earlier layer")
        return F.embedding(buckets, weight).permute(2, 0, 1)
