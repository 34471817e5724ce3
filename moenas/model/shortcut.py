"""A second feed-forward layer of a block, whose output joins the stream with another part."""

from __future__ import annotations

from torch import Tensor, nn

from moenas.model.layer_inputs import LayerInputs, run_ffn

# Shapes: B sequences of S tokens, D model width.


class Shortcut(nn.Module):
    """A feed-forward layer beside another, with norms of its own where it has any.

    It reads what the other reads ("ffn"), or the stream before the block ("block") or before the
    other ("stream"). Its output is added `delay` blocks later.
    """

    def __init__(
        self,
        before: nn.Module | None,
        ffn: nn.Module,
        after: nn.Module | None,
        source: str,
        delay: int,
    ) -> None:
        super().__init__()
        self.before = before
        self.ffn = ffn
        self.after = after
        self.source = source
        self.delay = delay

    def forward(self, ffn_input: Tensor, inputs: LayerInputs) -> Tensor:
        """Map the stream before the block, or what its ffn reads, (B, S, D) to (B, S, D)."""
        x = ffn_input
        if self.source == "block":
            assert inputs.block_input is not None
            x = inputs.stream = inputs.block_input
        elif self.source == "stream":
            assert inputs.stream is not None
            x = inputs.stream
        y = run_ffn(self.ffn, x if self.before is None else self.before(x), inputs)
        return y if self.after is None else self.after(y)
