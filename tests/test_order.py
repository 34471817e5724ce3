"""The form of the code: which file may import which, where each library lives, how long things are."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]

# The order of packages, from the ground up. A package imports only from the lines above its own.
ORDER = """
    former
    __init__ errors
    passwords records formats markdown processes
    failures folders terminal
    checked resources pareto
    grammar store
    model data
    space predict huggingface
    evaluate
    export report
    search workers dashboard testing
    study
    loggers
    service
    cli
    __main__
"""

# Library -> the only packages that import it. `objectives` and `dashboards` are the folders.
LIBRARIES = {
    "a2wsgi": "service",
    "alembic": "store",
    "click": "cli",
    "fastapi": "service",
    "fsspec": "store",
    "fvcore": "evaluate",
    "httpx": "service",
    "jinja2": "service",
    "mlflow": "loggers",
    "moocore": "pareto",
    "numpy": "pareto data predict evaluate export search",
    "optuna": "search store study dashboard",
    "optuna_dashboard": "dashboard",
    "pandas": "study service",
    "pyarrow": "data",
    "plotly": "report dashboard dashboards service",
    "prometheus_client": "service",
    "pydantic": "service",
    "rich": "cli",
    "ray": "workers",
    "safetensors": "evaluate export",
    "scipy": "predict search",
    "sqlalchemy": "store study service",
    "starlette": "service",
    "tokenizers": "data",
    "tensorboard": "loggers",
    "torch": "model data predict evaluate export testing loggers",
    "typer": "cli",
    "uvicorn": "service",
    "wandb": "loggers",
    "yaml": "resources",
}
LIGHT = "grammar store report dashboard"
"""Packages that load without PyTorch, for they only read."""

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
MODULES = {
    ".".join(p.relative_to(ROOT / "moenas").with_suffix("").parts).removesuffix(".__init__")
    for p in PACKAGE
}
RANK = {name: i for i, line in enumerate(ORDER.strip().splitlines()) for name in line.split()}


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
    """The dotted names that a file imports; `from moenas.space import sections` gives moenas.space.sections."""
    modules = set()
    for node in statements(tree_of(path), inside_functions=inside_functions):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = whole.removeprefix("moenas.") in MODULES
                modules.add(whole if is_module else str(node.module))
    return modules


def own(names: set[str]) -> set[str]:
    """Of imported names, our modules: moenas.model.mixers.mixer -> parts.mixers, moenas -> __init__."""
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
    modules: set[str] = set()
    waiting = {module}
    while waiting:
        at = waiting.pop()
        seen.add(at)
        names = imported(paths[at], inside_functions=False)
        modules |= libraries(names)
        parents = {m.rsplit(".", 1)[0] for m in own(names) if "." in m}
        waiting |= (own(names) | parents) - seen
    return modules


def package_of(module: str) -> str:
    """store.migrations.env -> store."""
    return module.split(".")[0]


def test_every_module_is_in_a_package_of_the_order() -> None:
    assert {package_of(module_of(path)) for path in PACKAGE} == set(RANK)


def test_imports_go_down() -> None:
    upward = []
    for path in PACKAGE:
        here = package_of(module_of(path))
        others = {package_of(name) for name in own(imported(path))} - {here}
        upward += [f"{name_of(path)}: {name}" for name in others if RANK[name] >= RANK[here]]
    assert upward == []


def test_no_imports_go_round() -> None:
    modules = {module_of(path): own(imported(path)) for path in PACKAGE}
    TopologicalSorter(modules).prepare()  # raises CycleError


def test_each_library_stays_in_its_packages() -> None:
    """A new library is named above and in pyproject.toml, each with its packages."""
    strays = []
    for path in [*PACKAGE, *DESK]:
        for library in sorted(libraries(imported(path))):
            if package_of(module_of(path)) not in LIBRARIES.get(library, "").split():
                strays.append(f"{name_of(path)}: {library}")
    assert strays == []


def test_packages_that_only_read_load_no_torch() -> None:
    light = [m for m in map(module_of, PACKAGE) if package_of(m) in LIGHT.split()]
    light.append("cli.commands")
    assert [m for m in light if "torch" in loaded_with(m)] == []


def test_the_command_line_starts_light() -> None:
    heavy = set(LIBRARIES) - {"typer", "click"}
    probe = (
        "import sys, moenas, moenas.cli.commands; print(*{m.split('.')[0] for m in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert heavy & set(done.stdout.split()) == set()


def test_dependencies_name_their_packages() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    for extra in ("data", "mlflow", "service", "tensorboard", "wandb"):
        listed += text.partition(f"\n{extra} = [")[2].partition("\n]")[0]
    named = dict(re.findall(r'^\s*"([a-z0-9-]+)[^"]*",\s*# ([^;\n]*)', listed, re.MULTILINE))
    library_of = {
        "pyyaml": "yaml",
        "mlflow-skinny": "mlflow",
        "optuna-dashboard": "optuna_dashboard",
        "prometheus-client": "prometheus_client",
    }
    by_library = {
        library_of.get(name, name): set(packages.split(", ")) for name, packages in named.items()
    }
    own_dependency = {k: set(v.split()) for k, v in LIBRARIES.items() if k != "click"}
    assert by_library == own_dependency


def test_files_functions_and_signatures_are_short() -> None:
    too_long = []
    for path in CODE:
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines > MAX_LINES and path not in TESTS:
            too_long.append(f"{name_of(path)}: {lines} lines")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                place = f"{name_of(path)}:{node.lineno} {node.name}"
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    too_long.append(f"{place}: {length} lines")
                named = [*node.args.posonlyargs, *node.args.args]
                count = len([a for a in named if a.arg not in ("self", "cls")])
                if count > MAX_PARAMETERS and not is_command(node):
                    too_long.append(f"{place}: {count} parameters")
    assert too_long == []


def test_modules_open_with_one_sentence() -> None:
    bad = []
    for path in CODE:
        opening = (ast.get_docstring(tree_of(path)) or "").partition("\n")[0]
        if not opening.endswith((".", ":")):
            bad.append(f"{name_of(path)}: the docstring does not begin with a whole sentence")
        if path.stem in SHALLOW_NAMES:
            bad.append(f"{name_of(path)}: a name that says nothing")
    assert bad == []


def test_texts_are_ascii_without_leftovers() -> None:
    leftover = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
    bad = []
    for path in TEXTS:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.isascii() or leftover.search(line):
                bad.append(f"{name_of(path)}:{number}: {line}")
    assert bad == []
