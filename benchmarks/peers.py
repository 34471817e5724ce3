"""The peer of the benchmarks: the same layers and models in transformers, with the same weights."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor, nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from moenas.evaluate.dtypes import has_bfloat16
from moenas.export.published_weights import published_weights
from moenas.huggingface.family_matching import family_config, layers_of_architecture
from moenas.model import MoE
from moenas.model.architecture import Architecture, Model

T = TypeVar("T")

CONTEXT = 32768
"""Positions of the configuration of a model, in tokens."""

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
"""Implementations of transformers that run on a CPU; the others need kernels for a GPU.
`batched_mm` copies the weights of an expert for every slot: 17 GB for 2048 tokens of 2 experts of 3
x 256 x 512."""


def machine() -> str:
    """Name the processor, the instructions that torch uses on it, and the libraries compared."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((x.split(": ")[1] for x in lines if x.startswith("model name")), "unknown")
    capability = torch.backends.cpu.get_cpu_capability()
    bfloat16 = "bfloat16" if has_bfloat16("cpu") else "bfloat16 emulated"
    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{name}, {capability}, {bfloat16}, {libraries}"


def timed(work: Callable[..., T], *given: Any) -> tuple[float, T]:
    """Return the seconds that a call takes, and its result.

    CPU time with one thread, else wall time.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    result = work(*given)
    return clock() - start, result


def block_of(moe: MoE, implementation: str, dtype: torch.dtype) -> Qwen3MoeSparseMoeBlock:
    """Return the layer of Qwen3-MoE with the weights of ours, in the type that it computes in.

    The weights of the experts are copies, because theirs lie the other way round.
    """
    experts: Any = moe.experts
    logits: Any = moe.router.logits
    config = transformers.Qwen3MoeConfig(
        hidden_size=experts.d_model,
        moe_intermediate_size=experts.width,
        num_experts=experts.n_experts,
        num_experts_per_tok=moe.router.top_k,
        norm_topk_prob=True,
        experts_implementation=implementation,
    )
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(config)
    block.gate.weight = logits.weight
    turned = (nn.Parameter(w.detach().mT.contiguous()) for w in (experts.up, experts.down))
    block.experts.gate_up_proj, block.experts.down_proj = turned
    return block if dtype == torch.float32 else copy.deepcopy(block).to(dtype)


def architecture(n_experts: int, top_k: int, d_expert: int) -> Architecture:
    """Return a model of the Qwen3-MoE family: 4 layers of width 256, a vocabulary of 4096."""
    attention = {"head_dim": 64, "n_heads": 4, "n_kv_heads": 2, "qk_norm": "head"}
    router = {"preset": "qwen3_moe", "top_k": top_k}
    ffn = {"kind": "moe", "n_experts": n_experts, "d_expert": d_expert, "router": router}
    block = {"repeat": 4, "mixer": {"kind": "attention", **attention}, "ffn": ffn}
    return Architecture.parse(
        {"vocab_size": 4096, "d_model": 256, "tie_embeddings": False, "blocks": [block]}
    )


def model_of(architecture: Architecture, ours: Model, implementation: str) -> Any:
    """Return the model of transformers with the function and the weights of ours.

    It has the configuration and the weights that `moenas export --format transformers` writes.
    """
    (_, moe), *_ = ours.moe_layers()
    plain = family_config(architecture, CONTEXT)
    config = transformers.AutoConfig.for_model(**plain, router_aux_loss_coef=moe.balance.aux_coef)
    layers = layers_of_architecture(architecture)
    family = plain["model_type"]
    weights = published_weights(family, layers.whole, layers.blocks, ours.state_dict())
    transformers.utils.logging.disable_progress_bar()
    return transformers.Qwen3MoeForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        attn_implementation="sdpa",
        experts_implementation=implementation,
    )


def agree(ours: Callable[[Tensor], Tensor], wanted: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Stop unless two functions give the same (B, S, ...) for `x`, up to the rounding of its type.

    A tenth of the tokens may differ: where the logits of a router nearly tie, rounding chooses.
    Their logits are rounded to the 8 bits of bfloat16, ours are not.
    """
    a, b = ours(x).detach().float(), wanted(x).detach().float()
    errors = (a - b).norm(dim=-1) / b.norm(dim=-1)
    error = float(errors.flatten().quantile(0.9))
    if not error < (2e-2 if x.dtype == torch.bfloat16 else 1e-4):
        raise SystemExit(f"the functions differ by {error:.1e}; there is nothing to compare")


def filled(module: nn.Module) -> nn.Module:
    """Give every weight a usual size."""
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.04)
    return module
