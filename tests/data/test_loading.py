"""The data section, the corpora, their batches, their entropies and their cache."""

from __future__ import annotations

import math
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from moenas.data import entropy as counts
from moenas.data import loading
from moenas.data import text as texts
from moenas.data.corpus import Corpus
from moenas.data.loading import load, parse
from moenas.errors import DataError, SpaceError
from moenas.records import Plain
from moenas.resources import Node, parse_yaml


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moenas"


def section(text: str) -> Plain:
    return parse(parse_yaml(f"data:\n  {text}\n", "x.yaml").value["data"])  # type: ignore


def write_tokens(path: Path, tokens: Any, dtype: str = "uint16") -> Path:
    array = np.asarray(tokens, dtype=dtype)
    np.save(path, array) if path.suffix == ".npy" else array.tofile(path)
    return path


def corpus_of(tmp_path: Path, n: int, vocab_size: int = 500) -> Corpus:
    """An array in which every token says where it stands, as far as the vocabulary goes."""
    path = write_tokens(tmp_path / "t.bin", np.arange(n) % vocab_size)
    return load(section(f"{{tokens: {path}, vocab_size: {vocab_size}}}"))


# --- the section -------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "kind"), [("stdlib", "stdlib"), ("{kind: pydoc}", "pydoc")])
def test_built_in_corpora_go_by_name(text: str, kind: str) -> None:
    assert section(text) == {"kind": kind}


def test_files_become_absolute_and_patterns_the_files_they_match(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    (tmp_path / "sub.txt").mkdir()
    monkeypatch.chdir(tmp_path)
    wanted = [str(tmp_path / name) for name in ("a.txt", "b.txt", "c.md")]
    assert section("{files: ['*.txt', a.txt, c.md]}") == {"kind": "files", "files": wanted}
    assert section("{files: c.md}") == {"kind": "files", "files": wanted[2:]}


@pytest.mark.parametrize("suffix", ["bin", "npy"])
def test_a_folder_of_tokens_is_its_two_splits(tmp_path: Path, suffix: str) -> None:
    for split in ("train", "val"):
        write_tokens(tmp_path / f"{split}.{suffix}", range(9))
    found = section(f"{{tokens: {tmp_path}, vocab_size: 9}}")
    assert Path(found["tokens"]).name == f"train.{suffix}"
    assert Path(found["val"]).name == f"val.{suffix}"


@pytest.mark.parametrize(("size", "dtype"), [("65536", "uint16"), ("65537", "uint32")])
def test_raw_tokens_are_as_wide_as_the_vocabulary_asks(
    tmp_path: Path, size: str, dtype: str
) -> None:
    path = write_tokens(tmp_path / "t.bin", range(8), "uint32")
    assert section(f"{{tokens: {path}, vocab_size: {size}}}")["dtype"] == dtype


def test_a_npy_file_says_its_own_type(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "t.npy", range(8), "uint32")
    assert section(f"{{tokens: {path}, vocab_size: 9}}")["dtype"] == "uint32"


def test_what_parse_gives_reads_as_itself(tmp_path: Path) -> None:
    for name in ("t", "v"):
        write_tokens(tmp_path / f"{name}.npy", range(8), "uint32")
    text = f"{{tokens: {tmp_path}/t.npy, val: {tmp_path}/v.npy, vocab_size: 1e3}}"
    for found in (section("stdlib"), section(f"{{files: {tmp_path}/*}}"), section(text)):
        assert parse(Node.wrap(found)) == found


BAD = [
    ("stdlb", "2:3: data: no corpus 'stdlb'. Did you mean 'stdlib'?"),
    ("3", "2:3: data: 3 is no corpus; give stdlib, pydoc"),
    ("[stdlib]", "2:3: data: ['stdlib'] is no corpus"),
    ("{}", "2:3: data: names no corpus (nothing)"),
    ("{file: x}", "2:3: data: names no corpus (file). Did you mean 'files'?"),
    ("{kind: stdlib, shuffle: true}", "2:18: data.shuffle: no key of 'stdlib' data."),
    ("{kind: tokens}", "2:3: data: 'vocab_size' is missing"),
    ("{files: []}", "2:11: data.files: is empty"),
    ("{files: [GONE]}", "2:12: data.files: 'GONE' matches no file"),
    ("{files: 'DIR/*.tex'}", "2:11: data.files: 'DIR/*.tex' matches no file"),
    ("{files: DIR}", "2:11: data.files: 'DIR' is a folder; give 'DIR/*'"),
    ("{files: [3]}", "2:12: data.files: 3 is not a path"),
    ("{files: DIR/empty}", "2:11: data.files: 'DIR/empty' is empty"),
    ("{files: /dev/null}", "2:11: data.files: '/dev/null' is not a plain file"),
    ("{tokens: DIR/t.bin}", "2:3: data: 'vocab_size' is missing"),
    ("{tokens: DIR/t.bin, vocab_size: .5}", "data.vocab_size: 0.5 is not a whole number"),
    ("{tokens: DIR/t.bin, vocab_size: 1e999}", "data.vocab_size: inf is not a whole number"),
    ("{tokens: DIR/t.bin, vocab_size: yes}", "data.vocab_size: 'yes' is not a whole number"),
    ("{tokens: DIR/t.bin, vocab_size: 9, dtype: int8}", "data.dtype: 'int8' is not one of uint8"),
    ("{tokens: DIR/t.bin, vocab_size: 9, vocab: 3}", "no key of 'tokens' data. Did you mean"),
    ("{tokens: DIR/odd, vocab_size: 9}", "'DIR/odd' has 3 bytes, not whole uint16 numbers"),
    ("{tokens: DIR/t.bin, val: GONE, vocab_size: 9}", "data.val: 'GONE' does not exist"),
    ("{tokens: DIR, vocab_size: 9}", "data.tokens: 'DIR' has no train.bin and val.bin"),
    ("{tokens: DIR/fake.npy, vocab_size: 9}", "'DIR/fake.npy' is no .npy array"),
    ("{tokens: DIR/square.npy, vocab_size: 9}", "holds uint16 in shape (2, 2); give one row"),
    ("{tokens: DIR/float.npy, vocab_size: 9}", "holds float64 in shape (4,)"),
    ("{tokens: DIR/t.npy, dtype: uint32, vocab_size: 9}", "holds uint16 in shape (4,); give one row of uint32"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD, ids=[text for text, _ in BAD])
def test_a_bad_section_is_refused_at_its_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "odd").write_bytes(b"odd")
    (tmp_path / "fake.npy").write_bytes(b"not an array")
    np.save(tmp_path / "square.npy", np.zeros((2, 2), dtype=np.uint16))
    np.save(tmp_path / "float.npy", np.zeros(4))
    for name in ("t.bin", "t.npy"):
        write_tokens(tmp_path / name, range(4))
    with pytest.raises(SpaceError) as error:
        section(text.replace("DIR", str(tmp_path)))
    assert str(error.value).startswith("x.yaml:2:")
    assert message.replace("DIR", str(tmp_path)) in str(error.value)
    assert "\n" not in str(error.value)


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
    found = section(f"{{tokens: {path}, vocab_size: 100}}")
    path.write_bytes(b"odd")
    with pytest.raises(DataError, match="readable when the space was checked"):
        load(found)


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
        found = counts.Counts(7)
        found.add(a)
        found.add(b)
    wanted = brute_entropy([a.tolist(), b.tolist()])
    assert found.entropy() == pytest.approx(wanted, abs=1e-9)


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
    """Pinned: another order would make losses incomparable with those of stored studies."""
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
    found = section(f"{{tokens: {path}, vocab_size: 9}}")
    first = load(found)
    with monkeypatch.context() as patch:
        patch.setattr(loading.Counts, "add", lambda *args, **kwargs: pytest.fail("read again"))
        assert load(found).sha256 == first.sha256
    before = path.stat()
    write_tokens(path, [3, 2, 1] * 30)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as cp -p and rsync -t do
    assert load(found).sha256 != first.sha256


def test_tokens_replaced_by_others_of_the_same_size_and_time_are_noticed(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "t.bin", [1, 2, 3] * 30)
    os.utime(path, ns=(10**18, 10**18))
    found = section(f"{{tokens: {path}, vocab_size: 9}}")
    first = load(found)
    other = write_tokens(tmp_path / "other.bin", [3, 2, 1] * 30)
    os.utime(other, ns=(10**18, 10**18))
    os.replace(other, path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (180, 10**18)
    second = load(found)
    assert second.sha256 != first.sha256
    assert second.sha256 == load(section(f"{{tokens: {path}, vocab_size: 9}}")).sha256
    with path.open("r+b") as file:  # in place: the inode stays, too
        file.write(b"\x05\x00")
    os.utime(path, ns=(10**18, 10**18))
    assert load(found).sha256 not in (first.sha256, second.sha256)
