"""The reference of the space file, written from the code: `python -m moenas.space.reference`."""

from __future__ import annotations

import ast
import inspect
import json
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from moenas import resources as refs
from moenas.data.tokenizer_file import END_OF_TEXT
from moenas.grammar.brief import NO_DEFAULT
from moenas.grammar.component import Component, Field, Part, fields
from moenas.grammar.conditions import Values
from moenas.grammar.requirements import LATENCIES, TRAINED
from moenas.markdown import table_lines
from moenas.model.architecture import Architecture
from moenas.records import Cost, Plain
from moenas.space import space
from moenas.space.objective import load_objective
from moenas.space.section_reading import known_names
from moenas.space.sections import Protocol, Recipe, Search
from moenas.space.stored_form import RESOURCES

OWN = ("moenas.",)
"""Modules whose components are ours; a user's own parts have no defaults on file."""

INTRODUCTION = """\
# The space file

<!-- `make docs` writes this file from the code; change the code's docstrings instead. -->

A space file describes one experiment: an architecture with holes, requirements, objectives, data,
training and search. A hole is a hyperparameter. The file is strict YAML 1.2. Unknown keys,
duplicate keys, anchors, aliases, tags and second documents are errors with line and column.
`moenas check FILE` validates a file and prints its size and cost. `moenas schema` prints the JSON
Schema for editors.
"""

SECTIONS = {
    "name": "name of the study; default: the file's name without `.yaml`",
    "use": "Python files with [parts of your own](parts.md), a list of paths",
    "layers": "blocks and components with [names](#layers), used in `architecture`",
    "architecture": "a language model with [holes](#holes)",
    "require": "comparisons that every candidate must meet",
    "objectives": "the numbers to measure, by name or by path",
    "data": "the corpus; default: `stdlib`",
    "train": "the training run that every candidate gets",
    "measure": "the workload that latency is measured under",
    "search": "who proposes candidates, how many, and what each may use",
}

HOLES = """\
## Holes

A hole may replace any value of `architecture`. All options of all holes are checked when the file
is read. An option that no valid architecture can have is an error.
"""

HOLE_FORMS = {
    "`{choice: [a, b, ...]}`": "one of the options: values, mappings or whole lists. An option may"
    " have holes of its own, which exist only where that option is drawn",
    "`{int: [low, high]}`": "a whole number from low to high, both included; in steps of n where"
    " the field must be a multiple of n",
    "`{int: [low, high], step: n}`": "low, low + n, low + 2n, ..., high",
    "`{int: [low, high], log: true}`": "a whole number, drawn by its logarithm: 8 to 16 is as"
    " likely as 16 to 32; excludes `step`",
    "`{float: [low, high]}`": "any number from low to high; takes `step` or `log` as well",
}

AFTER_HOLES = """\
A group of blocks with `vary: true` draws each of its layers by itself. A group of n layers with c
variants each has c to the power of n points.

A bare word is a component of that kind with its defaults: `balance: bias` is
`balance: {kind: bias}`, also as an option of a `choice`.

Some tables below list presets. `preset: NAME` sets the fields of that row. Fields written beside
it override the preset, one by one. `{preset: mixtral, balance: {kind: aux_loss, scope: sequence}}`
keeps the `coef` of the preset.
"""

NAMED_LAYERS = """\
## `layers`

This section names blocks and components. `architecture` uses a name in place of a block or a
component. `layer: NAME` in a mapping takes the fields of the named layer; fields beside it win.

```yaml
layers:
  local: {mixer: {kind: attention, head_dim: 64, n_heads: {choice: [8, 16]}, window: 1024}}
  experts: {kind: moe, n_experts: 64, d_expert: 512, router: {top_k: 4}}
architecture:
  vocab_size: 50304
  d_model: 1024
  blocks:
    - repeat: 6
      blocks:
        - {layer: local, ffn: {kind: dense, d_ff: 4096}, repeat: 5}
        - {mixer: {kind: attention, head_dim: 64}, ffn: experts}
objectives: [active_params, flops_per_token]
```

A name is only a spelling: fingerprint and cost are the same as if the architecture were written
out. A hole in a named layer is one hole, named `layers.NAME.FIELD`. It is drawn once for each
candidate, and all uses have its value, as all layers of a `repeat` do. `vary` does not draw it
again. A layer may use other layers. A name that is unknown, unused or the name of a kind is an
error.
"""

FIT = """\
## `fit`

A fit solves one width after each draw, so that all architectures of the study have one cost. A
study then compares granularities at equal active parameters:

```yaml
d_expert: {fit: {active_params: 20e6, within: 0.01}}
```

The target is `active_params`, `params`, `total_params`, `flops_per_token` or `weight_bytes`, as in
`require`. `within` is the largest accepted difference over the target; without it the cost is
exactly the target. `multiple_of: 64` asks for wider steps than the field has. The field is a width,
such as `d_expert`, `d_ff` or `d_model`. A fit is no hole, and no sampler sees it. The stored
architecture has a plain number.

A fit is also a requirement. A candidate is infeasible if the nearest width misses the target, or if
it has no such field and another cost. A space has one fit. One in a named layer gives all uses the
same width.
"""

SAME_AS = """\
## `same_as`

`same_as` ties a value to one that is chosen elsewhere in the architecture:

```yaml
blocks:
  - mixer: {kind: attention, head_dim: 64, n_kv_heads: {choice: [1, 2, 4]}}
    ffn: {kind: dense, d_ff: {int: [256, 1024], step: 64}}
  - mixer: {kind: attention, head_dim: 64, n_kv_heads: {same_as: blocks.0.mixer.n_kv_heads}}
    ffn: {kind: dense, d_ff: {same_as: blocks.0.ffn.d_ff}}
```

The path begins at `architecture` and names a value, a hole of single values, or a fit. A tied value
is no hole: samplers, sizes and the list of holes have the named one. Fingerprints and stored
architectures have plain numbers. The value must be written, in every architecture of the space: not
below a choice, and not in a group with `vary: true`. The section `layers` shares whole parts.
"""

REQUIRE = """\
## `require`

`require` is a list of comparisons (`<`, `<=`, `>`, `>=`, `==`, `!=`), joined by `and`, `or` and
`not`. The sides consist of numbers, quoted words, names, `+ - * / // %`, `min`, `max` and `abs`.
Nothing else is accepted. No code is executed.

A candidate that violates a requirement is infeasible. It is not built and not trained. The sampler
gets the amount of the violation. A field of a layer is compared layer by layer, and the worst
layer counts. Layers without the field are skipped. `mixer` and `ffn` are kinds: `ffn == "moe"`.

A name may include the components around the field: `mixer.scale`, `ffn.router.scale`,
`architecture.norm`. A name that several parts of one layer have needs these components.
"""

REQUIRE_TRAINED = """\
A comparison with one of these names is decided after training, by the routing on the validation
text or by the measured latency. The worst layer counts. A candidate that violates it is infeasible.
Its values are kept, but it is never on the front. The sampler gets the amount of the violation.

A requirement on a latency needs that objective. Where `moenas calibrate` has stored a prediction, a
bound such as `decode_ms < 5` can refuse a candidate before training. The bound must be certainly
broken: the whole interval of the prediction, taken twice as wide, is outside. No part of the model
may be larger than in the measured models.
"""

DATA_FORMS = {
    "`stdlib`": "the sources of the running Python's standard library, as bytes, split by file;"
    " tests, near-duplicates and licence headers are left out",
    "`pydoc`": "the topics of Python's language reference, as bytes",
    "`{files: [PATH, ...]}`": "your own text: files, folders and patterns such as `texts/*.md`."
    " Text files are read as bytes. Parquet and Arrow tables, data sets of Hugging Face that"
    " `save_to_disk` wrote, and JSON Lines. One column of text is read, each row as a document",
    "`{tokens: [PATH, ...], vocab_size: N}`": "memory-mapped arrays of tokens, in order: `.npy`,"
    " raw as nanoGPT writes them, llm.c with its header, and Megatron (`.bin` beside `.idx`)."
    " Patterns and folders are sorted by name, numbers by value. In a folder, the words train and"
    " val in the names tell the split",
}

DATA_KEYS = {
    "`val`": "files, folders or patterns of the validation split. Without it 5% are held back:"
    " some files or the ends of files of text, the rows of a column with the lowest digests, the"
    " end of tokens",
    "`text_column`": "the column of text of tables and JSON Lines; default: `text`, or the only"
    " column of text. JSON Lines are read as bytes without it",
    "`tokenizer`": "a `tokenizer.json` of the library tokenizers. Text is encoded with it, and it"
    " is stored with the study and its exports",
    "`end_of_text`": "the token after each document, or null; default: the first of"
    f" {', '.join(f'`{token}`' for token in END_OF_TEXT)} that the tokenizer has",
    "`vocab_size`": "the number of different tokens; a tokenizer gives it",
    "`dtype`": "the type of raw tokens: `uint8`, `uint16` or `uint32`; default: the smallest of the"
    " last two that holds the vocabulary",
}

AFTER_DATA = """\
A relative path starts from the current directory. `architecture.vocab_size` must be at least the
vocabulary of the data, which is 256 for bytes. The first bytes of a file tell its format, and
`moenas check` says what each is. The names of all tables or token files of a folder or a pattern
may say train, val (valid, validation) or test. Then they are these splits, and test is left out.
Tables and tokenizers need `pip install 'moenas[data]'`. Encoded text is kept in the cache of the
user, `~/.cache/moenas`.
"""

OVERRIDES = """\
## Overrides

The command line can override any value:
`moenas run tiny train.tokens=2e6 architecture.d_model=128`. Items of lists count from 0:
`architecture.blocks.0.repeat=3`. Overrides are stored with the study.

The same command resumes a study. These fields of `search` may change between runs:
{resources}. Any other change is refused, and the error prints the
difference. Give a changed space another `name`.
"""


def reference() -> str:
    """Return the whole reference as Markdown."""
    return "\n".join(_pages())


def _pages() -> Iterator[str]:
    yield INTRODUCTION
    rows = [(f"`{key}`", SECTIONS[key]) for key in space.KEYS]
    yield _table(("section", "content"), rows)
    yield "`architecture` and `objectives` are required.\n"
    yield HOLES
    yield _table(("hole", "what may be drawn"), HOLE_FORMS.items())
    yield AFTER_HOLES
    yield NAMED_LAYERS
    yield from _family("architecture", Architecture, "##", set())
    yield FIT
    yield SAME_AS
    yield from _require()
    yield from _objectives()
    yield "## `data`\n"
    yield _table(("corpus", "is"), DATA_FORMS.items())
    yield _table(("field of `data`", "is"), DATA_KEYS.items())
    yield AFTER_DATA
    for name, cls in (("train", Recipe), ("measure", Protocol), ("search", Search)):
        yield from _family(name, cls, "##", set())
    yield OVERRIDES.format(resources=", ".join(f"`{name}`" for name in RESOURCES))


def _family(
    name: str, family: type[Component], level: str, written: set[type[Component]]
) -> Iterator[str]:
    """Yield what is known of a family and each of its kinds, then the families inside it.

    Each family is written once, where it is met first.
    """
    written.add(family)
    yield f"{level} `{name}`\n\n{_prose(family)}\n"
    kinds = list(family.kinds.values()) if family.kind is None else []
    plain = [cls for cls in kinds if not fields(cls) and not issubclass(cls, Part)]
    if plain:
        yield _table(("kind without fields", "is"), [(f"`{c.kind}`", _prose(c)) for c in plain])
    for cls in [cls for cls in kinds if cls not in plain] or ([] if plain else [family]):
        yield from _component(cls)
    places = [(f.component, f.name) for cls in kinds or [family] for f in fields(cls).values()]
    for component, inner in dict.fromkeys(places):
        new = component is not None and component not in written
        if component is not None and new and _heading(component) == inner != name:
            yield from _family(inner, component, "###", written)


def _component(cls: type[Component]) -> Iterator[str]:
    """Yield what is known of one component: its fields, presets and former names of fields."""
    if cls.kind is not None:
        yield f"#### `kind: {cls.kind}`\n\n{_prose(cls)}\n"
    if issubclass(cls, Part):
        yield f"Cost: {inspect.getdoc(cls.cost)}\n"
    rows = [
        (f"`{f.name}`", _accepted(f), _default(f), f.doc + _no_effect(f))
        for f in fields(cls).values()
    ]
    yield _table(("field", "accepts", "default", "is"), rows)
    if cls.presets:
        presets = [(f"`{name}`", _pairs(values)) for name, values in cls.presets.items()]
        yield _table(("preset", "fields"), presets)
    moved = [(f"`{n}`", f"`{p}`") for n, p in cls.former.items() if p != f"{n}.kind"]
    if moved:
        yield "Former names are still read; `moenas check` says what to write instead.\n"
        yield _table(("former name", "present place"), moved)


def _heading(family: type[Component]) -> str:
    """Return the name of the first field, from the sections down, whose value is of a family."""
    roots = ("architecture", Architecture), ("train", Recipe), ("search", Search)
    todo: list[tuple[str, type[Component]]] = list(roots)
    for name, cls in todo:
        if cls is family:
            return name
        for kind in cls.kinds.values() if cls.kind is None and cls.kinds else (cls,):
            inner = ((f.name, f.component) for f in fields(kind).values())
            todo += [(n, c) for n, c in inner if c is not None and c not in dict(todo).values()]
    return family.__name__.lower()


def _require() -> Iterator[str]:
    yield REQUIRE
    costs = _field_docs(Cost) | {
        "weight_bytes": inspect.getdoc(Cost.weight_bytes) or "",
        "total_params": "The same as `params`.",
    }
    yield _table(("cost", "is"), [(f"`{name}`", text) for name, text in costs.items()])
    plain = {name for name in known_names() - set(costs) if "." not in name}
    names = ", ".join(f"`{name}`" for name in sorted(plain))
    yield textwrap.fill(f"Fields: {names}.", 100) + "\n"
    yield REQUIRE_TRAINED
    decided = {name: doc for name, (_, doc) in TRAINED.items()} | LATENCIES
    yield _table(("after training", "is"), [(f"`{name}`", doc) for name, doc in decided.items()])


def _objectives() -> Iterator[str]:
    yield "## `objectives`\n\nNames from this table, or paths of [your own files](objectives.md).\n"
    names = sorted(path.stem for path in refs.shipped("objectives").glob("[!_]*.py"))
    rows = [
        (f"`{o.name}`", o.unit or "none", o.direction, o.needs, o.doc)
        for o in map(load_objective, names)
    ]
    yield _table(("objective", "unit", "direction", "needs", "is"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "".join(f"{line}\n" for line in table_lines(head, rows))


def _accepted(field: Field) -> str:
    if field.component is None:
        return field.accepts_text()
    name = _heading(field.component)
    return f"{'list of ' if field.is_list else ''}[`{name}`](#{name})"


def _no_effect(field: Field) -> str:
    """Say beside which values of other fields the field has no effect."""

    def words(name: str, values: Values) -> str:
        listed = " or ".join(map(_yaml, values.listed))
        return f"{name} other than {listed}" if values.excluded else f"{name}: {listed}"

    cases = [" and ".join(words(*item) for item in x.items()) for x in field.without_effect]
    return f"; without effect beside {', or beside '.join(cases)}" if cases else ""


def _default(field: Field) -> str:
    if field.required:
        return "required"
    if isinstance(field.default, Component):
        return field.default.kind or "its defaults"
    return _yaml(field.default)


def _pairs(values: Plain) -> str:
    return ", ".join(f"`{key}: {_yaml(value)}`" for key, value in values.items())


def _yaml(value: object) -> str:
    """Spell a scalar, or a mapping of scalars, as YAML does."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(inner)}" for key, inner in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)


def _prose(cls: type[Component]) -> str:
    """Return the docstring of a component without the name of the section that opens it."""
    text = inspect.getdoc(cls) or ""
    head, colon, rest = text.partition(": ")
    if colon and head.startswith("`"):
        return rest[0].upper() + rest[1:]
    return text


def _field_docs(cls: type) -> dict[str, str]:
    """Return field -> the string below its declaration, or nothing where there is none."""
    body = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    name = ""
    for node in body.body:
        if isinstance(node, ast.AnnAssign):
            name = ast.unparse(node.target)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
            docs[name] = str(node.value.value)
    return docs


def defaults() -> str:
    """Return the text of `defaults.json`, which `moenas.grammar.brief` reads."""
    plain: Plain = {}
    former: Plain = {}
    waiting: list[type[Component]] = [Architecture]
    while waiting:
        family = waiting.pop()
        name = family.__name__.lower()
        if name in plain:
            continue
        own = plain[name] = {}
        for kind in family.kinds.values() if family.kinds and family.kind is None else [family]:
            if any(kind.__module__.startswith(part) for part in OWN):
                own[kind.kind or ""] = {n: _on_file(f) for n, f in fields(kind).items()}
                if kind.former:
                    former.setdefault(name, {})[kind.kind or ""] = dict(kind.former)
                waiting += [f.component for f in fields(kind).values() if f.component is not None]
    return json.dumps({"defaults": plain, "former": former}, indent=1, sort_keys=True) + "\n"


def _on_file(field: Field) -> list[object]:
    """Return [] for a required plain field, else its default and the family of its value.

    A derived default follows as the third item.
    """
    if field.derived is not None:
        return [field.default, None, field.derived]
    family = None if field.component is None else field.component.__name__.lower()
    if field.required:
        return [] if family is None else [NO_DEFAULT, family]
    default = field.default
    if isinstance(default, Component):
        default = default.plain()
    elif isinstance(default, tuple):
        default = [item.plain() if isinstance(item, Component) else item for item in default]
    return [default, family]


def main() -> None:
    """Print the page, or with `--defaults` the defaults of all components."""
    print(defaults() if "--defaults" in sys.argv[1:] else reference(), end="")


if __name__ == "__main__":
    main()
