"""How parts are joined to the residual stream: norms and factors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from moenas.model.layers.norms import NormKind, build_norm, norm_params
from moenas.records import Cost

NormPosition = Literal["pre", "post", "output", "sandwich"]

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
        y = self.scaled(self.normed_output(y, norm))
        y = y if shortcut is None else y + shortcut
        return self.add(x, y, norm)

    def normed_output(self, y: Tensor, norm: Any) -> Tensor:
        """Return the output of a part, after its norm if the norm is on the output."""
        if self.norm_position == "output":
            y = norm(y)
        elif self.norm_position == "sandwich":
            y = norm.after(y)
        return y

    def add(self, x: Tensor, y: Tensor, norm: Any) -> Tensor:
        """Return the stream with `y` added as it is."""
        x = (x if self.skip == 1 else x * self.skip) + y
        return norm(x) if self.norm_position == "post" else x


@dataclass(frozen=True)
class ResidualConfig:
    """What every layer of a model shares: the residual stream and how parts are joined to it."""

    d_model: int
    norm: NormKind
    norm_eps: float
    norm_position: NormPosition
    multiplier: float
    """Of what a part adds to the stream."""
    skip: float = 1.0
    """Of the stream that a part is added to."""
    depth_scale: bool = False
    """Whether the factors follow the number of the part; see `build_join`."""

    def at(self, position: NormPosition | None) -> ResidualConfig:
        """Return what a part shares whose norms stand elsewhere; None: as in the model."""
        return self if position is None else replace(self, norm_position=position)

    def norm_cost(self) -> Cost:
        """Return the cost of one norm of the stream."""
        params = norm_params(self.norm, self.d_model)
        return Cost(params=params, active_params=params)

    def build_norm(self) -> nn.Module:
        """Build one norm of the stream."""
        return build_norm(self.norm, self.d_model, self.norm_eps)

    def join_cost(self) -> Cost:
        """Return the cost of the norms around one part."""
        return self.norm_cost() * (2 if self.norm_position == "sandwich" else 1)

    def build_norms(self) -> nn.Module:
        """Build the norm around one part, or the two norms."""
        if self.norm_position == "sandwich":
            return PrePostNorm(self.build_norm(), self.build_norm())
        return self.build_norm()

    def build_join(self, part: int) -> ResidualAdd:
        """Build what adds a part to the stream; `part` is its number in the model, from 1.

        With a depth scale, part i is divided by sqrt(i + 1), and the stream multiplied by sqrt(i /
        (i + 1)) (Beam). So a sum of independent terms of equal size keeps its size.
        """
        if not self.depth_scale:
            return ResidualAdd(self.norm_position, self.multiplier, self.skip)
        multiplier, skip = (part + 1) ** -0.5, (part / (part + 1)) ** 0.5
        return ResidualAdd(self.norm_position, self.multiplier * multiplier, self.skip * skip)

    @property
    def norms_outputs(self) -> bool:
        """Whether each part's output has a norm of its own before it is added."""
        return self.norm_position in ("output", "sandwich")

    def shortcut_norms(self, source: str) -> tuple[bool, bool]:
        """Return whether a shortcut that reads `source` has a norm before and one after it."""
        before = source != "ffn" and self.norm_position in ("pre", "sandwich")
        return before, self.norms_outputs
