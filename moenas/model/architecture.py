"""An architecture and the language model it becomes: cost, canonical fingerprint, build."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moenas.grammar import field_names, tree
from moenas.grammar import summary as describe
from moenas.grammar.component import Component, Conflict, changed, setting
from moenas.grammar.conditions import one_of
from moenas.model.blocks import (
    KEPT,
    Block,
    BlockGroup,
    merge_half_blocks,
)
from moenas.model.decoding import TokenSampler
from moenas.model.head import Head
from moenas.model.layer_inputs import LayerIndexed, LayerInputs, SharedKV
from moenas.model.layer_stack import LayerStack
from moenas.model.layers.linear import matrices, output_projections
from moenas.model.layers.norms import NormKind
from moenas.model.mixers.shared_kv import kv_source_error, link_layers
from moenas.model.mixers.token_indexer import index_source_error
from moenas.model.residual import NormPosition, ResidualConfig
from moenas.model.stem import Caches, EmbeddingStem
from moenas.records import Cost
from moenas.resources import sha256

MAX_LAYERS = 10_000
"""Of an architecture, with groups and patterns written out."""


@dataclass(frozen=True, kw_only=True)
class Architecture(Component):
    """A decoder-only language model, complete: a space without holes."""

    vocab_size: int = setting("tokens of the vocabulary", low=2)
    d_model: int = setting("width of the residual stream", low=8, multiple=8)
    norm: NormKind = setting(
        "layernorm has no bias, layernorm_bias has one; dyt is a tanh with a learned slope",
        default="rmsnorm",
    )
    norm_eps: float = setting(
        "added to the mean square or variance",
        default=1e-6,
        low=0.0,
        without_effect={"norm": one_of("dyt")},
    )
    norm_position: NormPosition = setting(
        "before each part, after the sum, on a part's output, or before and on the output",
        default="pre",
    )
    positions: Literal["none", "learned"] = setting(
        "learned: a vector for each position is added to the embedding (GPT-2)", default="none"
    )
    max_positions: int | None = setting(
        "rows of the learned positions: the longest context",
        default=None,
        low=256,
        without_effect={"positions": one_of("none")},
    )
    tie_embeddings: bool = setting("the head is the embedding table, transposed", default=True)
    embedding_multiplier: float = setting("factor of the embedding", default=1.0)
    embedding_norm: bool = setting(
        "a norm of the embedding before the first block (BLOOM, arXiv 2211.05100)", default=False
    )
    residual_multiplier: float = setting("factor of what each part adds", default=1.0)
    skip_multiplier: float = setting(
        "factor of the stream that a part is added to (DeepNorm, arXiv 2203.00555)", default=1.0
    )
    depth_scale: bool = setting(
        "part i of the model, from 1, joins the stream x as sqrt(i / (i + 1)) x + part / sqrt(i +"
        " 1), with the multipliers (Beam). Where every part reads the stream through a norm (pre,"
        " sandwich) it multiplies norm_eps of part i by i, and has no other effect",
        default=False,
    )
    logit_multiplier: float = setting("factor of the logits", default=1.0)
    logit_softcap: float | None = setting(
        "logits become c tanh(logit / c) (Gemma 2, arXiv 2408.00118)", default=None, low=0.1
    )
    head_bias: bool = setting("the head has a bias", default=False)
    blocks: tuple[BlockGroup, ...] = setting("groups of layers, from the input to the output")

    @classmethod
    def parse(cls, plain: Mapping[str, Any]) -> Self:
        """Build an architecture from plain data; the inverse of `plain`.

        Raises:
            SpaceError: naming the field that is wrong.
        """
        return tree.parse(cls, plain)

    def invalid(self) -> str | Conflict | None:
        """Return why a block does not fit the width, or fields do not go together, or None."""
        if (layers := sum(group.n_layers for group in self.blocks)) > MAX_LAYERS:
            return f"blocks: {layers:,} layers, written out; at most {MAX_LAYERS:,}: lower a repeat"
        for group in self.blocks:
            if (conflict := group.invalid_at(self.d_model)) is not None:
                return conflict
        if self.positions == "learned" and self.max_positions is None:
            return "positions: 'learned' needs max_positions; give it, at least the context"
        return None

    def invalid_as_a_whole(self) -> Conflict | None:
        """Return why a layer cannot read keys, a table or an index of an earlier one, or None."""
        mixers = [layer.mixer for layer in self.layers]
        return kv_source_error(mixers, self.d_model) or index_source_error(mixers)

    @property
    def layers(self) -> tuple[BlockGroup, ...]:
        """The groups and patterns written out, one a layer; no shortcut joins after the last.

        Layers of the same parts are one object, so that what is asked of each can be kept.
        """
        layers = [layer for group in self.blocks for layer in group.layers]
        for i, layer in enumerate(reversed(layers)):
            if layer.shortcut_delay > i:
                layers[-1 - i] = changed(layer, shortcut_delay=i, sum_norm=False)
        distinct = {id(layer): layer for layer in layers}
        known = dict[tuple[object, ...], BlockGroup]()
        first = {n: known.setdefault(layer.identity, layer) for n, layer in distinct.items()}
        return tuple(first[id(layer)] for layer in layers)

    @property
    def stream(self) -> ResidualConfig:
        """What the layers share."""
        return ResidualConfig(
            self.d_model,
            self.norm,
            self.norm_eps,
            self.norm_position,
            self.residual_multiplier,
            self.skip_multiplier,
            self.depth_scale,
        )

    def canonical(self) -> Self:
        """Return the canonical form: architectures that train and compute the same have one.

        It has canonical parts and no patterns. A mixer is in one block with the ffn after it, and
        each run of equal layers is one group. Fields without effect have their defaults. It is
        kept.
        """
        if KEPT not in self.__dict__:
            canonical = self.__dict__[KEPT] = self._canonical()
            canonical.__dict__[KEPT] = canonical
        kept: Self = self.__dict__[KEPT]
        return kept

    def _canonical(self) -> Self:
        stream, written, known = self.stream, self.layers, dict[int, BlockGroup]()
        for layer in written:  # equal layers are one object, most of the time
            if id(layer) not in known:
                known[id(layer)] = layer.canonical_in(stream)
        runs = itertools.groupby(merge_half_blocks([known[id(layer)] for layer in written]))
        return changed(
            self,
            blocks=tuple(changed(layer, repeat=len(list(run))) for layer, run in runs),
            norm_eps=1e-6 if self.norm == "dyt" else self.norm_eps,
            max_positions=self.max_positions if self.positions == "learned" else None,
            depth_scale=self.depth_scale and not self._norms_undo_scale(known.values()),
        )

    def _norms_undo_scale(self, layers: Iterable[BlockGroup]) -> bool:
        """Whether a factor of the stream changes nothing, by its canonical layers.

        With a depth scale the stream after part i is that without one, divided by sqrt(i + 1). A
        norm undoes the factor where its eps is 0. With an eps, it acts as an eps of i times the
        size: that is an effect. A part of the user's may read the stream itself.
        """
        if self.norm == "dyt" or self.norm_eps or self.norm_position not in ("pre", "sandwich"):
            return False
        return all(
            stream.norm_position in ("pre", "sandwich")
            for layer in layers
            for stream in layer.norm_positions(self.stream)
        ) and not any(layer.shortcut_delay or layer.reads_stream for layer in layers)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify the canonical architecture.

        They hash the fields that differ from their defaults, so a new field changes no fingerprint.
        """
        data = self.canonical().fingerprint_data()
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return sha256(text.encode())[:16]

    def cost(self, context: int) -> Cost:
        """Return the exact cost of the whole model at a context length in tokens."""
        table = self.vocab_size * self.d_model
        bias = self.vocab_size if self.head_bias else 0
        rows = self.d_model * (self.max_positions or 0) if self.positions == "learned" else 0
        head = Cost(params=table + bias, active_params=table + bias, flops_per_token=2 * table)
        lookups = [Cost(params=rows, active_params=min(rows, self.d_model))]
        if not self.tie_embeddings:
            lookups.append(Cost(params=table, active_params=self.d_model))
        norms = self.embedding_norm + (self.norm_position != "post")
        head = head + self.stream.norm_cost() * norms
        often, groups = Counter[tuple[object, ...]](), dict[tuple[object, ...], BlockGroup]()
        for group in self.blocks:
            often[group.identity] += group.repeat
            groups[group.identity] = group
        blocks = [groups[identity].cost(self.stream, context) * n for identity, n in often.items()]
        return sum([*lookups, *blocks], start=head)

    def pass_flops(self, context: int) -> int:
        """Return the operations that a count of one pass over `context` tokens finds.

        These are `context * flops_per_token` of the cost, plus what the cost leaves out on
        purpose: rows of experts that carry nothing, and roundings.
        """
        flops = context * self.cost(context).flops_per_token
        parts = (part for layer in self.layers for part in layer.parts.values())
        return flops + sum(part.surplus_flops(self.d_model, context) for part in parts)

    def kv_cache_bytes(self, context: int) -> int:
        """Return the bytes of keys and values that decoding one sequence of `context` tokens needs.

        2 bytes an element. Tokens behind a window or chunk are not needed; the cache of a built
        model keeps them, too: `context * kv_bytes_per_token` of the cost. States of a fixed size
        are left out.
        """
        needed = 0
        for mixer in (layer.mixer for layer in self.layers):
            if mixer is not None:
                a_token = mixer.cost(self.d_model, context).kv_bytes_per_token
                needed += a_token * min(context, mixer.attention_span or context)
        return needed

    def build(self, device: torch.device | str = "cpu", seed: int = 0) -> Model:
        """Build the model and draw its weights; the same seed gives the same model."""
        model = self.outline(device)
        initialise(model, seed)
        return model

    def outline(self, device: torch.device | str = "meta") -> Model:
        """Build the model without drawing weights; on the meta device it takes no memory."""
        rows, layers = self.max_positions if self.positions == "learned" else None, self.layers
        first_parts = itertools.accumulate((layer.n_joins for layer in layers), initial=1)
        with torch.device(device):
            return Model(
                self._build_stem(rows),
                [
                    layer.build_block(self.stream, part)
                    for layer, part in zip(layers, first_parts, strict=False)
                ],
                None if self.norm_position == "post" else self.stream.build_norm(),
                self._build_head(),
                sum(len(layer.parts) for layer in self.canonical().layers),
            )

    def _build_stem(self, rows: int | None) -> EmbeddingStem:
        norm = self.stream.build_norm() if self.embedding_norm else None
        return EmbeddingStem(self.d_model, rows, self.embedding_multiplier, norm)

    def _build_head(self) -> Head:
        return Head(
            self.vocab_size,
            None if self.tie_embeddings else self.d_model,
            self.head_bias,
            self.logit_multiplier,
            self.logit_softcap,
        )

    def describe(self) -> str:
        """Say in one line what it is: `96d rmsnorm, 4x(attention 3q/1kv, moe 8e top2 ...)`."""
        return describe.one_line(self.canonical().plain())

    def names(self) -> list[dict[str, float | str]]:
        """Return for each canonical layer the names that a requirement can use, and their values.

        The names are the fields of the architecture, of the layer, of its parts and of their
        routers in canonical form. `n_layers` and the kinds, as `mixer` and `ffn`, are added: see
        `field_names`. Fields that are null and names that mean several fields of the layer are left
        out.
        """
        whole = field_names.scalars(self, field_names.WHOLE)
        layers = self.canonical().layers
        whole[f"{field_names.WHOLE}.n_layers"] = len(layers)
        known = dict[int, dict[str, float | str]]()
        for layer in layers:  # equal layers are one object, most of the time
            if id(layer) not in known:
                known[id(layer)] = field_names.by_unique_suffix(
                    whole | field_names.scalars(layer, field_names.LAYER)
                )
        return [known[id(layer)] for layer in layers]


def initialise(model: LayerStack, seed: int, device: torch.device | str = "cpu") -> None:
    """Draw all weights on a device from a generator of its own, in the order of their names.

    Only on the CPU are they the same on every machine.

    Normal with standard deviation sqrt(2 / (5 d_model)) (Nguyen and Salazar, arXiv 1910.05895:
    Xavier's for a d x 4d matrix; 0.02 at d_model 1000), divided by sqrt(model.n_residual_branches)
    where a weight writes into the residual stream (GPT-2). Each module tells its weights: see
    `matrices`. Norms start at 1 and biases at 0. A module with a method `start` draws its own
    parameters.
    """
    generator = torch.Generator(device).manual_seed(seed)
    std = math.sqrt(2 / (5 * model.d_model))
    into_stream = {id(weight) for _, part in model.parts() for weight in output_projections(part)}
    modules: list[Any] = list(model.modules())
    for module in modules:
        if hasattr(module, "start"):
            module.start(generator)
            continue
        for parameter in matrices(module):
            scale = math.sqrt(model.n_residual_branches) if id(parameter) in into_stream else 1.0
            drawn = torch.empty(parameter.shape, device=device)
            drawn.normal_(0.0, std / scale, generator=generator)
            parameter.data.copy_(drawn)


class Model(LayerStack):
    """A decoder-only language model: embedding, blocks, norm, head.

    `n_residual_branches` parts add to the residual stream: mixers, feed-forward layers and
    shortcuts. They are counted in the canonical architecture, so that all spellings get the same
    initial weights. A mixture with its shared experts counts as one.
    """

    matrices = ("embedding",)

    def __init__(
        self,
        stem: EmbeddingStem,
        blocks: list[Block],
        norm: nn.Module | None,
        head: Head,
        n_residual_branches: int,
    ) -> None:
        super().__init__()
        self.vocab_size = head.vocab_size
        self.d_model = stem.d_model
        self.n_residual_branches = n_residual_branches
        self.embedding = nn.Parameter(torch.empty(self.vocab_size, self.d_model))
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        for i, block in enumerate(blocks):
            if isinstance(block.mixer, LayerIndexed):
                block.mixer.set_layer_index(i, len(blocks))
        link_layers([block.mixer for block in blocks])
        self.norm = norm
        self.head = head

    def forward(
        self, tokens: Tensor, cache: Caches | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return the float32 logits (B, S, V) of the token after each of `tokens` (B, S), int64.

        With a cache, `tokens` continue those that it has seen. Computes in `dtype`, or in the dtype
        of the parameters.
        """
        logits: Tensor = self.head(self.hidden(tokens, cache, dtype), self.embedding)
        return logits

    def hidden(
        self, tokens: Tensor, cache: Caches | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return what the head reads, (B, S, D); see `forward`."""
        x = F.embedding(tokens, self.embedding).to(dtype or self.embedding.dtype)
        x = self.stem(x, 0 if cache is None else cache.length)
        inputs = LayerInputs(tokens, shared_kv=SharedKV(), pending_shortcuts=[])
        for i, block in enumerate(self.blocks):
            inputs.cache = None if cache is None else cache[i]
            x = block(x, inputs)
        if cache is not None:
            cache.length += tokens.shape[1]
        normed: Tensor = x if self.norm is None else self.norm(x)
        return normed

    def new_cache(self, batch: int, context: int) -> Caches:
        """Return an empty cache for each layer, for `batch` sequences of up to `context` tokens.

        A layer without a mixer, or that reads the keys of another, has none.
        """
        mixers: list[Any] = [block.mixer for block in self.blocks]
        return Caches(None if m is None else m.new_cache(batch, context) for m in mixers)

    def loss(self, tokens: Tensor, targets: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the mean cross entropy in nats a token, without auxiliary losses."""
        loss: Tensor = self.head.loss(self.hidden(tokens, None, dtype), self.embedding, targets)
        return loss

    def generate(self, tokens: Tensor, n: int, **options: Any) -> Tensor:
        """Return `tokens` (B, S) followed by up to `n` new tokens; the options are of `stream`."""
        return torch.cat((tokens, *self.stream(tokens, n, **options)), dim=1)

    def stream(
        self,
        tokens: Tensor,
        n: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[int] = (),
        seed: int | None = None,
    ) -> Iterator[Tensor]:
        """Yield up to `n` next tokens (B, 1) of `tokens` (B, S), each as soon as it is known.

        Temperature 0 takes the most likely token. Else a token is drawn from
        softmax(logits / temperature), with `top_p` from the nucleus alone. A sequence with a new
        token of `stop` repeats it; the stream ends when all have one. A `seed` repeats its draws.
        The model is in evaluation mode meanwhile, and in its own mode afterwards.

        Raises:
            ValueError: if there is no token to begin with, or an option is out of range.
        """
        if tokens.dim() != 2 or not tokens.numel():
            shape = tuple(tokens.shape)
            raise ValueError(f"tokens are (B, S) with B and S at least 1, not {shape}")
        if n < 0:
            raise ValueError(f"n is the number of new tokens, at least 0, not {n}")
        return self._stream(tokens, n, TokenSampler(tokens.device, temperature, top_p, seed), stop)

    @torch.no_grad()
    def _stream(
        self, tokens: Tensor, n: int, sampler: TokenSampler, stop: Sequence[int]
    ) -> Iterator[Tensor]:
        was_training = self.training
        self.eval()
        try:
            cache, new = self.new_cache(len(tokens), tokens.shape[1] + n), tokens
            ended = torch.zeros_like(tokens[:, :1], dtype=torch.bool)
            for _ in range(n):
                sampled = sampler.next_tokens(self(new, cache)[:, -1])
                new = torch.where(ended, new[:, -1:], sampled)
                yield new
                if stop:
                    ended = ended | torch.isin(new, torch.tensor(list(stop), device=new.device))
                    if bool(ended.all()):
                        return
        finally:
            self.train(was_training)
