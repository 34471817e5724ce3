"""What a mixer reads of an earlier one: keys and values, and the table of a position bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from moenas.grammar.component import Conflict

# Shapes: B sequences, K key-value heads, L tokens so far, C width of a head, H query heads.


class SharedKV:
    """What the mixers of one pass lend to later ones, by the numbers of their layers."""

    def __init__(self) -> None:
        self.keys: dict[int, tuple[Tensor, Tensor]] = {}
        """Keys and values (B, K, L, C) of all tokens so far, as queries meet them."""
        self.tables: dict[int, Tensor] = {}
        """Tables (buckets, H) of position biases."""


class SharesKV(nn.Module):
    """A mixer that lends to later ones, or reads what earlier ones lend; `forward` takes `lent`.

    `kv_source` n: its keys are those of the n-th mixer before that has its own, None: its own.
    `bias_shared`: whether the table of its position bias is that of the nearest mixer before that
    has one, None: it needs none.
    """

    lends = True
    """`forward` also takes what is lent."""

    def __init__(self, kv_source: int | None, bias_shared: bool | None) -> None:
        super().__init__()
        self.kv_source = kv_source
        self.bias_shared = bias_shared
        self.number = 0
        """Of its layer; with all below it follows from the place in a model: see `link`."""
        self.lends_keys = False
        self.lends_table = False
        self.keys_from: int | None = None
        self.table_from: int | None = None

    def publish_kv(self, keys: Tensor, values: Tensor, lent: SharedKV | None) -> None:
        """Leave keys and values (B, K, L, C) where they are read later."""
        if lent is not None and self.lends_keys:
            lent.keys[self.number] = keys, values

    def shared_kv_of(self, lent: SharedKV | None) -> tuple[Tensor, Tensor]:
        """Return the keys and values (B, K, L, C) of the layer that this one reads.

        Raises:
            ValueError: if the mixer stands in no model, where there are none.
        """
        if lent is None or self.keys_from is None:
            raise ValueError("keys and values of an earlier layer are read, and there is none")
        return lent.keys[self.keys_from]

    def table(self, own: Tensor | None, lent: SharedKV | None) -> Tensor | None:
        """Return the table (buckets, H) that another layer lends, or lend one's `own`."""
        if lent is None or self.bias_shared is None:
            return None
        if own is not None and self.lends_table:
            lent.tables[self.number] = own
        return None if self.table_from is None else lent.tables[self.table_from]


def lenders(mixers: Sequence[Any]) -> list[tuple[int | None, int | None]]:
    """Return whose keys and whose table each mixer reads, by their places in the list.

    The mixers are modules or their records, by `kv_source` and `bias_shared`. None stands where
    nothing is read, -1 where there is no such mixer before.
    """
    owners: list[int] = []
    tables: list[int] = []
    found: list[tuple[int | None, int | None]] = []
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
        found.append((keys, table))
    return found


def link(mixers: Sequence[Any]) -> None:
    """Tell the mixers of a model, None where a layer has none, who reads what of whom."""
    for i, (keys, table) in enumerate(lenders(mixers)):
        if keys is not None:
            mixers[i].keys_from = keys
            mixers[keys].number, mixers[keys].lends_keys = keys, True
        if table is not None:
            mixers[i].table_from = table
            mixers[table].number, mixers[table].lends_table = table, True


def kv_source_error(mixers: Sequence[Any], d_model: int) -> Conflict | None:
    """Return which mixer cannot read what it would of an earlier one, and why, or None.

    The mixers are records, by layers; None where a layer has none.
    """
    for i, (keys, table) in enumerate(lenders(mixers)):
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
    if keys is not None and (name := mixer.unlike(mixers[keys], d_model)):
        return f"kv_source reads the keys of layer {keys}, and their {name} differ; make them equal"
    if table == -1:
        return (
            "position_bias is shared, but no layer before it has one of its own;"
            " the first must not be shared"
        )
    if table is not None and _table(mixer, d_model) != _table(mixers[table], d_model):
        return (
            f"position_bias is that of layer {table}, and their n_heads or"
            " num_buckets differ; make them equal"
        )
    return None


def _table(mixer: Any, d_model: int) -> tuple[int, int]:
    """Return the shape of the table of a position bias."""
    return mixer.position_bias.num_buckets, mixer.heads_at(d_model)[0]
