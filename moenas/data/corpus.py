"""A corpus: tokens to train on, tokens to validate on, and the batches that are cut from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from moenas.data.domains import Domains
from moenas.data.shards import TokenArray, Tokens
from moenas.errors import DataError
from moenas.records import Plain


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens to train on, tokens to validate on, and what is known of them."""

    name: str
    train: TokenArray
    """1-D, unsigned; may be memory-mapped, and may be several files."""
    val: TokenArray
    vocab_size: int
    is_bytes: bool
    """Tokens are the bytes of text, so a loss has a meaning in bits per byte."""
    sha256: str
    """Digest of both splits: dtype, length and bytes of train, then of val."""
    entropy: list[float | None]
    """[H0, H1]: entropy of a token, and of a token given the one before it, in nats per token,
    over train and val together. H1 is None above 4096 words."""
    manifest: Plain = field(repr=False)
    """Where the tokens come from: files, sizes, digests, rules; stored with a study."""
    domains: Domains | None = field(default=None, repr=False)
    """The domain of each token; None if there is one at most, or if it is not known."""
    bigram_loss: float | None = None
    """Loss on val of a smoothed bigram that was counted on train: see `bigram_loss`. What a model
    reaches that knows the previous token alone."""

    @property
    def domain_names(self) -> tuple[str, ...]:
        """Names of the domains, none if they are not known."""
        return self.domains.names if self.domains else ()

    def require(self, context: int, vocab_size: int) -> None:
        """Check that sequences of `context` tokens can be cut and that a model knows all tokens.

        Raises:
            DataError: naming the split that is too small, or the vocabulary that is.
        """
        for split, tokens in (("train", self.train), ("val", self.val)):
            if len(tokens) < context + 1:
                raise DataError(
                    f"the {split} split of '{self.name}' holds {len(tokens)} tokens, a sequence"
                    f" needs {context + 1}; give more text or a train.context below {len(tokens)}",
                    path="data",
                )
        if vocab_size < self.vocab_size:
            raise DataError(
                f"'{self.name}' has tokens 0 to {self.vocab_size - 1}, the architecture knows"
                f" {vocab_size}; give it vocab_size: {self.vocab_size}",
                path="data",
            )

    def batch(
        self, step: int, batch: int, context: int, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and the tokens that follow them, two int64 tensors (batch, context).

        Crops start anywhere in train, drawn uniformly and with replacement by Philox keyed with
        (seed, step): the same for every candidate, whatever came before, on every machine.
        """
        return self._crops(self.train, self._starts(step, batch, context, seed), context)

    def crops(self, steps: Sequence[int], batch: int, context: int, seed: int) -> Tokens:
        """Return the crops of several steps, (n, batch, context + 1), in a small integer type.

        Its first `context` tokens are the inputs of `batch`, its last `context` tokens the targets.
        """
        starts = np.stack([self._starts(step, batch, context, seed) for step in steps])
        crops = self.train[starts[:, :, None] + np.arange(context + 1)]
        small = np.uint8 if self.vocab_size <= 2**8 else np.int32
        return crops.astype(np.int16 if 2**8 < self.vocab_size <= 2**15 else small)

    def batch_domains(self, step: int, batch: int, context: int, seed: int) -> torch.Tensor | None:
        """Return the domains of the tokens of a batch (batch, context), int64, or None."""
        return self._domains("train", self._starts(step, batch, context, seed), context)

    def _starts(self, step: int, batch: int, context: int, seed: int) -> Tokens:
        raw = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(batch)
        return (raw % np.uint64(len(self.train) - context)).astype(np.int64)

    def val_batches(
        self, context: int, batch: int, tokens: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield fixed windows of val, evenly spread and disjoint, at most `batch` at a time.

        There are tokens // context windows, at least one, and no more than val holds.
        """
        for starts in self._val_starts(context, batch, tokens):
            yield self._crops(self.val, starts, context)

    def val_domains(self, context: int, batch: int, tokens: int) -> Iterator[torch.Tensor | None]:
        """Yield the domains of the tokens of each of `val_batches`, (batch, context), or None."""
        for starts in self._val_starts(context, batch, tokens):
            yield self._domains("val", starts, context)

    def _val_starts(self, context: int, batch: int, tokens: int) -> Iterator[Tokens]:
        last = len(self.val) - context - 1
        count = max(1, min(tokens // context, last // context + 1))
        starts = np.arange(count, dtype=np.int64) * last // max(1, count - 1)
        for i in range(0, count, batch):
            yield starts[i : i + batch]

    def _domains(self, split: str, starts: Tokens, context: int) -> torch.Tensor | None:
        if self.domains is None:
            return None
        return torch.from_numpy(self.domains.at(split, starts[:, None] + np.arange(context)))

    @staticmethod
    def _crops(
        split: TokenArray, starts: Tokens, context: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        crops = split[starts[:, None] + np.arange(context + 1)].astype(np.int64)
        both = torch.from_numpy(crops)
        return both[:, :-1], both[:, 1:]
