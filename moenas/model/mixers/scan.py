"""Recurrences over tokens, computed by chunks in float32, mostly as matrix products.

A scan keeps all intermediate tensors for its gradient. On CUDA it keeps its inputs alone, and the
backward pass recomputes the rest (see `recomputed`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moenas.model.layers.linear import on_cuda, size

# Shapes: B sequences, S tokens, H heads, G groups of heads, N chunks of Q tokens, P width of the
# values of a head, M width of its keys (its state is M x P).

CHUNK = 64
"""Most tokens in a chunk."""
CHANNEL_CHUNK = 16
"""The same if each channel has its own decay, with a factor for each token pair and channel."""


def chunk_length(length: int, longest: int = CHUNK) -> int:
    """Return the tokens of a chunk: the largest divisor of the length from longest / 2 to longest.

    Without such a divisor it is `longest`, and the last chunk is padded.
    """
    chunks = -(-length // longest)
    for n in range(chunks, 2 * chunks):
        if length % n == 0:
            return length // n
    return longest


def padded(length: int, longest: int = CHUNK) -> int:
    """Return the number of tokens after padding `length` to whole chunks."""
    chunk = chunk_length(length, longest)
    return -(-length // chunk) * chunk


def in_chunks(x: Tensor, chunk: int) -> Tensor:
    """Map (B, S, ...) to (B, N, Q, ...), padded with zeros."""
    missing = -size(x.shape[1]) % chunk
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    chunks: Tensor = x.unflatten(1, (-1, chunk))
    return chunks


def decays_between(steps: Tensor) -> Tensor:
    """Return (..., Q, Q): exp(sum of steps j + 1 to i) for i >= j, else 0; steps (..., Q) <= 0."""
    sums = steps.cumsum(dim=-1)
    between = sums.unsqueeze(-1) - sums.unsqueeze(-2)
    later = torch.ones_like(between, dtype=torch.bool).triu(1)
    return between.masked_fill(later, -torch.inf).exp()


def recomputed(scan: Callable[..., tuple[Tensor, Tensor]], *given: object) -> tuple[Tensor, Tensor]:
    """Return the result of a scan, of which the inputs alone are kept for the gradient."""
    if not torch.is_grad_enabled():
        return scan(*given)
    y, state = checkpoint(scan, *given, use_reentrant=False, preserve_rng_state=False)
    return y, state


def scan_heads(
    x: Tensor, steps: Tensor, b: Tensor, c: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return y (B, S, H, P) and the last state of h_t = exp(steps_t) h_(t-1) + b_t x_t, y = c h.

    `x` (B, S, H, P), `steps` (B, S, H), `b` and `c` (B, S, G, M), each for H / G heads. The state
    is (B, G, H / G, M, P). The state space dual (arXiv 2405.21060, listing 1): attention without
    softmax inside a chunk, and one state carried from chunk to chunk.
    """
    if on_cuda(x):
        return recomputed(heads_by_chunks, x, steps, b, c, state)
    return heads_by_chunks(x, steps, b, c, state)


def heads_by_chunks(
    x: Tensor, steps: Tensor, b: Tensor, c: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute `scan_heads` by listing 1 of arXiv 2405.21060; `decays_between` is its segsum."""
    batch, length, heads, width = map(int, x.shape)  # tensors while the model is traced
    groups = size(b.shape[2])
    chunk = chunk_length(length)
    # 1. Chunks of Q tokens; a dot stands for the H / G heads of a group.
    x = in_chunks(x, chunk).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2, 5)  # B N G . Q P
    steps = in_chunks(steps, chunk).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2)  # B N G . Q
    b, c = (in_chunks(m, chunk).transpose(2, 3).unsqueeze(3) for m in (b, c))  # B N G 1 Q M
    # 2. Inside a chunk, without its first state: y_i = sum over j <= i of
    #    (c_i . b_j) exp(steps j + 1 to i) x_j, which is masked attention without softmax.
    inside = (c @ b.transpose(-2, -1)) * decays_between(steps) @ x  # B N G . Q P
    # 3. What the tokens of a chunk add to the state at its end, and how much of the state before
    #    the chunk is left there.
    sums = steps.cumsum(dim=-1)
    to_end = (sums[..., -1:] - sums).exp().unsqueeze(-1)
    added = b.transpose(-2, -1) @ (x * to_end)  # B N G . M P
    carry = sums[..., -1].exp()[..., None, None]  # B N G . 1 1
    # 4. The state before each chunk, (B, G, H / G, M, P): N steps one after another.
    if state is None:
        state = torch.zeros_like(added[:, 0])
    before = []
    for kept, new in zip(carry.unbind(1), added.unbind(1), strict=True):
        before.append(state)
        state = state * kept + new
    # 5. What the tokens of a chunk read of the state before it.
    across = c @ torch.stack(before, dim=1) * sums.exp().unsqueeze(-1)
    y = (inside + across).permute(0, 1, 4, 2, 3, 5).reshape(batch, -1, heads, width)
    return y[:, :length], state


def scan_macs(heads: int, groups: int, state: int, width: int, length: int) -> int:
    """Return the multiply-adds of `scan_heads` over a sequence, full squares inside a chunk."""
    chunk = chunk_length(length)
    a_token = groups * chunk * state + heads * (chunk * width + 2 * state * width)
    return padded(length) * a_token


def read_channels(
    x: Tensor, rates: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return y (B, S, C), the states of `scan_channels` times `c` (B, S, M), and the last state."""
    if on_cuda(x):
        return recomputed(channels_by_chunks, x, rates, dt, b, c, state)
    return channels_by_chunks(x, rates, dt, b, c, state)


def channels_by_chunks(
    x: Tensor, rates: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute `read_channels` by chunks."""
    states, state = scan_channels(x, rates, dt, b, state)
    return (states @ c.unsqueeze(-1)).squeeze(-1), state


def scan_channels(
    x: Tensor, rates: Tensor, dt: Tensor, b: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return all states (B, S, C, M) of h_t = exp(dt_t rates) h_(t-1) + dt_t x_t b_t, and the last.

    `x` and `dt` (B, S, C), `rates` (C, M) < 0, `b` (B, S, M). The selective scan (arXiv
    2312.00752, section 3.3) has a decay for each channel and state, so it is no matrix product. All
    chunks go through their tokens at once, then each adds the state of the one before it: about
    2 sqrt(S) steps.
    """
    length = size(x.shape[1])
    # 1. Chunks of about sqrt(S) tokens, for the fewest steps of both loops together.
    chunk = max(1, round(length**0.5))
    # 2. Discretise: A_t = exp(dt_t rates) and the input dt_t x_t b_t (eq. 4), both B N Q C M.
    dt = in_chunks(dt, chunk)
    decays = (dt.unsqueeze(-1) * rates).exp()
    inputs = (dt * in_chunks(x, chunk)).unsqueeze(-1) * in_chunks(b, chunk).unsqueeze(3)
    # 3. Inside all chunks at once: the states from a state of 0, and the product of the decays
    #    since the chunk began. `unbind`, as the gradient of an index is a whole tensor of zeros.
    own, through = [inputs[:, :, 0]], [decays[:, :, 0]]
    for decay, new in zip(decays.unbind(2)[1:], inputs.unbind(2)[1:], strict=True):
        own.append(own[-1] * decay + new)
        through.append(through[-1] * decay)
    states, reached = torch.stack(own, dim=2), torch.stack(through, dim=2)  # B N Q C M
    # 4. The state before each chunk, (B, C, M): N steps one after another.
    if state is None:
        state = torch.zeros_like(own[0][:, 0])
    before = []
    for kept, new in zip(through[-1].unbind(1), own[-1].unbind(1), strict=True):
        before.append(state)
        state = new + kept * state
    # 5. Add the decayed state from before the chunk.
    states = states + reached * torch.stack(before, dim=1).unsqueeze(2)
    return states.flatten(1, 2)[:, :length], state


def delta_rule(
    qkv: tuple[Tensor, Tensor, Tensor], steps: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return y (B, S, H, P) and the last state (B, H, M, P) of the gated delta rule.

    S_t = (I - beta_t k_t k_t^T) exp(steps_t) S_(t-1) + beta_t k_t v_t^T and y_t = S_t^T q_t, with
    `qkv` (B, S, H, M), (B, S, H, M) and (B, S, H, P) and `beta` (B, S, H). The `steps` are
    (B, S, H), or (B, S, H, M) with a decay for each row of the state (Kimi delta attention,
    arXiv 2510.26692). Chunked by the WY form (arXiv 2412.06464, section 3.3): a triangular system
    for each chunk gives what its tokens write, then one state is carried from chunk to chunk.
    """
    if on_cuda(beta):
        return recomputed(rule_by_chunks, qkv, steps, beta, state)
    return rule_by_chunks(qkv, steps, beta, state)


def rule_by_chunks(
    qkv: tuple[Tensor, Tensor, Tensor], steps: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute `delta_rule` by chunks.

    Of a chunk with the state S before it, and the decay d_ij of steps j + 1 to i, token i writes
    u_i = beta_i (v_i - S^T d_i k_i - sum over j < i of (k_i . d_ij k_j) u_j). This is a
    unit lower triangular system for the u of all its tokens, linear in S.
    """
    length, by_channel = size(beta.shape[1]), steps.dim() == 4
    chunk = chunk_length(length, CHANNEL_CHUNK if by_channel else CHUNK)
    # 1. Chunks of Q tokens; the decays between two tokens, and those since the chunk began.
    q, k, v = (in_chunks(x, chunk).transpose(2, 3) for x in qkv)  # B N H Q .
    steps, beta = (in_chunks(x, chunk).transpose(2, 3) for x in (steps, beta))  # B N H Q [M]
    steps = steps.transpose(-2, -1) if by_channel else steps.unsqueeze(-2)
    decays = decays_between(steps).permute(0, 1, 2, 4, 5, 3)  # B N H Q Q M, or 1 for M
    since = steps.cumsum(dim=-1).exp().transpose(-2, -1)  # B N H Q M, or 1 for M
    # 2. Solve the system for both parts of u = values - reads S: without a state, and by state.
    keys = k * beta.unsqueeze(-1)
    system = products(keys, k, decays).tril(-1)
    wanted = torch.cat((v * beta.unsqueeze(-1), keys * since), dim=-1)
    solved = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    values, reads = solved.split((v.shape[-1], k.shape[-1]), dim=-1)
    # 3. Scores of the queries (Q, Q), and the keys as they decay to the end of the chunk (M, Q).
    scores = products(q, k, decays)
    to_end = (k * decays[..., -1, :, :]).transpose(-2, -1)
    if state is None:
        state = k.new_zeros(k.shape[0], k.shape[2], k.shape[-1], v.shape[-1])
    # 4. Chunk by chunk, two products each: `reader` multiplies the state, (2 Q, M) by (M, P), and
    #    `taker` multiplies what the tokens write, (Q + M, Q) by (Q, P).
    readers = torch.cat((reads, q * since), dim=-2).unbind(1)
    takers = torch.cat((scores, to_end), dim=-2).unbind(1)
    carry = since[..., -1:, :].transpose(-2, -1).unbind(1)
    sizes, outputs = (chunk, k.shape[-1]), []
    for reader, taker, kept, value in zip(readers, takers, carry, values.unbind(1), strict=True):
        expected, seen = (reader @ state).chunk(2, dim=-2)
        now, added = (taker @ (value - expected)).split(sizes, dim=-2)
        outputs.append(seen + now)
        state = state * kept + added
    y = torch.stack(outputs, dim=1).transpose(2, 3).flatten(1, 2)
    return y[:, :length], state


def products(a: Tensor, b: Tensor, decays: Tensor) -> Tensor:
    """Return (..., Q, Q), the sums over M of a_i b_j decays_ij.

    `a` and `b` (..., Q, M), `decays` (..., Q, Q, M), or 1 for M.
    """
    if decays.shape[-1] == 1:
        return (a @ b.transpose(-2, -1)) * decays.squeeze(-1)
    return ((decays * b.unsqueeze(-3)) @ a.unsqueeze(-1)).squeeze(-1)


def delta_macs(heads: int, key: int, value: int, length: int, longest: int = CHUNK) -> int:
    """Return the multiply-adds of `delta_rule` over a sequence, full squares inside a chunk.

    The triangular system counts as the product of its full square with its right sides.
    """
    chunk = chunk_length(length, longest)
    a_token = chunk * (3 * key + 2 * value) + 3 * key * value
    return padded(length, longest) * heads * a_token
