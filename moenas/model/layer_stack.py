"""Blocks that are trained together: their parts, auxiliary losses, and the end of a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moenas.model.mixers.token_indexer import total_index_loss
from moenas.model.moe.balance import total_auxiliary_loss
from moenas.model.moe.dispatch import grouped_waits
from moenas.model.moe.routed_layer import RoutedLayer


class LayerStack(nn.Module):
    """A module with blocks, whose mixtures of experts and token indexers have losses of their own.

    A subclass sets `blocks`, or overrides `stacked`.
    """

    blocks: nn.ModuleList
    d_model: int
    """Width of the residual stream."""
    n_residual_branches: int
    """Parts that add to the residual stream, by which the first weights are scaled."""

    def stacked(self) -> list[Any]:
        """Return the blocks, from the input to the output."""
        return list(self.blocks)

    def moe_layers(self) -> list[tuple[int, RoutedLayer]]:
        """Return the mixtures of experts, with the numbers from 0 of their layers."""
        return [(i, part) for i, part in self.parts() if isinstance(part, RoutedLayer)]

    def parts(self) -> list[tuple[int, nn.Module]]:
        """Return mixers and feed-forward layers, with shortcuts, and the numbers of their
        layers."""
        by_layer = [(x.mixer, x.ffn, x.shortcut and x.shortcut.ffn) for x in self.stacked()]
        return [(i, part) for i, parts in enumerate(by_layer) for part in parts if part is not None]

    def capturable(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether a pass in a type on a device reads no value on the host.

        A CUDA graph can hold such a pass. A module whose passes read says `capturable = False`;
        grouped products of some types wait for the host, see `dispatch.grouped_waits`.
        """
        if self.moe_layers() and grouped_waits(dtype, device):
            return False
        parts = (module for module in self.modules() if module is not self)
        return all(getattr(part, "capturable", True) for part in parts)

    def auxiliary_loss(self) -> Tensor:
        """Return the weighted losses of the last forward pass, over all layers.

        They are the balance and z losses of routers, and the divergences of token indexers.
        """
        layers = [(moe.balance, moe.routing) for _, moe in self.moe_layers()]
        loss = total_auxiliary_loss(layers) if layers else next(self.parameters()).new_zeros(())
        of_indexers = total_index_loss(self.modules())
        return loss if of_indexers is None else loss + of_indexers

    def after_step(self) -> None:
        """Move selection biases by the loads of the last training pass; call it each step.

        After it no part holds on to the graph of that pass.
        """
        for _, moe in self.moe_layers():
            moe.after_step()
        modules: list[Any] = list(self.modules())
        for module in modules:
            if hasattr(module, "index_loss"):
                module.index_loss = None
