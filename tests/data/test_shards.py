"""Shards read as one array: against numpy's concatenation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moenas.data.shards import Shard, ShardedTokens, divided, joined


def shards(lengths: list[int]) -> tuple[ShardedTokens, np.ndarray]:
    whole = np.arange(sum(lengths), dtype=np.uint16)
    parts = np.split(whole, np.cumsum(lengths)[:-1])
    return ShardedTokens([Shard(f"{i}.bin", part) for i, part in enumerate(parts)]), whole


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_slices_and_places_are_those_of_the_concatenation(
    lengths: list[int], data: st.DataObject
) -> None:
    parts, whole = shards(lengths)
    ends = st.one_of(st.none(), st.integers(-3, len(whole) + 3))
    cut = slice(data.draw(ends), data.draw(ends))
    assert parts[cut].tolist() == whole[cut].tolist()
    places = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1)))
    assert parts[places].tolist() == whole[places].tolist()
    square = np.stack([places, places[::-1]])
    assert parts[square].tolist() == whole[square].tolist()
    assert parts[square].dtype == whole.dtype
    assert len(parts) == len(whole)
    assert np.asarray(parts).tolist() == whole.tolist()


@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.data())
def test_a_split_keeps_the_places_in_the_files(lengths: list[int], data: st.DataObject) -> None:
    parts, whole = shards(lengths)
    at = data.draw(st.integers(0, len(whole)))
    before, after = divided(parts, at)
    assert before[:].tolist() == whole[:at].tolist()
    assert after[:].tolist() == whole[at:].tolist()
    assert isinstance(after, ShardedTokens)
    starts = np.cumsum([0, *lengths])
    for i in range(len(whole) - at):
        path, place = after.place(i)
        assert starts[int(path.removesuffix(".bin"))] + place == at + i


def test_one_shard_is_the_array_itself() -> None:
    tokens = np.arange(9, dtype=np.uint16)
    assert joined([Shard("a.bin", tokens)]) is tokens
    assert divided(tokens, 4)[1].tolist() == [4, 5, 6, 7, 8]


def test_a_place_outside_is_refused() -> None:
    with pytest.raises(IndexError):
        shards([3, 4])[0][np.array([7])]
