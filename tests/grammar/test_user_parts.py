"""Parts of a guest's file: the examples of the documents, in a study, in an export, and refused."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moenas import resources
from moenas.errors import InputError, PartError, SpaceError
from moenas.export.formats import export
from moenas.grammar import user_parts
from moenas.model import Mixer, Score, Selection
from moenas.space.space import Space
from moenas.study.launch import load_study, run
from moenas.testing import parts

pytestmark = pytest.mark.integration

PAGE = (Path(__file__).parents[2] / "docs" / "parts.md").read_text(encoding="utf-8")
FILES = ("sparsemax.py", "gumbel.py", "average.py")
KINDS = ("sparsemax", "gumbel_top_k", "average")


@pytest.fixture(autouse=True)
def kinds() -> Iterator[None]:
    """Forget the kinds that a guest's file adds."""
    families = (Mixer, Score, Selection)
    before = [dict(family.kinds) for family in families]
    yield
    for family, known in zip(families, before, strict=True):
        family.kinds.clear()
        family.kinds.update(known)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of the document, where the process runs."""
    python = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    for name, text in zip(FILES, python, strict=True):
        (tmp_path / name).write_text(text)
    (yaml,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.yaml").write_text(yaml)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (FILES[0], KINDS[0]),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in zip(FILES[1:], KINDS[1:], strict=True)),
    ],
)
def test_the_examples_keep_the_contract(desk: Path, name: str, kind: str) -> None:
    (line,) = parts.check_file(desk / name)
    assert f"the component '{kind}' passes the contract test" in line


def test_sparsemax_is_the_projection_on_the_simplex(desk: Path) -> None:
    user_parts.load("sparsemax.py")
    score = Score.kinds["sparsemax"]().build()
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * 2
    s = score(logits)
    torch.testing.assert_close(s.sum(-1), torch.ones(50))
    assert (s == 0).any()
    # Of the points of the simplex none is nearer: the inequality of a projection, at its corners.
    inner = ((logits - s).unsqueeze(1) * (torch.eye(6) - s.unsqueeze(1))).sum(-1)
    assert inner.max() < 1e-5


def test_a_study_uses_guests_on_ray_and_exports_them_without_their_files(desk: Path) -> None:
    wanted = ["architecture.blocks.0.mixer.choice=[{kind: average, d_inner: 16}]"]
    wanted.append("architecture.blocks.0.ffn.router.score=sparsemax")
    wanted.append("architecture.blocks.0.ffn.router.selection=gumbel_top_k")
    space = Space.load("mine.yaml", [*wanted, "train.tokens=1024", "search.trials=1"])
    run(space, workers=1)
    for name in FILES:
        (desk / name).unlink()
    check = (
        "import moenas; study = moenas.load_study('mine')\n"
        "found = study.architecture(0, allow_code=True); print(found.describe())"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert "average d16, moe 8e top2 d32 swiglu gumbel_top_k sparsemax" in done.stdout
    with pytest.raises(InputError, match=r"stored in the database .* --allow-code"):
        export(load_study("mine").store, "mine", 0, desk / "out")
    export(load_study("mine").store, "mine", 0, desk / "out", allow_code=True)
    text = (desk / "out" / "model.py").read_text()
    for name in ("Sparsemax", "GumbelTopK", "Average"):
        assert f"class {name}(" in text
    assert "moenas" not in re.sub(r'"""(.|\n)*?"""|#.*', "", text)


def test_a_changed_file_is_another_space(desk: Path) -> None:
    before = Space.load("mine.yaml").sha256
    with (desk / "average.py").open("a") as file:
        file.write("# another\n")
    assert Space.load("mine.yaml").sha256 != before


def test_a_space_without_guests_is_what_it_was() -> None:
    assert "use" not in Space.load("tiny").plain()


def test_the_latest_text_of_a_file_counts(desk: Path) -> None:
    first, text = user_parts.load("average.py"), (desk / "average.py").read_text()
    cls = Mixer.kinds["average"]
    second = user_parts.load("average.py", text + "\n")
    assert Mixer.kinds["average"] is not cls
    user_parts.load(first.path, first.source)
    assert Mixer.kinds["average"] is cls
    assert second.source != first.source


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("./average.py", "mine.yaml:2:6: use: write a list of Python files"),
        ("[3]", "mine.yaml:2:7: use: 3 is not the path of a Python file"),
        ("[./none.py]", r"mine.yaml:2:7: use: .*none.py"),
        ("[./empty.py]", r"mine.yaml:2:7: use: .*empty.py: defines no part"),
        ("[./broken.py]", r"mine.yaml:2:7: use: .*broken.py: line 1: .*ZeroDivisionError"),
        ("[./clash.py]", "the kind 'attention' already exists: AttentionMixer"),
    ],
)
def test_what_cannot_be_used_is_refused(desk: Path, use: str, message: str) -> None:
    (desk / "empty.py").write_text("x = 1\n")
    (desk / "broken.py").write_text("x = 1 / 0\n")
    clash = (desk / "average.py").read_text().replace('kind="average"', 'kind="attention"')
    (desk / "clash.py").write_text(clash)
    text = (desk / "mine.yaml").read_text().splitlines()
    text[1] = f"use: {use}"
    (desk / "mine.yaml").write_text("\n".join(text))
    with pytest.raises(SpaceError, match=message):
        Space.load("mine.yaml")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise SystemExit(0)", r"average\.py:\d+: SystemExit: 0"),
        ("raise KeyError('d')", r"average\.py:\d+: KeyError: 'd'"),
        ("return 3", "TypeError"),
        ("return Cost(params=-(10**9), active_params=1)", r"the sum is Cost\(params=-"),
    ],
)
def test_a_part_that_does_not_count_its_cost_is_refused(desk: Path, body: str, said: str) -> None:
    path = desk / "average.py"
    path.write_text(path.read_text().replace("weights = 2 * d_model * self.d_inner", body))
    space = Space.load("mine.yaml")
    architecture = space.require_feasible()
    with pytest.raises(PartError, match=rf"^a part's `cost` must return a Cost .*: {said}"):
        space.cost(architecture)


def test_a_guest_that_is_not_there_says_so(desk: Path) -> None:
    with pytest.raises(InputError, match=r"none\.py: cannot be read"):
        user_parts.load("none.py")
    with pytest.raises(InputError, match="defines no part"):
        user_parts.load("x.py", "x = 1\n")


def stored(desk: Path, source: str, digest: str | None = None) -> dict[str, object]:
    """The space of a study that uses a file, as a database holds it."""
    known = resources.sha256(source.encode()) if digest is None else digest
    return {"use": [{"path": str(desk / "gift.py"), "source": source, "sha256": known}]}


GIFT = "open('RAN', 'w').close()\nfrom moenas.model import Score\n" + PAGE.partition("```python\n")[
    2
].partition("```")[0].replace("from __future__ import annotations\n", "")


def test_what_a_database_holds_is_run_only_where_it_is_allowed(desk: Path) -> None:
    with pytest.raises(InputError, match=r"gift.py: .* stored in the database .* --allow-code"):
        user_parts.load_stored(stored(desk, GIFT), allow_code=False)
    with pytest.raises(InputError, match="another text than the one with SHA-256"):
        user_parts.load_stored(stored(desk, GIFT, "0" * 64), allow_code=True)
    assert not Path("RAN").exists()
    user_parts.load_stored(stored(desk, GIFT), allow_code=True)
    assert Path("RAN").exists()


def test_a_file_of_ones_own_counts_as_allowed(desk: Path) -> None:
    (desk / "gift.py").write_text(GIFT)
    (desk / "gift.py").chmod(0o666)
    with pytest.raises(InputError, match="--allow-code"):
        user_parts.load_stored(stored(desk, GIFT), allow_code=False)
    (desk / "gift.py").chmod(0o644)
    user_parts.load_stored(stored(desk, GIFT), allow_code=False)
    (desk / "gift.py").write_text(GIFT + "# edited\n")
    with pytest.raises(InputError, match="--allow-code"):
        user_parts.load_stored(stored(desk, GIFT), allow_code=False)
