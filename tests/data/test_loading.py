"""The corpora, their batches, their entropies and their cache."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import tokenizers
import torch
from corpora import section, write_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pyarrow import feather, parquet

from moenas.data import entropy as counts
from moenas.data import loading
from moenas.data import text as texts
from moenas.data.corpus import Corpus
from moenas.data.loading import load
from moenas.data.tokenizer_file import stored
from moenas.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moenas"


def corpus_of(tmp_path: Path, n: int, vocab_size: int = 500) -> Corpus:
    """An array in which every token says where it stands, as far as the vocabulary goes."""
    path = write_tokens(tmp_path / "t.bin", np.arange(n) % vocab_size)
    return load(section(f"{{tokens: {path}, vocab_size: {vocab_size}}}"))


# --- the corpora -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return load({"kind": "stdlib"})


def test_the_manifest_of_the_library_says_what_it_holds(stdlib: Corpus) -> None:
    manifest = stdlib.manifest
    sizes = Counter[str]()
    for row in manifest["files"]:
        sizes[row["split"]] += row["bytes"]
    assert sizes["train"] == pytest.approx(len(stdlib.train), rel=1e-3) == manifest["train_tokens"]
    assert sizes["val"] == pytest.approx(len(stdlib.val), rel=1e-3) == manifest["val_tokens"]
    assert (stdlib.vocab_size, stdlib.is_bytes, stdlib.name) == (256, True, "stdlib")
    assert manifest["sha256"] == stdlib.sha256


def test_python_code_is_as_predictable_as_known(stdlib: Corpus) -> None:
    """About 4.5 bits a byte alone and 3.5 after the byte before, in every release."""
    bits = [h / math.log(2) for h in stdlib.entropy if h is not None]
    assert bits == pytest.approx([4.53, 3.49], abs=0.05)


def test_files_are_a_corpus_of_their_bytes(tmp_path: Path) -> None:
    text = bytes(range(256)) * 20
    (tmp_path / "a.txt").write_bytes(text)
    corpus = load(section(f"{{files: {tmp_path}/a.txt}}"))
    assert corpus.train.tobytes() + corpus.val.tobytes() == text
    assert corpus.is_bytes


@pytest.mark.parametrize("suffix", ["bin", "npy"])
def test_tokens_are_mapped_and_their_tail_validates(tmp_path: Path, suffix: str) -> None:
    path = write_tokens(tmp_path / f"t.{suffix}", np.arange(1000) % 300)
    corpus = load(section(f"{{tokens: {path}, vocab_size: 300}}"))
    assert isinstance(corpus.train, np.memmap)
    assert (len(corpus.train), len(corpus.val)) == (950, 50)
    assert np.concatenate([corpus.train, corpus.val]).tolist() == [i % 300 for i in range(1000)]
    assert (corpus.is_bytes, corpus.manifest["dtype"]) == (False, "uint16")


def test_two_arrays_are_the_two_splits(tmp_path: Path) -> None:
    train = write_tokens(tmp_path / "a.bin", [1, 2, 3])
    val = write_tokens(tmp_path / "b.bin", [4, 5])
    corpus = load(section(f"{{tokens: {train}, val: {val}, vocab_size: 6}}"))
    assert (corpus.train.tolist(), corpus.val.tolist()) == ([1, 2, 3], [4, 5])


@pytest.mark.parametrize("place", [3, 990, 2500])
def test_a_token_outside_the_vocabulary_is_found(
    tmp_path: Path, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counts, "CHUNK", 256)
    tokens = np.zeros(2600, dtype=np.uint16)
    tokens[[place, 2599]] = 50, 60
    path = write_tokens(tmp_path / "t.bin", tokens)
    with pytest.raises(DataError, match=rf"t\.bin: token 50 at position {place} is not below"):
        load(section(f"{{tokens: {path}, vocab_size: 50}}"))


def test_tokens_that_were_cut_short_since_are_refused(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "t.bin", range(100))
    data = section(f"{{tokens: {path}, vocab_size: 100}}")
    path.write_bytes(b"odd")
    with pytest.raises(DataError, match="readable when the space was checked"):
        load(data)


@pytest.mark.parametrize(
    ("context", "vocab_size", "message"),
    [(10, 500, None), (60, 500, "val split of .* holds 50"), (2000, 500, "train split of .* holds 950"), (10, 499, "vocab_size: 500")],
)  # fmt: skip
def test_a_corpus_says_when_it_is_too_small(
    tmp_path: Path, context: int, vocab_size: int, message: str | None
) -> None:
    corpus = corpus_of(tmp_path, 1000)
    if message is None:
        corpus.require(context, vocab_size)
    else:
        with pytest.raises(DataError, match=message):
            corpus.require(context, vocab_size)


# --- digest and entropy ------------------------------------------------------------------------


def test_the_digest_depends_on_tokens_and_split_alone(tmp_path: Path) -> None:
    def digest(train: list[int], val: list[int], suffix: str = "bin") -> str:
        a = write_tokens(tmp_path / f"a.{suffix}", train)
        b = write_tokens(tmp_path / f"b.{suffix}", val)
        return load(section(f"{{tokens: {a}, val: {b}, vocab_size: 9}}")).sha256

    known = digest([1, 2, 3], [4])
    assert digest([1, 2, 3], [4], "npy") == known
    assert known not in {digest([1, 2], [3, 4]), digest([1, 2, 4], [3]), digest([1, 2, 3], [5])}


def brute_entropy(splits: list[list[int]]) -> tuple[float, float]:
    """H(X) and H(X, Y) - H(X) over pairs of neighbours, from their definition."""

    def entropy(counts: Counter[Any]) -> float:
        total = sum(counts.values())
        return -sum(n / total * math.log(n / total) for n in counts.values())

    pairs = Counter(p for s in splits for p in pairwise(s))
    firsts = Counter[int]()
    for (first, _), n in pairs.items():
        firsts[first] += n
    return entropy(Counter(x for s in splits for x in s)), entropy(pairs) - entropy(firsts)


@settings(max_examples=50, deadline=None)
@given(
    arrays.arrays(np.uint16, st.integers(1, 60), elements=st.integers(0, 6)),
    arrays.arrays(np.uint16, st.integers(1, 60), elements=st.integers(0, 6)),
    st.integers(1, 20),
)
def test_entropies_are_those_of_their_definition(a: Any, b: Any, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counts, "CHUNK", chunk)
        counted = counts.Counts(7)
        counted.add(a)
        counted.add(b)
    wanted = brute_entropy([a.tolist(), b.tolist()])
    assert counted.entropy() == pytest.approx(wanted, abs=1e-9)


def test_large_vocabularies_have_no_order_1_entropy_and_say_so(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, 10_000, vocab_size=5000)
    assert corpus.entropy == [pytest.approx(math.log(5000)), None]
    assert "4096" in corpus.manifest["entropy_note"]


# --- batches -----------------------------------------------------------------------------------


def test_a_batch_depends_on_seed_and_step_alone(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, 5000)
    tokens, targets = corpus.batch(7, 4, 16, seed=3)
    corpus.batch(8, 4, 16, seed=3)
    assert tokens.shape == targets.shape == (4, 16)
    assert tokens.dtype == targets.dtype == torch.int64
    assert torch.equal(corpus.batch(7, 4, 16, seed=3)[0], tokens)
    assert not torch.equal(corpus.batch(8, 4, 16, seed=3)[0], tokens)
    assert not torch.equal(corpus.batch(7, 4, 16, seed=4)[0], tokens)
    assert torch.equal(corpus.batch(7, 2, 16, seed=3)[0], tokens[:2])


def test_the_order_of_data_is_the_same_in_every_release(tmp_path: Path) -> None:
    """Pinned: another order would make losses incomparable with losses of stored studies."""
    corpus = corpus_of(tmp_path, 5000)
    assert corpus.batch(0, 4, 8, seed=0)[0][:, 0].tolist() == [107, 328, 7, 348]


def test_targets_follow_their_tokens(tmp_path: Path) -> None:
    tokens, targets = corpus_of(tmp_path, 5000).batch(0, 8, 32, seed=0)
    assert torch.equal((tokens + 1) % 500, targets)


def test_crops_start_anywhere_and_stay_inside(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, 42, vocab_size=42)
    starts = {int(x) for s in range(50) for x in corpus.batch(s, 8, 30, seed=0)[0][:, 0]}
    assert starts == set(range(40 - 30))


@settings(max_examples=60, deadline=None)
@given(st.integers(20, 400), st.integers(1, 30), st.integers(1, 7), st.integers(1, 600))
def test_validation_windows_are_spread_and_disjoint(
    size: int, context: int, batch: int, tokens: int
) -> None:
    if size < context + 1:
        return
    val = np.arange(size, dtype=np.uint16)
    corpus = Corpus("x", val, val, 400, False, "", [None, None], {})
    batches = list(corpus.val_batches(context, batch, tokens))
    starts = [int(x) for t, _ in batches for x in t[:, 0]]
    assert len(starts) == max(1, min(tokens // context, (size - 1) // context))
    gaps = np.diff(starts)
    assert starts[0] == 0
    assert all(gaps >= context)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1
    assert len(gaps) == 0 or starts[-1] == size - 1 - context
    assert all(len(t) == batch for t, _ in batches[:-1])
    assert all(torch.equal(t + 1, targets) for t, targets in batches)


# --- the cache ---------------------------------------------------------------------------------


@pytest.fixture
def few_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = texts.stdlib_sources()[:40]
    monkeypatch.setattr(texts, "stdlib_sources", lambda: sources)


@pytest.mark.usefixtures("few_sources")
def test_a_kept_corpus_is_the_corpus(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load({"kind": "stdlib"})
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(texts, "stdlib", lambda sources: pytest.fail("built again"))
    again = load({"kind": "stdlib"})
    assert again.manifest == first.manifest
    assert again.train.tolist() == first.train.tolist()
    assert again.val.tolist() == first.val.tolist()


@pytest.mark.usefixtures("few_sources")
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "nonsense"])
def test_a_damaged_cache_is_built_again(cache: Path, damage: str) -> None:
    first = load({"kind": "stdlib"})
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(
        {
            "flip": whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:],
            "cut": whole[:-1],
            "empty": b"",
            "nonsense": b"[1, 2]\nxyz",
        }[damage]
    )
    assert load({"kind": "stdlib"}).train.tolist() == first.train.tolist()
    assert kept.read_bytes() == whole


@pytest.mark.usefixtures("few_sources")
@pytest.mark.parametrize("place", ["/dev/null", "/proc/none", "relative"])
def test_a_cache_that_cannot_be_written_is_none(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", place)
    assert len(load({"kind": "stdlib"}).train)
    assert not list(tmp_path.iterdir())


def test_tokens_are_read_whole_once_and_again_when_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tokens(tmp_path / "t.bin", [1, 2, 3] * 30)
    data = section(f"{{tokens: {path}, vocab_size: 9}}")
    first = load(data)
    with monkeypatch.context() as patch:
        patch.setattr(loading.Counts, "add", lambda *args, **kwargs: pytest.fail("read again"))
        assert load(data).sha256 == first.sha256
    before = path.stat()
    write_tokens(path, [3, 2, 1] * 30)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as cp -p and rsync -t do
    assert load(data).sha256 != first.sha256


def test_tokens_replaced_by_others_of_the_same_size_and_time_are_noticed(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "t.bin", [1, 2, 3] * 30)
    os.utime(path, ns=(10**18, 10**18))
    data = section(f"{{tokens: {path}, vocab_size: 9}}")
    first = load(data)
    other = write_tokens(tmp_path / "other.bin", [3, 2, 1] * 30)
    os.utime(other, ns=(10**18, 10**18))
    os.replace(other, path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (180, 10**18)
    second = load(data)
    assert second.sha256 != first.sha256
    assert second.sha256 == load(section(f"{{tokens: {path}, vocab_size: 9}}")).sha256
    with path.open("r+b") as file:  # in place: the inode stays, too
        file.write(b"\x05\x00")
    os.utime(path, ns=(10**18, 10**18))
    assert load(data).sha256 not in (first.sha256, second.sha256)


# --- text with a tokenizer, columns, shards ------------------------------------------------------


def test_digests_are_those_of_earlier_versions(tmp_path: Path) -> None:
    """Pinned: evaluations of stored studies are found by them."""
    for i in range(3):
        (tmp_path / f"{i}.txt").write_bytes(f"text {i} \u00fcber\r\n".encode() * 40)
    write_tokens(tmp_path / "t.bin", np.arange(900) % 300)
    files, tokens = (
        f"{{files: '{tmp_path}/*.txt'}}",
        f"{{tokens: {tmp_path}/t.bin, vocab_size: 300}}",
    )
    assert load(section(files)).sha256[:16] == "62f222de51a02198"
    assert load(section(tokens)).sha256[:16] == "bd1c839d5395ebbb"


@pytest.mark.parametrize("suffix", ["npy", "bin"])
def test_shards_are_the_corpus_of_their_concatenation(tmp_path: Path, suffix: str) -> None:
    tokens = np.random.default_rng(0).integers(0, 300, 5000)
    for name, part in (("2", tokens[:1700]), ("10", tokens[1700:1701]), ("9", tokens[1701:])):
        write_tokens(tmp_path / f"shard_{name}.{suffix}", part)
    ordered = np.concatenate([tokens[:1700], tokens[1701:], tokens[1700:1701]])
    whole = write_tokens(tmp_path / f"whole.{suffix}", ordered)
    shards = load(section(f"{{tokens: '{tmp_path}/shard_*.{suffix}', vocab_size: 300}}"))
    one = load(section(f"{{tokens: {whole}, vocab_size: 300}}"))
    assert shards.sha256 == one.sha256
    assert shards.entropy == one.entropy
    assert shards.bigram_loss == one.bigram_loss
    for step in range(20):
        both = [corpus.batch(step, 8, 32, seed=1) for corpus in (shards, one)]
        assert torch.equal(both[0][0], both[1][0])
        assert torch.equal(both[0][1], both[1][1])
    assert np.array_equal(shards.crops([0, 5], 4, 16, 0), one.crops([0, 5], 4, 16, 0))
    windows = [list(corpus.val_batches(16, 4, 200)) for corpus in (shards, one)]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(*windows, strict=True))


def test_a_token_outside_the_vocabulary_is_found_in_its_shard(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.bin", range(40))
    write_tokens(tmp_path / "b.bin", [1, 2, 99, 3])
    with pytest.raises(DataError, match=r"b\.bin: token 99 at position 2 is not below"):
        load(section(f"{{tokens: [{tmp_path}/a.bin, {tmp_path}/b.bin], vocab_size: 40}}"))


def test_val_of_ones_own_validates_and_nothing_else_does(tmp_path: Path) -> None:
    for name in ("a", "b", "v"):
        (tmp_path / f"{name}.txt").write_text(f"{name} text\n" * 50)
    corpus = load(
        section(f"{{files: ['{tmp_path}/a.txt', '{tmp_path}/b.txt'], val: '{tmp_path}/v.txt'}}")
    )
    assert corpus.val.tobytes() == (tmp_path / "v.txt").read_bytes()
    assert corpus.train.tobytes() == b"a text\n" * 50 + b"b text\n" * 50
    assert corpus.domain_names


def trained_tokenizer(path: Path, size: int = 300) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the cat and the dog \u00fcber the hill"] * 20, trainer)
    made.save(str(path))
    return made


def test_text_with_a_tokenizer_is_the_tokens_of_that_library(tmp_path: Path) -> None:
    made = trained_tokenizer(tmp_path / "tokenizer.json")
    texts = {name: f"{name}: the cat \u00fcber the dog\n" * 30 for name in "abcdef"}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "val.md").write_text("the hill and the cat\n" * 9)
    data = section(
        f"{{files: '{tmp_path}/*.txt', val: {tmp_path}/val.md, tokenizer: {tmp_path}/tokenizer.json}}"
    )
    corpus = load(data)
    end = made.token_to_id("<|endoftext|>")
    wanted = [i for text in texts.values() for i in [*made.encode(text).ids, end]]
    assert np.asarray(corpus.train).tolist() == wanted
    assert made.decode(np.asarray(corpus.val).tolist()) == (tmp_path / "val.md").read_text()
    assert (corpus.vocab_size, corpus.is_bytes) == (made.get_vocab_size(), False)
    again = load(data)
    assert isinstance(again.train, np.memmap)
    assert again.sha256 == corpus.sha256
    assert again.manifest == corpus.manifest
    assert stored(again.manifest) == (tmp_path / "tokenizer.json").read_text()


def test_a_split_cuts_no_character_in_two(tmp_path: Path) -> None:
    made = trained_tokenizer(tmp_path / "tokenizer.json")
    for length in range(100, 108):
        (tmp_path / "a.txt").write_text("\u00fc\u4e2d" * length)
        corpus = load(
            section(f"{{files: {tmp_path}/a.txt, tokenizer: {tmp_path}, end_of_text: null}}")
        )
        parts = [made.decode(np.asarray(split).tolist()) for split in (corpus.train, corpus.val)]
        assert "".join(parts) == "\u00fc\u4e2d" * length


def test_a_changed_text_is_encoded_again(tmp_path: Path) -> None:
    trained_tokenizer(tmp_path / "tokenizer.json")
    path = tmp_path / "a.txt"
    path.write_text("the cat " * 99)
    data = section(f"{{files: {path}, tokenizer: {tmp_path}}}")
    before = path.stat()
    first = load(data).sha256
    path.write_text("the dog " * 99)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load(data).sha256 != first


def test_text_that_is_not_utf8_is_refused_with_its_place(tmp_path: Path) -> None:
    trained_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 " * 9)
    with pytest.raises(DataError, match=r"a\.txt: byte 3 is not UTF-8"):
        load(section(f"{{files: {tmp_path}/a.txt, tokenizer: {tmp_path}}}"))


@pytest.mark.parametrize("has_val", [False, True])
def test_a_column_is_its_rows_and_equal_rows_are_in_one_split(
    tmp_path: Path, has_val: bool
) -> None:
    rows = [f"row {i % 700} of text" for i in range(1400)]
    parquet.write_table(pyarrow.table({"id": range(1400), "text": rows}), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"text": ["held out", None]}), tmp_path / "v.parquet")
    val = f", val: {tmp_path}/v.parquet" if has_val else ""
    corpus = load(section(f"{{files: {tmp_path}/a.parquet{val}}}"))
    train, held_out = (
        split.tobytes().decode().splitlines() for split in (corpus.train, corpus.val)
    )
    if has_val:
        assert (train, held_out) == (rows, ["held out"])
        return
    assert Counter(train) + Counter(held_out) == Counter(rows)
    assert not set(train) & set(held_out)
    assert 0.03 < len(held_out) / len(rows) < 0.07


def test_one_column_is_one_corpus_in_every_format(tmp_path: Path) -> None:
    table = pyarrow.table({"n": range(500), "words": [f"row {i}\nof text" for i in range(500)]})
    parquet.write_table(table, tmp_path / "a.parquet")
    feather.write_feather(table, str(tmp_path / "a.arrow"), compression="uncompressed")
    with pyarrow.ipc.new_stream(str(tmp_path / "a.stream"), table.schema) as stream:
        stream.write_table(table, max_chunksize=64)
    rows = table.to_pylist()
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    digests = {
        load(section(f"{{files: {tmp_path}/a.{suffix}, text_column: words}}")).sha256
        for suffix in ("parquet", "arrow", "stream", "jsonl")
    }
    assert len(digests) == 1


def test_a_bad_line_of_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: is no JSON"):
        load(section(f"{{files: {tmp_path}/a.jsonl, text_column: text}}"))
