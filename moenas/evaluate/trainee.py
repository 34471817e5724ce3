"""The modules of a training run: a model, and its heads for further tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moenas.model.architecture import Model
from moenas.model.multi_token import PredictionHeads

HEADS = "mtp."
"""Beginning of the names of the weights of the heads; no weight of a model has it."""


@dataclass(frozen=True)
class Trainee:
    """A model and its heads; None without any."""

    model: Model
    heads: PredictionHeads | None = None

    def stacks(self) -> list[Model | PredictionHeads]:
        """Return the model, then the heads."""
        return [self.model] if self.heads is None else [self.model, self.heads]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the weights with their names; names of weights of the heads begin with HEADS."""
        yield from self.model.named_parameters()
        if self.heads is not None:
            yield from ((HEADS + name, w) for name, w in self.heads.named_parameters())

    def parameters(self) -> list[nn.Parameter]:
        """Return the weights."""
        return [weight for _, weight in self.named_parameters()]

    def modules(self) -> list[nn.Module]:
        """Return the modules that hold the weights."""
        return [module for stack in self.stacks() for module in stack.modules()]

    def state_dict(self) -> dict[str, Tensor]:
        """Return weights and buffers by name; names of the heads begin with HEADS."""
        state = dict(self.model.state_dict())
        if self.heads is not None:
            state |= {HEADS + name: value for name, value in self.heads.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load what `state_dict` returned.

        Raises:
            RuntimeError: if a weight is missing, unknown, or of another shape.
        """
        own = {name: value for name, value in state.items() if not name.startswith(HEADS)}
        of_heads = {n.removeprefix(HEADS): x for n, x in state.items() if n.startswith(HEADS)}
        if (self.heads is None) != (not of_heads):
            raise RuntimeError("it has other heads for further tokens")
        self.model.load_state_dict(own)
        if self.heads is not None:
            self.heads.load_state_dict(of_heads)

    def train(self) -> None:
        """Put all of it into training mode."""
        for stack in self.stacks():
            stack.train()

    def zero_grad(self) -> None:
        """Free the gradients."""
        for stack in self.stacks():
            stack.zero_grad(set_to_none=True)

    def losses(
        self, tokens: Tensor, targets: Tensor, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the mean cross entropy of the next token in nats, and the loss that is trained.

        The second one also has the auxiliary losses and the weighted loss of the heads.
        """
        model = self.model
        if self.heads is None:
            loss = model.loss(tokens, targets, dtype)
            return loss, loss + model.auxiliary_loss()
        hidden = model.hidden(tokens, None, dtype)
        loss = model.head.loss(hidden, model.embedding, targets)
        further = self.heads.loss(model, hidden, tokens, targets)
        auxiliary = model.auxiliary_loss() + self.heads.auxiliary_loss()
        return loss, loss + further + auxiliary

    def after_step(self) -> None:
        """End a step; see `LayerStack.after_step`."""
        for stack in self.stacks():
            stack.after_step()

    def capturable(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether a step reads no value on the host; see `LayerStack.capturable`."""
        return all(stack.capturable(dtype, device) for stack in self.stacks())
