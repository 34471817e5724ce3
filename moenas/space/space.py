"""A space file: an architecture with holes, its requirements, and how to search it."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self, cast

from moenas.data import section as data
from moenas.errors import (
    MoenasError,
    PartError,
    SourceLocation,
    SpaceError,
    suggestion,
)
from moenas.failures import located
from moenas.grammar import field_names, sampling
from moenas.grammar import tree as grammar
from moenas.grammar.counting import count
from moenas.grammar.json_schema import SchemaWriter
from moenas.grammar.nodes import Choice, Fit, Fixed, Range, Record, Tree
from moenas.grammar.option_check import check_options
from moenas.grammar.requirements import LATENCIES, TRAINED, Names, Requirement
from moenas.grammar.user_parts import UserFile
from moenas.model.architecture import Architecture
from moenas.records import Cost, Plain, RoutingRow
from moenas.resources import NOWHERE, Node, find, parse_yaml, read_text
from moenas.space.early_stopping import DEFAULT_RUNGS
from moenas.space.feasibility import binding
from moenas.space.fit import fit_cost, read_one_fit, solve
from moenas.space.lengths import require_layers, require_positions
from moenas.space.named_layers import expand
from moenas.space.objective import Objective
from moenas.space.overrides import override
from moenas.space.section_reading import (
    has_key,
    mark_of,
    read_name,
    read_objectives,
    read_requirements,
    read_section,
    read_use,
    require_measured,
)
from moenas.space.sections import Protocol, Recipe, Search, start_marks
from moenas.space.stored_form import digest
from moenas.space.tied_values import check_tied_ranges, with_tied_values

KEYS = (
    "name", "use", "layers", "architecture", "require", "objectives", "data", "train", "measure",
    "search",
)  # fmt: skip
ONE_STEP = "train.budget holds one training step"
"""The requirement of a budget of training FLOPs; a step for each rung and the end if these stop."""
NO_COST = "a part's `cost` must return a Cost of whole numbers of at least 0"


@dataclass(frozen=True)
class Space:
    """One whole experiment: the architecture with holes and everything around it."""

    name: str
    text: str
    """The file, verbatim."""
    overrides: tuple[str, ...]
    use: tuple[UserFile, ...]
    """Files of parts that are not moenas's own."""
    tree: Tree
    requirements: tuple[Requirement, ...]
    objectives: tuple[Objective, ...]
    data: Plain
    train: Recipe
    measure: Protocol
    search: Search
    data_mark: SourceLocation = field(default=SourceLocation("<space>"), compare=False)
    """Where the section `data` stands."""
    names_sampler: bool = field(default=True, compare=False)
    """Whether the file names a sampler; without one it takes the default."""
    names_lr_scale: bool = field(default=True, compare=False)
    """Whether the file has `train.lr_scale`; without it, it takes the default."""
    start_marks: tuple[SourceLocation, ...] = field(default=(), compare=False)
    """Where each entry of `search.start_from` stands."""
    budget_mark: SourceLocation = field(default=NOWHERE, compare=False)
    """Where the section `train` or its budget stands."""
    fit: Fit | None = None
    """The width that is solved after each draw."""

    def __repr__(self) -> str:
        objectives = ", ".join(objective.name for objective in self.objectives)
        size = self.size
        points = f"{size:,}" if size < 10**12 else f"about 10^{math.log10(size):.0f}"
        return f"Space({self.name!r}: {points} points; {objectives})"

    @classmethod
    def load(cls, ref: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Self:
        """Read a space by path or name; `overrides` are dotted, like `train.tokens=2e6`.

        Every option of every hole is checked now.

        Raises:
            SpaceError: with file, line and column of what is wrong.
            NotFoundError: if there is no such space.
        """
        path = find("spaces", ".yaml", os.fspath(ref))
        return cls.parse(read_text(path), str(path), overrides)

    @classmethod
    def parse(cls, text: str, source: str = "<space>", overrides: Sequence[str] = ()) -> Self:
        """Read a space from YAML text; `source` names it in errors and names the study."""
        root = parse_yaml(text, source)
        if not isinstance(root.value, dict):
            raise root.error("", f"a space file is a mapping with the keys {', '.join(KEYS)}")
        for line in overrides:
            root = override(root, line)
        keys = cast(dict[str, Node], root.value)
        for key, node in keys.items():
            if key not in KEYS:
                near = suggestion(key, KEYS)
                raise node.error(
                    key, f"no such section.{near} There are {', '.join(KEYS)}.", key=True
                )
        for key in ("architecture", "objectives"):
            if key not in keys:
                raise root.error("", f"the section '{key}' is missing")
        use = tuple(read_use(keys.get("use")))
        written = with_tied_values(expand(keys["architecture"], keys.get("layers")))
        tree = grammar.read(Architecture, written, "architecture")
        check_tied_ranges(tree)
        space = cls(
            name=read_name(keys.get("name"), source),
            text=text,
            overrides=tuple(overrides),
            use=use,
            tree=tree,
            requirements=tuple(read_requirements(keys.get("require"), tree)),
            objectives=tuple(read_objectives(keys["objectives"])),
            data=data.parse(keys.get("data") or Node("stdlib", SourceLocation(source))),
            train=read_section(Recipe, "train", keys, source),
            measure=read_section(Protocol, "measure", keys, source),
            search=read_section(Search, "search", keys, source),
            data_mark=keys["data"].mark if "data" in keys else SourceLocation(source),
            names_sampler=has_key(keys.get("search"), "sampler"),
            names_lr_scale=has_key(keys.get("train"), "lr_scale"),
            start_marks=tuple(start_marks(keys.get("search"))),
            budget_mark=mark_of(keys.get("train"), "budget"),
            fit=read_one_fit(tree),
        )
        space._check(keys)
        return space._with_rungs(keys)

    def _check(self, keys: dict[str, Node]) -> None:
        """Check what spans sections: never-valid options, and the vocabulary of the data."""
        require_layers(self.tree)
        require_positions(self.tree, self.objectives, self.train, self.measure)
        check_options(self.tree)
        if not any(True for _ in self.holes):
            sampling.drawn(self.tree, sampling.RandomSuggest(0))
        if self.train.budget is not None and has_key(keys.get("train"), "tokens"):
            raise keys["train"].error(
                "train.tokens", "a budget decides the tokens of each candidate; give one of the two"
            )
        untrained = all(objective.needs != "training" for objective in self.objectives)
        if untrained and self.search.replicates > 1:
            raise SpaceError(
                "replicates differ in their training, and no objective trains the model; add"
                " val_loss to the objectives",
                location=keys["search"].mark,
                path="search.replicates",
            )
        require_measured(self.requirements, self.objectives)
        needed = self.data.get("vocab_size", 256)
        for value, mark in _values(self.tree, "vocab_size"):
            if value < needed:
                raise SpaceError(
                    f"{value} is too small for the data, which has {needed} different tokens",
                    location=mark,
                    path="architecture.vocab_size",
                )

    def _with_rungs(self, keys: dict[str, Node]) -> Self:
        """Return the space with rungs where early stopping needs some.

        Raises:
            SpaceError: if early stopping does not suit the objectives or the length of training.
        """
        early_stopping = self.search.early_stopping
        if not early_stopping.stops:
            return self
        reason = early_stopping.unsuitable(self.objectives)
        if reason is None and self.train.budget is None and self.train.steps < 2:
            reason = f"training has {self.train.steps} step, and a rung needs one before the last"
        if reason is not None:
            section = keys["search"]
            written = cast(dict[str, Node], section.value)
            node = written.get("early_stopping", section)
            raise node.error("search.early_stopping", reason)
        rungs = self.train.rungs or DEFAULT_RUNGS
        return replace(self, train=replace(self.train, rungs=rungs))

    @cached_property
    def former_fields(self) -> dict[str, str]:
        """Former name -> present place of the fields that had another name in earlier versions."""
        return field_names.former(Architecture)

    @property
    def former_names(self) -> list[str]:
        """A line for each former name of a field in the text: where it is, and what to write."""
        required = (line for requirement in self.requirements for line in requirement.former)
        return [*grammar.former_names(self.tree), *required]

    @property
    def size(self) -> int:
        """The exact number of points, before `require`; a continuous range counts as one."""
        return count(self.tree)

    @property
    def continuous(self) -> int:
        """How many holes are continuous ranges, with infinitely many values."""
        ranges = (hole.tree for hole in self.holes)
        return sum(isinstance(tree, Range) and tree.count is None for tree in ranges)

    @property
    def holes(self) -> Iterator[sampling.Hole]:
        """Every hole under the name that the sampler sees."""
        return sampling.holes(self.tree)

    @property
    def vocab_sizes(self) -> list[int]:
        """Every vocabulary that an architecture of the space can have; of a range, its low end."""
        return [value for value, _ in _values(self.tree, "vocab_size")]

    def draw(self, suggest: sampling.Suggest) -> Plain:
        """Fill the holes from an Optuna trial (or another `Suggest`) and return plain data.

        The width of a fit is the one whose cost is nearest to the target.
        """
        return cast(Plain, sampling.draw(self.tree, self._answers(suggest)))

    def drawn(self, suggest: sampling.Suggest) -> Architecture:
        """Fill the holes as `draw`, and return the canonical architecture.

        Raises:
            SpaceError: if the drawn fields do not go together.
        """
        answers = self._answers(suggest)
        return cast(Architecture, sampling.drawn(self.tree, answers)).canonical()

    def _answers(self, suggest: sampling.Suggest) -> sampling.Answers:
        """Return the answers to the holes, with the width of the fit."""
        answers = sampling.Answers.of(suggest)
        if self.fit is not None:
            with suppress(SpaceError):  # the fields do not go together; the caller says why
                solve(self.tree, self.fit, answers, self.cost)
        return answers

    def missed_fit(self, suggest: sampling.Suggest) -> str:
        """Say which width is nearest to the target of the fit in a draw, and its cost."""
        assert self.fit is not None
        answers = self._answers(suggest)
        architecture = cast(Architecture, sampling.drawn(self.tree, answers))
        amount = f"{fit_cost(self.fit, self.cost(architecture)):,}"
        if not answers.has_fit:
            return f"{self.fit.text}: the draw has no {self.fit.path}, and its cost is {amount}"
        width = answers.width(self.fit)
        return f"{self.fit.text}: the nearest width, {width}, gives {amount} ({self.fit.path})"

    def architecture(self, plain: Plain, mark: SourceLocation = NOWHERE) -> Architecture:
        """Build the canonical architecture from drawn data; an error names the place `mark`.

        Raises:
            SpaceError: if the drawn fields do not go together.
        """
        return grammar.parse(Architecture, plain, mark).canonical()

    def violations(self, architecture: Architecture) -> dict[str, float]:
        """Return requirement -> by how much it is broken: over 0 if broken, else 0 or less.

        Of those that are decided before anything is built. The target of a fit is one of them.
        """
        wanted = [r for r in self.requirements if not r.trained]
        layers = self.layer_names(architecture) if wanted else []
        violations = {r.text: r.violation(layers) for r in wanted}
        budget = self.train.budget
        if budget is not None and budget.train_flops is not None:
            step = self.train.step_flops(self.training_cost(architecture).flops_per_token)
            # With early stopping, each rung and the end need a step of their own.
            least = 1 + self.train.rungs if self.search.early_stopping.stops else 1
            violations[ONE_STEP] = least * step / budget.train_flops - 1.0
        if self.fit is not None:
            violations[self.fit.text] = self.fit.violation(
                fit_cost(self.fit, self.cost(architecture))
            )
        return violations

    def trained_violations(
        self,
        architecture: Architecture,
        routing: Sequence[RoutingRow],
        values: Mapping[str, float],
    ) -> dict[str, float]:
        """Return the same of the requirements that are decided after training.

        `routing` and `values` come from an evaluation. A model without MoE layers breaks none on
        the routing.
        """
        wanted = [r for r in self.requirements if r.trained]
        if not wanted:
            return {}
        rows: dict[int, Mapping[str, Any]] = {row["layer"]: row for row in routing}
        measured = {name: values.get(name) for name in LATENCIES}
        layers: list[Names] = [
            {
                **names,
                **measured,
                **{name: rows.get(i, {}).get(key) for name, (key, _) in TRAINED.items()},
            }
            for i, names in enumerate(self.layer_names(architecture))
        ]
        return {r.text: r.violation(layers) for r in wanted}

    def layer_names(self, architecture: Architecture) -> list[Names]:
        """Return the values of the names that a requirement can use, for each layer."""
        cost = self.cost(architecture)
        shared: dict[str, float | str | None] = {**cost.plain(), "total_params": cost.params}
        layers = architecture.names()
        known = {id(layer): {**layer, **shared} for layer in layers}
        return [known[id(layer)] for layer in layers]

    def feasible(self, n_draws: int) -> Iterator[Architecture | str]:
        """Draw random architectures; yield each that is feasible, or why it is not.

        A string is the reason: a broken requirement, or the clash that makes the draw invalid.
        """
        for seed in range(n_draws):
            try:
                architecture = self.drawn(sampling.RandomSuggest(seed))
            except SpaceError as error:
                yield str(error)
                continue
            violations = self.violations(architecture)
            worst = max(violations, key=lambda text: violations[text], default="")
            yield worst if violations.get(worst, 0) > 0 else architecture

    def require_feasible(self, n_draws: int = 1000) -> Architecture:
        """Return the first feasible one of `n_draws` random architectures.

        Raises:
            SpaceError: with what most of them break, if none is feasible.
        """
        reasons = Counter[str]()
        for drawn in self.feasible(n_draws):
            if not isinstance(drawn, str):
                return drawn
            reasons[drawn] += 1
        worst = ", ".join(f"{text} ({n} times)" for text, n in reasons.most_common(3))
        binds = binding(self, n_draws)
        raise SpaceError(
            f"{self.name}: no architecture satisfies `require`;"
            f" {n_draws} random architectures break {worst}" + (f"; {binds}" if binds else "")
        )

    def cost(self, architecture: Architecture) -> Cost:
        """Return the cost of an architecture at the training context of this space.

        Raises:
            PartError: if a part of the user's does not count its own.
        """
        return self._counted(lambda: architecture.cost(self.train.context))

    def training_cost(self, architecture: Architecture) -> Cost:
        """Return the cost in training: of the model, and of the heads that `train.mtp` adds.

        Raises:
            PartError: if a part of the user's does not count its own.
        """
        return self._counted(lambda: self.train.training_cost(architecture))

    def cost_record(self, architecture: Architecture) -> dict[str, int]:
        """Return the cost as it is stored; see `Recipe.cost_record`.

        Raises:
            PartError: if a part of the user's does not count its own.
        """
        if self.train.heads is None:  # of every draw: it is counted once
            return self.cost(architecture).plain()
        self.training_cost(architecture)
        return self.train.cost_record(architecture)

    def _counted(self, count: Callable[[], Cost]) -> Cost:
        try:
            cost = count()
            right = all(type(n) is int and n >= 0 for n in cost.plain().values())
        except MoenasError:
            raise
        except (Exception, SystemExit) as error:
            raise PartError(f"{NO_COST}: {located(error)}") from error
        if not right:
            raise PartError(f"{NO_COST}: the sum is {cost}")
        return cost

    def plain(self) -> Plain:
        """Return all that the space says, with presets and defaults written out."""
        use: Plain = {"use": [file.plain() for file in self.use]} if self.use else {}
        shared = sampling.shared_holes(self.tree)
        return (
            use
            | ({"layers": shared} if shared else {})
            | {
                "architecture": grammar.unparse(self.tree),
                "require": [r.text for r in self.requirements],
                "objectives": [
                    {"name": o.name, "sha256": o.info().sha256} for o in self.objectives
                ],
                "data": self.data,
                "train": self.train.plain(),
                "measure": self.measure.plain(),
                "search": self.search.plain(),
            }
        )

    @property
    def sha256(self) -> str:
        """Digest of all that a resumed study must not change: everything but its resources."""
        return digest(self.plain())

    def with_search(self, **changes: Any) -> Self:
        """Return the space with other values in `search`, e.g. `with_search(trials=100)`."""
        return replace(self, search=replace(self.search, **changes))


def file_schema() -> Plain:
    """Return the JSON Schema (draft 7) of a space file."""
    writer = SchemaWriter()
    text = {"type": "string"}
    architecture = writer.family(Architecture, layers=False)
    parts = [{"$ref": f"#/definitions/{x}"} for x in writer.definitions if x != "architecture"]
    layers = {"type": "object", "additionalProperties": {"anyOf": parts}}
    properties: Plain = {
        "name": {"type": "string", "description": "the study's name; the file's name if left out"},
        "use": {"type": "array", "items": text, "description": "files of parts of your own"},
        "layers": {**layers, "description": "blocks and components by name"},
        "architecture": architecture,
        "require": {"type": "array", "items": text, "description": "comparisons to meet"},
        "objectives": {"type": "array", "minItems": 1, "items": text},
        "data": {"anyOf": [text, {"type": "object"}], "description": "the corpus"},
        "train": writer.family(Recipe, holes=False),
        "measure": writer.family(Protocol, holes=False),
        "search": writer.family(Search, holes=False),
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "moenas space file",
        "type": "object",
        "additionalProperties": False,
        "required": ["architecture", "objectives"],
        "properties": properties,
        "definitions": writer.definitions,
    }


def _values(tree: Tree, name: str) -> Iterator[tuple[int, SourceLocation]]:
    """Yield every value that a top-level whole-number field of the architecture can have."""
    if isinstance(tree, Choice):
        for option in tree.options:
            yield from _values(option, name)
    elif isinstance(tree, Record):
        yield from _values(tree.fields[name], name)
    elif isinstance(tree, Range):
        yield int(tree.low), tree.mark
    elif isinstance(tree, Fixed):
        yield cast(int, tree.value), tree.mark
