"""Blocks: a mixer and feed-forward layers, each with norm and residual; groups and patterns."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from moenas.grammar.component import Component, Conflict, Part, changed, setting
from moenas.grammar.conditions import none_of, one_of
from moenas.model.feedforward.dense import FFN
from moenas.model.ffn_merging import merge_ffns, merge_order
from moenas.model.layer_inputs import LayerInputs, run_ffn, run_mixer
from moenas.model.mixers.mixer import Mixer
from moenas.model.moe.experts import MoEFFN
from moenas.model.residual import NormPosition, ResidualAdd, ResidualConfig
from moenas.model.shortcut import Shortcut
from moenas.records import Cost

KEPT = "_canonical"
"""Where a layer keeps its canonical form; it is no field, so it does not count in comparisons."""


@dataclass(frozen=True, kw_only=True)
class BlockGroup(Component):
    """`repeat` equal blocks after one another, or a pattern of blocks `repeat` times.

    A block has a mixer, a feed-forward layer or both. A pattern is a list of groups instead. A
    mixer alone in a block and an ffn alone in the next are the same as one block of both. They
    count as one layer.
    """

    repeat: int = setting(
        "how often the block or the pattern is repeated", default=1, low=1, high=1000
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
    shortcut_input: Literal["ffn", "block", "stream"] = setting(
        "what the shortcut reads: the normed input of ffn (LongCat-Flash), or the stream before"
        " the block (Arctic) or before ffn (Gemma 4) through a norm of its own",
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
    mixer_norm: NormPosition | None = setting(
        "where the norms of the mixer are; null: as norm_position of the model says",
        default=None,
        without_effect={"mixer": one_of(None)},
    )
    ffn_norm: NormPosition | None = setting(
        "where the norms of ffn and shortcut are; null: as norm_position of the model says (A.X"
        " K1: sandwich around its mixtures alone). A parallel block has the norms of mixer_norm",
        default=None,
        without_effect=(
            {"ffn": one_of(None)},
            {"parallel": one_of(True), "mixer": none_of(None)},
        ),
    )
    sum_norm: bool = setting(
        "a norm of the sum of ffn and shortcut before it joins the stream (Gemma 4)",
        default=False,
        without_effect=(
            {"shortcut": one_of(None)},
            {"shortcut_delay": none_of(0)},
            {"parallel": one_of(True), "mixer": none_of(None)},
        ),
    )
    block_scale: bool = setting(
        "a trained factor of the stream at the end of the block, 1 at first (Gemma 4)",
        default=False,
    )
    blocks: tuple[BlockGroup, ...] | None = setting(
        "a pattern of blocks; then this group has no mixer and ffn of its own", default=None
    )

    def invalid(self) -> str | None:
        """Return why the fields do not go together, or None."""
        own = self.mixer is not None or self.ffn is not None
        if self.blocks is not None and (own or self.shortcut is not None):
            return "a group has either 'blocks' or 'mixer' and 'ffn'; leave one of them out"
        if self.blocks is not None and self.block_scale:
            return "block_scale: a pattern has none; give it to the blocks of the pattern"
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
        norms = (self.mixer_norm, self.ffn_norm, self.sum_norm, self.block_scale)
        return (*map(id, parts), *rest, *norms)

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

    @property
    def has_sum_norm(self) -> bool:
        """Whether the sum of ffn and shortcut has a norm."""
        return (
            self.sum_norm
            and self.shortcut is not None
            and not self.shortcut_delay
            and not self.is_parallel
        )

    @property
    def reads_stream(self) -> bool:
        """Whether a part may read the stream without the norm of its block."""
        of_users = any(not type(x).__module__.startswith("moenas.") for x in self.parts.values())
        networks = [x for x in (self.ffn, self.shortcut) if isinstance(x, MoEFFN)]
        return of_users or any(x.router.logits.input != "ffn" for x in networks)

    @property
    def n_joins(self) -> int:
        """How often one layer adds to the stream; a shortcut is added with another part."""
        return sum(part is not None for part in (self.mixer, self.ffn)) - self.is_parallel

    def norm_positions(self, stream: ResidualConfig) -> tuple[ResidualConfig, ResidualConfig]:
        """Return what the mixer and the ffn share with the model, by where their norms are."""
        mixer = stream.at(self.mixer_norm)
        return mixer, mixer if self.is_parallel else stream.at(self.ffn_norm)

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
            sum_norm=self.has_sum_norm,
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
        _, ffn = canonical.norm_positions(stream)
        # The ffn reads the stream before the block, too, if nothing was added to it before.
        same_input, source = canonical.mixer is None or canonical.parallel, canonical.shortcut_input
        own_norm = ffn.shortcut_norms("block")[0] and stream.norm_cost().params
        if not own_norm and (same_input or source == "stream"):
            canonical = changed(canonical, shortcut_input="ffn")
        elif same_input and source == "stream":
            canonical = changed(canonical, shortcut_input="block")
        moved = stream.norm_position  # a place that is written where it differs
        norms = canonical.mixer_norm, None if canonical.parallel else canonical.ffn_norm
        parts = canonical.mixer, canonical.ffn
        written = [
            None if part is None or norm == moved else norm
            for part, norm in zip(parts, norms, strict=True)
        ]
        canonical = changed(canonical, mixer_norm=written[0], ffn_norm=written[1])
        return canonical._with_sources(ffn)._side_by_side(ffn)

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
        late = self.shortcut_delay > 0 or self.shortcut_input != "ffn"
        if self.ffn is None or self.shortcut is None or late:
            return self
        if stream.norms_outputs or self.has_sum_norm:
            if self.parallel:
                return self
            whole = None
        else:
            whole = merge_ffns(self.ffn, self.shortcut) or merge_ffns(self.shortcut, self.ffn)
        if whole is not None:
            return changed(self, ffn=whole, shortcut=None)
        first, second = sorted((self.ffn, self.shortcut), key=merge_order)
        return changed(self, ffn=first, shortcut=second)

    def cost(self, stream: ResidualConfig, context: int) -> Cost:
        """Return the cost of the block, or of the pattern, once."""
        groups = self.blocks or ()
        one = sum((group.cost(stream, context) * group.repeat for group in groups), start=Cost())
        for part in self.parts.values():
            one = one + part.cost(stream.d_model, context)
        of_mixer, of_ffn = self.norm_positions(stream)
        if self.mixer is not None:
            one = one + of_mixer.join_cost()
        if self.ffn is not None and not self.is_parallel:
            one = one + of_ffn.join_cost()
        if self.block_scale:
            one = one + Cost(params=1, active_params=1)
        if self.shortcut is not None:
            norms = sum(of_ffn.shortcut_norms(self.shortcut_input)) + self.has_sum_norm
            one = one + stream.norm_cost() * norms
        return one

    def build_block(self, stream: ResidualConfig, first_part: int = 1) -> Block:
        """Build the one layer of a group of one; its first part has this number in the model."""
        of_mixer, of_ffn = self.norm_positions(stream)
        mixer = None if self.mixer is None else self.mixer.build(stream.d_model)
        ffn = None if self.ffn is None else self.ffn.build(stream.d_model)
        norm1 = None if mixer is None else of_mixer.build_norms()
        shortcut = self._build_shortcut(of_ffn)
        join = (of_ffn if mixer is None else of_mixer).build_join(first_part)
        if self.is_parallel:
            return ParallelBlock(norm1, mixer, None, ffn, join, shortcut, scaled=self.block_scale)
        norm2 = None if ffn is None else of_ffn.build_norms()
        ffn_join = None
        if mixer is not None and ffn is not None and (of_mixer != of_ffn or stream.depth_scale):
            ffn_join = of_ffn.build_join(first_part + 1)
        sum_norm = stream.build_norm() if self.has_sum_norm else None
        return Block(
            norm1,
            mixer,
            norm2,
            ffn,
            join,
            shortcut,
            ffn_join=ffn_join,
            sum_norm=sum_norm,
            scaled=self.block_scale,
        )

    def _build_shortcut(self, stream: ResidualConfig) -> Shortcut | None:
        if self.shortcut is None:
            return None
        norms = stream.shortcut_norms(self.shortcut_input)
        before, after = (stream.build_norm() if norm else None for norm in norms)
        ffn = self.shortcut.build(stream.d_model)
        return Shortcut(before, ffn, after, self.shortcut_input, self.shortcut_delay)


def is_mixture(part: Part | None) -> bool:
    """Whether a part has a router, whose load is watched layer by layer."""
    return part is not None and part.router is not None


def merge_half_blocks(layers: Sequence[BlockGroup]) -> tuple[BlockGroup, ...]:
    """Return canonical layers, each mixer alone in one block with the ffn alone after it.

    Such a pair computes the same as one block at every position of the norm, with four exceptions.
    A shortcut is added between them, or a factor is multiplied between them. The shortcut beside
    the ffn has a norm of its own there. Both are mixtures of experts. Delays count the new blocks.
    Nothing changes if a part depends on its layer index.
    """
    different = {id(layer): layer for layer in layers}.values()
    if any(part.layer_indexed for layer in different for part in layer.parts.values()):
        return tuple(layers)
    joined = {i + layer.shortcut_delay for i, layer in enumerate(layers) if layer.shortcut}
    halves = {
        i
        for i, (one, other) in enumerate(pairwise(layers))
        if one.ffn is None
        and not one.block_scale
        and other.mixer is None
        and other.shortcut_input == "ffn"
        if not is_mixture(one.mixer) or not any(map(is_mixture, (other.ffn, other.shortcut)))
    } - joined
    number = [0, *itertools.accumulate(i not in halves for i in range(len(layers)))]
    groups = list[BlockGroup]()
    known = dict[
        tuple[int, int, int, NormPosition | None], BlockGroup
    ]()  # equal layers stay one object
    for i, layer in enumerate(layers):
        if i in halves:
            continue
        mixer = layers[i - 1].mixer if i - 1 in halves else layer.mixer
        norm = layers[i - 1].mixer_norm if i - 1 in halves else layer.mixer_norm
        delay = number[i + layer.shortcut_delay] - number[i]
        if mixer is layer.mixer and delay == layer.shortcut_delay:
            groups.append(layer)
            continue
        key = id(layer), id(mixer), delay, norm
        if key not in known:
            known[key] = changed(layer, mixer=mixer, shortcut_delay=delay, mixer_norm=norm)
        groups.append(known[key])
    return tuple(groups)


class Block(nn.Module):
    """A mixer, then a feed-forward layer, each joined to the stream; either may be missing.

    A shortcut is a second feed-forward layer. Its output is added to the stream together with the
    last part (the ffn, or the mixer where there is no ffn) of this block or of a later one. So with
    `post` one norm covers the whole sum.
    """

    matrices: tuple[str, ...] = ()

    def __init__(
        self,
        norm1: nn.Module | None,
        mixer: nn.Module | None,
        norm2: nn.Module | None,
        ffn: nn.Module | None,
        join: ResidualAdd,
        shortcut: Any = None,  # Shortcut or None
        *,
        ffn_join: ResidualAdd | None = None,
        sum_norm: nn.Module | None = None,
        scaled: bool = False,
    ) -> None:
        super().__init__()
        self.scaled = scaled
        self.norm1 = norm1
        self.mixer = mixer
        self.norm2 = norm2
        self.ffn = ffn
        self.join = join
        self.shortcut = shortcut
        self.ffn_join = ffn_join
        self.sum_norm = sum_norm
        self.scale = nn.Parameter(torch.ones(1)) if scaled else None

    def forward(self, x: Tensor, inputs: LayerInputs | None = None) -> Tensor:
        """Map (B, S, D) to (B, S, D); with a cache in `inputs`, `x` continues the tokens in it."""
        x = self.joined(x, inputs or LayerInputs())
        return x if self.scale is None else x * self.scale.to(x.dtype)

    def joined(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        """Return the stream (B, S, D) with the parts added, before the factor of the block."""
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
        join = self.join if self.ffn_join is None else self.ffn_join
        normed = join.entering(x, self.norm2)
        y = run_ffn(self.ffn, normed, inputs)
        if self.sum_norm is not None:
            return self.add_normed_sum(x, y, normed, inputs)
        x = join(x, y, self.norm2, self.due_shortcuts(normed, inputs))
        return x

    def add_normed_sum(self, x: Tensor, y: Tensor, normed: Tensor, inputs: LayerInputs) -> Tensor:
        """Return the stream with the norm of `y` of the ffn plus the shortcut added (Gemma 4).

        The shortcut of an earlier block that is due here is added beside the norm.
        """
        assert self.sum_norm is not None
        join = self.join if self.ffn_join is None else self.ffn_join
        earlier = inputs.pending_shortcuts.pop(0) if inputs.pending_shortcuts else None
        y = join.normed_output(y, self.norm2) + self.shortcut(normed, inputs)
        y = join.scaled(self.sum_norm(y))
        return join.add(x, y if earlier is None else y + earlier, self.norm2)

    def due_shortcuts(self, ffn_input: Tensor, inputs: LayerInputs) -> Tensor | None:
        """Return what shortcuts add to the stream at the end of this block.

        The output of this block's shortcut waits in `inputs.pending_shortcuts`: item i is added at
        the end of the i-th block after this one. `ffn_input` (B, S, D) is what the ffn reads.
        """
        pending = inputs.pending_shortcuts
        due = pending.pop(0) if pending else None
        if self.shortcut is None:
            return due
        join = self.join if self.ffn_join is None else self.ffn_join
        y = join.scaled(self.shortcut(ffn_input, inputs))
        delay = self.shortcut.delay
        if pending is None or delay == 0:
            return y if due is None else due + y
        pending += [None] * (delay - len(pending))
        other = pending[delay - 1]
        pending[delay - 1] = y if other is None else other + y
        return due


class ParallelBlock(Block):
    """A mixer and a feed-forward layer that read the same, joined to the stream together."""

    matrices: tuple[str, ...] = ()

    def joined(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        """Return the stream (B, S, D) with the sum of both parts added."""
        inputs.block_input = inputs.stream = x
        normed = self.join.entering(x, self.norm1)
        assert self.mixer is not None
        assert self.ffn is not None
        y = run_mixer(self.mixer, normed, inputs) + run_ffn(self.ffn, normed, inputs)
        x = self.join(x, y, self.norm1, self.due_shortcuts(normed, inputs))
        return x
