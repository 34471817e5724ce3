"""Two feed-forward layers side by side, ordered or written as one."""

from __future__ import annotations

import json
from typing import Any

from moenas.grammar.component import changed
from moenas.model.feedforward.dense import FFN, DenseFFN
from moenas.model.moe.experts import MoEFFN


def merge_order(ffn: FFN) -> tuple[bool, str]:
    """Return what two feed-forward layers side by side are ordered by: a mixture comes first."""
    return ffn.kind != "moe", json.dumps(ffn.plain(), sort_keys=True)


def merge_ffns(ffn: FFN, beside: FFN) -> FFN | None:
    """Return the one layer that is the sum of two canonical ones of the same input, or None.

    A network without biases beside another is a wider one, and beside a mixture it is a shared
    expert. The one has the weights of the two, laid end to end.
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
    return ffn.activation, ffn.gate_limit, ffn.gate_alpha, ffn.up_shift, ffn.activated_limit
