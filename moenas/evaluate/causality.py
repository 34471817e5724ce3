"""The causality test: no logit depends on a later token or another sequence of the batch."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from moenas.model.architecture import Architecture, Model
from moenas.model.layers.linear import on_cuda
from moenas.model.mixers.scan import chunk_length
from moenas.model.moe.router import Router

# Shapes: B sequences of S tokens.

SEQUENCES = 3
"""Sequences of the tested batch. The text has three times as many."""
LENGTH = 256
"""Most tokens of a sequence, four chunks of a scan. A longer window or chunk raises the number."""
FLOAT32_TOLERANCE = 1e-5
"""Largest relative change of a logit in float32 that is not repeated in float64."""
FLOAT64_TOLERANCE = 1e-9
"""Largest relative change of a logit in float64 that rounding can explain."""
ROUNDING_LIMIT = 1e-2
"""Relative change of a logit in float32 that rounding cannot explain."""
SEED = 20_240
"""Seed of the noise, which is the same in every pass."""
OF_EVERY_MODULE = frozenset(vars(nn.Module()))

States = list[tuple[str, Tensor]]
"""Name and output of each component, in the order of execution, then the logits."""
Run = Callable[[Tensor], States]


@dataclass(frozen=True)
class Leak:
    """A logit that depends on a later token or on another sequence of its batch."""

    mode: Literal["training", "evaluation"]
    alone: bool
    """Whether the leak occurs in a single sequence, not in a batch alone."""
    position: int
    """The first token whose logits changed."""
    cut: int
    """The cut: tokens of the same sequence from this position on were replaced."""
    size: float
    """Largest change of a logit before the cut."""
    place: str
    """The first component whose output changed, as `blocks.1.mixer`; empty for the logits alone."""

    def __str__(self) -> str:
        layer = re.match(r"blocks\.(\d+)", self.place)
        where = f"layer {layer[1]} ({self.place})" if layer else "the model"
        what = f"the tokens from position {self.cut} on"
        if not self.alone:
            what += " and the other sequences of its batch"
        return (
            f"in {self.mode}, {where} looks ahead: the logits at position {self.position} change by"
            f" {self.size:.2g} with {what}"
        )


def allows_acausal(architecture: Architecture) -> bool:
    """Whether a router of an architecture has `allow_acausal`."""
    parts = (part for layer in architecture.layers for part in layer.parts.values())
    routers = (part.router for part in parts)
    return any(isinstance(r, Router) and r.allow_acausal and not r.causal for r in routers)


def mask_boundaries(architecture: Architecture) -> set[int]:
    """Return the lengths in tokens of windows, chunks, and what indexers leave whole."""
    parts = [part for layer in architecture.layers for part in layer.parts.values()]
    spans = {part.attention_span for part in parts if part.attention_span is not None}
    spans |= {x.top_k for x in (getattr(part, "indexer", None) for part in parts) if x}
    blocks = [x for x in (getattr(part, "block_indexer", None) for part in parts) if x]
    return spans | {length for x in blocks for length in (x.block, x.reach)}


def text_size(context: int, mask_boundaries: Collection[int] = ()) -> tuple[int, int]:
    """Return the number of sequences and their tokens that `find_leaks` needs.

    A sequence has at most the training context. It has at most LENGTH tokens, or twice the longest
    window or chunk and one more, if that is longer.
    """
    return 3 * SEQUENCES, min(context, max(LENGTH, 2 * max(mask_boundaries, default=0) + 1))


def find_leaks(model: Model, text: Tensor, mask_boundaries: Collection[int] = ()) -> list[Leak]:
    """Return the leaks of a model, at most one for each mode.

    `text` (9, S) is real text, S at least 2. The test runs in training and in evaluation mode, on
    one sequence and on a batch of 3. It replaces the tokens after a cut and all other sequences,
    for each cut in turn. Compared passes have the same shapes and draw the same noise. The state of
    the model and of the generators is restored.

    Cuts lie after the first and before the last token, and at two positions inside chunks. More
    cuts lie at the ends of the first two chunks of a scan and at each of `mask_boundaries`. An
    error by one position shows there. The test misses leaks that need more tokens or other texts,
    and changes below FLOAT32_TOLERANCE of the largest logit in float32.

    A suspected leak is repeated in float64, where rounding is 1e8 times smaller. In float32, other
    numbers of rows for the experts change the rounding, which can flip a near-tie of two experts.
    If a part cannot run in float64, three texts are tested in float32, and a leak must show in all.
    The same holds for a change above ROUNDING_LIMIT that float64 does not show, because float64
    does not use the kernel of the grouped products.
    """
    device = next(model.parameters()).device
    leaks = []
    cuda = [device] if device.type == "cuda" else []
    with _preserve_state(model), torch.random.fork_rng(devices=cuda):
        for training in (True, False):
            model.train(training)
            # Attention may use another kernel if gradients are needed.
            with torch.enable_grad() if training else torch.no_grad():
                leak = _first_leak(model, text.to(device), _cuts(text.shape[1], mask_boundaries))
            if leak is not None:
                leaks.append(leak)
    return leaks


def _cuts(length: int, mask_boundaries: Collection[int]) -> list[int]:
    """Return the positions of the cuts. Odd numbers lie inside chunks, which are even."""
    chunk = chunk_length(length)
    cuts = {1, length // 3 | 1, 2 * length // 3 | 1, length - 1, chunk, 2 * chunk, *mask_boundaries}
    return sorted(cut for cut in cuts if 0 < cut < length)


def _first_leak(model: Model, text: Tensor, cuts: list[int]) -> Leak | None:
    """Return the first leak in the present mode of the model."""
    # 1. A quick search in float32.
    tokens, others = _parts(text, model.vocab_size, 0)
    if not _suspect(model, tokens, others, cuts):
        return None
    # 2. The same search in float64, which excludes rounding.
    bound = ROUNDING_LIMIT
    try:
        leak = _exact_search(model, (tokens, others), cuts)
    except Exception:  # an operator of a user's part may refuse float64 with any exception
        leak, bound = None, FLOAT32_TOLERANCE
    if leak is not None:
        return leak
    # 3. Three texts in float32: a near-tie occurs in one text, a leak in all.
    again = (_parts(text, model.vocab_size, turn) for turn in range(3))
    leaks = [_search(model, _named_run(model), pair, cuts, bound) for pair in again]
    return leaks[0] if all(leaks) else None


def _suspect(model: Model, tokens: Tensor, others: Tensor, cuts: list[int]) -> bool:
    """Whether float32 shows a change above FLOAT32_TOLERANCE.

    On CUDA all cuts of a single sequence are tested in one batch. If the model draws noise, they
    are tested one by one, because each row of a batch would get other noise.
    """
    sizes: tuple[int, ...] = (1, SEQUENCES)
    if on_cuda(tokens):
        changed = _change_side_by_side(model, tokens[0], others[0], cuts)
        if changed:
            return True
        sizes = sizes if changed is None else (SEQUENCES,)
    pair = tokens, others
    return _search(model, _plain_run(model), pair, cuts, FLOAT32_TOLERANCE, sizes=sizes) is not None


def _change_side_by_side(
    model: Model, tokens: Tensor, others: Tensor, cuts: list[int]
) -> bool | None:
    """Whether a cut changes earlier logits, with a row for each cut; None if noise was drawn."""
    given = torch.stack([torch.cat((tokens[:cut], others[cut:])) for cut in cuts] + [tokens])
    device = given.device
    _seeded(device)
    before = _noise(device)
    logits = model(given, dtype=torch.float32).detach()
    if not all(map(torch.equal, before, _noise(device))):
        return None
    whole = logits[-1:].expand_as(logits)
    return any(_change(whole, logits, row, cut, FLOAT32_TOLERANCE) for row, cut in enumerate(cuts))


def _exact_search(model: Model, pair: tuple[Tensor, Tensor], cuts: list[int]) -> Leak | None:
    """Search in float64 on the device of the model, or on the CPU if memory runs out.

    The CPU takes up to 19 seconds for each mode, and a GPU far less.
    """
    try:
        return _search(model, _exact_run(model), pair, cuts, FLOAT64_TOLERANCE)
    except torch.OutOfMemoryError:
        cpu = torch.device("cpu")
        tokens, others = (part.to(cpu) for part in pair)
        return _search(model, _exact_run(model, cpu), (tokens, others), cuts, FLOAT64_TOLERANCE)


def _parts(text: Tensor, vocab_size: int, turn: int) -> tuple[Tensor, Tensor]:
    """Return tokens (3, S) of a text, and others (3, S) that differ at every position."""
    turned = text.roll(-turn * SEQUENCES, dims=0)
    tokens, others = turned[:SEQUENCES], turned[SEQUENCES : 2 * SEQUENCES]
    return tokens, torch.where(others == tokens, (others + 1) % vocab_size, others)


def _search(
    model: Model,
    run: Run,
    pair: tuple[Tensor, Tensor],
    cuts: list[int],
    bound: float,
    *,
    sizes: tuple[int, ...] = (1, SEQUENCES),
) -> Leak | None:
    """Search for a change above `bound`, cut by cut, in batches of the given sizes."""
    tokens, others = pair
    for sequences in sizes:
        kept, changed = tokens[:sequences], others[:sequences]
        before = run(kept)
        for i, cut in enumerate(cuts):
            row = i % sequences
            given = changed.clone()
            given[row, :cut] = kept[row, :cut]
            after = run(given)
            own = _change(before[-1][1], after[-1][1], row, cut, bound)
            if own is None:
                continue
            places = (
                name
                for (name, a), (_, b) in zip(before[:-1], after[:-1], strict=True)
                if _change(a, b, row, cut, bound)
            )
            mode: Any = "training" if model.training else "evaluation"
            return Leak(mode, sequences == 1, own[0], cut, own[1], next(places, ""))
    return None


@torch.no_grad()
def _change(
    before: Tensor, after: Tensor, row: int, cut: int, bound: float
) -> tuple[int, float] | None:
    """Return the first position before the cut that changed by more than `bound`, and the maximum.

    Values that were not finite before are ignored, because the loss finds them.
    """
    finite = before.isfinite()
    known = before.where(finite, torch.zeros_like(before))
    gap = (after - known).abs().nan_to_num(nan=torch.inf)[row, :cut]
    gap = gap.where(finite[row, :cut], torch.zeros_like(gap)).flatten(1).amax(dim=1)
    over = (gap > bound * known.abs().max()).nonzero()
    return (int(over[0]), float(gap.max())) if len(over) else None


# --- passes ------------------------------------------------------------------------------------


def _seeded(device: torch.device) -> None:
    """Seed the noise generators of the CPU and of the device of the model."""
    torch.default_generator.manual_seed(SEED)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(SEED)


def _noise(device: torch.device) -> list[Tensor]:
    """Return the states of the noise generators."""
    states = [torch.default_generator.get_state()]
    return states + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _plain_run(model: Model) -> Run:
    """Return a pass in float32 that records the logits alone."""

    def run(tokens: Tensor) -> States:
        _seeded(tokens.device)
        return [("", model(tokens, dtype=torch.float32).detach())]

    return run


def _named_run(model: Model) -> Run:
    """Return a pass in float32 that records the output of each component."""

    def run(tokens: Tensor) -> States:
        _seeded(tokens.device)
        with _capture_outputs(model, tokens) as states:
            logits = model(tokens, dtype=torch.float32)
        return [*states, ("", logits.detach())]

    return run


def _exact_run(model: Model, device: torch.device | None = None) -> Run:
    """Return a pass in float64 that records the output of each component, on a device."""
    device = device or model.embedding.device
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {
        name: tensor.detach().to(device, torch.float64 if tensor.is_floating_point() else None)
        for name, tensor in tensors.items()
    }

    def run(tokens: Tensor) -> States:
        _seeded(tokens.device)
        # A pass may change buffers in place.
        own = {name: tensor.clone() for name, tensor in state.items()}
        with _capture_outputs(model, tokens) as states, _InFloat64():
            logits = functional_call(model, own, (tokens,), {"dtype": torch.float64})
        return [*states, ("", logits.detach())]

    return run


class _InFloat64(TorchFunctionMode):
    """Computes casts to float32 and grouped matrix products in float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0].double()
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        if getattr(func, "__name__", "") in ("grouped_mm", "_grouped_mm"):
            return _grouped(args[0], args[1], kwargs["offs"])
        return func(*args, **kwargs)


def _grouped(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Return (N, F): rows (N, D) before each of `ends` (E,) times the matrix of (E, D, F)."""
    products = rows.new_zeros(len(rows), matrices.shape[-1])
    start = 0
    for matrix, end in zip(matrices, ends.tolist(), strict=True):
        products[start:end] = rows[start:end] @ matrix
        start = end
    return products


@contextmanager
def _capture_outputs(model: Model, tokens: Tensor) -> Iterator[States]:
    """Record the output of each layer and of each component of a layer, for every token."""
    states: States = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.shape[:2] == tokens.shape:
                states.append((name, output.detach()))

        return hook

    named = model.named_modules()
    parts = [(n, m) for n, m in named if re.fullmatch(r"blocks\.\d+(\.\w+)?", n)]
    handles = [module.register_forward_hook(note(name)) for name, module in parts]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _preserve_state(model: Model) -> Iterator[None]:
    """Restore the attributes, buffers and mode of every module at the end."""
    kept = []
    for module in model.modules():
        own = vars(module)
        buffers = {id(b): b for b in (*module._buffers.values(), *own.values()) if _ours(b)}
        tensors = [(b, b._version, b.detach().clone()) for b in buffers.values()]
        boxes = {
            name: (box, copy(box))
            for name, box in own.items()
            if isinstance(box, list | dict | set) and name not in OF_EVERY_MODULE
        }
        kept.append((module, dict(own), dict(module._buffers), tensors, boxes))
    try:
        yield
    finally:
        for module, own, named, tensors, boxes in kept:
            vars(module).clear()
            vars(module).update(own)
            module._buffers.clear()
            module._buffers.update(named)
            _restore(tensors, boxes)


def _ours(value: Any) -> bool:
    """Whether an attribute is a tensor that a forward pass can change, so no parameter."""
    return (
        isinstance(value, Tensor)
        and not isinstance(value, nn.Parameter)
        and not value.is_inference()
    )


@torch.no_grad()
def _restore(tensors: list[tuple[Tensor, int, Tensor]], boxes: dict[str, tuple[Any, Any]]) -> None:
    """Restore the contents of tensors and containers."""
    for tensor, version, before in tensors:
        if tensor._version != version:
            tensor.copy_(before)
    for box, before in boxes.values():
        if isinstance(box, list):
            box[:] = before
        else:
            box.clear()
            box.update(before)
