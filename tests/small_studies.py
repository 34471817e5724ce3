"""Small studies that train real mixtures of experts, for what is written of a trained trial."""

from __future__ import annotations

from moenas.space.space import Space

MIXTURES = """
name: mixtures
architecture:
  vocab_size: 256
  d_model: {choice: [16, 24]}
  blocks:
    - mixer: {kind: attention, head_dim: 8}
      ffn: {kind: moe, n_experts: 4, d_expert: 16, router: {top_k: {choice: [1, 2]}}}
objectives: [val_loss, flops_per_token]
train: {tokens: 2048, context: 16, batch: 4, val_tokens: 256}
search: {trials: 2, seed: 3, sampler: random}
"""


def moe_study(more: str = "") -> Space:
    """A space of 4 points; the text of `corpus.txt` in the working folder trains them."""
    return Space.parse(MIXTURES + "data: {files: [corpus.txt]}\n" + more, "mixtures.yaml")
