"""The form of the code: which file may import which, where each library lives, how long things are."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground to the roof. A module imports only from the lines above its own. A module in a
# folder that is not named here stands where the folder stands.
FLOORS = """
    __init__ errors
    records refs counts formats processes
    tally stops optuna_rows
    events
    failures folders
    checked
    domains bigram
    component front weights describe brief require lease tables texts urls retry faults terminal
    grammar guests migrations membership rows claims identity
    naming
    draws schema sections objective migrations.env migrations.versions database readers figures statements
    optuna_storage
    store_reader
    store
    notes
    dashboard heartbeat attempts
    parts.layers parts.norms parts.lending parts.bias parts.cross_entropy
    parts.scan parts.head
    parts.activations parts.dispatch parts.scores parts.selection parts.logits parts.presets
    parts.assignment parts.projections
    parts.mixers parts.rotary parts.attend parts.gating parts.ffn
    parts.borrowing parts.residual
    parts.attention parts.ssm
    parts.latent parts.lightning parts.linear
    parts.kda
    parts.balance parts.product_key
    parts.routers
    parts.experts
    parts.moa parts.blocks
    parts
    architecture
    corpus
    data lengths
    corpus_cache
    space
    dtypes devices routing causality cuda_graphs isolation
    memory
    optimizer timing
    steps
    device_steps
    train latency flops lift footprint
    subject
    measure matching
    results ray_address
    ray_worker ray_head ray_cluster
    ray_processes
    ray_pool
    pool samplers points
    candidate spool asker repairs changes jobs
    intake reconcile
    doctor
    driver remeasure
    study
    maintenance
    export testing report reference
    progress
    options
    cli_maintenance
    cli
    __main__
"""

# Library -> the only modules that import it. `objectives` and `dashboards` are the files there.
ROOMS = {
    "alembic": "database migrations",
    "click": "cli",
    "fvcore": "flops",
    "moocore": "front",
    "numpy": "front corpus data counts domains bigram matching export isolation",
    "optuna": "samplers asker points reconcile optuna_rows driver candidate study dashboard optuna_storage repairs doctor",
    "optuna_dashboard": "dashboard",
    "pandas": "study",
    "plotly": "figures dashboard dashboards",
    "rich": "cli progress",
    "ray": "ray_head ray_cluster",
    "safetensors": "measure export",
    "scipy": "none",
    "sqlalchemy": "store store_reader statements attempts readers optuna_storage database identity faults urls claims membership rows tables migrations optuna_rows reconcile repairs remeasure doctor",
    "torch": "cuda_graphs corpus timing optimizer steps device_steps parts architecture devices dtypes routing causality train latency flops memory footprint lift isolation subject measure export testing",
    "typer": "cli cli_maintenance options",
    "yaml": "refs",
}

MAX_LINES = 500
"""Of a file. Tests are exempt, as each is read by itself."""
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 6
"""That can be given by position; the rest is keyword-only."""
SHALLOW_NAMES = {"base", "common", "constants", "core", "helpers", "misc", "types", "utils"}

PACKAGE = sorted((ROOT / "moenas").rglob("*.py"))
DESK = sorted([*ROOT.glob("objectives/*.py"), *ROOT.glob("dashboards/*.py")])
TESTS = sorted(ROOT.glob("tests/**/*.py"))
CODE = [*PACKAGE, *DESK, *sorted(ROOT.glob("benchmarks/**/*.py")), *TESTS]
OTHER = ("spaces/*.yaml", "benchmarks/gpu/*.*", "docs/*.md", "Makefile", "pyproject.toml")
TEXTS = [*CODE, *(path for pattern in OTHER for path in sorted(ROOT.glob(pattern)))]
FLOOR_OF = {m: i for i, line in enumerate(FLOORS.strip().splitlines()) for m in line.split()}


def module_of(path: Path) -> str:
    """moenas/parts/mixers.py -> parts.mixers; objectives/val_loss.py -> objectives.val_loss."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    inside = parts[1:] if parts[0] == "moenas" else parts
    return ".".join(inside[:-1] if inside[-1] == "__init__" and len(inside) > 1 else inside)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def statements(tree: ast.AST, *, inside_functions: bool) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING:`, which are not there when the code runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if not inside_functions and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        yield node
        yield from statements(node, inside_functions=inside_functions)


def imported(path: Path, *, inside_functions: bool = True) -> set[str]:
    """The dotted names that a file imports; `from moenas import refs` gives moenas.refs."""
    found = set()
    for node in statements(tree_of(path), inside_functions=inside_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = whole.removeprefix("moenas.") in FLOOR_OF
                found.add(whole if is_module else str(node.module))
    return found


def own(names: set[str]) -> set[str]:
    """Of imported names, our modules: moenas.parts.mixers -> parts.mixers, moenas -> __init__."""
    inside = {name for name in names if name.split(".")[0] == "moenas"}
    return {name.removeprefix("moenas.") if name != "moenas" else "__init__" for name in inside}


def is_command(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether the parameters of a function are the flags of a command."""
    return any(".command(" in ast.unparse(decorator) for decorator in node.decorator_list)


def libraries(names: set[str]) -> set[str]:
    """Of imported names, the third-party libraries."""
    tops = {name.split(".")[0] for name in names}
    return tops - set(sys.stdlib_module_names) - {"moenas"}


def loaded_with(module: str) -> set[str]:
    """The libraries that come in when a module is imported, by whatever way."""
    paths = {module_of(path): path for path in PACKAGE}
    seen: set[str] = set()
    found: set[str] = set()
    waiting = {module}
    while waiting:
        at = waiting.pop()
        seen.add(at)
        names = imported(paths[at], inside_functions=False)
        found |= libraries(names)
        parents = {m.rsplit(".", 1)[0] for m in own(names) if "." in m}
        waiting |= (own(names) | parents) - seen
    return found


def floor_of(module: str) -> int | None:
    """The line of a module, or of the folder that it lies in."""
    while module not in FLOOR_OF and "." in module:
        module = module.rpartition(".")[0]
    return FLOOR_OF.get(module)


def test_every_module_has_a_floor_and_every_line_a_module() -> None:
    modules = {module_of(path) for path in PACKAGE}
    assert [module for module in modules if floor_of(module) is None] == []
    assert set(FLOOR_OF) - modules == set()


@pytest.mark.parametrize("path", PACKAGE, ids=module_of)
def test_imports_go_down(path: Path) -> None:
    here = floor_of(module_of(path)) or 0
    up = {name for name in own(imported(path)) if (floor_of(name) or 0) >= here}
    assert not up, f"{name_of(path)} imports from its own floor or above"


@pytest.mark.parametrize("path", [*PACKAGE, *DESK], ids=module_of)
def test_each_library_stays_in_its_rooms(path: Path) -> None:
    module = module_of(path)
    for library in sorted(libraries(imported(path))):
        assert library in ROOMS, f"{library} has no room; give it one here and in pyproject.toml"
        rooms = ROOMS[library].split()
        assert module in rooms or module.split(".")[0] in rooms, f"{library} in {module}"


def test_the_ground_floors_load_no_torch() -> None:
    light = [m for m in FLOOR_OF if FLOOR_OF[m] <= FLOOR_OF["dashboard"]] + ["report", "cli"]
    assert [m for m in light if "torch" in loaded_with(m)] == []


def test_the_command_line_starts_light() -> None:
    heavy = set(ROOMS) - {"typer", "click"}
    probe = "import sys, moenas, moenas.cli; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert heavy & set(done.stdout.split()) == set()


def test_dependencies_name_their_rooms() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    named = dict(re.findall(r'^\s*"([a-z-]+)[^"]*",\s*# ([^;\n]*)', listed, re.MULTILINE))
    library_of = {"pyyaml": "yaml", "optuna-dashboard": "optuna_dashboard"}
    found = {library_of.get(name, name): set(rooms.split(", ")) for name, rooms in named.items()}
    own_dependency = {name: set(rooms.split()) for name, rooms in ROOMS.items() if name != "click"}
    assert found == own_dependency


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_files_functions_and_signatures_are_short(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES or path in TESTS, f"{lines} lines"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            place = f"{name_of(path)}:{node.lineno} {node.name}"
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{place}: {length} lines"
            named = [*node.args.posonlyargs, *node.args.args]
            count = len([a for a in named if a.arg not in ("self", "cls")])
            assert count <= MAX_PARAMETERS or is_command(node), f"{place}: {count} parameters"


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_modules_open_with_one_sentence(path: Path) -> None:
    docstring = ast.get_docstring(tree_of(path))
    assert docstring, "no module docstring"
    assert docstring.splitlines()[0].endswith((".", ":")), "the first line is not a whole sentence"
    assert path.stem not in SHALLOW_NAMES, "a name that says nothing"


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_texts_are_ascii_without_leftovers(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    odd = [f"{i}: {line}" for i, line in enumerate(text.splitlines(), 1) if not line.isascii()]
    assert not odd
    leftovers = re.findall(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b", text)
    assert not leftovers
