"""Print docs/zoo.md: the counts of the models in spaces/zoo, and what checks them.

    python benchmarks/zoo.py > docs/zoo.md

Counted by arithmetic from the files. Their comments give the name, the source and the published
numbers.
"""

from __future__ import annotations

import re
from pathlib import Path

from moenas.grammar.sampling import RandomSuggest
from moenas.space.space import Space

ROOT = Path(__file__).parents[1]
CHECKS = {
    "logits": (
        "tests/parity/families.py",
        "tests/parity/variants.py",
        "tests/parity/others.py",
    ),
    "counts": ("tests/parity/test_counts.py",),
}
"""What a test compares with transformers -> the files that name the models it is done for."""
PAGE = """\
# The zoo

Published models as spaces of one point, in `spaces/zoo/`: `moenas check zoo/mixtral_8x7b` counts
one without building it, and a copy with a hole in it is a search around that model.
`moenas init my.yaml --from zoo/olmoe_1b_7b` writes that copy. `--from config.json` writes the
architecture of a Hugging Face model. `--shrink d_model=128` makes either smaller at constant
proportions.

Of the active parameters all are counted that one token passes through, of an input embedding with
a table of its own one row. FLOPs are for a token of the forward pass at a context of 4,096, two for
each multiply-add; `moenas check` counts at `train.context`, 128 if the file says nothing, and
`moenas check zoo/mixtral_8x7b train.context=4096 train.tokens=1e6` at the context of the table.
Published figures are rounded, and often leave out embeddings.

| file | source | parameters | active | GFLOP/token | published | same as in transformers |
| --- | --- | ---: | ---: | ---: | --- | --- |
{rows}

- counts: the exact numbers of parameters, all and active, of the whole model as transformers 5.23.0
  defines it (`make test-slow`, tests/parity/test_counts.py). Of Switch the decoder counts, without
  cross-attention. LongCat-Flash counts without weights that nothing reads. For DeepSeekMoE it is
  GLM's definition with the sizes of DeepSeekMoE; transformers has the model itself as
  `DeepseekOcr2TextModel`, with as many parameters. Arctic, GLaM, Grok-1, GShard, Hunyuan-Large,
  Ling-mini, Pangu Pro MoE, SmallThinker and Step-3 are not in transformers.
- logits: the file, made small, and a small random model of transformers give the same logits with
  the weights of either, in float32 to 1e-5, and 1e-4 for Jamba and Kimi
  Linear (tests/parity/test_models.py).

What a file leaves out of its model is said in its first lines. Further families agree with
transformers in their logits as small models and have no file: A.X K1 (norms of mixtures alone),
Beam (gates with a bias, depth-scaled residuals), Command A (parallel blocks), DeepSeek-V3.2 and
GLM-5 (token indexers), dots 3 Note (latent attention with windows), FlexOlmo, Flint, Gemma 4
(factors of blocks), Granite MoE with a shared network or with windows, Hunyuan 3, K-EXAONE, Kolibri
1 (a selection bias on the logits), Laguna (softplus gates), Ling hybrid, Mellum, MiniMax-M3
(block indexers), Mistral Small 4 (a temperature of late positions).

Of the 58 causal language models with experts in transformers 5.23, 50 are points of the space, and
`moenas init --from` reads their configurations (Gemma 4 without embeddings of each layer). A.X K2,
DeepSeek-V4, Doge, Hunyuan 4, Inkling, Inkling 2, Qwen4-Exp and ZAYA1 are none.

## What has no point

Of published mixtures these have parts that the space has no field for:

- positions whose stretch follows the length of the text (dynamic NTK), or has a factor for each
  pair (LongRoPE: Phi-3.5-MoE's file gives the model before it);
- indexers of Qwen4-Exp, compressed keys and values (DeepSeek-V4, ZAYA1), a norm of its own for the
  keys that a layer reads of another (Hunyuan-Large: its file reads them as normed), convolutions of
  keys and values (Inkling);
- embeddings of each layer (Gemma 4 E2B), norms with a gate of their own and gates made of the
  latent of the queries (A.X K2), masks that a learned score of the values makes (Doge);
- experts drawn in training and the estimator of their gradient (SparseMixer: Phi-3.5-MoE's file has
  its weights), routers that read the one of the layer before (ZAYA1), penalties that adapt to the
  load (ReMoE, Skywork-MoE);
- several residual streams, and gates on them (DeepSeek-V4, Hunyuan 4, Qwen4-Exp, Muse Spark),
  encoders (NLLB-MoE).

`python benchmarks/zoo.py` writes this page.
"""


def comment(text: str) -> str:
    """Return the comment that a file begins with, as one line."""
    lines = re.match(r"(?:#.*\n)*", text)
    return " ".join(line.lstrip("# ") for line in lines.group().splitlines()) if lines else ""


def row(path: Path) -> str:
    """Return one model's row of the table."""
    space = Space.load(path)
    cost = space.architecture(space.draw(RandomSuggest(0))).cost(4096)
    said = comment(space.text)
    source = re.match(r"[^(]+\([^)]*\)", said)
    published = re.search(r"published: (.+?)\.(?= |$)", said, re.IGNORECASE)
    texts = {c: "".join((ROOT / file).read_text() for file in f) for c, f in CHECKS.items()}
    checks = [check for check, text in texts.items() if f'"{path.stem}"' in text]
    cells = [
        f"`{path.stem}`",
        source.group() if source else "",
        f"{cost.params:,}",
        f"{cost.active_params:,}",
        f"{cost.flops_per_token / 1e9:.2f}",
        published.group(1) if published else "",
        ", ".join(checks),
    ]
    return f"| {' | '.join(cells)} |"


def page() -> str:
    """Return the whole page."""
    rows = (row(path) for path in sorted((ROOT / "spaces" / "zoo").glob("*.yaml")))
    return PAGE.format(rows="\n".join(rows))


if __name__ == "__main__":
    print(page(), end="")
