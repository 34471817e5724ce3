"""What is installed: one top-level name, with every file of the package and of the three folders."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUFFIXES = {".py", ".yaml", ".json", ".html", ".css", ".js"}
FOLDERS = {"spaces": "*.yaml", "objectives": "*.py", "dashboards": "*.py"}


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def shipped_files() -> set[str]:
    """The names that the wheel must hold, read off the checkout."""
    ours = (p for p in (ROOT / "moenas").rglob("*") if p.suffix in SUFFIXES)
    files = {str(p.relative_to(ROOT)) for p in ours} | {"moenas/py.typed"}
    for folder, pattern in FOLDERS.items():
        shipped = (p.relative_to(ROOT) for p in (ROOT / folder).rglob(pattern) if p.is_file())
        files |= {f"moenas/_shipped/{p}" for p in shipped if "__pycache__" not in p.parts}
    return files


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without the network from a copy, so that no build/ is left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("moenas", *FOLDERS):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source)
    (built,) = out.glob("*.whl")
    return built


def test_the_only_top_level_name_is_moenas(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"moenas"}
    assert len(tops) == 2


def test_nothing_is_left_out_and_nothing_more_is_in(wheel: Path) -> None:
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert names == shipped_files()


def test_installed_it_finds_what_was_shipped(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip("install", "--no-deps", "--no-index", "--target", target, wheel)
    probe = """
import sys
sys.path.insert(0, sys.argv[1])
from moenas import resources
for folder, suffix in (
    ("spaces", ".yaml"), ("spaces/zoo", ".yaml"), ("objectives", ".py"), ("dashboards", ".py")
):
    for path in resources.listing(folder, suffix).values():
        assert path.is_relative_to(sys.argv[1]), path
        print(f"{folder}/{path.name}")
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", probe, str(target)],
        cwd=tmp_path,
        env={},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = {
        f"{folder}/{path.name}"
        for folder, pattern in {**FOLDERS, "spaces/zoo": "*.yaml"}.items()
        for path in (ROOT / folder).glob(f"[!_]{pattern}")
    }
    assert set(done.stdout.split()) == expected
