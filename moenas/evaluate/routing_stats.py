"""How a model routes: load, router logits and domains of the experts of each layer, over passes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from moenas.model.moe.routed_layer import RoutedLayer
from moenas.model.moe.selection import Hash
from moenas.records import RoutingRow

# Shapes: B sequences of S tokens, T = B S tokens, E experts, G domains.

DEAD = 0.01
"""An expert with less than this share of the mean load is dead."""
MIN_ASSIGNMENTS = 100
"""Mean slots per expert before an expert without a slot counts as dead."""

COLLAPSE_WINDOW = 4
"""Rows of a learning curve before that: a tenth of a run of 40 rows."""

Layers = Sequence[tuple[int, RoutedLayer]]
"""Mixtures of experts with the numbers of their layers, as `Model.moe_layers` gives them."""


@dataclass(frozen=True)
class RoutingStats:
    """How one layer routed."""

    layer: int
    load: Tensor
    """(E,) slots of each expert, before any were dropped; on the CPU."""
    dropped: float
    """Share of the slots that found no room, the mean over the tokens."""
    logit_rms: float
    """Root of the mean square of the router's logits."""
    logit_max: float
    """Largest absolute logit of the router."""
    domains: Tensor
    """(G, E) slots of each domain at each expert."""

    def row(self, names: Sequence[str] = ()) -> RoutingRow:
        """Return a row of routing health: `layer`, `routing_health`, and what is above.

        `domains`, if there are `names`: name -> share of its slots at each expert; a domain
        without a slot is left out.
        """
        row: RoutingRow = {
            "layer": self.layer,
            **routing_health(self.load),
            "dropped": self.dropped,
            "logit_rms": self.logit_rms,
            "logit_max": self.logit_max,
        }
        if names:
            slots = self.domains.sum(dim=-1, keepdim=True)
            shares = (self.domains / slots).tolist()
            row["domains"] = {
                name: [round(share, 4) for share in domain_shares]
                for name, domain_shares, some in zip(
                    names, shares, slots.flatten().tolist(), strict=True
                )
                if some
            }
        return row

    def rounded_row(self, names: Sequence[str] = ()) -> RoutingRow:
        """Return the same row with 4 decimals: one of many, for a learning curve."""
        rounded = {
            key: [round(x, 4) for x in value]
            if isinstance(value, list)
            else round(value, 4)
            if isinstance(value, float)
            else value
            for key, value in self.row(names).items()
        }
        return cast(RoutingRow, rounded)


class RoutingAccumulator:
    """Adds up on the device how each mixture of experts of a model routes, pass by pass.

    `add` does not make the host wait; `read` does, once for all layers.
    """

    def __init__(self, layers: Layers, n_domains: int = 0) -> None:
        self.layers = layers
        self.n_domains = n_domains
        self._tokens: list[Tensor] = []  # (1,) each; a captured graph counts without the host
        self._loads: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._tables: list[Tensor] = []
        for _, moe in layers:
            device, n_experts = next(moe.parameters()).device, moe.balance.n_experts
            self._tokens.append(torch.zeros(1, dtype=torch.int64, device=device))
            self._loads.append(torch.zeros(n_experts, dtype=torch.int64, device=device))
            # Tokens times dropped share, sum of squares of the logits, largest absolute logit.
            self._sums.append(torch.zeros(3, device=device, dtype=torch.float64))
            size = n_domains * n_experts
            self._tables.append(torch.zeros(size, dtype=torch.int64, device=device))

    @torch.no_grad()
    def add(self, where: Tensor | None = None) -> None:
        """Take in the last forward pass; `where` (B, S) is the domain of each of its tokens."""
        for i, (_, moe) in enumerate(self.layers):
            routing, sums = moe.routing, self._sums[i]
            logits = routing.choice.logits
            self._tokens[i] += len(logits)
            self._loads[i] += routing.load
            sums[0] += len(logits) * routing.dropped
            sums[1] += torch.linalg.vector_norm(logits).square()
            torch.maximum(sums[2], torch.linalg.vector_norm(logits, math.inf), out=sums[2])
            if where is not None:
                self._add_domains(i, where.to(logits.device, non_blocking=True).flatten())

    def _add_domains(self, i: int, where: Tensor) -> None:
        """Count the slots of each domain, `where` (T,), at each expert."""
        choice, n_experts = self.layers[i][1].routing.choice, len(self._loads[i])
        place = where[choice.slot_tokens()] * n_experts + choice.experts.flatten()
        ones = torch.ones_like(place) if choice.kept is None else choice.kept.flatten().long()
        self._tables[i].scatter_add_(0, place, ones)

    def read(self) -> list[RoutingStats]:
        """Return how each layer routed since the last reading, and reset."""
        parts = [*self._tokens, *self._loads, *self._sums, *self._tables]
        if not parts:
            return []
        numbers = torch.cat([part.double() for part in parts]).cpu()
        split = numbers.split([len(part) for part in parts])
        n = len(self.layers)
        if not split[0]:
            return []  # no pass since the last reading
        readings = [self._reading(layer, *split[i::n]) for i, (layer, _) in enumerate(self.layers)]
        for part in parts:
            part.zero_()
        return readings

    def _reading(
        self, layer: int, count: Tensor, load: Tensor, sums: Tensor, table: Tensor
    ) -> RoutingStats:
        tokens = int(count)
        dropped, squares, largest = sums.tolist()
        return RoutingStats(
            layer,
            load,
            dropped / tokens,
            math.sqrt(squares / (tokens * len(load))),
            largest,
            table.view(self.n_domains, len(load)),
        )


class CollapseDetector:
    """Looks out for layers whose router sends almost everything to few experts.

    It judges over 4 rows of the curve at a time, and over more until each expert could have had 100
    slots. Over fewer slots a rare expert looks like a dead one. A router without balancing often
    leaves 15 of 16 experts idle for a row or two after warm-up, and then uses them again. So an
    expert with a share of the load in any of the rows does not count as dead. Layers that choose by
    a fixed hash are left out, because they cannot collapse.
    """

    def __init__(self, layers: Layers, max_dead: float | None) -> None:
        self.max_dead = max_dead
        self.rows = 0
        """Rows of the curve since the last judgement."""
        self.loads: dict[int, Tensor] = {}
        """Layer -> (E,) slots of each expert over these rows."""
        self._fixed = {layer for layer, moe in layers if isinstance(moe.router.selection, Hash)}

    def update(self, readings: Iterable[RoutingStats]) -> tuple[int, float] | None:
        """Take in a row; return layer and share of dead experts of the first that collapsed."""
        if self.max_dead is None:
            return None
        self.rows += 1
        for reading in readings:
            if reading.layer not in self._fixed:
                known = self.loads.get(reading.layer, 0)
                self.loads[reading.layer] = known + reading.load
        few = any(load.sum() < MIN_ASSIGNMENTS * len(load) for load in self.loads.values())
        if self.rows < COLLAPSE_WINDOW or few:
            return None
        shares = {i: routing_health(load)["dead"] / len(load) for i, load in self.loads.items()}
        self.rows, self.loads = 0, {}
        return next(((i, share) for i, share in shares.items() if share > self.max_dead), None)


def routing_health(load: Tensor) -> RoutingRow:
    """Say how evenly slots fell on experts, from their (E,) counts.

    load: share of each expert, adding up to 1. max_vio: largest load over mean load, minus 1
    (arXiv 2408.15664, eq. 4). cv: standard deviation over mean. entropy: entropy of the shares over
    log E, 1 when even. dead: experts with less than 1 % of the mean load. Without any slot all are
    dead, and the other figures 0.
    """
    share = load.double() / load.sum().clamp_min(1)
    relative = share * len(share)
    entropy = -(share * share.clamp_min(1e-300).log()).sum() / math.log(max(2, len(share)))
    alone = len(share) == 1 and share.sum() > 0
    return {
        "load": [round(x, 6) for x in share.tolist()],
        "max_vio": max(0.0, relative.max().item() - 1),
        "cv": relative.std(correction=0).item(),
        "entropy": 1.0 if alone else entropy.item(),
        "dead": int((relative < DEAD).sum()),
    }
