"""The one grammar of architectures and spaces: components with holes, read from YAML or data.

A tree mirrors the YAML text: `Record` (a component), `Listing`, `Fixed` (a value) and the holes
`Choice` and `Range`. A tree without holes is an architecture. Conditional parameters come from
nesting alone: what stands inside one option of a `Choice` exists only where that option is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast

from moenas.errors import SourceLocation, SpaceError
from moenas.grammar.component import (
    Component,
    Conflict,
    Field,
    accepted_mapping,
    fields,
    join,
)
from moenas.grammar.conditions import Scalar
from moenas.grammar.hole_reading import (
    FIT,
    MAX_OPTIONS,
    check_hole_keys,
    hole_kind,
    option_labels,
    read_fit,
    read_range,
    shared_name,
)
from moenas.grammar.nodes import (
    ORIGIN,
    Choice,
    Fit,
    Fixed,
    Listing,
    Origin,
    Range,
    Record,
    Tree,
    walk,
)
from moenas.grammar.spellings import apply_spellings, as_mapping
from moenas.grammar.synonyms import hint
from moenas.records import Plain
from moenas.resources import NOWHERE, Node

C = TypeVar("C", bound=Component)


def read(family: type[Component], node: Node, path: str = "", name: str = "") -> Tree:
    """Read a component, or a hole with components as options, from YAML or plain data.

    `name` is the field that holds it, for errors; without one, the end of the path.

    Raises:
        SpaceError: `file:line:column: path: what is wrong; what would be right`.
    """
    path = node.path or path
    hole = hole_kind(node)
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
            raise node.error(path, f"'{key}' is missing; give {field.accepts_text()} ({field.doc})")
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
    for node in walk(tree):
        if isinstance(node, Record):
            yield from node.former


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
    hole = hole_kind(node)
    if hole == "choice":
        return _read_choice(lambda n, p: _read_field(field, n, p), node, path)
    if hole is not None:
        return read_range(field, node, path, whole=hole == "int")
    if isinstance(node.value, dict) and FIT in node.value and "kind" not in node.value:
        return read_fit(field, node, path)
    if field.component is not None and not (node.value is None and field.optional):
        component = field.component
        if not field.is_list:
            return read(component, node, path, field.name)
        if not isinstance(node.value, list) or not node.value:
            raise node.error(path, f"{node.plain!r} is not {field.accepts_text()}")
        items = (
            read(component, item, join(path, i), field.name) for i, item in enumerate(node.value)
        )
        return Listing(tuple(items), node.mark)
    if field.is_list and field.component is None:
        if not isinstance(node.value, list):
            raise node.error(path, f"{_short(node.plain)} is not {field.accepts_text()}")
        for i, item in enumerate(node.value):
            if not isinstance(item.value, str):
                raise item.error(join(path, i), f"{_short(item.plain)} is not a word")
        return Listing(tuple(Fixed(cast(str, x.value), x.mark) for x in node.value), node.mark)
    if isinstance(node.value, dict | list):
        raise node.error(path, f"{_short(node.plain)} is not {field.accepts_text()}")
    if (reason := field.error_for(node.value)) is not None:
        raise node.error(path, reason)
    return Fixed(field.convert(node.value), node.mark)


def _read_default(field: Field, mark: SourceLocation, path: str) -> Tree:
    """Read the default of a field that was left out."""
    value = field.default
    if isinstance(value, Component):
        family = cast(type[Component], field.component)
        return read(family, Node.wrap(value.plain()), path, field.name)
    return Fixed(cast(Scalar, value), mark)


def _read_choice(read_option: Any, node: Node, path: str) -> Choice:
    """Read `{choice: [...]}`; every option is checked now, not when it is drawn."""
    options = check_hole_keys(node, "choice", path)["choice"]
    if not isinstance(options.value, list) or not options.value:
        raise options.error(path, "'choice' needs a list of at least one option")
    if len(options.value) > MAX_OPTIONS:
        raise options.error(path, f"'choice' takes at most {MAX_OPTIONS} options; write a range")
    labels = option_labels(options.value)
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
    return Choice(tuple(labels), tuple(trees), node.mark, shared_name(node, path))


def make(record: Record, values: Mapping[str, Any]) -> Component:
    """Make the component of a record from the values of its fields.

    Raises:
        SpaceError: if fields do not go together; it names their place.
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
    if whole and (reason := component.invalid_as_a_whole()) is not None:
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
        plain: Plain = {"int" if tree.whole else "float": [tree.low, tree.high]}
        if tree.log:
            plain["log"] = True
        elif tree.step is not None:
            plain["step"] = tree.step
        return plain
    if isinstance(tree, Fit):
        return {FIT: {tree.cost: tree.target, "within": tree.within, "multiple_of": tree.step}}
    kind: Plain = {} if tree.cls.kind is None else {"kind": tree.cls.kind}
    return kind | {name: unparse(value) for name, value in tree.fields.items()}


def _short(plain: Any) -> str:
    text = str(plain)
    return text if len(text) <= 40 else text[:37] + "..."
