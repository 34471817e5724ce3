"""Multi-token prediction: heads for further tokens, in training alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moenas.grammar.component import Component, changed, setting
from moenas.model.architecture import Architecture, Model, initialise
from moenas.model.blocks import BlockGroup
from moenas.model.layer_inputs import LayerIndexed, LayerInputs, SharedKV
from moenas.model.layer_stack import LayerStack
from moenas.model.layers.linear import Linear
from moenas.model.layers.norms import RMSNorm
from moenas.records import Cost

# Shapes: B sequences of S tokens, D model width. Head k = 1, 2, ... reads N = S - k positions.

SEEDS = 1 << 31
"""Added to the seed of a model, so that its heads draw other numbers than the model does. The
generator of a CPU uses the low 32 bits of a seed."""


@dataclass(frozen=True, kw_only=True)
class MultiTokenPrediction(Component):
    """`mtp`: heads beside the model in training; head k predicts the token after the next k.

    The sequential modules of DeepSeek-V3 (arXiv 2412.19437, section 2.2). Head k joins the output
    of head k - 1, or of the model, with the embedding of the k-th next token. Both have an RMSNorm,
    and a matrix maps 2 d_model to d_model (equation 21). A block follows, then a norm as before the
    head of the model, and that head (equation 23). The block is made as the last one of the model,
    with keys and values of its own. The model's embedding and head are used. The training loss is
    the loss of the next token plus `weight` times the mean loss of the heads (equation 25). Neither
    the validation loss nor a stored or exported model has the heads.
    """

    depth: int = setting("heads, one after another", default=1, low=1, high=16)
    weight: float = setting(
        "factor of the mean of their losses (DeepSeek-V3: 0.3, then 0.1); 0: no heads are built, as"
        " without `mtp`",
        default=0.3,
        low=0.0,
    )

    def block(self, architecture: Architecture) -> BlockGroup:
        """Return the block of each head: the last of the model, reading no earlier layer.

        Its attention has no indexer if the model's attention reads the indexer of another layer.
        """
        layer = architecture.canonical().layers[-1]
        mixer: Any = layer.mixer
        if getattr(mixer, "kv_source", None) is not None:
            mixer = changed(mixer, kv_source=None)
        if getattr(mixer, "bias_shared", None):
            mixer = changed(mixer, position_bias=changed(mixer.position_bias, shared=False))
        if getattr(mixer, "index_shared", False):
            mixer = changed(mixer, index_shared=False)
        return changed(layer, mixer=mixer, repeat=1, vary=False)

    def pass_flops(self, architecture: Architecture, context: int) -> int:
        """Return the forward operations of all heads on a sequence of `context` tokens."""
        architecture = architecture.canonical()
        width, block = architecture.d_model, self.block(architecture)
        outside = 2 * width * (2 * width + architecture.vocab_size)
        total = 0
        for n in range(context - 1, max(0, context - 1 - self.depth), -1):
            total += n * (outside + block.cost(architecture.stream, n).flops_per_token)
        return total

    def cost(self, architecture: Architecture, context: int) -> Cost:
        """Return what the heads add in training; FLOPs of a token are rounded up."""
        if not self.weight:
            return Cost()
        architecture = architecture.canonical()
        width, stream = architecture.d_model, architecture.stream
        one = self.block(architecture).cost(stream, context)
        own = 2 * width * width + 2 * width
        own += stream.norm_cost().params * (architecture.norm_position != "post")
        return Cost(
            params=self.depth * (one.params + own),
            active_params=self.depth * (one.active_params + own),
            flops_per_token=-(-self.pass_flops(architecture, context) // context),
        )

    def outline(
        self, architecture: Architecture, device: torch.device | str = "meta"
    ) -> PredictionHeads:
        """Build the heads without drawing weights; on the meta device they take no memory.

        They come from the canonical form, so that equal models get equal heads.
        """
        architecture = architecture.canonical()
        block, stream = self.block(architecture), architecture.stream
        n_branches = sum(len(layer.parts) for layer in architecture.layers)
        with torch.device(device):
            heads = [
                PredictionHead(
                    architecture.d_model,
                    architecture.norm_eps,
                    block.build_block(stream),
                    None if architecture.norm_position == "post" else stream.build_norm(),
                )
                for _ in range(self.depth)
            ]
            return PredictionHeads(heads, self.weight, len(architecture.layers), n_branches)

    def build(
        self, architecture: Architecture, device: torch.device | str = "cpu", seed: int = 0
    ) -> PredictionHeads:
        """Build the heads and draw their weights as for a model; see `initialise`."""
        heads = self.outline(architecture, device)
        initialise(heads, seed + SEEDS)
        return heads


def build_heads(
    mtp: MultiTokenPrediction | None, architecture: Architecture, device: torch.device, seed: int
) -> PredictionHeads | None:
    """Build the heads of a candidate and draw their weights; None for None."""
    return None if mtp is None else mtp.build(architecture, device, seed)


class PredictionHead(nn.Module):
    """One head: the stream of the head before, joined with the embedding of a later token."""

    def __init__(self, d_model: int, eps: float, block: nn.Module, norm: nn.Module | None) -> None:
        super().__init__()
        self.stream_norm = RMSNorm(d_model, eps)
        self.token_norm = RMSNorm(d_model, eps)
        self.join = Linear(2 * d_model, d_model)
        self.block = block
        self.norm = norm

    def forward(self, x: Tensor, embedded: Tensor, tokens: Tensor) -> Tensor:
        """Map the stream (B, N, D) and the embeddings (B, N, D) of `tokens` (B, N) to (B, N, D)."""
        joined = self.join(torch.cat((self.stream_norm(x), self.token_norm(embedded)), dim=-1))
        inputs = LayerInputs(tokens, shared_kv=SharedKV(), pending_shortcuts=[])
        y: Tensor = self.block(joined, inputs)
        return y


class PredictionHeads(LayerStack):
    """The heads of a model; `loss` reads the embedding and the head of the model itself."""

    def __init__(
        self,
        heads: list[PredictionHead],
        weight: float,
        n_layers: int,
        n_residual_branches: int,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.d_model = heads[0].join.d_out
        self.n_residual_branches = n_residual_branches
        self.heads = nn.ModuleList(heads)
        for block in self.stacked():
            if isinstance(block.mixer, LayerIndexed):
                block.mixer.set_layer_index(n_layers - 1, n_layers)

    def stacked(self) -> list[Any]:
        """Return the blocks of the heads."""
        heads: list[Any] = list(self.heads)
        return [head.block for head in heads]

    def losses(self, model: Model, hidden: Tensor, tokens: Tensor, targets: Tensor) -> list[Tensor]:
        """Return the mean cross entropy of each head in nats a token.

        `hidden` (B, S, D) is what the head of the model reads for `tokens` (B, S), and `targets`
        (B, S) are the tokens after these. Head k predicts targets[:, k:] of S - k positions, and
        its loss is their mean; equation 24 divides the same sum by S.
        """
        losses = []
        heads: list[Any] = list(self.heads)
        for k, head in enumerate(heads, start=1):
            later = tokens[:, k:]
            embedded = F.embedding(later, model.embedding).to(hidden.dtype)
            hidden = head(hidden[:, :-1], embedded, later)
            normed = hidden if head.norm is None else head.norm(hidden)
            losses.append(model.head.loss(normed, model.embedding, targets[:, k:]))
        return losses

    def loss(self, model: Model, hidden: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean of the losses of the heads, times the weight; see `losses`."""
        losses = self.losses(model, hidden, tokens, targets)
        return self.weight * torch.stack(losses).mean()
