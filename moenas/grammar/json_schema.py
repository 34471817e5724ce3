"""The JSON Schema (draft 7) of a space file, for editors."""

from __future__ import annotations

from moenas.grammar.component import Component, Field, fields
from moenas.grammar.hole_reading import FIT, FIT_COSTS, SAME_AS
from moenas.records import Plain

_LAYER: Plain = {"type": "string", "description": "the name of a layer of `layers`"}
_SAME_AS: Plain = {
    "type": "object",
    "additionalProperties": False,
    "required": [SAME_AS],
    "properties": {SAME_AS: {"type": "string", "description": "the path of a value"}},
}
_NAMES = {bool: "boolean", int: "integer", float: "number", str: "string"}


class SchemaWriter:
    """Collects one definition per family, so that the schema stays as small as the grammar."""

    def __init__(self) -> None:
        self.definitions: Plain = {}

    def family(self, cls: type[Component], *, holes: bool = True, layers: bool = True) -> Plain:
        """Return a reference to the schema of a family, writing it down the first time.

        `holes`: its values may be holes. `layers`: a named layer may give its fields.
        """
        layers = layers and holes
        name = cls.__name__.lower()
        if name not in self.definitions:
            self.definitions[name] = {}
            members = list(cls.kinds.values()) if cls.kinds and cls.kind is None else [cls]
            options = [self._record(x, holes=holes, layers=layers) for x in members]
            if cls.kinds and cls.kind is None:
                options.append({"enum": list(cls.kinds), "description": "with its defaults"})
            option = options[0] if len(options) == 1 else {"anyOf": options}
            self.definitions[name] = option
        return {"$ref": f"#/definitions/{name}"}

    def _record(self, cls: type[Component], *, holes: bool, layers: bool) -> Plain:
        properties: Plain = {}
        if cls.kind is not None:
            properties["kind"] = {"const": cls.kind}
        if cls.presets:
            properties["preset"] = {"enum": list(cls.presets), "description": "spells fields"}
        if layers:
            properties["layer"] = {"type": "string", "description": "takes the fields of a layer"}
        known = fields(cls)
        for name, field in known.items():
            properties[name] = {"description": field.doc, **self._field(field, holes=holes)}
        required = [name for name, field in known.items() if field.required and not cls.presets]
        if cls.kind is not None:
            required.insert(0, "kind")
        schema: Plain = {
            "type": "object",
            "description": (cls.__doc__ or "").split("\n")[0],
            "additionalProperties": False,
            "properties": properties,
        }
        if required and layers:
            return schema | {"anyOf": [{"required": required}, {"required": ["layer"]}]}
        return schema | ({"required": required} if required else {})

    def _field(self, field: Field, *, holes: bool) -> Plain:
        if field.component is not None:
            inner = self.family(field.component, holes=holes)
            if holes:
                inner = {"anyOf": [inner, _LAYER]}
            if field.is_list:
                item = {"anyOf": [inner, _choice(inner)]} if holes else inner
                inner = {"type": "array", "minItems": 1, "items": item}
            null: list[Plain] = [{"type": "null"}] if field.optional else []
            option = {"anyOf": [inner, *null]} if null else inner
            return {"anyOf": [inner, _choice(option), *null]} if holes else option
        value = _scalar(field)
        if field.is_list:
            return {"type": "array", "items": value}
        if not holes:
            return value
        options = [value, _choice(value), _SAME_AS]
        if int in field.scalars or float in field.scalars:
            options.append(_range("int"))
        if float in field.scalars:
            options.append(_range("float"))
        if field.multiple is not None:
            options.append(_fit())
        return {"anyOf": options}


def _choice(option: Plain) -> Plain:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["choice"],
        "properties": {"choice": {"type": "array", "minItems": 1, "items": option}},
    }


def _range(hole: str) -> Plain:
    number = {"type": "number"}
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [hole],
        "properties": {
            hole: {"type": "array", "items": number, "minItems": 2, "maxItems": 2},
            "step": number,
            "log": {"type": "boolean"},
        },
    }


def _fit() -> Plain:
    number = {"type": "number"}
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [FIT],
        "properties": {
            FIT: {
                "type": "object",
                "additionalProperties": False,
                "minProperties": 1,
                "properties": {
                    name: {**number, "minimum": 0} for name in (*FIT_COSTS, "within", "multiple_of")
                },
            }
        },
    }


def _scalar(field: Field) -> Plain:
    """Return the schema of a scalar field, without holes."""
    options: list[Plain] = [{"enum": list(field.choices)}] if field.choices else []
    for scalar in field.scalars:
        bounds: Plain = {}
        if scalar in (int, float):
            bounds = {"minimum": field.low, "maximum": field.high, "multipleOf": field.multiple}
        known = {key: value for key, value in bounds.items() if value is not None}
        options.append({"type": _NAMES[scalar]} | known)
    if field.optional:
        options.append({"type": "null"})
    return options[0] if len(options) == 1 else {"anyOf": options}
