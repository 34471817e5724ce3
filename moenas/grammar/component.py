"""A part of an architecture: typed fields, cost and build; families and their kinds."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar, cast, get_args, get_origin

from moenas.errors import SpaceError
from moenas.grammar.conditions import Conditions, Scalar, Values
from moenas.grammar.derived import MODEL_WIDTH, derived_value
from moenas.records import Cost, Plain

if TYPE_CHECKING:
    from torch import nn

C = TypeVar("C", bound="Component")

MAX_NUMBER = 10**15
"""Fits into every database's integers; infinities and nan are refused with it."""
FINGERPRINT_DATA = "_fingerprint_data_kept"
"""Key under which a component keeps the data of its fingerprint."""


def setting(
    doc: str,
    *,
    default: Any = dataclasses.MISSING,
    low: float | None = None,
    high: float | None = None,
    multiple: int | None = None,
    why: str | None = None,
    without_effect: Conditions | Mapping[str, Values] = (),
    derived: str | None = None,
) -> Any:
    """Declare a field of a component: its meaning (with unit and source), default and bounds.

    `low` and `high` are inclusive. `multiple` asks for a multiple of that number. `why` is the
    reason for the bounds; an error says it. `without_effect` maps other fields of the component to
    values: where they have these, the field has no effect and is not drawn. It then needs a
    default. Several mappings are alternatives.

    `derived` is an expression of other fields of the component and of `d_model`, such as
    `d_model / head_dim`; see `moenas.grammar.derived`. The default is then null, which stands for
    the value of the expression. The meaning says so.
    """
    if derived is not None:
        default, doc = None, f"{doc}; null: {derived}"
    conditions = (without_effect,) if isinstance(without_effect, Mapping) else without_effect
    bounds = {"low": low, "high": high, "multiple": multiple, "why": why}
    metadata = {"doc": doc, **bounds, "without_effect": conditions, "derived": derived}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Field:
    """What is known of one field of a component."""

    name: str
    doc: str
    scalars: tuple[type, ...]
    """Accepted scalar types: bool, int, float, str."""
    choices: tuple[Scalar, ...]
    """The values of a Literal that the field accepts; empty if any value of the type will do."""
    component: type[Component] | None
    """The family of the field's value, if it is a component."""
    is_list: bool
    """The field is a list of components, or of scalars if it has no `component`."""
    optional: bool
    """None is accepted."""
    default: Any
    low: float | None = None
    high: float | None = None
    multiple: int | None = None
    why: str | None = None
    """The reason for the bounds."""
    without_effect: Conditions = ()
    """Values of other fields beside which this one has no effect."""
    derived: str | None = None
    """The expression of other fields that null stands for."""

    @property
    def required(self) -> bool:
        """The field has no default."""
        return self.default is dataclasses.MISSING

    def accepts_text(self) -> str:
        """Say in words what the field accepts."""
        if self.choices:
            return "one of " + ", ".join(str(c) for c in self.choices)
        if self.component is not None:
            mapping = accepted_mapping(self.component)
            return f"a list, each item {mapping}" if self.is_list else mapping
        if self.is_list:
            return "a list of words"
        text = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
        words = " or ".join(
            text[s] for s in self.scalars if not (s is int and len(self.scalars) > 1)
        )
        if self.multiple:
            words += f" that is a multiple of {self.multiple}"
        if self.low is not None and self.high is not None:
            words += f" from {self.low:g} to {self.high:g}"
        elif self.low is not None:
            words += f" of at least {self.low:g}"
        elif self.high is not None:
            words += f" of at most {self.high:g}"
        return words + (" or null" if self.optional else "")

    def error_for(self, value: Any) -> str | None:
        """Return why `value` is not accepted here, or None if it is."""
        if value is None:
            return None if self.optional else f"is empty; give {self.accepts_text()}"
        if self.choices and value in self.choices and type(value) in map(type, self.choices):
            return None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and not abs(value) <= MAX_NUMBER:
            return f"{value:.3g} is too large; the maximum is 1e15"
        fits = (
            (isinstance(value, bool) and bool in self.scalars)
            or (number and float in self.scalars)
            or (number and int in self.scalars and float(value).is_integer())
            or (isinstance(value, str) and str in self.scalars)
        )
        if self.choices or not fits:
            return f"{value!r} is not {self.accepts_text()}"
        if number and (
            (self.low is not None and value < self.low)
            or (self.high is not None and value > self.high)
            or (self.multiple is not None and value % self.multiple)
        ):
            reason = f"; {self.why}" if self.why else ""
            return f"{value!r} is not {self.accepts_text()}{reason}"
        return None

    def convert(self, value: Any) -> Any:
        """Give an accepted value its canonical type: `1e6` is an int where an int is meant."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return value
        if int in self.scalars and float(value).is_integer():
            return int(value)
        return float(value) if float in self.scalars else value


@dataclass(frozen=True)
class Conflict:
    """Why the fields of a component below do not go together with those above it."""

    component: Component
    """The component below that the error points at."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class Component:
    """A frozen record of fields that reads from and writes to plain data.

    A class defined without `kind` is a family (`Mixer`); a subclass of a family with `kind="..."`
    is one of its kinds. A family without kinds (`Router`) is written without a `kind` key.
    """

    kinds: ClassVar[dict[str, type[Component]]] = {}
    kind: ClassVar[str | None] = None
    presets: ClassVar[dict[str, Plain]] = {}
    """Names of well-known combinations of fields. A preset is only a spelling."""
    former: ClassVar[Mapping[str, str]] = {}
    """Former name of a field -> its present place: `field`, `field.inner`, or `field.kind` if the
    former field was the name of a kind. Space files and stored architectures may use these names.
    Fingerprints are made of them, so that fingerprints of earlier versions stay valid."""

    def __init_subclass__(cls, kind: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind is None:
            cls.kinds = {}
            return
        known = cls.kinds.get(kind)
        if known is not None and _origin(known) != _origin(cls):
            raise SpaceError(
                f"the kind '{kind}' already exists: {known.__qualname__} of {known.__module__};"
                " choose another name"
            )
        cls.kind = kind
        cls.kinds[kind] = cls

    def invalid(self) -> str | Conflict | None:
        """Return why the fields do not go together, or None. Overridden where they can clash.

        The error points at this component, or at the one that a `Conflict` names.
        """
        return None

    def invalid_as_a_whole(self) -> str | Conflict | None:
        """Return why items of its lists do not go together, or None. Asked of a whole alone."""
        return None

    def canonical(self) -> Self:
        """Return the one spelling of all components that compute the same function."""
        return self

    def plain(self) -> Plain:
        """Return the component as a JSON object with every field written out."""
        plain: Plain = {} if self.kind is None else {"kind": self.kind}
        for name in fields(type(self)):
            value = getattr(self, name)
            if isinstance(value, Component):
                value = value.plain()
            elif isinstance(value, tuple):
                value = [x.plain() if isinstance(x, Component) else x for x in value]
            plain[name] = value
        return plain

    def resolved(self, name: str, d_model: int | None = None) -> Any:
        """Return a field, or what its null stands for at a model width.

        None if the field is null and has no derived default, or if that is no whole number.
        """
        value, expression = getattr(self, name), fields(type(self))[name].derived
        if value is not None or expression is None:
            return value
        return derived_value(
            expression,
            lambda other: d_model if other == MODEL_WIDTH else self.resolved(other, d_model),
        )

    def fingerprint_data(self) -> Plain:
        """Return the JSON object that a fingerprint is made of: fields that differ from defaults.

        Fields that had another place in an earlier version have their former names. It is kept,
        because a search meets the same parts in thousands of architectures: do not change it.
        """
        kept: Plain | None = self.__dict__.get(FINGERPRINT_DATA)
        if kept is None:
            kept = self.__dict__[FINGERPRINT_DATA] = self._fingerprint_data()
        return kept

    def _fingerprint_data(self) -> Plain:
        data: Plain = {} if self.kind is None else {"kind": self.kind}
        former = {place: name for name, place in self.former.items()}
        flat = {place.partition(".")[0] for place in former if "." in place}
        for name, value in self._not_default():
            if isinstance(value, tuple):
                data[name] = [item.fingerprint_data() for item in value]
            elif not isinstance(value, Component):
                data[former.get(name, name)] = value
            elif name not in flat:
                data[name] = value.fingerprint_data()
            else:
                inner = dict(value.fingerprint_data())
                default = fields(type(self))[name].default
                if value.kind is not None and value.kind == default.kind:
                    del inner["kind"]
                data |= {former.get(place := f"{name}.{n}", place): v for n, v in inner.items()}
        return data

    def _not_default(self) -> Iterator[tuple[str, Any]]:
        """Yield name and value of the fields that differ from their defaults."""
        for name, field in fields(type(self)).items():
            if (value := getattr(self, name)) != field.default:
                yield name, value


def accepted_mapping(family: type[Component]) -> str:
    """Say in words which mapping a family accepts: by its kinds, or by its fields."""
    if family.kind is None and family.kinds:
        return f"a mapping with a kind, or one of the kinds {', '.join(family.kinds)}"
    return f"a mapping of {', '.join(fields(family))}"


def changed(component: C, **changes: Any) -> C:
    """Return a component with other values of some fields; the same object if none is another.

    As `dataclasses.replace` in a fraction of its time, which counts in spaces of many layers.
    """
    values = component.__dict__
    if all(values[name] is value for name, value in changes.items()):
        return component
    copy = object.__new__(type(component))
    copy.__dict__.update({name: values[name] for name in fields(type(component))}, **changes)
    return copy


def _origin(cls: type) -> tuple[str, str]:
    """Return what stays the same when a user edits a file: modules end in a digest of it."""
    return cls.__module__.rpartition("_")[0] or cls.__module__, cls.__qualname__


@dataclass(frozen=True, kw_only=True)
class Part(Component):
    """A component of a model: it counts its cost and builds itself at a model width."""

    @property
    def layer_indexed(self) -> bool:
        """Whether the built module depends on the number of its layer in the model."""
        return False

    @property
    def router(self) -> Component | None:
        """The router of a mixture of experts; a field of this name takes its place."""
        return None

    @property
    def attention_span(self) -> int | None:
        """How many tokens one can see, itself included: a field `window` or `chunk`; None: all."""
        known = fields(type(self))
        spans = (getattr(self, name) for name in ("window", "chunk") if name in known)
        return next((span for span in spans if span), None)

    def invalid_at(self, d_model: int) -> str | Conflict | None:
        """Return why the part does not fit a model of this width, or None."""
        return None

    def cost(self, d_model: int, context: int) -> Cost:
        """Return the exact cost of this part at a model width and a context length in tokens."""
        raise NotImplementedError

    def surplus_flops(self, d_model: int, context: int) -> int:
        """Return the operations of a pass beyond `context * flops_per_token` of the cost.

        The numbers are for one sequence of `context` tokens. A count of the built part finds
        operations that the cost leaves out, such as rows that carry nothing. Operations that the
        cost was rounded up by are subtracted.
        """
        return 0

    def build(self, d_model: int) -> nn.Module:
        """Build the part at a model width."""
        raise NotImplementedError


def fields(cls: type[Component]) -> dict[str, Field]:
    """Return the fields of a component class, in order of declaration."""
    return _fields(cast(Any, cls))


@cache
def _fields(cls: Any) -> dict[str, Field]:
    hints = typing.get_type_hints(cls)
    return {f.name: _field(f, hints[f.name]) for f in dataclasses.fields(cls)}


def _field(declared: dataclasses.Field[Any], hint: Any) -> Field:
    """Read one declaration; the annotation says what is accepted."""
    args = get_args(hint) if get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    scalars: list[type] = []
    literals: list[Scalar] = []
    component, is_list = None, False
    for arg in args:
        if get_origin(arg) is Literal:
            literals += get_args(arg)
        elif get_origin(arg) is tuple:
            item, is_list = get_args(arg)[0], True
            if issubclass(item, Component):
                component = item
            else:
                scalars.append(item)
        elif isinstance(arg, type) and issubclass(arg, Component):
            component = arg
        elif arg is not types.NoneType:
            scalars.append(arg)
    meta = declared.metadata
    return Field(
        name=declared.name,
        doc=meta.get("doc", ""),
        scalars=tuple(scalars),
        choices=tuple(literals),
        component=component,
        is_list=is_list,
        optional=types.NoneType in args,
        default=declared.default,
        low=meta.get("low"),
        high=meta.get("high"),
        multiple=meta.get("multiple"),
        why=meta.get("why"),
        without_effect=meta.get("without_effect", ()),
        derived=meta.get("derived"),
    )


def join(path: str, part: object) -> str:
    """Join two parts of a dotted path."""
    return f"{path}.{part}" if path else str(part)
