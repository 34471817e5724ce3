"""Routers: the experts of a token, their weights, and the balancing of the load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from moenas.grammar.component import Component, changed, setting
from moenas.grammar.conditions import one_of
from moenas.model.moe.balance import (
    AuxLossBalance,
    Balance,
    BiasBalance,
    ImportanceLoadBalance,
    LoadBalancer,
    NoBalance,
    QuantileBalance,
    Reduce,
)
from moenas.model.moe.gating import BiasOn, Gating, Weights
from moenas.model.moe.logits import LinearLogits, Logits, Noise, NoLogits, RouterInput
from moenas.model.moe.presets import FORMER, PRESETS
from moenas.model.moe.scores import Score, SoftmaxScore
from moenas.model.moe.selection import Selection, TokenChoice, TopKSelection
from moenas.records import Cost, Plain


@dataclass(frozen=True, kw_only=True)
class Router(Component):
    """A router: scores, a selection, weights and load balancing; a preset is only a spelling.

    Each token scores all experts, some are chosen, and their outputs are added up with weights.
    Balancing, noise and capacity act in training only.
    """

    presets: ClassVar[dict[str, Plain]] = PRESETS
    former: ClassVar[Mapping[str, str]] = FORMER

    score: Score = setting(
        "affinity of a token to each expert, from the router's logits", default=SoftmaxScore()
    )
    selection: Selection = setting(
        "which experts a token goes to, by their scores", default=TopKSelection()
    )
    allow_acausal: bool = setting(
        "let a selection look at later tokens (sinkhorn and base, in training; expert_choice): a"
        " language model's loss is then better than what it can write",
        default=False,
        without_effect={"selection": one_of("top_k", "noisy_top_k", "hash", "threshold")},
    )
    top_k: int = setting(
        "experts chosen for a token; the mean with expert_choice and threshold", default=2, low=1
    )
    normalize: bool | None = setting(
        "divide the weights of a token by their sum (with top_k 1 every weight would be 1, and the"
        " router would get no gradient)",
        derived="top_k > 1",
    )
    scale: float = setting("factor on the weights after that", default=1.0, low=1e-6)
    expert_scale: bool = setting(
        "a trained factor of each expert on its weights after that, 1 at first (Gemma 4, Pangu Pro"
        " MoE)",
        default=False,
    )
    weight_on: Literal["output", "input"] = setting(
        "what the weight multiplies: the output of an expert, or its input (Llama 4)",
        default="output",
    )
    logits: Logits = setting(
        "the number of each expert that the score reads; no score reads them with score: uniform",
        default=LinearLogits(),
        without_effect={"score": one_of("uniform")},
    )
    capacity_factor: float | None = setting(
        "in training an expert takes ceil(factor * top_k * tokens / n_experts) slots of a"
        " sequence, first come first served, and drops the rest; null: none is dropped",
        default=None,
        low=1e-3,
        without_effect={"selection": one_of("expert_choice")},
    )
    balance: Balance = setting("how the load of the experts is balanced", default=AuxLossBalance())
    bias_on: BiasOn = setting(
        "what the bias of `balance` is added to for the selection: the score (DeepSeek-V3), or the"
        " logit (Kolibri 1)",
        default="score",
        without_effect={"balance": one_of("none", "aux_loss", "importance_load")},
    )
    loss_reduce: Reduce = setting(
        "how the losses of all layers join: added up; their mean (MegaBlocks); or aux_loss of the"
        " slots of all layers together, top_k for an even load (a router_aux_loss_coef of"
        " transformers), and the mean of the others",
        default="sum",
        without_effect={
            "balance": one_of("none", "bias", "quantile"),
            "z_coef": one_of(0.0),
            "entropy_coef": one_of(0.0),
        },
    )
    z_coef: float = setting(
        "weight of the router z-loss (ST-MoE, arXiv 2202.08906, eq. 5)",
        default=0.0,
        low=0.0,
        without_effect={"score": one_of("uniform")},
    )
    entropy_coef: float = setting(
        "weight of the mean entropy of a token's scores over their sum, which makes top_p choose"
        " fewer experts (arXiv 2403.07652)",
        default=0.0,
        low=0.0,
        without_effect={"score": one_of("uniform")},
    )

    @property
    def causal(self) -> bool:
        """Whether a token's experts depend on no later token, in training and evaluation."""
        return self.selection.causal

    @property
    def has_logits(self) -> bool:
        """Whether the score reads logits."""
        return self.score.from_logits

    @property
    def uses_loss(self) -> bool:
        """Whether a balancing loss has an effect; where experts choose, the load is even anyway."""
        even = self.selection.expert_choice and self.balance.loss != "importance"
        trainable = self.selection.trainable_load and self.has_logits
        return self.balance.loss is not None and self.balance.coef > 0 and trainable and not even

    @property
    def uses_bias(self) -> bool:
        """Whether a bias on the selection has an effect."""
        return self.balance.has_bias and self.selection.per_token and self.balance.rate > 0

    @property
    def top_p(self) -> float | None:
        """The share of all scores at which a token takes no further expert; None: it takes all."""
        selection = self.selection
        return selection.cut(self.top_k) if isinstance(selection, TokenChoice) else None

    @property
    def sparsemixer_eps(self) -> float | None:
        """The eps of SparseMixer if it gives the weights; None: the scores give them."""
        selection = self.selection
        return selection.sparsemixer_eps if isinstance(selection, TokenChoice) else None

    @property
    def normalizes(self) -> bool:
        """Whether the weights of a token are divided by their sum."""
        return bool(self.resolved("normalize"))

    def invalid(self) -> str | None:
        """Refuse a router that no gradient reaches, and one that looks ahead unless allowed to.

        A single weight divided by itself is 1.
        """
        selection = self.selection
        single = self.top_k == 1 and not selection.variable_k and not selection.expert_choice
        if single and self.normalize and self.has_logits:
            return (
                "with top_k: 1 and normalize: true the router learns nothing; write normalize:"
                " null, beside a preset too"
            )
        if selection.trainable_load and not self.has_logits:
            return (
                f"score: '{self.score.kind}' ranks no expert before another; take selection: 'hash'"
            )
        if self.causal or self.allow_acausal:
            return selection.invalid_with(self.top_k)
        return (
            f"selection: '{selection.kind}' lets a token's experts depend on later tokens, so a"
            " language model would be trained on what it must predict; take 'threshold' or"
            " 'top_k', or set allow_acausal: true"
        )

    def invalid_among(self, n_experts: int) -> str | None:
        """Return why the router does not fit a number of experts, or None."""
        if n_experts == 1 and self.normalize and self.has_logits:
            return (
                "with one expert and normalize: true the router learns nothing; write normalize:"
                " null, beside a preset too"
            )
        reason = self.logits.invalid_among(n_experts) if self.has_logits else None
        return reason or self.selection.invalid_among(self.top_k, n_experts)

    def canonical(self) -> Self:
        """Reset every field that has no effect beside the others."""
        balance, learned = self._canonical_balance(), self.has_logits
        return changed(
            self,
            selection=self.selection.canonical_for(self.top_k),
            logits=self.logits.canonical() if learned else Router.logits,
            # Without logits each weight is scale, or scale / top_k if normalised.
            normalize=self.normalizes and learned,
            scale=self.scale if learned or not self.normalizes else self.scale / self.top_k,
            allow_acausal=not self.causal,
            capacity_factor=None if self.selection.expert_choice else self.capacity_factor,
            balance=balance,
            bias_on=self.bias_on if balance.has_bias else "score",
            loss_reduce=self._canonical_reduce(balance),
            z_coef=self.z_coef if learned else 0.0,
            entropy_coef=self.entropy_coef if learned else 0.0,
        )

    def _canonical_balance(self) -> Balance:
        """Return the balancing whose every part has an effect."""
        balance, loss, bias = self.balance, self.uses_loss, self.uses_bias
        if loss and bias:
            return balance
        if bias and isinstance(balance, QuantileBalance):
            return balance
        if bias:
            return BiasBalance(rate=balance.rate)
        if not loss:
            return NoBalance()
        if balance.loss == "importance":
            return ImportanceLoadBalance(coef=balance.coef)
        return AuxLossBalance(coef=balance.coef, scope=balance.scope)

    def _canonical_reduce(self, balance: Balance) -> Reduce:
        """Return how losses join: "pooled" is a mean where there is no aux_loss."""
        others = (self.z_coef or self.entropy_coef) and self.has_logits
        if balance.loss is None and not others:
            return "sum"
        pools = self.loss_reduce == "pooled" and balance.loss != "load"
        return "mean" if pools else self.loss_reduce

    def canonical_among(self, n_experts: int) -> Self:
        """Return the canonical form among a number of experts."""
        router = self.canonical()
        if (router.capacity_factor or 0) * router.top_k >= n_experts:
            router = changed(router, capacity_factor=None)
        selection = router.selection.canonical_among(router.top_k, n_experts)
        router = changed(router, selection=selection)
        has_effect = selection.trainable_load or router.has_logits
        if router.top_k == n_experts and not selection.variable_k and has_effect:
            router = router._canonical_with_all_experts()
        if n_experts == 1:
            router = router._canonical_with_one_expert()
        return router.canonical()

    def _canonical_with_all_experts(self) -> Self:
        """Return the canonical form of a router whose tokens go to all experts.

        Without top_p the load is even, only the weights can differ, and softmax scores add up to 1.
        """
        by_score = self.top_p is None and self.sparsemixer_eps is None
        whole = by_score and self.score.adds_up_to_1 and self.top_k > 1
        keeps = self.balance.loss == "importance" or self.top_p is not None
        return changed(
            self,
            selection=self.selection if self.selection.per_token else TopKSelection(),
            balance=self.balance if keeps else NoBalance(),
            normalize=self.normalizes or whole,
        )

    def _canonical_with_one_expert(self) -> Self:
        """Return the canonical form of a router with one expert, to which SparseMixer gives 1."""
        selection = self.selection
        if isinstance(selection, TokenChoice) and self.score.adds_up_to_1:
            selection = changed(selection, sparsemixer_eps=None)
        return changed(self, selection=selection, balance=NoBalance(), entropy_coef=0.0)

    def cost(self, d_model: int, n_experts: int) -> Cost:
        """Count the matrices of the router; the selection bias is not trained by gradients.

        The noise is drawn in training only: its matrix is a parameter, and neither active nor
        an operation.
        """
        factors = n_experts if self.expert_scale else 0
        if not self.has_logits:
            return Cost(params=factors, active_params=factors)
        params = self.logits.n_params(d_model, n_experts) + factors
        noise = d_model * n_experts if self.selection.noisy else 0
        flops = 2 * self.logits.n_weights(d_model, n_experts)
        return Cost(params=params + noise, active_params=params, flops_per_token=flops)

    def build(self, d_model: int, n_experts: int) -> Gating:
        """Build the module that scores and chooses among E experts."""
        logits, learned = self.logits, self.has_logits
        return Gating(
            logits.build_input(d_model) if learned else RouterInput(logits.input, None),
            logits.build(d_model, n_experts) if learned else NoLogits(n_experts),
            Noise(d_model, n_experts) if self.selection.noisy else None,
            self.selection.build(self.top_k, n_experts),
            self.score.build(),
            weights=Weights(
                normalize=self.normalizes,
                scale=self.scale,
                n_scales=n_experts if self.expert_scale else None,
                top_p=self.top_p,
                eps=self.sparsemixer_eps,
            ),
            bias_on=self.bias_on,
        )

    def build_balancer(self, n_experts: int) -> LoadBalancer:
        """Build the module that counts the load and keeps it even."""
        learned = self.has_logits
        return LoadBalancer(
            n_experts,
            loss=self.balance.loss or "load",
            aux_coef=self.balance.coef if self.uses_loss else 0.0,
            scope=self.balance.scope,
            reduce=self.loss_reduce,
            z_coef=self.z_coef if learned else 0.0,
            entropy_coef=self.entropy_coef if learned else 0.0,
            bias_rate=self.balance.rate if self.uses_bias else None,
            bias_on=self.bias_on,
            by_quantile=self.uses_bias and isinstance(self.balance, QuantileBalance),
        )
