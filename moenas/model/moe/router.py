"""Routers: which experts a token goes to, with what weight, and how the load is kept even."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import nn

from moenas.grammar.component import Component, changed, setting
from moenas.model.layers.norms import RMSNorm
from moenas.model.moe.balance import Balance
from moenas.model.moe.gating import Gating, Weights
from moenas.model.moe.logits import (
    CosineLogits,
    HiddenLayer,
    LogitShape,
    Noise,
    NoLogits,
    RouterInput,
    RouterLogits,
)
from moenas.model.moe.presets import PRESETS
from moenas.model.moe.scores import Score
from moenas.model.moe.selection import ExpertSelection, GroupedTopK, Selection
from moenas.records import Cost, Plain

Balancing = Literal["none", "aux_loss", "importance_load", "bias", "bias_and_loss"]


@dataclass(frozen=True, kw_only=True)
class Router(Component):
    """A router as independent fields; a preset is only a spelling of them.

    Each token scores all experts, some are chosen, and their outputs are added up with weights.
    Balancing, noise and capacity act in training only.
    """

    presets: ClassVar[dict[str, Plain]] = PRESETS

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
    even_groups: bool = setting(
        "each group that a token chooses from gives as many of its top_k experts (MoGE, arXiv"
        " 2505.21411, with as many top_groups as n_groups)",
        default=False,
    )
    top_p: float | None = setting(
        "of its top_k experts a token keeps the first that reach this share of all scores together"
        " (arXiv 2403.07652, where top_k is n_experts); the cost counts top_k, the most that it"
        " gets; null: all. With selection: top_k and noisy_top_k",
        default=None,
        low=1e-3,
        high=1.0,
    )
    sparsemixer_eps: float | None = setting(
        "weighs each expert by SparseMixer (Phi-3.5-MoE, its router_jitter_noise; GRIN, arXiv"
        " 2409.12136): the softmax over the logits of experts not taken before it that are at"
        " most 2 eps max(|z|, its own) below its own; trained by the gradient of that weight, and"
        " not by the paper's estimator. null: by the scores. With selection: top_k and noisy_top_k",
        default=None,
        low=1e-4,
    )
    normalize: bool | None = setting(
        "divide the weights of a token by their sum; null: if top_k is over 1, for a single"
        " weight would always be 1 and teach the router nothing",
        default=None,
    )
    scale: float = setting("factor on the weights after that", default=1.0, low=1e-6)
    expert_scale: bool = setting(
        "a trained factor of each expert on its weights after that, 1 at first (Gemma 4, Pangu Pro"
        " MoE)",
        default=False,
    )
    weight_on: Literal["output", "input"] = setting(
        "what the weight multiplies: what an expert gives, or what it gets (Llama 4)",
        default="output",
    )
    router_input: Literal["ffn", "stream", "block"] = setting(
        "what the router reads: the input of its layer; what the norm before the layer reads (Gemma"
        " 4); or the stream before the mixer of the block (SmallThinker, arXiv 2507.20984)",
        default="ffn",
    )
    input_norm: bool = setting("an RMSNorm of what the router reads (Gemma 4)", default=False)
    hidden: int | None = setting(
        "width of a layer before the logits; null: none", default=None, low=8, multiple=8
    )
    hidden_activation: Literal["gelu", "none"] = setting(
        "what follows that layer; none: it is the projection of X-MoE", default="gelu"
    )
    logits: Literal["linear", "cosine"] = setting(
        "products with a vector of each expert, or cosines with it times one trained factor (X-MoE,"
        " arXiv 2204.09179)",
        default="linear",
    )
    logit_bias: bool = setting("the logits have a trained bias (gpt-oss)", default=False)
    logit_norm: bool = setting(
        "the logits of a token are standardised over the experts (Skywork-MoE, arXiv 2406.06563,"
        " eq. 6)",
        default=False,
    )
    logit_scale: float = setting(
        "factor on the logits after that (lambda of Skywork-MoE; Gemma 4: d_model^-0.5)",
        default=1.0,
        low=1e-6,
    )
    logit_cap: float | None = setting(
        "logits then become c tanh(z / c) (Laguna); null: they do not", default=None, low=0.1
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
    entropy_coef: float = setting(
        "weight of the mean entropy of a token's scores over their sum, which makes top_p choose"
        " fewer experts (arXiv 2403.07652)",
        default=0.0,
        low=0.0,
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
    def cuts(self) -> bool:
        """Whether a token may keep fewer than its top_k experts."""
        return self.chooses.alone and self.top_k > 1 and (self.top_p or 1) < 1

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
                "with top_k: 1 and normalize: true the router learns nothing; write normalize:"
                " null, beside a preset too"
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
            return (
                "with one expert and normalize: true the router learns nothing; write normalize:"
                " null, beside a preset too"
            )
        if n_experts <= 2 and self.logit_norm and self.scores.from_logits:
            return (
                f"with logit_norm: true and {n_experts} experts all tokens have the same logits up"
                " to their order, so the router learns nothing; take 3 experts or leave it out"
            )
        if self.cuts and (self.top_p or 1) * n_experts <= 1:
            return (
                f"top_p ({self.top_p:g}) is reached by one of {n_experts} experts; write top_k: 1,"
                f" or a top_p above {1 / n_experts:.3g}"
            )
        return self._invalid_groups(n_experts)

    def _invalid_groups(self, n_experts: int) -> str | None:
        if not self.chooses.alone or self.n_groups == 1:
            return None
        if n_experts % self.n_groups:
            return f"n_groups ({self.n_groups}) must divide the number of experts ({n_experts})"
        groups = min(self.top_groups, self.n_groups)
        open_to = n_experts // self.n_groups * groups
        if self.top_k > open_to:
            return f"top_k ({self.top_k}) must be at most the {open_to} experts of top_groups"
        if self.even_groups and self.top_k % groups:
            return (
                f"with even_groups: true top_k ({self.top_k}) must be a multiple of the {groups}"
                " groups that a token chooses from"
            )
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
        per_sequence = balance in ("aux_loss", "bias_and_loss")
        learned = self.scores.from_logits
        return changed(
            self,
            **self._canonical_groups(),
            **self._canonical_logits(),
            # Without logits each weight is scale, or scale / top_k if normalised.
            normalize=self.normalizes and learned,
            scale=self.scale if learned or not self.normalizes else self.scale / self.top_k,
            top_p=self.top_p if self.cuts else None,
            sparsemixer_eps=self.sparsemixer_eps if self.chooses.alone else None,
            allow_acausal=not self.causal,
            capacity_factor=None if self.chooses.by_expert else self.capacity_factor,
            balance=balance,
            aux_coef=self.aux_coef if self.uses_loss else Router.aux_coef,
            aux_scope=self.aux_scope if per_sequence else "batch",
            aux_reduce=self._reduce(per_sequence),
            bias_rate=self.bias_rate if self.uses_bias else Router.bias_rate,
        )

    def _canonical_groups(self) -> dict[str, Any]:
        """Return the groups, of which all stay open where they leave the choice as it is."""
        several = self.chooses.alone and self.n_groups > 1
        open_groups = min(self.top_groups, self.n_groups)
        even = several and self.even_groups and open_groups > 1
        limited = several and self.n_groups > self.top_groups
        # As many open groups as experts, ranked by their best, leave all open.
        free = self.group_score == "max" and self.top_groups >= self.top_k
        grouped = even or (limited and not free)
        return {
            "n_groups": self.n_groups if grouped else 1,
            "top_groups": open_groups if grouped else 1,
            "group_score": self.group_score if grouped and limited else "max",
            "even_groups": even,
        }

    def _canonical_logits(self) -> dict[str, Any]:
        """Return the fields of the logits, at their defaults where there are none."""
        if self.scores.from_logits:
            return {"hidden_activation": self.hidden_activation if self.hidden else "gelu"}
        names = (
            *("router_input", "input_norm", "hidden", "hidden_activation", "logits", "logit_bias"),
            *("logit_norm", "logit_scale", "logit_cap", "jitter", "z_coef", "entropy_coef"),
        )
        return {name: getattr(Router, name) for name in names}

    def _reduce(self, evens_load: bool) -> Literal["sum", "mean", "pooled"]:
        """Return how losses join: pooled is a mean where there is no aux_loss."""
        others = (self.z_coef or self.entropy_coef) and self.scores.from_logits
        if not self.uses_loss and not others:
            return "sum"
        return "mean" if self.aux_reduce == "pooled" and not evens_load else self.aux_reduce

    def canonical_among(self, n_experts: int) -> Self:
        """Return the canonical form among a number of experts."""
        found = self.canonical()
        if (found.capacity_factor or 0) * found.top_k >= n_experts:
            found = changed(found, capacity_factor=None)
        weighed = found.chooses.learned or found.scores.from_logits
        if found.top_k == n_experts and not found.chooses.variable and weighed:
            # Without top_p the load is even, only the weights can differ, and softmax scores add
            # up to 1.
            by_score = found.top_p is None and found.sparsemixer_eps is None
            whole = by_score and found.scores.adds_up_to_1 and found.top_k > 1
            even: Balancing = "none"
            if found.balance == "importance_load" or found.top_p is not None:
                even = found.balance
            found = changed(
                found,
                selection=found.selection if found.chooses.alone else "top_k",
                balance=even,
                n_groups=1,
                normalize=found.normalizes or whole,
            )
        elif found.n_groups == n_experts:  # groups of one
            found = changed(found, n_groups=1)
        elif found.even_groups and found.top_k * found.n_groups == n_experts * found.top_groups:
            found = changed(found, even_groups=False)  # all experts of the groups
        if n_experts == 1:
            same = found.scores.adds_up_to_1  # as SparseMixer, the weight is 1
            eps = None if same else found.sparsemixer_eps
            found = changed(found, balance="none", entropy_coef=0.0, sparsemixer_eps=eps)
        return found.canonical()

    def cost(self, d_model: int, n_experts: int) -> Cost:
        """Count the matrices of the router; the selection bias is not trained by gradients.

        The noise is drawn in training only: its matrix is a parameter, and neither active nor
        an operation.
        """
        factors = n_experts if self.expert_scale else 0
        if not self.scores.from_logits:
            return Cost(params=factors, active_params=factors)
        width = self.hidden or d_model
        weights = width * n_experts + (d_model * self.hidden if self.hidden else 0)
        bias, norm = n_experts * self.logit_bias, d_model * self.input_norm
        temperature = self.logits == "cosine" and (self.logit_bias or not self.logit_norm)
        params = weights + factors + bias + norm + temperature
        noise = d_model * n_experts if self.chooses.noisy else 0
        return Cost(params=params + noise, active_params=params, flops_per_token=2 * weights)

    def build(self, d_model: int, n_experts: int) -> Gating:
        """Build the part that chooses."""
        normed = self.input_norm and self.scores.from_logits
        return Gating(
            RouterInput(self.router_input, RMSNorm(d_model) if normed else None),
            self.build_logits(d_model, n_experts),
            Noise(d_model, n_experts) if self.chooses.noisy else None,
            self.build_selection(n_experts),
            self.scores.build(),
            Weights(
                self.normalizes,
                self.scale,
                n_experts if self.expert_scale else None,
                self.top_p if self.cuts else None,
                self.sparsemixer_eps if self.chooses.alone else None,
            ),
        )

    def build_logits(self, d_model: int, n_experts: int) -> nn.Module:
        """Build the logits of E experts."""
        if not self.scores.from_logits:
            return NoLogits(n_experts)
        width, kind = self.hidden, CosineLogits if self.logits == "cosine" else RouterLogits
        return kind(
            width or d_model,
            n_experts,
            self.logit_bias,
            self.jitter,
            HiddenLayer(d_model, width, self.hidden_activation) if width else None,
            LogitShape(self.logit_scale, self.logit_norm, self.logit_cap),
        )

    def build_selection(self, n_experts: int) -> ExpertSelection:
        """Build the selection among a number of experts."""
        groups = min(self.top_groups, self.n_groups)
        even = self.even_groups and groups > 1
        if self.chooses.alone and (self.n_groups > groups or even):
            return GroupedTopK(self.top_k, self.n_groups, groups, self.group_score, even)
        return self.chooses.build(self.top_k, n_experts)

    def build_balance(self, n_experts: int) -> Balance:
        """Build the part that evens out the load."""
        how = (self.aux_scope, self.aux_reduce)
        learned = self.scores.from_logits
        return Balance(
            n_experts,
            self.aux_coef if self.uses_loss else 0.0,
            self.z_coef if learned else 0.0,
            self.bias_rate if self.uses_bias else None,
            ("importance" if self.balance == "importance_load" else "load", *how),
            self.entropy_coef if learned else 0.0,
        )
