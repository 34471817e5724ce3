"""Softmax attention: scores, softmax, weighted mean of the values, and attention masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moenas.model.layers.linear import on_cuda, size
from moenas.model.mixers.position_bias import distances


def masked(bias: Tensor, seen: Tensor | None) -> Tensor:
    """Return biases (H, S, L) with -inf at keys that `seen` (S, L) excludes; None excludes none."""
    return bias if seen is None else bias.masked_fill(~seen, -torch.inf)


class AttentionSpan(nn.Module):
    """The causal attention span: all earlier tokens, a sliding window, or the token's own chunk.

    `bias` is added to the scores by the distance of query and key.
    """

    def __init__(
        self,
        window: int | None = None,
        chunk: int | None = None,
        bias: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.window = window
        self.chunk = chunk
        self.bias = bias

    def first_seen(self, start: int) -> int:
        """Return the first position that the query at position `start` attends to."""
        if self.chunk is not None:
            return start // self.chunk * self.chunk
        return 0 if self.window is None else max(0, start - self.window + 1)

    def is_limited(self, start: int, length: int) -> bool:
        """Whether the spans of `length` queries from `start` on begin at different keys.

        While a pass is traced, a length can be open; then any limit counts.
        """
        if torch.compiler.is_compiling():
            return self.window is not None or self.chunk is not None
        return self.first_seen(start + length - 1) > self.first_seen(start)

    def seen(self, start: int, length: int, first: int, device: torch.device) -> Tensor:
        """Return the mask (S, L): which keys, from position `first` on, a query attends to."""
        query = torch.arange(start, start + length, device=device).unsqueeze(-1)
        key = torch.arange(first, start + length, device=device)
        seen = key <= query
        if self.window is not None:
            seen = seen & (key > query - self.window)
        if self.chunk is not None:
            seen = seen & (key >= query - query % self.chunk)
        return seen


SINK_WIDTH = 8
"""Elements that a sink adds to queries and keys: two hold its logit, the rest are 0 to align."""


def sink_flops(n_heads: int, widths: tuple[int, int], context: int) -> int:
    """Return what the key of a sink and its elements add to a pass over `context` tokens.

    `widths` are the widths of a key and of a value. A pass over one token has explicit products.
    """
    if context == 1:
        return 0
    width = sum(widths)
    added = SINK_WIDTH * (2 if widths[0] == widths[1] else 1)
    pairs = (context + 1) * (width + added) - context * width
    return 2 * n_heads * context * pairs


class SoftmaxAttention(nn.Module):
    """Scaled dot-product attention over the span of each token.

    Soft caps, and sinks at a single query, use explicit products. PyTorch's fused kernels compute
    the rest; a sink is one more key for them (see `with_sinks`).
    """

    matrices: tuple[str, ...] = ()

    def __init__(
        self,
        n_heads: int,
        scale: float,
        reach: nn.Module,
        softcap: float | None = None,
        sinks: bool = False,
        temperature: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.scale = scale
        self.reach = reach
        self.softcap = softcap
        self.temperature = temperature
        self.sinks = nn.Parameter(torch.zeros(n_heads)) if sinks else None

    @property
    def bias(self) -> Any:
        """The position bias, or None."""
        return self.reach.bias

    @property
    def bias_shared(self) -> bool | None:
        """Whether the bias uses the table of another layer; None without a bias."""
        return getattr(self.bias, "shared", None)

    @property
    def table(self) -> Tensor | None:
        """The table (buckets, H) of the bias, if this layer owns one."""
        return getattr(self.bias, "weight", None)

    @property
    def has_kernel(self) -> bool:
        """Whether a fused kernel has these scores; a causal one makes NaN of a scale of 0."""
        return self.softcap is None and self.scale != 0

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        start: int,
        table: Tensor | None = None,
        *,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """Return (B, H, S, C of v) for q (B, H, S, C), and k and v (B, K, L, C) from position 0 on.

        The queries stand at positions start, start + 1, ... K divides H. `table` (buckets, H) is
        the table of an earlier layer's bias, if this layer shares it. `chosen` are the keys that
        an indexer leaves to each query, (B, S, L) or (B, K, S, L); it has no position bias then.

        On CPUs a bfloat16 gradient is computed in float32, which is up to 3 times faster.
        """
        dtype = q.dtype
        # 1. Scale late queries, and choose the type of the products.
        if self.temperature is not None:
            q = self.temperature(q, start)
        if q.requires_grad and q.device.type == "cpu":
            q, k, v = q.float(), k.float(), v.float()
        # 2. Cut keys that no query attends to.
        reach: Any = self.reach
        first = reach.first_seen(start)
        if first:
            k, v = k[:, :, first:], v[:, :, first:]
        length = size(q.shape[2])  # a tensor while the model is traced
        single = length == 1 and not torch.compiler.is_compiling()  # a traced length is open
        # 3. The mask (S, L), or biases (H, S, L); none where the kernel's causal mask is enough.
        plain = chosen is None and self.has_kernel and self.sinks is None and self.bias is None
        causal = plain and not single and start == first and not reach.is_limited(start, length)
        mask = None if causal or single else reach.seen(start, length, first, q.device)
        if self.bias is not None:
            far = distances(start, length, first, q.device)
            mask = masked(self.bias(far, table), mask).to(q.dtype)
        if chosen is not None:
            chosen = self.by_head(chosen[..., first:])
            mask = chosen if mask is None else chosen & mask
        # 4. Explicit products, for what no fused kernel computes.
        if not self.has_kernel or (self.sinks is not None and single):
            return self.explicit_attention(q, k, v, mask).to(dtype)
        # 5. A fused kernel, with the sink as the first key.
        width = size(v.shape[-1])
        if self.sinks is not None and mask is not None:
            q, k, v = self.with_sinks(q, k, v, self.sinks)
            mask = F.pad(mask, (1, 0), value=self.bias is None)  # a bias of 0, or seen
        if on_cuda(q):
            # No kernel shares key-value heads whose keys and values differ in width.
            differs = size(k.shape[-1]) != width and size(k.shape[1]) < self.n_heads
            if single and differs:
                return self.explicit_attention(q, k, v, mask).to(dtype)
            return attended_on_cuda(q, k, v, mask, causal, self.scale)[..., :width].to(dtype)
        grouped = size(k.shape[1]) < self.n_heads
        y = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=self.scale, enable_gqa=grouped
        )
        return y[..., :width].to(dtype)

    def by_head(self, chosen: Tensor) -> Tensor:
        """Return (B, 1, S, L) for all heads, or (B, H, S, L) where each group has its own."""
        if chosen.dim() == 3:
            return chosen.unsqueeze(1)
        return chosen.repeat_interleave(self.n_heads // size(chosen.shape[1]), dim=1)

    @torch.no_grad()
    def group_weights(self, q: Tensor, k: Tensor, start: int, chosen: Tensor) -> Tensor:
        """Return the mean attention weights of the heads of each key-value head, (B, K, S, L).

        q and k are (B, H, S, C) and (B, K, L, C), `chosen` is (B, K, S, L). The part of sinks is
        left out, as in `mean_weights`.
        """
        if self.temperature is not None:
            q = self.temperature(q, start)
        groups = q.unflatten(1, (k.shape[1], -1))
        scores = (groups @ k.unsqueeze(2).transpose(-2, -1)).float() * self.scale
        if self.softcap is not None:
            scores = (scores / self.softcap).tanh() * self.softcap
        scores = scores.masked_fill(~chosen.unsqueeze(2), -torch.inf)
        if self.sinks is None:
            plain: Tensor = scores.softmax(dim=-1).mean(dim=2)
            return plain
        sinks = self.sinks.float().view(1, k.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1].mean(dim=2)
        shares: Tensor = weights / weights.sum(dim=-1, keepdim=True)
        return shares

    @torch.no_grad()
    def mean_weights(self, q: Tensor, k: Tensor, start: int, chosen: Tensor) -> Tensor:
        """Return the mean attention weights of the heads, (B, S, L), over the `chosen` keys.

        q and k are (B, H, S, C) and (B, H, L, C), `chosen` is (B, S, L). A sink takes a part of
        the weight of its head. The mean is divided by its sum over the keys then (DeepSeek-V3.2,
        arXiv 2512.02556, section 2.1.1: the sum of the heads is L1-normalized).
        """
        if self.temperature is not None:
            q = self.temperature(q, start)
        scores = (q @ k.transpose(-2, -1)).float() * self.scale
        scores = scores.masked_fill(~chosen.unsqueeze(1), -torch.inf)
        if self.sinks is None:
            return scores.softmax(dim=-1).mean(dim=1)
        sinks = self.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1].mean(dim=1)
        return weights / weights.sum(dim=-1, keepdim=True)

    def with_sinks(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add a first key whose score is the sink of each head, and whose value is 0.

        Each query gets sink / scale as two elements: its rounding to the dtype, and the remainder.
        The new key has ones there, the other keys zeros. Values as wide as the keys stay as wide.
        """
        logits = (sinks.float() / self.scale).unsqueeze(-1)
        near = logits.to(q.dtype)
        parts = torch.cat((near, (logits - near).to(q.dtype)), dim=-1)  # (H, 2)
        ends = F.pad(parts, (0, SINK_WIDTH - 2)).view(1, self.n_heads, 1, -1)
        one = F.pad(torch.zeros_like(k[:, :, :1]), (0, 2), value=1.0)
        keys = F.pad(one, (0, SINK_WIDTH - 2)), F.pad(k, (0, SINK_WIDTH))
        wider = SINK_WIDTH if v.shape[-1] == k.shape[-1] else 0
        q = torch.cat((q, ends.expand(q.shape[0], -1, q.shape[2], -1)), dim=-1)
        return q, torch.cat(keys, dim=2), F.pad(v, (0, wider, 1, 0))

    def explicit_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Return (B, H, S, C) by explicit products; each of K key-value heads has H / K queries.

        `mask` is a boolean mask (S, L), (B, 1, S, L) or (B, H, S, L), or with a position bias the
        biases (H, S, L).
        """
        # 1. Scores in float32, (B, K, H / K, S, L), with the soft cap.
        kv_heads = k.shape[1]
        q = q.unflatten(1, (kv_heads, -1))  # (B, K, H / K, S, C)
        scores = (q @ k.unsqueeze(2).transpose(-2, -1)).float() * self.scale
        if self.softcap is not None:
            scores = (scores / self.softcap).tanh() * self.softcap
        # 2. Mask, or add the position biases.
        if mask is not None and self.bias is None:
            if mask.dim() == 4:  # one mask for all heads, or one a head
                own = size(mask.shape[1]) > 1
                mask = mask.unflatten(1, (kv_heads, -1)) if own else mask.unsqueeze(2)
            scores = scores.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            scores = scores + mask.float().unflatten(0, (kv_heads, -1))
        # 3. Softmax, with the sink as one more score whose weight is dropped.
        if self.sinks is not None:
            sinks = self.sinks.float().view(1, kv_heads, -1, 1, 1)
            sinks = sinks.expand(*scores.shape[:-1], 1)
            weights = torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]
        else:
            weights = scores.softmax(dim=-1)
        return (weights.to(v.dtype) @ v.unsqueeze(2)).flatten(1, 2)


# --- on CUDA -----------------------------------------------------------------------------------

KERNEL_WIDTH = 8
"""The kernels take widths of keys and values that are multiples of this."""
FLASH_WIDTH = 256
"""Widest head of the flash kernel, which alone shares key-value heads (cuDNN is off)."""


def avoid_cudnn_attention() -> None:
    """Disable cuDNN attention in this process. A worker calls it once at its start.

    cuDNN plans each new shape, for about half a second by reports. A candidate has about six
    shapes. The summation order of its gradients is not fixed.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def attended_on_cuda(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Return attention by PyTorch's kernels, with gradients summed in a fixed order.

    The output is (B, H, S, C of v), padded with zeros to a multiple of KERNEL_WIDTH. With a mask,
    in float32, or with keys and values of different widths, no kernel shares key-value heads. They
    are repeated for each query head then, because explicit products would store every score.
    """
    # The kernels read a mask along its rows.
    mask = mask if mask is None else mask.contiguous()
    missing = [-x.shape[-1] % KERNEL_WIDTH for x in (q, k, v)]
    if any(missing):
        q, k, v = (F.pad(x, (0, n)) for x, n in zip((q, k, v), missing, strict=True))
    flash = mask is None and q.dtype in (torch.bfloat16, torch.float16)
    flash = flash and q.shape[-1] == v.shape[-1] <= FLASH_WIDTH
    shared = q.shape[1] // k.shape[1]
    if shared > 1 and not flash:
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    how = Kernel(causal, scale, enable_gqa=shared > 1 and flash)
    trained = any(x is not None and x.requires_grad for x in (q, k, v, mask))
    if torch.is_grad_enabled() and trained and how.exists(q, k, v, mask):
        y: Tensor = _Attended.apply(q, k, v, mask, how)  # type: ignore[no-untyped-call]
        return y
    return how.attend(q, k, v, mask)


class Kernel(NamedTuple):
    """The arguments of a call of PyTorch's attention."""

    causal: bool
    scale: float
    enable_gqa: bool

    def exists(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
        """Whether a fused kernel takes the inputs. Its gradients use atomic adds by default."""
        backend = torch.backends.cuda
        params = backend.SDPAParams(q, k, v, mask, 0.0, self.causal, self.enable_gqa)
        return backend.can_use_flash_attention(params) or backend.can_use_efficient_attention(
            params
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Return (B, H, S, C of v)."""
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=self.causal, scale=self.scale, enable_gqa=self.enable_gqa
        )


class _Attended(torch.autograd.Function):
    """Attention by PyTorch's kernels, with gradients summed in a fixed order.

    Without PyTorch's deterministic mode they use atomic adds, and some kernels have no other form.
    The mode is on for this operation alone, as PyTorch refuses some others of the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, how: Kernel) -> Tensor:
        own: list[Any] = [x if x is None else x.detach() for x in (q, k, v, mask)]
        wanted = ctx.needs_input_grad[:4]
        ctx.inputs = [x.requires_grad_() for x, needed in zip(own, wanted, strict=True) if needed]
        with torch.enable_grad(), _in_one_order():
            ctx.y = how.attend(*own)
        y: Tensor = ctx.y.detach()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with _in_one_order():
            grads = iter(torch.autograd.grad(ctx.y, ctx.inputs, grad))
        ctx.y = ctx.inputs = None  # as torch frees what a node has saved
        return *(next(grads) if needed else None for needed in ctx.needs_input_grad[:4]), None


@contextmanager
def _in_one_order() -> Iterator[None]:
    """Switch the deterministic mode of PyTorch on, without filling new memory."""
    switch: Any = torch.utils.deterministic
    mode, filled = torch.get_deterministic_debug_mode(), switch.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")
    switch.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        switch.fill_uninitialized_memory = filled
