"""The inputs of the layers of one pass beside the tokens that they map."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

# Shapes: B sequences of S tokens, D model width, K key-value heads, L tokens so far, C width of a
# head, H query heads.


class SharedKV:
    """Keys, values and bias tables that the mixers of one pass share, by numbers of layers."""

    def __init__(self) -> None:
        self.keys: dict[int, tuple[Tensor, Tensor]] = {}
        """Keys and values (B, K, L, C) of all tokens so far, as queries meet them."""
        self.tables: dict[int, Tensor] = {}
        """Tables (buckets, H) of position biases."""
        self.selected: Tensor | None = None
        """Which keys the nearest indexer before has selected, (B, S, L); None: it left out none."""


class LayerInputs:
    """What the layers of one pass read beside the tokens that they map.

    One object goes through all blocks of a pass, and each block sets its own cache and streams.
    """

    def __init__(
        self,
        token_ids: Tensor | None = None,
        *,
        cache: Any = None,
        shared_kv: SharedKV | None = None,
        pending_shortcuts: list[Tensor | None] | None = None,
    ) -> None:
        self.token_ids = token_ids
        """(B, S) token ids."""
        self.cache = cache
        """The cache of the mixer of the current block, None without one."""
        self.shared_kv = shared_kv
        """Data that mixers share with mixers of later blocks; None in a layer outside of a
        model."""
        self.pending_shortcuts = pending_shortcuts
        """(B, S, D) outputs of shortcuts to be added at the end of this block, of the next one, and
        so on. None in a block outside of a model: there each joins at the end of its own block."""
        self.block_input: Tensor | None = None
        """(B, S, D) residual stream before the mixer of the block."""
        self.stream: Tensor | None = None
        """(B, S, D) residual stream that the norm before the current layer reads."""

    def router_input(self, source: str) -> Tensor | None:
        """Return what a router reads, (B, S, D): "stream", "block", or None for "ffn"."""
        if source == "ffn":
            return None
        return self.block_input if source == "block" else self.stream


class ReadsInputs(nn.Module):
    """A layer whose `forward` takes more than the tokens, and for a mixer the cache.

    Mixers and feed-forward layers derive from it where they read `LayerInputs`. All other modules
    are called as `mixer(x, cache)` and `ffn(x)`.
    """

    def run(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        """Map (B, S, D) to (B, S, D): call the module with what it reads of `inputs`."""
        raise NotImplementedError


class LayerIndexed(nn.Module):
    """A mixer that depends on the number of its layer; its config says so by `layer_indexed`."""

    def set_layer_index(self, index: int, n_layers: int) -> None:
        """Take the place `index` of `n_layers`, from 0."""
        raise NotImplementedError


def run_mixer(mixer: nn.Module, x: Tensor, inputs: LayerInputs) -> Tensor:
    """Return what a mixer makes of (B, S, D)."""
    if isinstance(mixer, ReadsInputs):
        return mixer.run(x, inputs)
    y: Tensor = mixer(x, inputs.cache)
    return y


def run_ffn(ffn: nn.Module, x: Tensor, inputs: LayerInputs) -> Tensor:
    """Return what a feed-forward layer makes of (B, S, D)."""
    if isinstance(ffn, ReadsInputs):
        return ffn.run(x, inputs)
    y: Tensor = ffn(x)
    return y
