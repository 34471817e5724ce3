"""Blocks: a mixer and a feed-forward layer, each with norm and residual; groups and patterns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from torch import Tensor, nn

from moenas.component import Component, setting
from moenas.parts.ffn import FFN
from moenas.parts.mixers import Mixer
from moenas.parts.norms import NormKind, build_norm, norm_params
from moenas.records import Cost

NormPosition = Literal["pre", "post", "output", "sandwich"]


@dataclass(frozen=True)
class Stream:
    """What every layer of a model shares: the residual stream and how parts are joined to it."""

    d_model: int
    norm: NormKind
    norm_eps: float
    norm_position: NormPosition
    multiplier: float
    """Of what a part adds to the stream."""

    def norm_cost(self) -> Cost:
        """Return the cost of one norm of the stream."""
        params = norm_params(self.norm, self.d_model)
        return Cost(params=params, active_params=params, weight_bytes=2 * params)

    def build_norm(self) -> nn.Module:
        """Build one norm of the stream."""
        return build_norm(self.norm, self.d_model, self.norm_eps)

    def join_cost(self) -> Cost:
        """Return the cost of the norms around one part."""
        return self.norm_cost() * (2 if self.norm_position == "sandwich" else 1)

    def build_join(self) -> nn.Module:
        """Build the norm around one part, or the two norms."""
        if self.norm_position == "sandwich":
            return Sandwich(self.build_norm(), self.build_norm())
        return self.build_norm()


@dataclass(frozen=True, kw_only=True)
class BlockGroup(Component):
    """`repeat` equal blocks after one another, or a pattern of blocks `repeat` times.

    A block has a mixer, a feed-forward layer or both. A pattern is a list of groups instead.
    """

    repeat: int = setting(
        "how often the block or the pattern stands here", default=1, low=1, high=1000
    )
    vary: bool = setting("draw each of the layers by itself", default=False)
    mixer: Mixer | None = setting("how a token reads the tokens before it", default=None)
    ffn: FFN | None = setting("what happens to each token by itself", default=None)
    blocks: tuple[BlockGroup, ...] | None = setting(
        "a pattern of blocks; then this group has no mixer and ffn of its own", default=None
    )

    def invalid(self) -> str | None:
        """Return why the fields do not go together, or None."""
        own = self.mixer is not None or self.ffn is not None
        if self.blocks is not None and own:
            return "a group has either 'blocks' or 'mixer' and 'ffn'; leave one of them out"
        if self.blocks is None and not own:
            return "a group needs 'mixer', 'ffn' or both, or 'blocks'; give one of them"
        return None

    def invalid_at(self, d_model: int) -> str | None:
        """Return why a part does not fit a model of this width, or None."""
        inner: list[tuple[str, Any]] = [("mixer", self.mixer), ("ffn", self.ffn)]
        inner = [(name, part) for name, part in inner if part is not None]
        for i, group in enumerate(self.blocks or ()):
            inner.append((f"blocks.{i}", group))
        for name, part in inner:
            if (reason := part.invalid_at(d_model)) is not None:
                return f"{name}{'.' if part in (self.blocks or ()) else ': '}{reason}"
        return None

    @property
    def layers(self) -> tuple[BlockGroup, ...]:
        """The layers written out, each as a group of one."""
        if self.blocks is None:
            return (replace(self, repeat=1, vary=False),) * self.repeat
        return tuple(layer for group in self.blocks for layer in group.layers) * self.repeat

    def canonical_at(self, d_model: int) -> Self:
        """Return the canonical form of one layer at a model width."""
        mixer = None if self.mixer is None else self.mixer.canonical_at(d_model)
        ffn = None if self.ffn is None else self.ffn.canonical()
        return replace(self, mixer=mixer, ffn=ffn)

    def cost(self, stream: Stream, context: int) -> Cost:
        """Return the cost of all layers of the group."""
        one = sum((group.cost(stream, context) for group in self.blocks or ()), start=Cost())
        for part in (self.mixer, self.ffn):
            if part is not None:
                one = one + part.cost(stream.d_model, context) + stream.join_cost()
        return one * self.repeat

    def build(self, stream: Stream) -> list[Block]:
        """Build the layers of the group."""
        return [layer.build_block(stream) for layer in self.layers]

    def build_block(self, stream: Stream) -> Block:
        """Build the one layer of a group of one."""
        parts = (self.mixer, self.ffn)
        norms = [None if part is None else stream.build_join() for part in parts]
        mixer, ffn = (None if part is None else part.build(stream.d_model) for part in parts)
        return Block(norms[0], mixer, norms[1], ffn, stream.norm_position, stream.multiplier)


class Sandwich(nn.Module):
    """The norms before and after a part."""

    def __init__(self, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before = before
        self.after = after


class Block(nn.Module):
    """A mixer, then a feed-forward layer, each added to the stream; either may be missing.

    With a part f, a norm n and a multiplier m, the stream becomes `x + m f(n(x))` (pre, arXiv
    2002.04745), `n(x + m f(x))` (post, arXiv 1706.03762), `x + m n(f(x))` (output, OLMo 2, arXiv
    2501.00656) or `x + m n'(f(n(x)))` (sandwich, CogView, arXiv 2105.13290).
    """

    def __init__(
        self,
        norm1: nn.Module | None,
        mixer: nn.Module | None,
        norm2: nn.Module | None,
        ffn: nn.Module | None,
        norm_position: str = "pre",
        multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        self.norm1 = norm1
        self.mixer = mixer
        self.norm2 = norm2
        self.ffn = ffn
        self.norm_position = norm_position
        self.multiplier = multiplier

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        """Map (B, S, D) to (B, S, D); with a cache, `x` continues the tokens in it."""
        norm1, norm2, mixer, ffn = self.norm1, self.norm2, self.mixer, self.ffn
        if mixer is not None:
            x = self.joined(x, self.scaled(mixer(self.entering(x, norm1), cache), norm1), norm1)
        if ffn is not None:
            x = self.joined(x, self.scaled(ffn(self.entering(x, norm2)), norm2), norm2)
        return x

    def entering(self, x: Tensor, norm: Any) -> Tensor:
        """Return what a part reads of the stream."""
        if self.norm_position == "pre":
            x = norm(x)
        elif self.norm_position == "sandwich":
            x = norm.before(x)
        return x

    def scaled(self, y: Tensor, norm: Any) -> Tensor:
        """Return what a part adds to the stream."""
        if self.norm_position == "output":
            y = norm(y)
        elif self.norm_position == "sandwich":
            y = norm.after(y)
        return y if self.multiplier == 1 else y * self.multiplier

    def joined(self, x: Tensor, y: Tensor, norm: Any) -> Tensor:
        """Return the stream with `y` added."""
        x = x + y
        return norm(x) if self.norm_position == "post" else x
