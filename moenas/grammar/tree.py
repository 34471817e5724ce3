"""The one grammar of architectures and spaces: components with holes, read from YAML or data.

A tree mirrors the YAML text: `Record` (a component), `Listing`, `Fixed` (a value) and the holes
`Choice` and `Range`. A tree without holes is an architecture. Conditional parameters come from
nesting alone: what stands inside one option of a `Choice` exists only where that option is drawn.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias, TypeVar, cast

from moenas.errors import SourceLocation, SpaceError, suggestion
from moenas.grammar.component import (
    MAX_NUMBER,
    Component,
    Conflict,
    Field,
    Scalar,
    accepted_mapping,
    fields,
    join,
)
from moenas.grammar.spellings import apply_spellings, as_mapping
from moenas.grammar.synonyms import hint
from moenas.records import Plain
from moenas.resources import NOWHERE, Node

MAX_OPTIONS = 1000
LAYERS = "layers"
"""The section of named layers, and the first part of the paths of their holes."""
HOLES = {"choice": {"choice"}, "int": {"int", "step", "log"}, "float": {"float", "step", "log"}}


@dataclass(frozen=True)
class Fixed:
    """A value that is the same in every architecture of the space."""

    value: Scalar
    mark: SourceLocation


@dataclass(frozen=True)
class Choice:
    """A hole: one of several options, each of which may have holes of its own."""

    labels: tuple[Scalar, ...]
    """What the sampler sees: the value of a scalar option, the kind or preset of a component."""
    options: tuple[Tree, ...]
    mark: SourceLocation
    shared: str = ""
    """The name of a hole in a named layer: all uses of the layer have this one hole."""


@dataclass(frozen=True)
class Range:
    """A hole: a number from low to high, both inclusive."""

    low: float
    high: float
    step: float | None
    log: bool
    whole: bool
    mark: SourceLocation
    shared: str = ""
    """As of a `Choice`."""

    @property
    def count(self) -> int | None:
        """How many values the range holds; None if it is continuous."""
        if self.step is None:
            return None
        if self.whole:
            return int(self.high - self.low) // int(self.step) + 1
        return round((self.high - self.low) / self.step) + 1

    @property
    def unit(self) -> int:
        """What the sampler counts in. Optuna has no step beside `log`: multiples of 8 are drawn
        as a number of eights."""
        return int(self.step or 1) if self.log else 1

    @property
    def name(self) -> str:
        """The end of the hole's name: `/8` if it is drawn as a number of eights."""
        return f"/{self.unit}" if self.unit > 1 else ""


ORIGIN = "_origin"
"""Where a component keeps its `Origin`; it is no field, so it does not count in comparisons."""


@dataclass(frozen=True)
class Origin:
    """Where a component is written: its path in the space file, and its place."""

    path: str
    mark: SourceLocation

    def error(self, reason: str) -> SpaceError:
        """Build the error for this component."""
        return SpaceError(reason, location=self.mark, path=self.path)


@dataclass(frozen=True)
class Record:
    """A component whose fields may hold holes."""

    cls: type[Component]
    fields: dict[str, Tree]
    mark: SourceLocation
    path: str = ""
    """Where it stands in the space file: the fields above it and the options that hold it."""
    former: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    """A line for each former name of a field that the text uses."""

    @cached_property
    def origin(self) -> Origin:
        """Where the component is written."""
        return Origin(self.path, self.mark)

    @cached_property
    def has_holes(self) -> bool:
        """Whether a hole stands anywhere in it."""
        return any(map(has_holes, self.fields.values()))

    @cached_property
    def drawn(self) -> dict[Any, Any]:
        """What `sampling.drawn` made of it, to be made once: equal layers are one object."""
        return {}


@dataclass(frozen=True)
class Listing:
    """A list of components, or of values outside of `architecture`."""

    items: tuple[Tree, ...]
    mark: SourceLocation
    first: int = 0
    """Number of the first item in paths."""

    @cached_property
    def has_holes(self) -> bool:
        """Whether a hole stands anywhere in it."""
        return any(map(has_holes, self.items))


Tree: TypeAlias = Fixed | Choice | Range | Record | Listing
C = TypeVar("C", bound=Component)


def has_holes(tree: Tree) -> bool:
    """Whether a tree is a hole, or one stands in it."""
    return tree.has_holes if isinstance(tree, Record | Listing) else not isinstance(tree, Fixed)


def read(family: type[Component], node: Node, path: str = "", name: str = "") -> Tree:
    """Read a component, or a hole with components as options, from YAML or plain data.

    `name` is the field that holds it, for errors; without one, the end of the path.

    Raises:
        SpaceError: `file:line:column: path: what is wrong; what would be right`.
    """
    path = node.path or path
    hole = _hole_kind(node)
    if hole == "choice":
        return _read_choice(lambda n, p: read(family, n, p, name), node, path)
    name = name or path.rpartition(".")[2]
    node = as_mapping(family, node)
    if hole is not None:
        raise node.error(path, f"a range is not allowed here; give {accepted_mapping(family)}")
    if not isinstance(node.value, dict):
        raise node.error(path, f"{node.plain!r} is not {accepted_mapping(family)}")
    written = dict(node.value)
    cls = _read_kind(family, written, node, path, name)
    former = apply_spellings(cls, written, path)
    for former_name, present, value in former:  # checked even where the value has no effect
        _read_field(present, value, join(path, former_name))
    known = fields(cls)
    for key, value in written.items():
        if key not in known:
            raise value.error(
                join(path, key),
                f"no field of '{cls.kind or name}'.{hint(key, known)} It has {', '.join(known)}.",
                key=True,
            )
    trees: dict[str, Tree] = {}
    for key, field in known.items():
        if key in written:
            trees[key] = _read_field(field, written[key], join(path, key))
        elif field.required:
            raise node.error(path, f"'{key}' is missing; give {field.wanted()} ({field.doc})")
        else:
            trees[key] = _read_default(field, node.mark, join(path, key))
    if not isinstance(trees.get("vary", node), Fixed | Node):
        raise written["vary"].error(
            join(path, "vary"), "a hole is not allowed here; give true or false"
        )
    notes = (
        f"{node.key_mark or node.mark}: {join(path, key)}: a former name; write {cls.former[key]}"
        for key, _, node in former
    )
    return Record(cls, trees, node.mark, path, tuple(notes))


def former_names(tree: Tree) -> Iterator[str]:
    """Yield a line for each former name of a field that the text of a tree uses."""
    if isinstance(tree, Record):
        yield from tree.former
    inner: Iterable[Tree] = ()
    if isinstance(tree, Record):
        inner = tree.fields.values()
    elif isinstance(tree, Choice | Listing):
        inner = tree.options if isinstance(tree, Choice) else tree.items
    for value in inner:
        yield from former_names(value)


def _hole_kind(node: Node) -> str | None:
    """Return choice, int or float if the node is a hole."""
    if not isinstance(node.value, dict):
        return None
    return next((hole for hole in HOLES if hole in node.value), None)


def _read_kind(
    family: type[Component], written: dict[str, Node], node: Node, path: str, name: str
) -> type[Component]:
    """Take the `kind` key out of a mapping and return the class it names."""
    if family.kind is not None or not family.kinds:
        return family
    kinds = ", ".join(family.kinds)
    if "kind" not in written:
        raise node.error(path, f"'kind' is missing; give one of {kinds}")
    kind = written.pop("kind")
    if not isinstance(kind.value, str) or kind.value not in family.kinds:
        text = f"no {name} of kind {kind.plain!r}."
        near = hint(str(kind.plain), family.kinds)
        place = path if kind.mark is node.mark else join(path, "kind")
        raise kind.error(place, f"{text}{near} There are {kinds}.")
    return family.kinds[kind.value]


def _read_field(field: Field, node: Node, path: str) -> Tree:
    """Read one field: a hole, a component, a list of components or a scalar."""
    path = node.path or path
    hole = _hole_kind(node)
    if hole == "choice":
        return _read_choice(lambda n, p: _read_field(field, n, p), node, path)
    if hole is not None:
        return _read_range(field, node, path, whole=hole == "int")
    if field.component is not None and not (node.value is None and field.optional):
        component = field.component
        if not field.is_list:
            return read(component, node, path, field.name)
        if not isinstance(node.value, list) or not node.value:
            raise node.error(path, f"{node.plain!r} is not {field.wanted()}")
        items = (
            read(component, item, join(path, i), field.name) for i, item in enumerate(node.value)
        )
        return Listing(tuple(items), node.mark)
    if field.is_list and field.component is None:
        if not isinstance(node.value, list):
            raise node.error(path, f"{_short(node.plain)} is not {field.wanted()}")
        for i, item in enumerate(node.value):
            if not isinstance(item.value, str):
                raise item.error(join(path, i), f"{_short(item.plain)} is not a word")
        return Listing(tuple(Fixed(cast(str, x.value), x.mark) for x in node.value), node.mark)
    if isinstance(node.value, dict | list):
        raise node.error(path, f"{_short(node.plain)} is not {field.wanted()}")
    if (reason := field.reject(node.value)) is not None:
        raise node.error(path, reason)
    return Fixed(field.convert(node.value), node.mark)


def _read_default(field: Field, mark: SourceLocation, path: str) -> Tree:
    """Read the default of a field that was left out."""
    value = field.default
    if isinstance(value, Component):
        family = cast(type[Component], field.component)
        return read(family, Node.wrap(value.plain()), path, field.name)
    return Fixed(cast(Scalar, value), mark)


def _check_hole_keys(node: Node, hole: str, path: str) -> dict[str, Node]:
    """Refuse keys that do not belong to this kind of hole."""
    found = cast(dict[str, Node], node.value)
    for key, value in found.items():
        if key not in HOLES[hole]:
            allowed = ", ".join(sorted(HOLES[hole]))
            near = suggestion(key, HOLES[hole])
            raise value.error(
                join(path, key), f"not part of a '{hole}' hole.{near} It takes {allowed}.", key=True
            )
    return found


def _read_choice(read_option: Any, node: Node, path: str) -> Choice:
    """Read `{choice: [...]}`; every option is checked now, not when it is drawn."""
    options = _check_hole_keys(node, "choice", path)["choice"]
    if not isinstance(options.value, list) or not options.value:
        raise options.error(path, "'choice' needs a list of at least one option")
    if len(options.value) > MAX_OPTIONS:
        raise options.error(path, f"'choice' takes at most {MAX_OPTIONS} options; write a range")
    labels = _labels(options.value)
    trees = []
    for label, option in zip(labels, options.value, strict=True):
        inner = join(path, label) if isinstance(option.value, dict | list) else path
        trees.append(read_option(option, inner))
    if all(isinstance(tree, Fixed) for tree in trees):
        labels = [cast(Fixed, tree).value for tree in trees]
    seen: set[tuple[type, Scalar]] = set()
    for option, tree, label in zip(options.value, trees, labels, strict=True):
        value = label if isinstance(tree, Fixed) else option.value
        if isinstance(value, dict | list):
            continue
        if (type(value), value) in seen:
            raise option.error(path, f"duplicate option {value!r}")
        seen.add((type(value), value))
    return Choice(tuple(labels), tuple(trees), node.mark, _shared(path))


def _labels(options: list[Node]) -> list[Scalar]:
    """Name the options: a scalar by itself, a component by kind or preset, else by number."""
    labels: list[Scalar] = []
    taken = Counter(option.value for option in options if isinstance(option.value, str))
    for i, option in enumerate(options):
        if not isinstance(option.value, dict | list):
            labels.append(option.value)
            continue
        named = None
        if isinstance(option.value, dict):
            named = option.value.get("kind") or option.value.get("preset")
        label = str(named.plain) if named is not None else f"option{i + 1}"
        if option.path:  # a named layer
            label = option.path.rpartition(".")[2]
        taken[label] += 1
        labels.append(f"{label}-{taken[label]}" if taken[label] > 1 else label)
    return labels


def _read_range(field: Field, node: Node, path: str, *, whole: bool) -> Range:
    """Read `{int: [low, high], step, log}` or `{float: [low, high], step, log}`."""
    hole = "int" if whole else "float"
    found = _check_hole_keys(node, hole, path)
    if field.component is not None or not ({int, float} & set(field.scalars)):
        raise node.error(path, f"a range is not allowed here; give {field.wanted()}")
    if not whole and float not in field.scalars:
        raise node.error(path, f"a 'float' range is not allowed here; give {field.wanted()}")
    ends = found[hole]
    if not isinstance(ends.value, list) or len(ends.value) != 2:
        raise ends.error(path, f"'{hole}' needs two numbers: [low, high]")
    for end in ends.value:
        number = isinstance(end.value, int | float) and not isinstance(end.value, bool)
        if not number or (whole and not float(cast(float, end.value)).is_integer()):
            raise end.error(path, f"{end.plain!r} is not a {'whole ' if whole else ''}number")
        if (reason := field.reject(end.value)) is not None:
            raise end.error(path, reason)
    low, high = (_end(field, cast(float, end.value), whole) for end in ends.value)
    if low > high:
        raise ends.error(path, f"low ({low:g}) is above high ({high:g})")
    step, log = _step_and_log(field, found, path, whole=whole)
    if log and low <= 0:
        raise ends.error(path, f"'log' needs a low end above 0, not {low:g}")
    if step is not None and not (high - low) / step <= MAX_NUMBER:
        raise found["step"].error(join(path, "step"), f"{step:g} gives more than 1e15 steps")
    if step is not None and _remainder(high - low, step):
        raise ends.error(
            path, f"from {low:g} to {high:g} is not a whole number of steps of {step:g}"
        )
    return Range(low, high, step, log, whole, node.mark, _shared(path))


def _shared(path: str) -> str:
    """Return the name of a hole that stands in a named layer, or an empty string."""
    return path if path.startswith(f"{LAYERS}.") else ""


def _end(field: Field, value: float, whole: bool) -> float:
    """Give an end of a range the type of what is drawn: 64 and 64.0 are one space."""
    return int(value) if whole else cast(float, field.convert(value))


def _remainder(span: float, step: float) -> bool:
    """Whether a span is not a whole number of steps; exact for whole numbers."""
    if isinstance(span, int) and isinstance(step, int):
        return bool(span % step)
    return abs(span / step - round(span / step)) > 1e-9


def _step_and_log(
    field: Field, found: dict[str, Node], path: str, *, whole: bool
) -> tuple[float | None, bool]:
    """Read the step and log keys of a range; whole numbers step by 1 unless told otherwise."""
    log, step = found.get("log"), found.get("step")
    if log is not None and not isinstance(log.value, bool):
        raise log.error(join(path, "log"), f"{log.plain!r} is not true or false")
    is_log = bool(log and log.value)
    if step is None:
        return ((field.multiple or 1) if whole else None), is_log
    number = isinstance(step.value, int | float) and not isinstance(step.value, bool)
    if not number or not 0 < cast(float, step.value) <= MAX_NUMBER:
        raise step.error(join(path, "step"), f"{step.plain!r} is not a number above 0")
    value = cast(float, step.value)
    if whole and float(value).is_integer():
        value = int(value)
    if is_log:
        raise step.error(join(path, "step"), "'step' and 'log' exclude each other")
    multiple = field.multiple or 1
    if whole and value % multiple:
        raise step.error(join(path, "step"), f"{value:g} is not a multiple of {multiple}")
    return value, is_log


def _short(plain: Any) -> str:
    text = str(plain)
    return text if len(text) <= 40 else text[:37] + "..."


def make(record: Record, values: Mapping[str, Any]) -> Component:
    """Make the component of a record from the values of its fields.

    Raises:
        SpaceError: where the fields stand that do not go together.
    """
    component = record.cls(**values)
    component.__dict__[ORIGIN] = record.origin
    if (reason := component.invalid()) is not None:
        raise conflict(component, reason)
    return component


def conflict(component: Component, reason: str | Conflict) -> SpaceError:
    """Build the error for a component that was made from a tree."""
    if isinstance(reason, Conflict):
        component, reason = reason.component, reason.reason
    origin = component.__dict__.get(ORIGIN)
    return origin.error(reason) if isinstance(origin, Origin) else SpaceError(reason)


def construct(tree: Tree, path: str = "") -> Component:
    """Turn a tree without holes into the component that it describes.

    Raises:
        SpaceError: if a hole is left, or the fields do not go together.
    """
    if not isinstance(tree, Record):
        raise SpaceError("unresolved hole", location=tree.mark, path=path or "architecture")
    values: dict[str, Any] = {}
    for name, value in tree.fields.items():
        inner = join(path, name)
        if isinstance(value, Fixed):
            values[name] = value.value
        elif isinstance(value, Listing):
            values[name] = tuple(
                item.value if isinstance(item, Fixed) else construct(item, join(inner, i))
                for i, item in enumerate(value.items)
            )
        else:
            values[name] = construct(value, inner)
    return make(tree, values)


def parse(
    cls: type[C], plain: Mapping[str, Any], mark: SourceLocation = NOWHERE, *, whole: bool = True
) -> C:
    """Build a component of a family from plain data; the inverse of `Component.plain`.

    An error names the place `mark`. Not `whole`: lists may have items left out, so what must hold
    between items is not asked.

    Raises:
        SpaceError: naming the field that is wrong.
    """
    component = construct(read(cls, Node.wrap(dict(plain), mark)))
    if whole and (reason := component.invalid_together()) is not None:
        raise conflict(component, reason)
    return cast(C, component)


def unparse(tree: Tree) -> Any:
    """Return the plain data that reads back as this tree: defaults and presets written out."""
    if isinstance(tree, Fixed):
        return tree.value
    if isinstance(tree, Choice):
        return {"choice": [unparse(option) for option in tree.options]}
    if isinstance(tree, Listing):
        return [unparse(item) for item in tree.items]
    if isinstance(tree, Range):
        found: Plain = {"int" if tree.whole else "float": [tree.low, tree.high]}
        if tree.log:
            found["log"] = True
        elif tree.step is not None:
            found["step"] = tree.step
        return found
    kind: Plain = {} if tree.cls.kind is None else {"kind": tree.cls.kind}
    return kind | {name: unparse(value) for name, value in tree.fields.items()}
