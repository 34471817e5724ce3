"""Forward FLOPs of a model: fvcore traces one pass, with a handler for each operator."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from moenas.errors import CandidateError
from moenas.failures import error_line
from moenas.model.architecture import Architecture

with warnings.catch_warnings():
    # fvcore compiles unrelated detection losses with torch.jit.script when it is imported.
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=DeprecationWarning)
    from fvcore.nn import FlopCountAnalysis

Handler = Callable[[list[Any], list[Any]], int]


@dataclass(frozen=True)
class Flops:
    """What one forward pass costs."""

    per_token: int
    """Two for each multiply-add of every matrix product, divided by the tokens of the pass and
    rounded up."""
    macs: int
    """Multiply-adds of the whole pass; this is what fvcore calls flops."""
    by_operator: dict[str, int]
    """Operator -> multiply-adds of the whole pass."""


def _shape(value: Any) -> list[int]:
    """Return the shape of a tensor in a trace."""
    sizes: list[int] = value.type().sizes()
    return sizes


def _product(left: int) -> Handler:
    """Count a matrix product whose left operand is input number `left`.

    Each element of the result sums over the last axis of the left operand.
    """

    def count(inputs: list[Any], outputs: list[Any]) -> int:
        return prod(_shape(outputs[0])) * _shape(inputs[left])[-1]

    return count


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """Count scaled_dot_product_attention: QK^T and PV over the full square, mask or not.

    Query (B, H, S, Dqk), key (B, Hkv, L, Dqk), value (B, Hkv, L, Dv); keys and values that groups
    of heads share are used once for each head.
    """
    query, key, value = (_shape(v) for v in inputs[:3])
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _einsum(inputs: list[Any], outputs: list[Any]) -> int:
    """Count an einsum of two operands: the product of the sizes of all its letters."""
    terms = inputs[0].toIValue().replace(" ", "").split("->")[0].split(",")
    shapes = [_shape(v) for v in inputs[1].node().inputs()]
    if len(terms) != 2 or "..." in "".join(terms):
        raise CandidateError(
            f"flops_per_token: einsum '{','.join(terms)}' is not counted; write it with matmul"
        )
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        sizes.update(zip(term, shape, strict=True))
    return prod(sizes.values())


HANDLERS: dict[str, Handler] = {
    "aten::linear": _product(0),
    "aten::matmul": _product(0),
    "aten::mm": _product(0),
    "aten::bmm": _product(0),
    "aten::mv": _product(0),
    "aten::dot": lambda inputs, outputs: _shape(inputs[0])[-1],
    "aten::addmm": _product(1),
    "aten::baddbmm": _product(1),
    "aten::einsum": _einsum,
    # Rows sorted by group (T, K), one matrix for each group (E, K, N): every row meets one matrix.
    "aten::_grouped_mm": _product(0),
    "aten::scaled_dot_product_attention": _attention,
    # The full square of the system (Q, Q) with its right sides (Q, N), zeros and all.
    "aten::linalg_solve_triangular": _product(0),
}
"""Operators with matrix products -> multiply-adds. They replace fvcore's own handlers, which round
an einsum and miss broadcast batch axes of a matmul."""

_NO_PRODUCTS = """
    layer_norm rms_norm linalg_vector_norm softmax log_softmax logsumexp cumsum sum mean amax amin
    silu gelu sigmoid tanh exp log sqrt rsqrt softplus sin cos neg abs sign pow square
    add sub rsub mul div minimum maximum outer clamp_min clamp_max
    __rshift__ __xor__ __or__ ne lt le gt ge logical_and logical_or logical_not where
    isfinite
    topk sort argsort argmax bincount one_hot searchsorted repeat_interleave
    embedding index_select index_add scatter scatter_add scatter_reduce tril triu
    pad unflatten numpy_T view_as expand_as repeat numel
    detach clone lift_fresh empty_like ones_like
"""
NO_PRODUCTS = frozenset(f"aten::{name}" for name in _NO_PRODUCTS.split())
"""Operators without a matrix product that fvcore's own list lacks: norms, activations, reductions,
arithmetic by element, choosing and moving rows. They count as nothing, by the convention of
`Cost.flops_per_token`. An operator in no list is an error."""


class _Lower(nn.Module):
    """The model computing in bfloat16: `_grouped_mm` has no shapes for float32 on meta."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of `tokens`."""
        logits: Tensor = self.model(tokens, dtype=torch.bfloat16)
        return logits


SMALL_PARAMS = 2**24
"""Parameters up to which a model is built on the CPU to be counted: 64 MiB in float32."""
SMALL_PASS = 2 * 10**9
"""Operations up to which a pass is computed to be counted: less than 0.1 s of one core."""


def count_forward(architecture: Architecture, context: int) -> Flops:
    """Count one pass over `context` tokens.

    A small model computes the pass on the CPU; a larger one is counted on the meta device. PyTorch
    imports its compiler for meta kernels, which takes over 1 s of each process; the pass of a small
    model takes 0.1 s.

    Raises:
        CandidateError: naming the operators that are not known, or what has no shapes on meta.
    """
    params = architecture.cost(context).params
    if params > SMALL_PARAMS or architecture.pass_flops(context) > SMALL_PASS:
        return count_outline(architecture, context)
    return count_flops(architecture.build(), torch.zeros(1, context, dtype=torch.int64))


def require_closed_form(counted: Flops, architecture: Architecture, context: int) -> None:
    """Require that a count equals the closed form of the architecture's cost.

    Raises:
        CandidateError: if it differs.
    """
    foreseen = architecture.pass_flops(context)
    if 2 * counted.macs != foreseen:
        raise CandidateError(
            f"flops_per_token: fvcore counts {2 * counted.macs} operations in a pass of"
            f" {context} tokens, the closed form says {foreseen}; `cost` or `surplus_flops` of"
            " one of the parts is wrong"
        )


def count_outline(architecture: Architecture, context: int) -> Flops:
    """Count one pass over `context` tokens on the meta device: no weight is allocated.

    Raises:
        CandidateError: naming the operators that are not known, or what has no shapes on meta.
    """
    model = architecture.outline()
    tokens = torch.zeros(1, context, dtype=torch.int64, device="meta")
    try:
        return count_flops(_Lower(model), tokens)
    except (NotImplementedError, RuntimeError) as error:
        raise CandidateError(
            "flops_per_token: a part needs the values of tensors, which are counted by their shapes"
            f" alone: {error_line(error)}; let its shapes follow from the shapes of its input"
        ) from error


def count_flops(model: nn.Module, tokens: Tensor) -> Flops:
    """Count one forward pass over `tokens` (B, S), traced on the model's own device.

    The count is of one pass with an empty cache. An operator that is neither in HANDLERS nor in
    NO_PRODUCTS stops the count, so nothing is left out in silence.

    Raises:
        CandidateError: naming the operators that are not known.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            analysis = FlopCountAnalysis(model, tokens)
            analysis.clear_op_handles()
            analysis.set_op_handle(**HANDLERS)
            analysis.set_op_handle(**dict.fromkeys(NO_PRODUCTS))
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            by_operator = {str(k): int(v) for k, v in analysis.by_operator().items() if v}
            unknown = sorted(analysis.unsupported_ops())
    finally:
        model.train(was_training)
    if unknown:
        raise CandidateError(
            f"flops_per_token: no rule for {', '.join(unknown)}; add it to HANDLERS or NO_PRODUCTS"
            " of moenas/evaluate/flops.py"
        )
    macs = sum(by_operator.values())
    return Flops(-(-2 * macs // tokens.numel()), macs, by_operator)
