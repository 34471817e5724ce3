"""Write docs/architecture.md and its picture docs/packages.svg from the code.

`python benchmarks/packages.py FOLDER` writes both into a folder. tests/test_order.py has the order
of the packages. The first line of a package's docstring says what it holds.
"""

from __future__ import annotations

import ast
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moenas"
ORDER_FILE = ROOT / "tests" / "test_order.py"

WIDTH, ROW, GAP, MARGIN = 1040, 64, 26, 16
"""Pixels of the picture, of the height of a row, between rows, and around."""

HIDDEN = ("__init__", "__main__", "former")
"""Entry points, and former names of modules."""

HEAD = """# Architecture of the code

`make docs` writes this page from the code.

Each package is one stage in the life of a candidate. It imports only from packages below it in the
picture; `tests/test_order.py` holds the order, and which package may import which large library.

![Packages of moenas](packages.svg)

```
space file -> Space --draw--> Architecture -> Job -> Evaluation -> front -> export
              (holes)         (hashed)        (plain) (SQL rows)   (SQL)    (a folder)
```

The way of one candidate through the packages is described in
[CONTRIBUTING.md](../.github/CONTRIBUTING.md).
"""


def first_line(path: Path) -> str:
    """Return the first line of the docstring of a file, without its full stop."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].rstrip(".:")


def order() -> list[list[str]]:
    """Return the packages and modules of each line of the order, from the ground up."""
    tree = ast.parse(ORDER_FILE.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ORDER":
            lines = str(ast.literal_eval(node.value)).strip().splitlines()
            names = [[n for n in line.split() if n not in HIDDEN] for line in lines]
            return [line for line in names if line]
    raise SystemExit(f"{ORDER_FILE}: no ORDER")


def modules(package: str) -> list[Path]:
    """Return the files of a package, or the file of a module."""
    folder = PACKAGE / package
    if not folder.is_dir():
        return [folder.with_suffix(".py")]
    files = [p for p in sorted(folder.rglob("*.py")) if p.name != "__init__.py"]
    return files or [folder / "__init__.py"]


def picture(rows: list[list[str]]) -> str:
    """Return the packages as an SVG picture, the highest row at the top."""
    height = 2 * MARGIN + len(rows) * ROW + (len(rows) - 1) * GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
        f' width="{WIDTH}" height="{height}" font-family="Helvetica, Arial, sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for i, row in enumerate(reversed(rows)):
        y = MARGIN + i * (ROW + GAP)
        wide = (WIDTH - 2 * MARGIN - (len(row) - 1) * GAP) / len(row)
        for j, name in enumerate(row):
            x = MARGIN + j * (wide + GAP)
            colour = "#e7eef8" if (PACKAGE / name).is_dir() else "#f3f3f3"
            parts += [
                f'<rect x="{x:.0f}" y="{y}" width="{wide:.0f}" height="{ROW}" rx="8"'
                f' fill="{colour}" stroke="#5b7aa5"/>',
                f'<text x="{x + wide / 2:.0f}" y="{y + 28}" text-anchor="middle"'
                f' font-size="19" font-weight="bold" fill="#1c2c44">{escape(name)}</text>',
                f'<text x="{x + wide / 2:.0f}" y="{y + 50}" text-anchor="middle"'
                f' font-size="13" fill="#41536d">{label(name)}</text>',
            ]
        if i < len(rows) - 1:
            middle, end = WIDTH / 2, y + ROW + GAP
            parts.append(
                f'<path d="M {middle} {y + ROW + 4} V {end - 5} m -5 -6 l 5 6 l 5 -6"'
                ' fill="none" stroke="#5b7aa5" stroke-width="2"/>'
            )
    return "\n".join([*parts, "</svg>", ""])


def label(name: str) -> str:
    """Return the second line in a box: the number of files, or that it is one."""
    count = len(modules(name))
    return f"{count} files" if (PACKAGE / name).is_dir() and count > 1 else "1 file"


def page(rows: list[list[str]]) -> str:
    """Return the text of docs/architecture.md."""
    parts = [HEAD, "## Packages", "", "| package | holds |", "| --- | --- |"]
    names = [name for row in reversed(rows) for name in row]
    for name in names:
        folder = PACKAGE / name
        own = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        parts.append(f"| `{name}` | {first_line(own)} |")
    parts += ["", "## Files", ""]
    for name in names:
        if not (PACKAGE / name).is_dir():
            continue
        parts += [f"### `{name}`", "", "| file | holds |", "| --- | --- |"]
        parts += [
            f"| `{path.relative_to(PACKAGE / name)}` | {first_line(path)} |"
            for path in modules(name)
        ]
        parts.append("")
    return "\n".join(parts)


def main() -> None:
    """Write the page and the picture into the folder that is named."""
    folder, rows = Path(sys.argv[1]), order()
    folder.joinpath("architecture.md").write_text(page(rows), encoding="utf-8")
    folder.joinpath("packages.svg").write_text(picture(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
