"""From a built model to the Python text that builds it again without moenas.

Two readings make the text. The constructor calls are recorded while the model is built, so that
`build()` is one literal expression. The definitions are copied from their files unchanged: every
class, function and constant that the calls reach through the names in the code. Of a class only the
mentioned methods are copied. Code under `if on_cuda(...)` is left out: it is another implementation
for one device. Code that needs moenas raises InputError.
"""

from __future__ import annotations

import ast
import inspect
import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from types import ModuleType
from typing import Any, TypeGuard

from torch import nn

from moenas.errors import InputError

WIDTH = 100
"""Columns of the written text."""
ON_CUDA = "on_cuda"
"""The function whose call as a condition marks code that is left out."""
LIBRARIES = {"torch", *sys.stdlib_module_names}
"""What lifted code may import."""


# --- the calls that build a model ---------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """A bracketed list of labelled items: a call, a list, or a repeated item."""

    opening: str
    items: tuple[tuple[str, Group | str], ...]
    closing: str
    comma: str = ","

    def flat(self) -> str:
        """Write the group on one line."""
        between = f"{self.comma} "
        texts = [label + (x if isinstance(x, str) else x.flat()) for label, x in self.items]
        return self.opening + between.join(texts) + self.closing

    def written(self, indent: int, before: int) -> str:
        """Write the group over as few lines as fit; `before` columns of the first are taken."""
        if before + len(self.flat()) < WIDTH:
            return self.flat()
        inner = indent + 4
        lines = [self.opening]
        for label, item in self.items:
            taken = inner + len(label)
            text = item if isinstance(item, str) else item.written(inner, taken)
            lines.append(f"{' ' * inner}{label}{text}{self.comma}")
        return "\n".join([*lines, " " * indent + self.closing])


Calls = dict[nn.Module, inspect.BoundArguments]


@contextmanager
def _recording(classes: Iterable[type[nn.Module]]) -> Iterator[Calls]:
    """Record the arguments of every constructor of `classes` that is called meanwhile."""
    calls: Calls = {}
    own = {cls: cls.__dict__.get("__init__") for cls in classes}
    # All read before one is replaced: a class may have inherited the constructor of another.
    originals: dict[type[nn.Module], Callable[..., None]] = {cls: cls.__init__ for cls in own}

    def recorder(cls: type[nn.Module]) -> Callable[..., None]:
        original = originals[cls]
        signature = inspect.signature(original)

        def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            if type(self) is cls:
                calls[self] = signature.bind(self, *args, **kwargs)
            original(self, *args, **kwargs)

        return init

    try:
        for cls in own:
            cls.__init__ = recorder(cls)  # type: ignore[method-assign]
        yield calls
    finally:
        for cls, original in own.items():
            if original is None:
                del cls.__init__
            else:
                cls.__init__ = original  # type: ignore[method-assign]


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] not in LIBRARIES


def record(make: Callable[[], nn.Module]) -> tuple[Group, list[type[nn.Module]]]:
    """Return the expression that makes the model, and its classes, the innermost first."""
    classes = {type(m) for m in make().modules() if _is_ours(type(m))}
    with _recording(classes) as calls:
        model = make()
    used: dict[type[nn.Module], None] = {}
    expression = _expression(model, calls, used, "the model")
    assert isinstance(expression, Group)
    return expression, list(used)


def _expression(
    value: Any, calls: Calls, used: dict[type[nn.Module], None], place: str
) -> Group | str:
    """Write an argument as Python: plain values by `repr`, modules by the call that made them."""
    if isinstance(value, nn.ModuleList):
        return Group("nn.ModuleList(", (("", _items(value, calls, used, place)),), ")")
    if isinstance(value, list | tuple):
        return _items(value, calls, used, place)
    if isinstance(value, nn.Module) and value in calls:
        word = type(value).__name__
        given = list(calls[value].arguments.items())[1:]
        items = [(f"{k}=", _expression(x, calls, used, f"{word}({k}=...)")) for k, x in given]
        used[type(value)] = None
        return Group(f"{word}(", tuple(items), ")")
    finite = not isinstance(value, float) or math.isfinite(value)
    if value is None or (isinstance(value, bool | int | float | str) and finite):
        text = ascii(value)
        simple = isinstance(value, str) and not {'"', "\\"} & set(text)
        return f'"{text[1:-1]}"' if simple else text
    raise InputError(
        f"{place} is given {value!r}, which cannot be exported; a constructor takes numbers, words,"
        " None, and modules that are not torch's own"
    )


def _items(
    values: Iterable[Any], calls: Calls, used: dict[type[nn.Module], None], place: str
) -> Group:
    """Write a list; equal neighbours become `for _ in range(n)`."""
    written = [_expression(value, calls, used, place) for value in values]
    runs: list[Group | str] = []
    for _, run in groupby(written, key=lambda x: x if isinstance(x, str) else x.flat()):
        same = list(run)
        if len(same) == 1 or isinstance(same[0], str):
            runs += same
        else:
            times = ("", f"for _ in range({len(same)})")
            runs.append(Group("[", (("", same[0]), times), "]", comma=""))
    if len(runs) == 1 and isinstance(runs[0], Group) and runs[0].opening == "[":
        return runs[0]
    labels = ["*" if isinstance(x, Group) and x.opening == "[" else "" for x in runs]
    return Group("[", tuple(zip(labels, runs, strict=True)), "]")


# --- the definitions that those calls need ------------------------------------------------------

Definition = ast.ClassDef | ast.FunctionDef | ast.Assign | ast.AnnAssign
Key = tuple[str, str]
"""Name of a module, name of a definition in it."""


@dataclass
class _File:
    """The definitions and imports at the top level of one module."""

    module: str
    lines: list[str]
    definitions: dict[str, Definition] = field(default_factory=dict)
    docs: dict[str, ast.Expr] = field(default_factory=dict)
    """The string below a constant."""
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Name -> (module, name there); "" as the name for the module itself."""

    @classmethod
    def read(cls, module: ModuleType) -> _File:
        text = inspect.getsource(module)
        file = cls(module.__name__, text.splitlines())
        last = ""
        for node in ast.parse(text).body:
            if isinstance(node, ast.Expr) and last:
                file.docs[last] = node
            last = ""
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                file.definitions[node.name] = node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                if isinstance(target, ast.Name):
                    last = target.id
                    file.definitions[last] = node
            else:
                file.read_imports(node)
        return file

    def read_imports(self, node: ast.stmt) -> None:
        """Note the names of an import statement, or of those under `if TYPE_CHECKING`."""
        if isinstance(node, ast.If):
            for inner in node.body:
                self.read_imports(inner)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                self.imports[alias.asname or alias.name] = (alias.name, "")
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                self.imports[alias.asname or alias.name] = (node.module or "", alias.name)

    def text(self, name: str, dropped: Iterable[ast.stmt] = ()) -> str:
        """Return a definition as it is written, with the comment above and the string below."""
        node = self.definitions[name]
        first, end = self.extent(node)
        if name in self.docs:
            end = self.docs[name].end_lineno or end
        gone: set[int] = set()
        for method in dropped:
            start, stop = self.extent(method)
            while not self.lines[start - 2].strip():
                start -= 1
            gone |= set(range(start, stop + 1))
        kept = [self.lines[i - 1] for i in range(first, end + 1) if i not in gone]
        return "\n".join(kept)

    def extent(self, node: ast.stmt) -> tuple[int, int]:
        """Return the first and last line, counted from 1, decorators and comment included."""
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(d.lineno for d in decorators)])
        while first > 1 and self.lines[first - 2].lstrip().startswith("# "):
            first -= 1
        return first, node.end_lineno or node.lineno


@dataclass
class SourceClosure:
    """The definitions that some roots reach, in an order in which each stands below its needs."""

    methods: set[str]
    """Methods that are kept wherever they are defined; grows by what kept code mentions."""
    files: dict[str, _File] = field(default_factory=dict)
    keys: dict[str, Key] = field(default_factory=dict)
    """Name -> where it is defined, in order."""
    imports: set[tuple[str, str, str]] = field(default_factory=set)
    """(module, name there or "", name here)"""

    @classmethod
    def of(cls, roots: Iterable[Any], methods: Iterable[str]) -> SourceClosure:
        """Start from classes and functions and collect until no further method is mentioned."""
        wanted = list(roots)
        closure = cls(set(methods))
        while True:
            before = set(closure.methods)
            closure.keys, closure.imports = {}, set()
            visited: set[Key] = set()
            for root in wanted:
                closure.visit((root.__module__, root.__name__), visited)
            if closure.methods == before:
                return closure

    def visit(self, key: Key, visited: set[Key]) -> None:
        """Add what a definition needs, then the definition itself."""
        if key in visited:
            return
        visited.add(key)
        module, name = key
        file = self.file(module)
        for node in self.kept(file.definitions[name]):
            if isinstance(node, ast.Attribute):
                self.methods.add(node.attr)
            elif isinstance(node, ast.Name):
                self.need(file, node.id, visited)
        if name in self.keys:
            raise InputError(f"'{name}' is defined in {self.keys[name][0]} and in {module}; rename")
        self.keys[name] = key

    def need(self, file: _File, name: str, visited: set[Key]) -> None:
        """Follow a name to its definition or import; other names are local or built in."""
        if name in file.definitions:
            self.visit((file.module, name), visited)
        elif name in file.imports:
            module, there = self.source(*file.imports[name])
            if module.partition(".")[0] in LIBRARIES:
                self.imports.add((module, there, name))
            elif there == name and name in self.file(module).definitions:
                self.visit((module, name), visited)
            else:
                raise InputError(f"{file.module}: '{name}' of {module} cannot be lifted out")

    def source(self, module: str, name: str) -> Key:
        """Follow a name through the packages that hand it on to where it is defined."""
        while name and module.partition(".")[0] not in LIBRARIES:
            file = self.file(module)
            if name in file.definitions or name not in file.imports:
                break
            module, name = file.imports[name]
        return module, name

    def file(self, module: str) -> _File:
        """Return the parsed file of a module that is loaded."""
        if module not in self.files:
            self.files[module] = _File.read(sys.modules[module])
        return self.files[module]

    def kept(self, node: Definition) -> Iterator[ast.AST]:
        """Walk a definition without what is dropped of it."""
        dropped = set[ast.AST](self.dropped(node))
        for part in ast.iter_child_nodes(node) if isinstance(node, ast.ClassDef) else (node,):
            waiting = deque([part])
            while waiting:
                at = waiting.popleft()
                if at not in dropped:
                    yield at
                    waiting += ast.iter_child_nodes(at)

    def dropped(self, node: Definition) -> list[ast.stmt]:
        """Return the code to leave out: methods that nothing mentions, and forms for one device."""
        methods = [
            x
            for x in (node.body if isinstance(node, ast.ClassDef) else ())
            if isinstance(x, ast.FunctionDef)
            and not x.name.startswith("__")
            and x.name not in self.methods
        ]
        return methods + [x for x in ast.walk(node) if _for_cuda(x)]

    def texts(self) -> list[str]:
        """Return the definitions as they are written, in order."""
        texts = []
        for module, name in self.keys.values():
            file = self.file(module)
            texts.append(file.text(name, self.dropped(file.definitions[name])))
        return texts


def _for_cuda(node: ast.AST) -> TypeGuard[ast.If]:
    """Whether a statement is an `if` without else that asks for the device alone."""
    test = node.test if isinstance(node, ast.If) and not node.orelse else None
    called = test.func if isinstance(test, ast.Call) else None
    return isinstance(called, ast.Name) and called.id == ON_CUDA


def import_lines(imports: Iterable[tuple[str, str, str]]) -> str:
    """Write import statements in isort's order: standard library, then the rest."""
    blocks: list[str] = []
    distinct = set(imports)
    for standard in (True, False):
        own = [
            x for x in distinct if (x[0].partition(".")[0] in sys.stdlib_module_names) == standard
        ]
        lines = []
        for module, there, here in sorted(own):
            if not there:
                lines.append(f"import {module}" + (f" as {here}" if here != module else ""))
        for module in sorted({module for module, there, _ in own if there}):
            names = sorted({(t, h) for m, t, h in own if m == module and t}, key=_import_order)
            words = ", ".join(t if t == h else f"{t} as {h}" for t, h in names)
            lines.append(f"from {module} import {words}")
        if lines:
            blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _import_order(name: tuple[str, str]) -> tuple[int, str]:
    """Sort constants before classes before functions, as isort does."""
    word = name[0]
    return (0 if word.isupper() and len(word) > 1 else 1 if word[0].isupper() else 2), word
