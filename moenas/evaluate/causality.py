"""The gate of causality: no logit depends on a later token, or on another sequence of its batch."""

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
"""Sequences of the tested batch; a text holds three times as many."""
LENGTH = 256
"""Tokens of each, at most, unless a window or chunk is longer: four whole chunks of a scan."""
TIGHT = 1e-5
"""Largest relative change of a logit in float32 that is not repeated in float64."""
EXACT = 1e-9
"""Largest relative change of a logit in float64 that rounding can explain."""
GROSS = 1e-2
"""Relative change of a logit in float32 that rounding cannot explain."""
SEED = 20_240
"""Seed of the noise, which is the same in every pass."""
OF_EVERY_MODULE = frozenset(vars(nn.Module()))

States = list[tuple[str, Tensor]]
"""Outputs of the components in the order in which they ended, then the logits."""
Run = Callable[[Tensor], States]


@dataclass(frozen=True)
class Leak:
    """A logit that depends on a later token or on another sequence of its batch."""

    mode: Literal["training", "evaluation"]
    alone: bool
    """Whether it occurs in a sequence alone; else only in a batch."""
    position: int
    """The first token whose logits changed."""
    cut: int
    """The cut: tokens of its own sequence from here on were replaced."""
    size: float
    """Largest change of a logit there or behind, up to the cut."""
    place: str
    """The first component whose output changed, as `blocks.1.mixer`; empty: only the logits."""

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
    """Return the windows and chunks of an architecture in tokens: behind them masks change."""
    parts = (part for layer in architecture.layers for part in layer.parts.values())
    return {part.attention_span for part in parts if part.attention_span is not None}


def text_size(context: int, mask_boundaries: Collection[int] = ()) -> tuple[int, int]:
    """Return the numbers of sequences and of tokens that `find_leaks` needs of a text.

    All of the training context up to LENGTH, or up to twice the longest period and a token more: a
    whole period lies before the last one that begins.
    """
    return 3 * SEQUENCES, min(context, max(LENGTH, 2 * max(mask_boundaries, default=0) + 1))


def find_leaks(model: Model, text: Tensor, mask_boundaries: Collection[int] = ()) -> list[Leak]:
    """Return what makes a logit depend on a later token or another sequence, one a mode at most.

    `text` (9, S) is real text, S at least 2. In training and in evaluation mode, of one sequence
    alone and of a batch of 3, tokens behind a cut and all other sequences are replaced, several
    cuts one after another; passes that are compared have one shape and draw the same noise. The
    model and the generators are left exactly as they were.

    Cuts lie at the first and the last token, at two within chunks of scans and attention, and at
    the ends of the first two chunks of a scan and of each of `mask_boundaries`: off by one shows
    only there. What needs more tokens than `text` has is not seen, nor what only another content of
    the text calls up, nor a change below TIGHT of the largest logit in float32.

    Rounding is told from a leak in float64, where it is a hundred million times smaller: float32
    rounds otherwise where experts get other numbers of rows, and a tie between two experts may
    then fall otherwise. A part that cannot compute in float64 is judged in float32 by three texts:
    a tie so close is an accident of one text, and a leak is in all of them. So is a change by
    over a hundredth that float64 does not show, for there grouped products are not the kernel's.
    """
    device = next(model.parameters()).device
    leaks = []
    cuda = [device] if device.type == "cuda" else []
    with _preserve_state(model), torch.random.fork_rng(devices=cuda):
        for training in (True, False):
            model.train(training)
            # Attention may take another way where gradients are wanted.
            with torch.enable_grad() if training else torch.no_grad():
                leak = _first_leak(model, text.to(device), _cuts(text.shape[1], mask_boundaries))
            if leak is not None:
                leaks.append(leak)
    return leaks


def _cuts(length: int, mask_boundaries: Collection[int]) -> list[int]:
    """Return where sequences are cut; odd numbers lie within chunks, which are even."""
    chunk = chunk_length(length)
    cuts = {1, length // 3 | 1, 2 * length // 3 | 1, length - 1, chunk, 2 * chunk, *mask_boundaries}
    return sorted(cut for cut in cuts if 0 < cut < length)


def _first_leak(model: Model, text: Tensor, cuts: list[int]) -> Leak | None:
    """Return the first leak in the mode that the model is in."""
    tokens, others = _parts(text, model.vocab_size, 0)
    if not _suspect(model, tokens, others, cuts):
        return None
    bound = GROSS
    try:
        leak = _exact_search(model, (tokens, others), cuts)
    except Exception:  # whatever a user's operator raises in a type it was not written for
        leak, bound = None, TIGHT
    if leak is not None:
        return leak
    again = (_parts(text, model.vocab_size, turn) for turn in range(3))
    leaks = [_search(model, _named_run(model), pair, cuts, bound) for pair in again]
    return leaks[0] if all(leaks) else None


def _suspect(model: Model, tokens: Tensor, others: Tensor, cuts: list[int]) -> bool:
    """Whether float32 shows a change over TIGHT.

    On CUDA the cuts of a sequence alone are tried side by side in one batch, and one by one only
    where noise is drawn: of that each row would get another.
    """
    sizes: tuple[int, ...] = (1, SEQUENCES)
    if on_cuda(tokens):
        changed = _change_side_by_side(model, tokens[0], others[0], cuts)
        if changed:
            return True
        sizes = sizes if changed is None else (SEQUENCES,)
    pair = tokens, others
    return _search(model, _plain_run(model), pair, cuts, TIGHT, sizes=sizes) is not None


def _change_side_by_side(
    model: Model, tokens: Tensor, others: Tensor, cuts: list[int]
) -> bool | None:
    """Whether a cut changes what is before it, one row a cut (S,); None if noise was drawn."""
    given = torch.stack([torch.cat((tokens[:cut], others[cut:])) for cut in cuts] + [tokens])
    device = given.device
    _seeded(device)
    before = _noise(device)
    logits = model(given, dtype=torch.float32).detach()
    if not all(map(torch.equal, before, _noise(device))):
        return None
    whole = logits[-1:].expand_as(logits)
    return any(_change(whole, logits, row, cut, TIGHT) for row, cut in enumerate(cuts))


def _exact_search(model: Model, pair: tuple[Tensor, Tensor], cuts: list[int]) -> Leak | None:
    """Look in float64 on the device of the model, or on the CPU where that has too little memory.

    A GPU for computing is quicker by far; the CPU took up to 19 seconds a mode.
    """
    try:
        return _search(model, _exact_run(model), pair, cuts, EXACT)
    except torch.OutOfMemoryError:
        cpu = torch.device("cpu")
        tokens, others = (part.to(cpu) for part in pair)
        return _search(model, _exact_run(model, cpu), (tokens, others), cuts, EXACT)


def _parts(text: Tensor, vocab_size: int, turn: int) -> tuple[Tensor, Tensor]:
    """Return (3, S) tokens of a text and (3, S) others, which differ everywhere."""
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
    """Look for a change over `bound`, of a sequence alone and in the batch, cut by cut."""
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
    """Return the first position before the cut that changed by over `bound`, and the most change.

    What was not finite before is left out: that is for the loss to find.
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
    """Computes in float64 what is written for float32: casts, and grouped matrix products."""

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
    """Return rows (N, D) times matrices (E, D, F), rows up to the next of `ends` (E,) with one."""
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
    """Leave every module with the attributes, buffers and mode that it had."""
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
    """Whether an attribute is a tensor that a pass could change; parameters are for training."""
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
