"""Keys, values and tables of position biases that a mixer shares with later ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from moenas.grammar.component import Conflict
from moenas.model.layer_inputs import LayerInputs, ReadsInputs, SharedKV

# Shapes: B sequences, K key-value heads, L tokens so far, C width of a head, H query heads.


class SharesKV(ReadsInputs):
    """A mixer that shares keys, values or a bias table with later mixers, or reads an earlier
    one's.

    `kv_source` n: it reads the keys of the n-th earlier mixer that has its own, None: its own.
    `bias_shared`: whether it reads the bias table of the nearest earlier mixer that has one, None:
    it needs no table.
    """

    def __init__(self, kv_source: int | None, bias_shared: bool | None) -> None:
        super().__init__()
        self.kv_source = kv_source
        self.bias_shared = bias_shared
        self.number = 0
        """Of its layer; `link_layers` sets it and all below from the place in a model."""
        self.shares_keys = False
        self.shares_table = False
        self.keys_from: int | None = None
        self.table_from: int | None = None

    def run(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        """Map (B, S, D) to (B, S, D) with the cache and the shared keys of a pass."""
        y: Tensor = self(x, inputs.cache, inputs.shared_kv)
        return y

    def publish_kv(self, keys: Tensor, values: Tensor, shared: SharedKV | None) -> None:
        """Leave keys and values (B, K, L, C) where they are read later."""
        if shared is not None and self.shares_keys:
            shared.keys[self.number] = keys, values

    def shared_kv_of(self, shared: SharedKV | None) -> tuple[Tensor, Tensor]:
        """Return the keys and values (B, K, L, C) of the layer that this one reads.

        Raises:
            ValueError: if the mixer is in no model, so that there are none.
        """
        if shared is None or self.keys_from is None:
            raise ValueError("keys and values of an earlier layer are read, and there is none")
        return shared.keys[self.keys_from]

    def table(self, own: Tensor | None, shared: SharedKV | None) -> Tensor | None:
        """Return the table (buckets, H) of another layer, or share one's `own`."""
        if shared is None or self.bias_shared is None:
            return None
        if own is not None and self.shares_table:
            shared.tables[self.number] = own
        return None if self.table_from is None else shared.tables[self.table_from]


def kv_sources(mixers: Sequence[Any]) -> list[tuple[int | None, int | None]]:
    """Return whose keys and whose table each mixer reads, by their places in the list.

    The mixers are modules or their records, by `kv_source` and `bias_shared`. None means that
    nothing is read, -1 where there is no such mixer before.
    """
    owners: list[int] = []
    tables: list[int] = []
    sources: list[tuple[int | None, int | None]] = []
    for i, mixer in enumerate(mixers):
        keys = table = None
        source = getattr(mixer, "kv_source", 0)
        if source is None:
            owners.append(i)
        elif source:
            keys = owners[-source] if source <= len(owners) else -1
        shared = getattr(mixer, "bias_shared", None)
        if shared:
            table = tables[-1] if tables else -1
        elif shared is not None:
            tables.append(i)
        sources.append((keys, table))
    return sources


def link_layers(mixers: Sequence[Any]) -> None:
    """Tell the mixers of a model, None where a layer has none, who reads what of whom."""
    for i, (keys, table) in enumerate(kv_sources(mixers)):
        if keys is not None:
            mixers[i].keys_from = keys
            mixers[keys].number, mixers[keys].shares_keys = keys, True
        if table is not None:
            mixers[i].table_from = table
            mixers[table].number, mixers[table].shares_table = table, True


def kv_source_error(mixers: Sequence[Any], d_model: int) -> Conflict | None:
    """Return which mixer cannot read keys or a table of an earlier one, and why, or None.

    The mixers are records, by layers; None where a layer has none.
    """
    for i, (keys, table) in enumerate(kv_sources(mixers)):
        if (reason := _source_error(mixers, i, (keys, table), d_model)) is not None:
            return Conflict(mixers[i], f"layer {i}: {reason}")
    return None


def _source_error(
    mixers: Sequence[Any], i: int, sources: tuple[int | None, int | None], d_model: int
) -> str | None:
    """Return why mixer `i` cannot read the keys or the table of its sources, or None."""
    mixer, (keys, table) = mixers[i], sources
    if keys == -1:
        return (
            f"kv_source: {mixer.kv_source}, but fewer attention layers before it"
            " have keys and values of their own; leave it out there"
        )
    if keys is not None and (name := mixer.kv_mismatch(mixers[keys], d_model)):
        return f"kv_source reads the keys of layer {keys}, and their {name} differ; make them equal"
    if table == -1:
        return (
            "position_bias is shared, but no layer before it has one of its own;"
            " the first must not be shared"
        )
    if table is not None and _table(mixer, d_model) != _table(mixers[table], d_model):
        return (
            f"position_bias is shared with layer {table}, and their n_heads or"
            " num_buckets differ; make them equal"
        )
    return None


def _table(mixer: Any, d_model: int) -> tuple[int, int]:
    """Return the shape of the table of a position bias."""
    return mixer.position_bias.num_buckets, mixer.heads_at(d_model)[0]
