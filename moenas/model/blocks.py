"""Blocks: a mixer and feed-forward layers, each with norm and residual; groups and patterns."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Self

from torch import Tensor, nn

from moenas.grammar.component import Component, Conflict, Part, changed, setting
from moenas.grammar.conditions import one_of
from moenas.model.feedforward.dense import FFN, DenseFFN
from moenas.model.layer_inputs import LayerInputs, run_ffn, run_mixer
from moenas.model.layers.norms import NormKind, build_norm, norm_params
from moenas.model.mixers.mixer import Mixer
from moenas.model.moe.experts import MoEFFN
from moenas.model.residual import PrePostNorm, ResidualAdd
from moenas.records import Cost

NormPosition = Literal["pre", "post", "output", "sandwich"]


KEPT = "_canonical"
"""Where a layer keeps its canonical form; it is no field, so it does not count in comparisons."""


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

    def build_join(self) -> ResidualAdd:
        """Build what adds a part to the stream."""
        return ResidualAdd(self.norm_position, self.multiplier, self.skip)

    @property
    def norms_outputs(self) -> bool:
        """Whether each part's output has a norm of its own before it is added."""
        return self.norm_position in ("output", "sandwich")

    def shortcut_norms(self, source: str) -> tuple[bool, bool]:
        """Return whether a shortcut that reads `source` has a norm before and one after it."""
        before = source == "block" and self.norm_position in ("pre", "sandwich")
        return before, self.norms_outputs


@dataclass(frozen=True, kw_only=True)
class BlockGroup(Component):
    """`repeat` equal blocks after one another, or a pattern of blocks `repeat` times.

    A block has a mixer, a feed-forward layer or both. A pattern is a list of groups instead. A
    mixer alone in a block and an ffn alone in the next are the same as one block of both, and are
    counted as one layer.
    """

    repeat: int = setting(
        "how often the block or the pattern stands here", default=1, low=1, high=1000
    )
    vary: bool = setting("draw each of the layers by itself", default=False)
    mixer: Mixer | None = setting("how a token reads the tokens before it", default=None)
    ffn: FFN | None = setting("what happens to each token by itself", default=None)
    parallel: bool = setting(
        "mixer and ffn read the same normed input and are added together (PaLM, arXiv 2204.02311,"
        " section 2; Command A)",
        default=False,
        without_effect=({"mixer": one_of(None)}, {"ffn": one_of(None)}),
    )
    shortcut: FFN | None = setting(
        "a second feed-forward layer beside ffn: the mixture of a shortcut-connected MoE (ScMoE,"
        " arXiv 2404.05019; LongCat-Flash) or of a dense-MoE hybrid (Snowflake Arctic)",
        default=None,
    )
    shortcut_input: Literal["ffn", "block"] = setting(
        "what the shortcut reads: the normed input of ffn (LongCat-Flash), or the stream before"
        " the block through a norm of its own (Arctic)",
        default="ffn",
        without_effect={"shortcut": one_of(None)},
    )
    shortcut_delay: int = setting(
        "blocks after this one at whose end the shortcut joins the stream, at the latest the last"
        " (0: Arctic; 1: LongCat-Flash)",
        default=0,
        low=0,
        high=1000,
        without_effect={"shortcut": one_of(None)},
    )
    blocks: tuple[BlockGroup, ...] | None = setting(
        "a pattern of blocks; then this group has no mixer and ffn of its own", default=None
    )

    def invalid(self) -> str | None:
        """Return why the fields do not go together, or None."""
        own = self.mixer is not None or self.ffn is not None
        if self.blocks is not None and (own or self.shortcut is not None):
            return "a group has either 'blocks' or 'mixer' and 'ffn'; leave one of them out"
        if self.blocks is None and not own:
            return "a group needs 'mixer', 'ffn' or both, or 'blocks'; give one of them"
        if self.shortcut is not None and self.ffn is None:
            return "a shortcut needs an ffn beside it; give 'ffn', or make the shortcut the ffn"
        if sum(map(is_mixture, (self.ffn, self.shortcut))) > 1:
            return "a block has one mixture of experts: make 'ffn' or 'shortcut' another kind"
        if is_mixture(self.mixer) and (is_mixture(self.ffn) or is_mixture(self.shortcut)):
            return (
                "a block has one mixture of experts: give the mixer a block of its own, and"
                " another one after it the mixture of networks"
            )
        return None

    def invalid_at(self, d_model: int) -> Conflict | None:
        """Return which part does not fit a model of this width, and why, or None."""
        for part in self.parts.values():
            reason = part.invalid_at(d_model)
            if reason is not None:
                return reason if isinstance(reason, Conflict) else Conflict(part, reason)
        for group in self.blocks or ():
            if (conflict := group.invalid_at(d_model)) is not None:
                return conflict
        return None

    @property
    def identity(self) -> tuple[object, ...]:
        """What two groups have in common if they are made of the same objects, `repeat` aside."""
        parts = (self.mixer, self.ffn, self.shortcut, self.blocks)
        rest = (self.vary, self.parallel, self.shortcut_input, self.shortcut_delay)
        return (*map(id, parts), *rest)

    @property
    def parts(self) -> dict[str, Part]:
        """The parts of a block, by the names of their fields."""
        parts = {"mixer": self.mixer, "ffn": self.ffn, "shortcut": self.shortcut}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def n_layers(self) -> int:
        """How many layers the group has, written out."""
        inner = 1 if self.blocks is None else sum(group.n_layers for group in self.blocks)
        return self.repeat * inner

    @property
    def layers(self) -> tuple[BlockGroup, ...]:
        """The layers written out, each as a group of one."""
        if self.blocks is None:
            plain = self.repeat == 1 and not self.vary
            return ((self if plain else changed(self, repeat=1, vary=False)),) * self.repeat
        return tuple(layer for group in self.blocks for layer in group.layers) * self.repeat

    @property
    def is_parallel(self) -> bool:
        """Whether the block has two parts that read the same."""
        return self.parallel and self.mixer is not None and self.ffn is not None

    def canonical_at(self, d_model: int) -> Self:
        """Return the canonical form of one layer at a model width."""
        mixer = None if self.mixer is None else self.mixer.canonical_at(d_model)
        ffn = None if self.ffn is None else self.ffn.canonical()
        shortcut = None if self.shortcut is None else self.shortcut.canonical()
        return changed(
            self,
            mixer=mixer,
            ffn=ffn,
            parallel=self.is_parallel,
            shortcut=shortcut,
            shortcut_input=self.shortcut_input if shortcut else "ffn",
            shortcut_delay=self.shortcut_delay if shortcut else 0,
        )

    def canonical_in(self, stream: ResidualConfig) -> Self:
        """Return the canonical form of one layer of a model; it is kept for the last stream.

        Draws of one space share their layers, and most of the time their stream.
        """
        kept = self.__dict__.get(KEPT)
        if kept is None or kept[0] != stream:
            kept = self.__dict__[KEPT] = stream, self._canonical_in(stream)
        canonical: Self = kept[1]
        return canonical

    def _canonical_in(self, stream: ResidualConfig) -> Self:
        canonical = self.canonical_at(stream.d_model)
        # The ffn reads the stream before the block, too, if nothing was added to it before.
        same_input = canonical.mixer is None or canonical.parallel
        own_norm = stream.shortcut_norms("block")[0] and stream.norm_cost().params
        if same_input and not own_norm:
            canonical = changed(canonical, shortcut_input="ffn")
        return canonical._with_sources(stream)._side_by_side(stream)

    def _with_sources(self, stream: ResidualConfig) -> Self:
        """Write what routers read as `ffn`, else as `stream`, where these are the same."""
        whole = self.mixer is None or self.parallel  # what the block reads, its ffn does, too
        late = self.shortcut_input == "block"
        normed = stream.norm_position in ("pre", "sandwich")

        def written(part: FFN | None, of_block: bool) -> FFN | None:
            if not isinstance(part, MoEFFN):
                return part
            logits = part.router.logits
            word = logits.input
            if word != "ffn" and (whole or of_block):
                word = "stream"
            word = "ffn" if word == "stream" and not normed else word
            logits = changed(logits, input=word)
            return changed(part, router=changed(part.router, logits=logits))

        return changed(self, ffn=written(self.ffn, False), shortcut=written(self.shortcut, late))

    def _side_by_side(self, stream: ResidualConfig) -> Self:
        """Order two feed-forward layers with the same input and sum, or write them as one.

        They stay two if their outputs have norms, and in a parallel block: there one norm covers
        the sum of mixer and ffn.
        """
        late = self.shortcut_delay > 0 or self.shortcut_input == "block"
        if self.ffn is None or self.shortcut is None or late:
            return self
        if stream.norms_outputs:
            if self.parallel:
                return self
            whole = None
        else:
            whole = merge_ffns(self.ffn, self.shortcut) or merge_ffns(self.shortcut, self.ffn)
        if whole is not None:
            return changed(self, ffn=whole, shortcut=None)
        first, second = sorted((self.ffn, self.shortcut), key=_order)
        return changed(self, ffn=first, shortcut=second)

    def cost(self, stream: ResidualConfig, context: int) -> Cost:
        """Return the cost of the block, or of the pattern, once."""
        groups = self.blocks or ()
        one = sum((group.cost(stream, context) * group.repeat for group in groups), start=Cost())
        for part in self.parts.values():
            one = one + part.cost(stream.d_model, context)
        joins = sum(part is not None for part in (self.mixer, self.ffn)) - self.is_parallel
        one = one + stream.join_cost() * joins
        if self.shortcut is not None:
            one = one + stream.norm_cost() * sum(stream.shortcut_norms(self.shortcut_input))
        return one

    def build_block(self, stream: ResidualConfig) -> Block:
        """Build the one layer of a group of one."""
        mixer = None if self.mixer is None else self.mixer.build(stream.d_model)
        ffn = None if self.ffn is None else self.ffn.build(stream.d_model)
        norms = [None if part is None else stream.build_norms() for part in (mixer, ffn)]
        shortcut = self._build_shortcut(stream)
        if self.is_parallel:
            return ParallelBlock(norms[0], mixer, None, ffn, stream.build_join(), shortcut)
        return Block(norms[0], mixer, norms[1], ffn, stream.build_join(), shortcut)

    def _build_shortcut(self, stream: ResidualConfig) -> Shortcut | None:
        if self.shortcut is None:
            return None
        norms = stream.shortcut_norms(self.shortcut_input)
        before, after = (stream.build_norm() if norm else None for norm in norms)
        ffn = self.shortcut.build(stream.d_model)
        return Shortcut(before, ffn, after, self.shortcut_input == "block", self.shortcut_delay)


def is_mixture(part: Part | None) -> bool:
    """Whether a part has a router, whose load is watched layer by layer."""
    return part is not None and part.router is not None


def _order(ffn: FFN) -> tuple[bool, str]:
    """Return what two feed-forward layers side by side are ordered by: a mixture comes first."""
    return ffn.kind != "moe", json.dumps(ffn.plain(), sort_keys=True)


def merge_ffns(ffn: FFN, beside: FFN) -> FFN | None:
    """Return the one layer that is the sum of two canonical ones of the same input, or None.

    A network without biases beside another is a wider one, and beside a mixture it is a shared
    expert. The weights of the two, laid end to end, are those of the one.
    """
    if type(beside) is not DenseFFN or type(ffn) not in (DenseFFN, MoEFFN) or beside.bias:
        return None
    if _activation(ffn) != _activation(beside):
        return None
    if isinstance(ffn, DenseFFN) and not ffn.bias:
        return changed(ffn, d_ff=ffn.d_ff + beside.d_ff)
    if isinstance(ffn, MoEFFN) and not ffn.shared_gate and not ffn.out_bias:
        return changed(ffn, n_shared_experts=1, d_shared=ffn.shared_width + beside.d_ff)
    return None


def _activation(ffn: Any) -> tuple[Any, ...]:
    return ffn.activation, ffn.gate_limit, ffn.gate_alpha, ffn.up_shift


def merge_half_blocks(layers: Sequence[BlockGroup]) -> tuple[BlockGroup, ...]:
    """Return canonical layers, each mixer alone in one block with the ffn alone after it.

    Such a pair computes the same as one block at every position of the norm, with three exceptions:
    a shortcut is added between them, the shortcut beside the ffn has a norm of its own there, or
    both are mixtures of experts. Delays count the new blocks. Nothing changes if a part depends on
    its layer index.
    """
    different = {id(layer): layer for layer in layers}.values()
    if any(part.layer_indexed for layer in different for part in layer.parts.values()):
        return tuple(layers)
    joined = {i + layer.shortcut_delay for i, layer in enumerate(layers) if layer.shortcut}
    halves = {
        i
        for i, (one, other) in enumerate(pairwise(layers))
        if one.ffn is None and other.mixer is None and other.shortcut_input == "ffn"
        if not is_mixture(one.mixer) or not any(map(is_mixture, (other.ffn, other.shortcut)))
    } - joined
    number = [0, *itertools.accumulate(i not in halves for i in range(len(layers)))]
    groups = list[BlockGroup]()
    known = dict[tuple[int, int, int], BlockGroup]()  # equal layers stay one object
    for i, layer in enumerate(layers):
        if i in halves:
            continue
        mixer = layers[i - 1].mixer if i - 1 in halves else layer.mixer
        delay = number[i + layer.shortcut_delay] - number[i]
        if mixer is layer.mixer and delay == layer.shortcut_delay:
            groups.append(layer)
            continue
        key = id(layer), id(mixer), delay
        if key not in known:
            known[key] = changed(layer, mixer=mixer, shortcut_delay=delay)
        groups.append(known[key])
    return tuple(groups)


class Block(nn.Module):
    """A mixer, then a feed-forward layer, each joined to the stream; either may be missing.

    A shortcut is a second feed-forward layer. Its output is added to the stream together with the
    last part (the ffn, or the mixer where there is no ffn) of this block or of a later one. So with
    `post` one norm covers the whole sum.
    """

    def __init__(
        self,
        norm1: nn.Module | None,
        mixer: nn.Module | None,
        norm2: nn.Module | None,
        ffn: nn.Module | None,
        join: ResidualAdd,
        shortcut: Any = None,  # Shortcut or None
    ) -> None:
        super().__init__()
        self.norm1 = norm1
        self.mixer = mixer
        self.norm2 = norm2
        self.ffn = ffn
        self.join = join
        self.shortcut = shortcut

    def forward(self, x: Tensor, inputs: LayerInputs | None = None) -> Tensor:
        """Map (B, S, D) to (B, S, D); with a cache in `inputs`, `x` continues the tokens in it."""
        inputs = inputs or LayerInputs()
        # 1. The mixer. Where no ffn follows, shortcuts are added here.
        inputs.block_input = inputs.stream = x
        if self.mixer is not None:
            y = run_mixer(self.mixer, self.join.entering(x, self.norm1), inputs)
            due = None if self.ffn is not None else self.due_shortcuts(x, inputs)
            x = self.join(x, y, self.norm1, due)
        if self.ffn is None:
            return x
        # 2. The ffn, and the shortcuts that are due at the end of this block.
        inputs.stream = x
        normed = self.join.entering(x, self.norm2)
        y = run_ffn(self.ffn, normed, inputs)
        x = self.join(x, y, self.norm2, self.due_shortcuts(normed, inputs))
        return x

    def due_shortcuts(self, ffn_input: Tensor, inputs: LayerInputs) -> Tensor | None:
        """Return what shortcuts add to the stream at the end of this block.

        The output of this block's shortcut waits in `inputs.pending_shortcuts`: item i is added at
        the end of the i-th block after this one. `ffn_input` (B, S, D) is what the ffn reads.
        """
        pending = inputs.pending_shortcuts
        due = pending.pop(0) if pending else None
        if self.shortcut is None:
            return due
        y = self.join.scaled(self.shortcut(ffn_input, inputs))
        delay = self.shortcut.delay
        if pending is None or delay == 0:
            return y if due is None else due + y
        pending += [None] * (delay - len(pending))
        other = pending[delay - 1]
        pending[delay - 1] = y if other is None else other + y
        return due


class ParallelBlock(Block):
    """A mixer and a feed-forward layer that read the same, joined to the stream together."""

    def forward(self, x: Tensor, inputs: LayerInputs | None = None) -> Tensor:
        """Map (B, S, D) to (B, S, D), with the arguments of Block."""
        inputs = inputs or LayerInputs()
        inputs.block_input = inputs.stream = x
        normed = self.join.entering(x, self.norm1)
        assert self.mixer is not None
        assert self.ffn is not None
        y = run_mixer(self.mixer, normed, inputs) + run_ffn(self.ffn, normed, inputs)
        x = self.join(x, y, self.norm1, self.due_shortcuts(normed, inputs))
        return x


class Shortcut(nn.Module):
    """A feed-forward layer beside another, with norms of its own where it has any.

    It reads what the other reads, or the stream before the block (`of_block`). Its output is added
    `delay` blocks later.
    """

    def __init__(
        self,
        before: nn.Module | None,
        ffn: nn.Module,
        after: nn.Module | None,
        of_block: bool,
        delay: int,
    ) -> None:
        super().__init__()
        self.before = before
        self.ffn = ffn
        self.after = after
        self.of_block = of_block
        self.delay = delay

    def forward(self, ffn_input: Tensor, inputs: LayerInputs) -> Tensor:
        """Map the stream before the block, or what its ffn reads, (B, S, D) to (B, S, D)."""
        x = ffn_input
        if self.of_block:
            assert inputs.block_input is not None
            x = inputs.stream = inputs.block_input
        y = run_ffn(self.ffn, x if self.before is None else self.before(x), inputs)
        return y if self.after is None else self.after(y)
