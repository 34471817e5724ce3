"""The strict YAML reader and the finding of files by name."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from moenas import resources as refs
from moenas.errors import InputError, NotFoundError, SpaceError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("2E6", 2e6),
        ("1_000", 1000),
        ("012", 12),
        ("12:30:45", "12:30:45"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("null", None),
        ("~", None),
        (".5", 0.5),
        ("'1'", "1"),
        ('"true"', "true"),
        ("1.2.3", "1.2.3"),
        ("-7", -7),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    plain = refs.parse_yaml(text, "f").plain
    assert plain == value
    assert type(plain) is type(value)


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("a: 1\na: 2", "f:2:1", "duplicate key"),
        ("a: &x 1\nb: *x", "f:1:4", "anchors"),
        ("a: !!python/object:os.system 1", "f:1:4", "tags"),
        ("a: [1, 2", "f:1:9", "not valid YAML"),
        ("a: 1\n b: 2", "f:2:3", "not valid YAML"),
        ("a: 1\n---\nb: 2", "f:2:1", "second document"),
        ("", "f:1:1", "empty"),
        ("? [1]\n: 2", "f:1:3", "a key must be a word"),
        ("a: \x00", "f", "not valid YAML"),
    ],
)
def test_bad_yaml_is_refused_at_its_place(text: str, place: str, words: str) -> None:
    with pytest.raises(SpaceError) as error:
        refs.parse_yaml(text, "f")
    assert str(error.value).startswith(f"{place}:")
    assert words in str(error.value)


def test_alias_bomb_and_deep_nesting_are_refused_at_once() -> None:
    bomb = "a0: &a0 [x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    start = time.monotonic()
    for text in (bomb, "[" * 5000, "{a: " * 3000, "- " * 3000):
        with pytest.raises(SpaceError):
            refs.parse_yaml(text, "f")
    assert time.monotonic() - start < 20


def test_marks_point_at_values_and_keys() -> None:
    root = refs.parse_yaml("a:\n  - {b: 1}\n", "f")
    assert isinstance(root.value, dict)
    items = root.value["a"].value
    assert isinstance(items, list)
    inner = items[0].value
    assert isinstance(inner, dict)
    assert str(inner["b"].mark) == "f:2:9"
    assert str(inner["b"].key_mark) == "f:2:6"


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(min_codepoint=32, max_codepoint=0x24F), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text("abcdef", min_size=1, max_size=5), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(plain)
@example("0E0")
def test_what_is_written_reads_back(value: object) -> None:
    text = refs.to_yaml(value)
    assert refs.parse_yaml(text, "f").plain == value
    assert yaml.safe_load(text) == value


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_by_a_space_error(text: str) -> None:
    message = None
    try:
        refs.parse_yaml(text, "f")
    except SpaceError as error:
        message = str(error)
    assert message is None or message.startswith("f:")


def test_yaml_round_trip_keeps_order() -> None:
    value = {"b": 1, "a": [1, {"c": None}]}
    plain = refs.parse_yaml(refs.to_yaml(value), "f").plain
    assert plain == value
    assert list(plain) == ["b", "a"]


def test_the_folder_here_shadows_what_was_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refs.find("spaces", ".yaml", "tiny") == refs.shipped("spaces") / "tiny.yaml"
    (tmp_path / "spaces").mkdir()
    (tmp_path / "spaces" / "tiny.yaml").write_text("mine")
    assert refs.find("spaces", ".yaml", "tiny") == Path("spaces/tiny.yaml")


def test_a_name_may_lead_into_a_folder_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = refs.shipped("spaces") / "zoo" / "mixtral_8x7b.yaml"
    assert refs.find("spaces", ".yaml", "zoo/mixtral_8x7b") == shipped
    with pytest.raises(NotFoundError, match="Did you mean 'zoo/mixtral_8x7b'"):
        refs.find("spaces", ".yaml", "zoo/mixtral_8x7")
    mine = Path("spaces/zoo/mixtral_8x7b.yaml")
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert refs.find("spaces", ".yaml", "zoo/mixtral_8x7b") == mine
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "mixtral_8x7b").write_text("a path comes first")
    assert refs.find("spaces", ".yaml", "zoo/mixtral_8x7b") == Path("zoo/mixtral_8x7b")


def test_a_missing_name_suggests_the_nearest() -> None:
    with pytest.raises(NotFoundError, match="Did you mean 'tiny'"):
        refs.find("spaces", ".yaml", "tyny")
    for path in ("nowhere/tiny.yaml", "a" * 5000 + ".yaml", "a\0b.yaml"):
        with pytest.raises(NotFoundError, match="no such file"):
            refs.find("spaces", ".yaml", path)


def test_a_word_brings_up_the_names_below_that_hold_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        NotFoundError, match=r"no 'Qwen3' .* 'zoo/qwen3_235b_a22b' or 'zoo/qwen3_30"
    ):
        refs.find("spaces", ".yaml", "Qwen3")
    with pytest.raises(NotFoundError) as error:
        refs.find("spaces", ".yaml", "b")
    assert str(error.value).partition("?")[0].count("'zoo/") == 3
    folder = tmp_path / "spaces" / "own"
    folder.mkdir(parents=True)
    (folder / "my_qwen3.yaml").write_text("mine")
    with pytest.raises(NotFoundError, match="mean 'own/my_qwen3' or 'zoo/qwen3_235b_a22b' or"):
        refs.find("spaces", ".yaml", "qwen3")


@pytest.mark.parametrize("ref", ["zoo/", "zoo"])
def test_a_folder_lists_its_names(ref, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError) as error:
        refs.find("spaces", ".yaml", ref)
    said = str(error.value)
    assert said.startswith(f"'{ref}' is a folder of spaces/; name one of: zoo/")
    names = {f"zoo/{path.stem}" for path in (refs.shipped("spaces") / "zoo").glob("*.yaml")}
    assert set(said.partition(": ")[2].split(", ")) == names


def test_a_wrong_name_in_a_folder_brings_up_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError, match=r"no 'zoo/mixtrl' .* Did you mean 'zoo/mixtral_8x"):
        refs.find("spaces", ".yaml", "zoo/mixtrl")
    for ref in ("/", "/etc", "nowhere/", "../zoo/dbrx"):
        with pytest.raises(NotFoundError, match="no such file"):
            refs.find("spaces", ".yaml", ref)


def test_a_guest_file_that_does_not_run_names_its_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("x = 1\ny = (\n")
    with pytest.raises(InputError, match=r"bad\.py:2:"):
        refs.load_module(bad)
    worse = tmp_path / "worse.py"
    worse.write_text("x = 1\ny = 1 / 0\n")
    with pytest.raises(InputError, match=r"worse\.py: line 2: ZeroDivisionError"):
        refs.load_module(worse)
    ending = tmp_path / "ending.py"
    ending.write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(InputError, match=r"ending\.py: line 2: SystemExit\(0\)"):
        refs.load_module(ending)


def test_two_guests_of_one_name_stay_two_modules(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder / "guest.py").write_text(f"VALUE = {value}\n")
    first = refs.load_module(tmp_path / "a" / "guest.py")
    second = refs.load_module(tmp_path / "b" / "guest.py")
    assert (first.VALUE, second.VALUE) == (1, 2)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    binary = tmp_path / "x.yaml"
    binary.write_bytes(b"a: \xff\xfe")
    with pytest.raises(InputError, match=r"x\.yaml: not UTF-8"):
        refs.read_text(binary)
    with pytest.raises(InputError, match="cannot be read"):
        refs.read_text(tmp_path)


# --- files of the working directory ----------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "objectives").mkdir(mode=0o755)
    (tmp_path / "objectives" / "val_loss.py").write_text("needs = 'cost'\n")
    return tmp_path / "objectives"


def test_a_file_that_shadows_a_shipped_one_is_named_once(here, monkeypatch):
    told = []
    monkeypatch.setattr(refs, "listener", told.append)
    for _ in range(2):
        assert refs.find("objectives", ".py", "val_loss") == Path("objectives/val_loss.py")
        refs.find("objectives", ".py", "decode_ms")
    assert told == ["using objectives/val_loss.py of this folder"]


@pytest.mark.parametrize(
    ("folder", "file", "reason"),
    [
        (0o777, 0o644, "lies in a folder that is writable by every user"),
        (0o755, 0o666, "is writable by every user"),
    ],
)
def test_a_file_that_any_user_may_write_is_not_used(here, folder, file, reason):
    (here / "val_loss.py").chmod(file)
    here.chmod(folder)
    with pytest.raises(InputError, match=f"objectives/val_loss.py: {reason}"):
        refs.find("objectives", ".py", "val_loss")
    assert refs.find("objectives", ".py", "decode_ms").is_file()
    here.chmod(0o1777)
    (here / "val_loss.py").chmod(0o644)
    assert refs.find("objectives", ".py", "val_loss")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_a_file_of_another_user_is_not_used(here):
    os.chown(here / "val_loss.py", 12345, -1)
    with pytest.raises(InputError, match=r"belongs to another user \(uid 12345\)"):
        refs.find("objectives", ".py", "val_loss")
