"""What the documents say is so: commands, links, examples, tables and the tree of modules."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import moenas
from moenas import errors, resources
from moenas.cli.commands import app
from moenas.records import Cost
from moenas.space.objective import load_objective
from moenas.space.space import Space

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / ".github" / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
README_LINES = 130
"""Of the README: one page that is read whole."""
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page that are marked with a language; "" for none."""
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for marked, block in fenced if marked == language]


def typed(page: Path) -> Iterator[list[str]]:
    """The words of each command that a page tells one to type: in blocks, and in the text."""
    lines = [line for block in blocks(page, "") for line in block.splitlines()]
    lines += re.findall(r"`((?:moenas|make) [^`]+)`", page.read_text(encoding="utf-8"))
    for line in lines:
        for part in re.split(r" \| | > | && ", line.removeprefix("$ ")):
            words = shlex.split(part, comments=True) if re.match(r"moenas |make ", part) else []
            if words:
                yield words


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist_with_these_flags(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in typed(page):
        if words[0] == "make":
            assert words[1] in targets, words
        elif not words[1].startswith("-"):
            assert words[1] in COMMANDS, words
            command = COMMANDS[words[1]]
            if below := getattr(command, "commands", None):
                assert words[2] in below, words
                command = below[words[2]]
            flags = {flag for p in command.params for flag in p.opts if flag.startswith("-")}
            used = {w.partition("=")[0] for w in words[2:] if w.startswith("-")}
            assert used <= flags | {"-h", "--help"}, words


def test_every_command_is_documented() -> None:
    told = {words[1] for page in PAGES for words in typed(page) if words[0] == "moenas"}
    assert set(COMMANDS) - told == set()


def test_every_objective_is_documented() -> None:
    text = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    rows = {
        cells[1].strip(" `"): [c.strip() for c in cells[2:4]]
        for line in text.splitlines()
        if len(cells := line.split("|")) == 6
    }
    for name in resources.listing("objectives", ".py"):
        objective = load_objective(name)
        assert rows[name] == [objective.unit or "none", objective.needs]


def test_the_template_names_every_objective() -> None:
    text = (ROOT / "spaces" / "_template.yaml").read_text(encoding="utf-8")
    assert [name for name in resources.listing("objectives", ".py") if name not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        there = page if not path else (page.parent / path)
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_examples_in_yaml_are_valid(page: Path) -> None:
    for block in blocks(page, "yaml"):
        if "use: [" in block:
            continue  # tests/grammar/test_user_parts.py runs it
        if page.name == "recipes.md":
            continue  # tests/test_recipes.py runs it
        if "architecture:" in block and "objectives:" in block:
            Space.parse(block, name_of(page))
        else:
            for line in block.splitlines():
                resources.parse_yaml(line, name_of(page))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_examples_in_python_use_names_that_exist(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "moenas":
                assert hasattr(moenas, node.attr), node.attr


RUN = {
    "docs/getting_started.md": "test_the_example_of_the_python_interface_runs, here",
    "docs/objectives.md": "test_the_example_of_an_objective_measures, here",
    "docs/service.md": "tests/service/test_service_page.py",
    "docs/recipes.md": "tests/test_recipes.py",
    "docs/parts.md": "tests/grammar/test_user_parts.py",
    "docs/tracing.md": "tests/export/test_tracing.py",
}
"""Pages with Python -> the test that runs it."""


def test_every_page_with_python_has_a_test_that_runs_it() -> None:
    assert {name_of(page) for page in PAGES if blocks(page, "python")} == set(RUN)


def test_the_example_of_the_python_interface_runs(tmp_path: Path) -> None:
    """The block of the page, with fewer tokens and trials, in this process without Ray."""
    (block,) = blocks(ROOT / "docs" / "getting_started.md", "python")
    for words, fewer in (
        ('"train.tokens=200_000"', '"train.tokens=4_096", "train.val_tokens=2_048"'),
        ("spaces/tiny.yaml", str(ROOT / "spaces" / "tiny.yaml")),
        ("trials=24", 'trials=1, workers="inline"'),
        ("architecture(7)", "architecture(0)"),
    ):
        assert block.count(words) == 1, words
        block = block.replace(words, fewer)
    (tmp_path / "page.py").write_text(f"{block}print(len(study.dataframe()), type(model))\n")
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    size, member, *_, last = done.stdout.splitlines()
    assert int(size) == Space.load("tiny").size
    assert "val_loss" in member
    assert last == "1 <class 'moenas.model.architecture.Model'>"


def test_the_example_of_an_objective_measures() -> None:
    (source,) = blocks(ROOT / "docs" / "objectives.md", "python")
    objective = load_objective("kv_bytes", source)

    class Subject:
        cost = Cost(kv_bytes_per_token=96)

    assert objective.measure(Subject()).value == 96


def test_the_table_of_exit_codes_is_whole() -> None:
    text = (ROOT / "docs" / "getting_started.md").read_text(encoding="utf-8")
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and hasattr(k, "exit_code")]
    assert {kind.exit_code for kind in kinds} <= listed


def test_the_page_and_the_picture_of_the_packages_are_those_of_the_code(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "packages.py"), str(tmp_path)]
    subprocess.run(command, check=True, timeout=60)
    for name in ("architecture.md", "packages.svg"):
        assert (tmp_path / name).read_text() == (ROOT / "docs" / name).read_text(), "make docs"


def test_the_readme_is_short_and_names_every_package() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= README_LINES
    packages = {p.parent.name for p in (ROOT / "moenas").glob("*/__init__.py")}
    assert {name for name in packages if f"`{name}`" not in text} == set()


def test_the_space_of_the_readme_is_the_shipped_one() -> None:
    (space,) = blocks(ROOT / "README.md", "yaml")
    shipped = (ROOT / "spaces" / "tiny.yaml").read_text(encoding="utf-8")
    assert space.strip() in shipped


def test_every_public_name_can_be_had() -> None:
    assert [name for name in dir(moenas) if getattr(moenas, name) is None] == []


def test_the_changelog_tells_what_is_new() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    unreleased = text.partition("## [Unreleased]\n")[2].partition("\n## ")[0]
    assert re.search(r"^### (Added|Changed|Fixed|Removed)\n\n- ", unreleased, re.MULTILINE)
