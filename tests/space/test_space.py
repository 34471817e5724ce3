"""Space files: what they say, what is refused and where."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moenas import resources
from moenas.errors import InputError, NotFoundError, SpaceError
from moenas.grammar import sampling
from moenas.grammar.requirements import LATENCIES, TRAINED, parse_requirement
from moenas.model.architecture import Architecture
from moenas.resources import NOWHERE
from moenas.space.section_reading import known_names
from moenas.space.space import Space, file_schema
from moenas.space.stored_form import digest

SMALL = """\
architecture:
  vocab_size: 256
  d_model: {choice: [32, 64]}
  blocks:
    - repeat: {int: [1, 2]}
      mixer: {kind: attention, head_dim: 16}
      ffn:
        choice:
          - {kind: dense, d_ff: {int: [32, 64], step: 32}}
          - kind: moe
            n_experts: {choice: [2, 4]}
            d_expert: 32
            router: {top_k: {choice: [1, 2, 4]}}
require: [top_k <= n_experts]
objectives: [val_loss, flops_per_token]
data: pydoc
train: {tokens: 4096, context: 32, batch: 4}
"""


def parse(text: str, *overrides: str) -> Space:
    return Space.parse(text, "space.yaml", overrides)


def test_every_shipped_space_is_valid_and_meets_the_schema() -> None:
    schema = file_schema()
    jsonschema.Draft7Validator.check_schema(schema)
    paths = list(resources.shipped("spaces").glob("*.yaml"))
    assert {"tiny", "_template"} <= {path.stem for path in paths}
    for path in paths:
        space = Space.load(str(path))
        assert space.size >= 1
        jsonschema.validate(resources.parse_yaml(path.read_text(), path.name).plain, schema)


def test_a_space_shows_itself_in_one_short_line() -> None:
    for name in ("tiny", "wide", "zoo/mixtral_8x7b"):
        shown = repr(Space.load(name))
        assert shown.startswith(f"Space({name.rpartition('/')[2]!r}: ")
        assert " points; " in shown
        assert len(shown) < 200
        assert "\n" not in shown


def test_a_space_counts_its_points() -> None:
    # 2 widths * 2 depths * (2 dense + 2 * 3 mixtures)
    assert parse(SMALL).size == 2 * 2 * (2 + 2 * 3)


def test_violations_are_over_zero_just_where_the_requirement_is_broken() -> None:
    space = parse(SMALL)
    seen = set()
    for seed in range(200):
        plain = space.draw(sampling.RandomSuggest(seed))
        ffn = plain["blocks"][0]["ffn"]
        broken = ffn["kind"] == "moe" and ffn["router"]["top_k"] > ffn["n_experts"]
        try:
            violations = space.violations(space.architecture(plain))
        except SpaceError:
            assert broken
            continue
        assert (violations["top_k <= n_experts"] > 0) is broken
        seen.add(ffn["kind"])
    assert seen == {"dense", "moe"}


def test_requirements_of_the_trained_model_wait_for_its_routing() -> None:
    limits = ["max_vio < 1", "dead_experts + 1 <= n_experts / 2", "dropped_share < 0.1"]
    space = parse(
        SMALL.replace("[top_k <= n_experts]", f"[top_k <= n_experts, {', '.join(limits)}]")
    )
    plain = json.loads(json.dumps(next(_drawn(space, "moe")).plain()))
    plain["blocks"] = [{**plain["blocks"][0], "repeat": 2}]
    moe = Architecture.parse(plain)
    experts = next(iter(moe.layers)).ffn.n_experts  # type: ignore[union-attr]
    assert list(space.violations(moe)) == ["top_k <= n_experts"]
    even = {"max_vio": 0.2, "dead": 0, "dropped": 0.0}
    rows = [{"layer": 0, **even}, {"layer": 1, **even, "max_vio": 3.0, "dead": experts}]
    assert {t for t, v in space.trained_violations(moe, rows, {}).items() if v > 0} == set(
        limits[:2]
    )
    assert set(space.trained_violations(moe, rows, {})) == set(limits)
    assert max(space.trained_violations(moe, rows[:1], {}).values()) <= 0
    assert space.trained_violations(moe, rows, {})["max_vio < 1"] == pytest.approx(2 / 3)
    dense = next(_drawn(space, "dense"))
    assert set(space.trained_violations(dense, [], {}).values()) == {0.0}


def test_a_requirement_on_a_latency_waits_for_its_measured_value() -> None:
    text = SMALL.replace("[val_loss, flops_per_token]", "[val_loss, decode_ms]")
    space = parse(text.replace("[top_k <= n_experts]", "[decode_ms < 5, top_k <= n_experts]"))
    dense = next(_drawn(space, "dense"))
    assert list(space.violations(dense)) == ["top_k <= n_experts"]
    assert space.trained_violations(dense, [], {"decode_ms": 4.0})["decode_ms < 5"] == -0.2
    assert space.trained_violations(dense, [], {"decode_ms": 10.0})["decode_ms < 5"] == 0.5
    for objectives in ("[val_loss, flops_per_token]", "[val_loss, prefill_ms]"):
        without = SMALL.replace("[val_loss, flops_per_token]", objectives)
        message = r"space\.yaml:14:11: require: 'decode_ms < 5' .* add decode_ms to the objectives"
        with pytest.raises(SpaceError, match=message):
            parse(without.replace("[top_k <= n_experts]", "[decode_ms < 5]"))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("decode_ms < 5", "decode_ms"),
        ("3 * n_layers >= prefill_ms", "prefill_ms"),
        ("decode_ms == 5", None),
        ("abs(decode_ms - 3) > 1", None),
        ("decode_ms < prefill_ms", None),
        ("decode_ms < 2 * decode_ms - 3", None),
        ("1 < decode_ms < 5", None),
        ("decode_ms < 5 or n_layers < 2", None),
        ("decode_ms < 5 * max_vio", None),
        ("n_layers < 2", None),
    ],
)
def test_only_a_plain_bound_of_one_latency_is_one(text: str, name: str | None) -> None:
    known = known_names() | {*TRAINED, *LATENCIES}
    assert parse_requirement(text, NOWHERE, known).bounded_latency == name


def _drawn(space: Space, kind: str) -> Iterator[Architecture]:
    for seed in range(100):
        plain = space.draw(sampling.RandomSuggest(seed))
        if plain["blocks"][0]["ffn"]["kind"] == kind:
            with suppress(SpaceError):
                yield space.architecture(plain)


def test_names_of_the_routing_are_no_fields() -> None:
    assert not known_names() & {*TRAINED, *LATENCIES}


def test_a_requirement_of_the_trained_model_needs_an_objective_that_trains() -> None:
    text = SMALL.replace("[top_k <= n_experts]", "[max_vio < 1]")
    assert parse(text).requirements[0].trained
    untrained = text.replace("[val_loss, flops_per_token]", "[flops_per_token]")
    with pytest.raises(SpaceError, match=r"space.yaml:14:11: require: 'max_vio < 1' .* val_loss"):
        parse(untrained)


def test_a_drawn_architecture_printed_as_yaml_is_a_space_of_one_point() -> None:
    space = parse(SMALL)
    for seed in range(30):
        try:
            architecture = space.architecture(space.draw(sampling.RandomSuggest(seed)))
        except SpaceError:
            continue
        text = resources.to_yaml({"architecture": architecture.plain(), "objectives": ["val_loss"]})
        again = Space.parse(text, "one.yaml")
        assert again.size == 1
        drawn = again.architecture(again.draw(sampling.RandomSuggest(0)))
        assert drawn == architecture
        assert drawn.fingerprint == architecture.fingerprint


def test_overrides_reach_every_value() -> None:
    space = parse(
        SMALL, "train.tokens=8e3", "architecture.blocks.0.repeat=3", "search.trials=7", "name=other"
    )
    assert (space.train.tokens, space.search.trials, space.name) == (8000, 7, "other")
    plain = space.draw(sampling.RandomSuggest(0))
    assert plain["blocks"][0]["repeat"] == 3


def test_the_digest_ignores_resources_and_the_way_of_writing() -> None:
    space = parse(SMALL)
    same = parse(SMALL, "search.trials=99", "search.workers=2", "search.time_limit=null")
    spelt = parse(SMALL.replace("{kind: dense, d_ff", "{activation: swiglu, kind: dense, d_ff"))
    other = parse(SMALL, "train.tokens=8192")
    assert space.sha256 == same.sha256 == spelt.sha256 == digest(space.plain())
    assert other.sha256 != space.sha256
    json.dumps(space.plain())


def test_a_space_is_found_by_name_and_its_file_names_the_study(tmp_path: Path) -> None:
    assert Space.load("tiny").name == "tiny"
    path = tmp_path / "My space.yaml"
    path.write_text(SMALL)
    assert Space.load(path).name == "My space"
    with pytest.raises(NotFoundError, match="Did you mean 'tiny'"):
        Space.load("tinny")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("architecture:", "archtecture:", "space.yaml:1:1: archtecture: no such section. Did you mean 'architecture'?"),
        ("objectives: [val_loss, flops_per_token]\n", "", "the section 'objectives' is missing"),
        ("d_model:", "dmodel:", "space.yaml:3:3: architecture.dmodel: no field of 'architecture'. Did you mean 'd_model'?"),
        ("[32, 64]}\n  blocks", "[]}\n  blocks", "space.yaml:3:21: architecture.d_model: 'choice' needs a list of at least one option"),
        ("[32, 64]}\n  blocks", "[32, 33]}\n  blocks", "space.yaml:3:26: architecture.d_model: 33 is not a whole number that is a multiple of 8"),
        ("vocab_size: 256", "vocab_size: many", "space.yaml:2:15: architecture.vocab_size: 'many' is not a whole number"),
        ("vocab_size: 256", "vocab_size: 100", "space.yaml:2:15: architecture.vocab_size: 100 is too small for the data"),
        ("kind: attention", "kind: atention", "Did you mean 'attention'?"),
        ("head_dim: 16", "head_dim: 24", "space.yaml:"),
        ("top_k: {choice: [1, 2, 4]}", "top_k: 8", "can never be valid"),
        ("n_experts: {choice: [2, 4]}", "n_experts: 0", "architecture.blocks.0.ffn.moe.n_experts: 0 is not"),
        ("[top_k <= n_experts]", "[top_kk <= n_experts]", "space.yaml:14:11: require: no cost or field 'top_kk'. Did you mean 'top_k'?"),
        ("[top_k <= n_experts]", "['import os']", "space.yaml:14:"),
        ("[top_k <= n_experts]", "top_k <= n_experts", "write a list of comparisons"),
        ("[val_loss, flops_per_token]", "[val_los]", "space.yaml:15:14: objectives: no 'val_los' in objectives/. Did you mean 'val_loss'?"),
        ("[val_loss, flops_per_token]", "[val_loss, val_loss]", "duplicate objective"),
        ("[val_loss, flops_per_token]", "[]", "at least one name"),
        ("data: pydoc", "data: pydocs", "space.yaml:16:7"),
        ("data: pydoc", "data: {files: [nowhere/*.txt]}", "space.yaml:16:"),
        ("tokens: 4096", "tokens: 0", "space.yaml:17:17: train.tokens: 0 is not a whole number of at least 1"),
        ("tokens: 4096", "tokens: 100", "less than one step"),
        ("tokens: 4096", "tokens: {choice: [1, 2]}", "a hole is not allowed here"),
        ("tokens: 4096", "token: 4096", "Did you mean 'tokens'?"),
        ("train: {", "search: {sampler: 3}\ntrain: {", "space.yaml:17:19: search.sampler: 3 is not a word"),
        ("train: {", "search: {gpus: 2}\ntrain: {",
         "space.yaml:17:16: search.gpus: 2 is not a number from 0 to 1 or null;"
         " one candidate is trained on one GPU at most"),
        ("data: pydoc", "data: pydoc\ndata: pydoc", "duplicate key 'data'"),
        ("data: pydoc", "data: [pydoc", "not valid YAML"),
        ("data: pydoc", "name: 7", "space.yaml:16:7: name: 7 is not text"),
        ("data: pydoc", "name: ''", "a study's name has 1 to 200"),
        ("data: pydoc", "name: \"a\\nb\"", "a study's name has 1 to 200"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_at_its_place(old: str, new: str, message: str) -> None:
    assert old in SMALL
    with pytest.raises(InputError) as error:
        parse(SMALL.replace(old, new, 1))
    text = str(error.value)
    assert message in text
    assert "\n" not in text
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.tokens", "write it as section.field=value"),
        ("train.tokns=3", "Did you mean 'tokens'?"),
        ("train.tokens=many", "override 'train.tokens=many': train.tokens: 'many' is not"),
        ("architecture.blocks.3.repeat=1", "'3' is not a number from 0 to 0"),
        ("architecture.vocab_size.x=1", "nothing can be set below 256"),
        ("train.tokens=[1", "not valid YAML"),
        ("architecture.blocks.\u00b2.repeat=1", "is not a number from 0 to 0"),
        (".".join("a" * 5000) + "=1", "levels deep"),
        ("train.lr=1e400", "too large"),
        ("architecture.blocks.0.repeat=100000000", "from 1 to 1000"),
        ("search.seed=1e30", "too large"),
    ],
)
def test_a_bad_override_names_itself(override: str, message: str) -> None:
    with pytest.raises(SpaceError) as error:
        parse(SMALL, override)
    assert message in str(error.value)
    assert "override" in str(error.value)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_mutated_file_is_read_or_refused_never_a_crash(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(SMALL) - 1))
    length = data.draw(st.integers(0, 12))
    new = data.draw(
        st.sampled_from(["", ":", "{", "[", "]", "- ", "1e9", "null", "choice", "\t", "&a"])
    )
    message = ""
    try:
        parse(SMALL[:at] + new + SMALL[at + length :])
    except InputError as error:
        message = str(error)
    assert "\n" not in message


def test_large_counts_are_exact() -> None:
    text = SMALL.replace("repeat: {int: [1, 2]}", "repeat: 40\n      vary: true")
    # each of the 40 layers is one of 2 dense or 2 * 3 mixtures
    assert parse(text).size == 2 * (2 + 2 * 3) ** 40


def test_the_canonical_architecture_is_what_is_built() -> None:
    space = parse(SMALL)
    plain = space.draw(sampling.RandomSuggest(1))
    architecture = space.architecture(plain)
    assert isinstance(architecture, Architecture)
    assert architecture == architecture.canonical()


PLACED = """\
architecture:
  vocab_size: 256
  d_model: 64
  blocks:
    - mixer: {kind: attention, head_dim: 16}
      ffn: {kind: dense, d_ff: 64}
    - repeat: 2
      mixer:
        kind: attention
        head_dim: 16
        n_heads: 4
      ffn:
        choice:
          - {kind: dense, d_ff: 64}
          - kind: moe
            n_experts: 4
            d_expert: 64
            router: {preset: mixtral}
objectives: [val_loss]
train:
  context: 64
  warmup: 0.2
search:
  trials: 4
"""
FFN = "architecture.blocks.1.ffn.moe"


@pytest.mark.parametrize(
    ("old", "new", "place", "path"),
    [
        ("n_heads: 4", "n_heads: 4\n        n_kv_heads: 3", "9:9", "architecture.blocks.1.mixer"),
        ("16\n        n_heads: 4", "48", "9:9", "architecture.blocks.1.mixer"),
        ("n_heads: 4", "n_heads: 4\n        kv_source: 7", "9:9", "architecture.blocks.1.mixer"),
        ("n_experts: 4", "n_experts: 1", "15:13", FFN),
        ("preset: mixtral", "preset: mixtral, top_k: 8", "15:13", FFN),
        ("preset: mixtral", "preset: mixtral, top_k: {choice: [8, 9]}", "15:13", FFN),
        ("warmup: 0.2", "warmup: 0.9", "21:3", "train"),
        ("context: 64", "tokens: 10", "21:3", "train"),
        ("trials: 4", "sampler: tep", "24:12", "search.sampler"),
        ("trials: 4", "stop: {wall_time: soon}", "24:21", "search.stop.wall_time"),
        (
            "objectives",
            "measure:\n  min_repeats: 50\n  max_repeats: 4\nobjectives",
            "20:3",
            "measure",
        ),
    ],
)
def test_an_error_about_two_fields_names_the_place_and_path_of_their_block(
    old: str, new: str, place: str, path: str
) -> None:
    with pytest.raises(SpaceError) as refused:
        Space.parse(PLACED.replace(old, new, 1), "s.yaml").require_feasible(20)
    assert f"s.yaml:{place}: {path}: " in str(refused.value)
