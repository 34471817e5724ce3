"""Routers: which experts a token goes to, with what weight, and how the load is kept even."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

from moenas.component import Component, setting
from moenas.parts.balance import Balance
from moenas.parts.gating import Gating, Noise, NoLogits, RouterLogits
from moenas.parts.scores import Score
from moenas.parts.selection import ExpertSelection, GroupedTopK, Selection
from moenas.records import Cost, Plain

Balancing = Literal["none", "aux_loss", "importance_load", "bias", "bias_and_loss"]

# What depends on the number of experts (groups) is left out of the presets. An aux_coef is the
# published number, and aux_reduce says of which loss: a router_aux_loss_coef of a released
# configuration is that of the pooled loss.
_MIXTRAL: Plain = {"top_k": 2, "normalize": True, "aux_coef": 0.02, "aux_reduce": "pooled"}
_DEEPSEEK_V3: Plain = {
    "score": "sigmoid",
    "top_k": 8,
    "normalize": True,
    "scale": 2.5,
    "balance": "bias",
    "bias_rate": 0.001,
}


@dataclass(frozen=True, kw_only=True)
class Router(Component):
    """A router as independent fields; a preset is only a spelling of them.

    Each token scores all experts, some are chosen, and their outputs are added up with weights.
    Balancing, noise and capacity act in training only.
    """

    presets: ClassVar[dict[str, Plain]] = {
        # Shazeer et al., arXiv 1701.06538: eq. 3 to 11; k 4 and both losses 0.1.
        "shazeer": {
            "selection": "noisy_top_k",
            "top_k": 4,
            "balance": "importance_load",
            "aux_coef": 0.1,
        },
        # GShard, arXiv 2006.16668, algorithm 1: capacity of 2 slots a token over E experts. Not as
        # there: the second expert is not dispatched at random, the loss counts both choices, not
        # the first alone, and capacity is given out token by token, not to all first choices first.
        "gshard": {"top_k": 2, "normalize": True, "capacity_factor": 1.0, "aux_coef": 0.01},
        # Switch Transformer, arXiv 2101.03961: eq. 2 to 6; capacity 1.25, alpha 1e-2 (without
        # the jitter of the input, which section 2.4 sets to 0.01).
        "switch": {"top_k": 1, "normalize": False, "capacity_factor": 1.25, "aux_coef": 0.01},
        # ST-MoE, arXiv 2202.08906, section 4: GShard's top 2 with the z-loss.
        "st_moe": {
            "top_k": 2,
            "normalize": True,
            "capacity_factor": 1.25,
            "aux_coef": 0.01,
            "z_coef": 0.001,
        },
        # Mixtral 8x7B, arXiv 2401.04088, section 2.1; coefficient of its released configuration.
        "mixtral": _MIXTRAL,
        # The released configurations of Jamba v0.1, Granite 3.0 MoE, Qwen2-MoE and Qwen3-MoE.
        "jamba": {"top_k": 2, "normalize": False, "aux_coef": 0.001, "aux_reduce": "pooled"},
        "granite": {"top_k": 8, "normalize": True, "aux_coef": 0.001, "aux_reduce": "pooled"},
        "qwen2_moe": {"top_k": 4, "normalize": False, "aux_coef": 0.001, "aux_reduce": "pooled"},
        "qwen3_moe": {"top_k": 8, "normalize": True, "aux_coef": 0.001, "aux_reduce": "pooled"},
        # OLMoE, arXiv 2409.02060, section 2 and table 1; it was trained with MegaBlocks, whose
        # batched_load_balancing_loss is a mean over layers.
        "olmoe": {
            "top_k": 8,
            "normalize": False,
            "aux_coef": 0.01,
            "z_coef": 0.001,
            "aux_reduce": "mean",
        },
        # DeepSeekMoE 16B, arXiv 2401.06066, section 5.1.
        "deepseek_moe": {"top_k": 6, "normalize": False, "aux_coef": 0.001},
        # DeepSeek-V2, arXiv 2405.04434, section 2.2 (236B: 8 groups of which 3, scale 16).
        "deepseek_v2": {
            "top_k": 6,
            "normalize": False,
            "scale": 16.0,
            "group_score": "max",
            "aux_coef": 0.003,
            "aux_scope": "sequence",
        },
        # DeepSeek-V3, arXiv 2412.19437, eq. 12 to 16 (671B: 8 groups of which 4; without the
        # sequence-wise loss, which balance: bias_and_loss with aux_coef 1e-4 adds).
        "deepseek_v3": _DEEPSEEK_V3,
        # The released configurations of Kimi K2, GLM-4.5 and Nemotron 3 Nano.
        "kimi_k2": _DEEPSEEK_V3 | {"scale": 2.827},
        "glm_4_5": _DEEPSEEK_V3,
        "nemotron_3": _DEEPSEEK_V3 | {"top_k": 6},
        # gpt-oss, released code: a linear layer with bias, softmax over the chosen; coefficient of
        # its released configuration.
        "gpt_oss": {
            "top_k": 4,
            "normalize": True,
            "logit_bias": True,
            "aux_coef": 0.9,
            "aux_reduce": "pooled",
        },
        # Llama 4, released code: the sigmoid multiplies what goes into the expert.
        "llama4": {
            "score": "sigmoid",
            "top_k": 1,
            "normalize": False,
            "weight_on": "input",
            "aux_coef": 0.001,
        },
        # LongCat-Flash, arXiv 2509.01322, section 2.1, beside 256 identity experts.
        "longcat": {"top_k": 12, "normalize": False, "scale": 6.0, "balance": "bias"},
        # Expert threshold routing, arXiv 2603.11535: the causal form of expert choice.
        "threshold": {
            "selection": "threshold",
            "score": "sigmoid",
            "normalize": False,
            "balance": "none",
        },
    }

    score: str = setting(
        "how much a token wants each expert, from the router's logits",
        default="softmax",
        words=Score,
    )
    selection: str = setting(
        "which experts a token goes to, by their scores", default="top_k", words=Selection
    )
    allow_acausal: bool = setting(
        "let a selection look at later tokens (sinkhorn and base, in training; expert_choice): a"
        " language model's loss is then better than what it can write",
        default=False,
    )
    top_k: int = setting(
        "experts chosen for a token; the mean with expert_choice and threshold", default=2, low=1
    )
    n_groups: int = setting(
        "equal groups of experts, with selection: top_k and noisy_top_k", default=1, low=1
    )
    top_groups: int = setting(
        "groups of which a token chooses experts; beyond n_groups: all", default=1, low=1
    )
    group_score: Literal["max", "top2_sum"] = setting(
        "ranks groups by their best expert (DeepSeek-V2) or best two (DeepSeek-V3)", default="max"
    )
    normalize: bool | None = setting(
        "divide the weights of a token by their sum; null: if top_k is over 1, for a single"
        " weight would always be 1 and teach the router nothing",
        default=None,
    )
    scale: float = setting("factor on the weights after that", default=1.0, low=1e-6)
    weight_on: Literal["output", "input"] = setting(
        "what the weight multiplies: what an expert gives, or what it gets (Llama 4)",
        default="output",
    )
    logit_bias: bool = setting("the logits have a trained bias (gpt-oss)", default=False)
    hidden: int | None = setting(
        "width of a gelu layer before the logits; null: none", default=None, low=8, multiple=8
    )
    jitter: float = setting(
        "in training what enters the router is multiplied by 1 - jitter to 1 + jitter (arXiv"
        " 2101.03961, section 2.4)",
        default=0.0,
        low=0.0,
        high=1.0,
    )
    capacity_factor: float | None = setting(
        "in training an expert takes ceil(factor * top_k * tokens / n_experts) slots of a"
        " sequence, first come first served, and drops the rest; null: none is dropped",
        default=None,
        low=1e-3,
    )
    balance: Balancing = setting(
        "evens out the load by a loss (Switch), by the loss of arXiv 1701.06538 (eq. 6 to 11), by"
        " a bias on the selection (DeepSeek-V3; with top_k and noisy_top_k), or by that and the"
        " first loss",
        default="aux_loss",
    )
    aux_coef: float = setting("weight of the load-balancing loss", default=0.01, low=0.0)
    aux_scope: Literal["batch", "sequence"] = setting(
        "what aux_loss evens out: the load of each sequence (arXiv 2412.19437, eq. 17 to 20), or of"
        " a batch, which one device holds whole, so it is the global batch of arXiv 2501.11873",
        default="batch",
    )
    aux_reduce: Literal["sum", "mean", "pooled"] = setting(
        "how the losses of all layers join: added up; their mean (MegaBlocks); or aux_loss of the"
        " slots of all layers together, top_k for an even load (a router_aux_loss_coef of"
        " transformers), and the mean of the others",
        default="sum",
    )
    z_coef: float = setting(
        "weight of the router z-loss (ST-MoE, arXiv 2202.08906, eq. 5)", default=0.0, low=0.0
    )
    bias_rate: float = setting(
        "step of the selection bias after each update, with balance: bias", default=0.001, low=0.0
    )

    @property
    def chooses(self) -> Selection:
        """What is known of the selection."""
        return Selection.named(self.selection)

    @property
    def scores(self) -> Score:
        """What is known of the score."""
        return Score.named(self.score)

    @property
    def causal(self) -> bool:
        """Whether a token's experts depend on no later token, in training and evaluation."""
        return self.chooses.causal

    @property
    def uses_loss(self) -> bool:
        """Whether a balancing loss has an effect; where experts choose, the load is even anyway."""
        losses = ("aux_loss", "importance_load", "bias_and_loss")
        even = self.chooses.by_expert and self.balance != "importance_load"
        learned = self.chooses.learned and self.scores.from_logits
        return self.balance in losses and self.aux_coef > 0 and learned and not even

    @property
    def uses_bias(self) -> bool:
        """Whether a bias on the selection has an effect."""
        biased = self.balance in ("bias", "bias_and_loss") and self.chooses.alone
        return biased and self.bias_rate > 0

    @property
    def normalizes(self) -> bool:
        """Whether the weights of a token are divided by their sum."""
        return self.top_k > 1 if self.normalize is None else self.normalize

    def invalid(self) -> str | None:
        """Refuse a router that no gradient reaches, and one that looks ahead unless allowed to.

        A single weight divided by itself is 1.
        """
        chooses, learned = self.chooses, self.scores.from_logits
        single = self.top_k == 1 and not chooses.variable and not chooses.by_expert
        if single and self.normalize and learned:
            return (
                "with top_k: 1 and normalize: true the router learns nothing; leave normalize out"
            )
        if chooses.learned and not learned:
            return f"score: '{self.score}' ranks no expert before another; take selection: 'hash'"
        if self.causal or self.allow_acausal:
            return chooses.invalid_with(self.top_k)
        return (
            f"selection: '{self.selection}' lets a token's experts depend on later tokens, so a"
            " language model would be trained on what it must predict; take 'threshold' or"
            " 'top_k', or set allow_acausal: true"
        )

    def invalid_among(self, n_experts: int) -> str | None:
        """Return why the router does not fit a number of experts, or None."""
        if n_experts == 1 and self.normalize and self.scores.from_logits:
            return "with one expert and normalize: true the router learns nothing; leave it out"
        if not self.chooses.alone or self.n_groups == 1:
            return None
        if n_experts % self.n_groups:
            return f"n_groups ({self.n_groups}) must divide the number of experts ({n_experts})"
        open_to = n_experts // self.n_groups * min(self.top_groups, self.n_groups)
        if self.top_k > open_to:
            return f"top_k ({self.top_k}) must be at most the {open_to} experts of top_groups"
        return None

    def canonical(self) -> Self:
        """Reset every field that has no effect beside the others."""
        words: dict[tuple[bool, bool], Balancing] = {
            (False, False): "none",
            (False, True): "bias",
            (True, False): "importance_load" if self.balance == "importance_load" else "aux_loss",
            (True, True): "bias_and_loss",
        }
        balance = words[self.uses_loss, self.uses_bias]
        # All groups stay open where as many as chosen experts do, ranked by their best.
        grouped = self.chooses.alone and 1 < self.n_groups > self.top_groups
        grouped = grouped and (self.group_score != "max" or self.top_groups < self.top_k)
        per_sequence = balance in ("aux_loss", "bias_and_loss")
        learned = self.scores.from_logits
        return replace(
            self,
            # Without logits each weight is scale, or scale / top_k if normalised.
            normalize=self.normalizes and learned,
            scale=self.scale if learned or not self.normalizes else self.scale / self.top_k,
            logit_bias=self.logit_bias and learned,
            hidden=self.hidden if learned else None,
            jitter=self.jitter if learned else 0.0,
            z_coef=self.z_coef if learned else 0.0,
            allow_acausal=not self.causal,
            n_groups=self.n_groups if grouped else 1,
            top_groups=self.top_groups if grouped else 1,
            group_score=self.group_score if grouped else "max",
            capacity_factor=None if self.chooses.by_expert else self.capacity_factor,
            balance=balance,
            aux_coef=self.aux_coef if self.uses_loss else Router.aux_coef,
            aux_scope=self.aux_scope if per_sequence else "batch",
            aux_reduce=self._reduce(per_sequence),
            bias_rate=self.bias_rate if self.uses_bias else Router.bias_rate,
        )

    def _reduce(self, evens_load: bool) -> Literal["sum", "mean", "pooled"]:
        """Return how losses join: pooled is a mean where there is no aux_loss."""
        if not self.uses_loss and not (self.z_coef and self.scores.from_logits):
            return "sum"
        return "mean" if self.aux_reduce == "pooled" and not evens_load else self.aux_reduce

    def canonical_among(self, n_experts: int) -> Self:
        """Return the canonical form among a number of experts."""
        found = self.canonical()
        if (found.capacity_factor or 0) * found.top_k >= n_experts:
            found = replace(found, capacity_factor=None)
        weighed = found.chooses.learned or found.scores.from_logits
        if found.top_k == n_experts and not found.chooses.variable and weighed:
            # The load is even, only the weights can differ, and softmax scores add up to 1.
            found = replace(
                found,
                selection=found.selection if found.chooses.alone else "top_k",
                balance="importance_load" if found.balance == "importance_load" else "none",
                n_groups=1,
                normalize=found.normalizes or (found.scores.adds_up_to_1 and found.top_k > 1),
            )
        elif found.n_groups == n_experts:  # groups of one
            found = replace(found, n_groups=1)
        if n_experts == 1:
            found = replace(found, balance="none")
        return found.canonical()

    def cost(self, d_model: int, n_experts: int) -> Cost:
        """Count the matrices of the router; the selection bias is not trained by gradients.

        The noise is drawn in training only: its matrix is a parameter, and neither active nor
        an operation.
        """
        if not self.scores.from_logits:
            return Cost()
        width = self.hidden or d_model
        weights = width * n_experts + (d_model * self.hidden if self.hidden else 0)
        params = weights + (n_experts if self.logit_bias else 0)
        noise = d_model * n_experts if self.chooses.noisy else 0
        return Cost(params + noise, params, 2 * weights, 0, 2 * (params + noise))

    def build(self, d_model: int, n_experts: int) -> Gating:
        """Build the part that chooses."""
        learned = self.scores.from_logits
        return Gating(
            RouterLogits(d_model, n_experts, self.hidden, self.logit_bias, self.jitter)
            if learned
            else NoLogits(n_experts),
            Noise(d_model, n_experts) if self.chooses.noisy else None,
            self.build_selection(n_experts),
            self.scores.build(),
            self.normalizes,
            self.scale,
        )

    def build_selection(self, n_experts: int) -> ExpertSelection:
        """Build the selection among a number of experts."""
        if self.chooses.alone and self.n_groups > self.top_groups:
            return GroupedTopK(self.top_k, self.n_groups, self.top_groups, self.group_score)
        return self.chooses.build(self.top_k, n_experts)

    def build_balance(self, n_experts: int) -> Balance:
        """Build the part that evens out the load."""
        how = (self.aux_scope, self.aux_reduce)
        return Balance(
            n_experts,
            self.aux_coef if self.uses_loss else 0.0,
            self.z_coef if self.scores.from_logits else 0.0,
            self.bias_rate if self.uses_bias else None,
            ("importance" if self.balance == "importance_load" else "load", *how),
        )
