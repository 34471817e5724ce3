"""How parts are joined to the residual stream: norms and factors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

# Shapes: B sequences of S tokens, D model width.


class PrePostNorm(nn.Module):
    """The norms before and after a part."""

    def __init__(self, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before = before
        self.after = after


class ResidualAdd(nn.Module):
    """How a part is joined to the stream.

    With a part f, a norm n, a multiplier m and a skip multiplier a, the stream becomes
    `a x + m f(n(x))` (pre, arXiv 2002.04745), `n(a x + m f(x))` (post, arXiv 1706.03762; with a
    above 1 DeepNorm, arXiv 2203.00555), `a x + m n(f(x))` (output, OLMo 2, arXiv 2501.00656) or
    `a x + m n'(f(n(x)))` (sandwich, CogView, arXiv 2105.13290).
    """

    def __init__(self, norm_position: str, multiplier: float, skip: float) -> None:
        super().__init__()
        self.norm_position = norm_position
        self.multiplier = multiplier
        self.skip = skip

    def entering(self, x: Tensor, norm: Any) -> Tensor:
        """Return what a part reads of the stream."""
        if self.norm_position == "pre":
            x = norm(x)
        elif self.norm_position == "sandwich":
            x = norm.before(x)
        return x

    def scaled(self, y: Tensor) -> Tensor:
        """Return `y` as it is added to the stream."""
        return y if self.multiplier == 1 else y * self.multiplier

    def forward(self, x: Tensor, y: Tensor, norm: Any, shortcut: Tensor | None = None) -> Tensor:
        """Return the stream with `y` of a part added, and the output of a shortcut as it is."""
        if self.norm_position == "output":
            y = norm(y)
        elif self.norm_position == "sandwich":
            y = norm.after(y)
        y = self.scaled(y)
        y = y if shortcut is None else y + shortcut
        x = (x if self.skip == 1 else x * self.skip) + y
        return norm(x) if self.norm_position == "post" else x
