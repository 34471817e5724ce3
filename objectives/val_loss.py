"""Validation loss of the trained model, nats per token.

The mean cross-entropy of next-token prediction over `train.val_tokens` tokens that no training
step has seen. Compare it with the corpus's held-out bigram loss, which `bigram_loss` of every
evaluation holds. A model above it has learned less than a table of token pairs. The loss of a model
with `allow_acausal: true` is better than what it can write; the details say so under `acausal`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moenas.space.objective import Measurement

if TYPE_CHECKING:
    from moenas.evaluate.subject import Subject

direction = "minimize"
unit = "nats/token"
needs = "training"


def measure(subject: Subject) -> Measurement:
    """Return the loss, and how many tokens it is the mean of."""
    training = subject.training
    details = {"val_tokens": subject.recipe.val_tokens, "train_tokens": subject.recipe.tokens}
    marked = {} if training.acausal is None else {"acausal": training.acausal}
    return Measurement(training.val_loss, details | marked)
