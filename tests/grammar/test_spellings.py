"""Spellings of a component: bare words, presets that fill nested fields, former names of fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest

from moenas.errors import SpaceError
from moenas.grammar import tree
from moenas.grammar.brief import brief
from moenas.grammar.sampling import RandomSuggest
from moenas.grammar.spellings import former_hole_name
from moenas.model import AttentionMixer, BlockGroup, LatentAttentionMixer, Router, ShortConvMixer
from moenas.model.architecture import Architecture
from moenas.records import Plain
from moenas.report.space_check import check_report, check_text
from moenas.resources import Node
from moenas.search.points import Points
from moenas.space.space import Space

STORED = json.loads((Path(__file__).parent / "former_architectures.json").read_text())
"""Architectures of the space `wide` with the fingerprints and costs that earlier versions gave them.

In the first 25 the router has 32 fields of its own; in the others mixers have `rope_theta`,
`rope_scaling` and `rope_fraction`."""


def router(**fields: Any) -> Router:
    return tree.parse(Router, fields)


# --- bare words ----------------------------------------------------------------------------------


def test_a_bare_word_is_the_kind_with_its_defaults() -> None:
    assert router(balance="bias") == router(balance={"kind": "bias"})
    assert router(balance="bias") == router(balance={"kind": "bias", "rate": 0.001})
    assert tree.parse(BlockGroup, {"mixer": "short_conv"}).mixer == ShortConvMixer()
    with pytest.raises(SpaceError, match="ffn: 'd_ff' is missing"):
        tree.parse(BlockGroup, {"ffn": "dense"})


def test_bare_words_and_mappings_mix_in_a_choice() -> None:
    options = ["none", {"kind": "bias", "rate": {"choice": [0.1, 0.2]}}, {"kind": "bias"}]
    balance = tree.read(Router, Node.wrap({"balance": {"choice": options}})).fields["balance"]
    assert balance.labels == ("none", "bias", "bias-2")
    with pytest.raises(SpaceError, match="'none'"):
        tree.read(Router, Node.wrap({"balance": {"choice": ["none", "none"]}}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"balance": "biased"}, "balance: no balance of kind 'biased'. Did you mean 'bias'"),
        ({"balance": 3}, "balance: 3 is not a mapping"),
        ({"balance": {"kind": "bias", "coef": 1}}, "balance.coef: no field of 'bias'"),
        ({"balance": {"rate": 0.1}}, "balance: 'kind' is missing"),
    ],
)
def test_a_wrong_kind_or_field_is_named(fields: Plain, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        router(**fields)


# --- presets -------------------------------------------------------------------------------------


def test_a_field_beside_a_preset_wins_also_inside_a_component() -> None:
    mixed = router(preset="mixtral", balance={"kind": "aux_loss", "scope": "sequence"})
    assert (mixed.balance.coef, mixed.balance.scope) == (0.02, "sequence")
    assert router(preset="mixtral", balance="bias_and_loss").balance.coef == 0.02
    assert router(preset="mixtral", balance="none") == router(
        top_k=2, normalize=True, balance="none", loss_reduce="pooled"
    )


# --- former names --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("former", "present"),
    [
        ({"aux_coef": 0.5}, {"balance": {"kind": "aux_loss", "coef": 0.5}}),
        (
            {"balance": "bias_and_loss", "bias_rate": 0.1, "aux_coef": 0.2},
            {"balance": {"kind": "bias_and_loss", "rate": 0.1, "coef": 0.2}},
        ),
        ({"balance": "bias", "aux_coef": 0.5}, {"balance": "bias"}),  # it had no effect
        ({"balance": "none", "bias_rate": 0.5, "aux_scope": "sequence"}, {"balance": "none"}),
        ({"selection": "threshold", "top_p": 0.5, "n_groups": 4}, {"selection": "threshold"}),
        (
            {"selection": "noisy_top_k", "n_groups": 2, "top_groups": 1},
            {"selection": {"kind": "noisy_top_k", "n_groups": 2, "top_groups": 1}},
        ),
        (
            {"logits": "cosine", "hidden": 8, "router_input": "block", "logit_cap": 2.0},
            {"logits": {"kind": "cosine", "hidden": 8, "input": "block", "cap": 2.0}},
        ),
        ({"aux_reduce": "mean"}, {"loss_reduce": "mean"}),
        (
            {"preset": "mixtral", "aux_coef": 0.001},
            {"preset": "mixtral", "balance": {"kind": "aux_loss", "coef": 0.001}},
        ),
        (
            {"preset": "deepseek_v3", "n_groups": 8, "top_groups": 4},
            {
                "preset": "deepseek_v3",
                "selection": {"kind": "top_k", "n_groups": 8, "top_groups": 4},
            },
        ),
    ],
)
def test_a_former_name_is_read_at_its_present_place(former: Plain, present: Plain) -> None:
    assert router(**former) == router(**present)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"bias_rate": 0.1, "balance": {"kind": "bias", "rate": 0.2}},
            "bias_rate: is the former name of balance.rate, which is given, too",
        ),
        ({"aux_reduce": "sum", "loss_reduce": "sum"}, "aux_reduce: is the former name of loss_re"),
        ({"bias_rate": -1}, "bias_rate: -1 is not a number of at least 0"),
        ({"balance": "none", "bias_rate": "fast"}, "bias_rate: 'fast' is not a number"),
    ],
)
def test_a_former_name_is_checked_like_the_present_one(fields: Plain, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        router(**fields)


LATENT = {"n_heads": 2, "kv_rank": 8, "nope_dim": 8, "rope_dim": 4, "v_dim": 8}
YARN = {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("former", "present"),
    [
        ({"rope_theta": 500.0}, {"rope": {"theta": 500.0}}),
        (
            {"rope_fraction": 0.5, "rope_scaling": YARN},
            {"rope": {"partial_rotary_factor": 0.5, "scaling": YARN}},
        ),
        (
            {"rope": {"theta": 500.0}, "rope_fraction": 0.0},
            {"rope": {"theta": 500, "partial_rotary_factor": 0}},
        ),
    ],
)
def test_a_former_field_of_rope_is_read_at_its_present_place(former: Plain, present: Plain) -> None:
    mixer = {"head_dim": 8}
    assert tree.parse(AttentionMixer, mixer | former) == tree.parse(AttentionMixer, mixer | present)
    kind = {"kind": "attention"} | mixer
    assert brief(kind | former, "mixer") == brief(kind | present, "mixer")


def test_latent_attention_without_positions_is_read_by_its_former_name() -> None:
    former, present = LATENT | {"rope_theta": None}, LATENT | {"rope": {"theta": None}}
    mixer = tree.parse(LatentAttentionMixer, former)
    assert mixer == tree.parse(LatentAttentionMixer, present)
    assert mixer.canonical_at(16).fingerprint_data()["rope_theta"] is None
    with pytest.raises(SpaceError, match="no field of 'latent_attention'"):
        tree.parse(LatentAttentionMixer, LATENT | {"rope_base": 1.0})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rope_theta": 9.0, "rope": {"theta": 8.0}},
            "rope_theta: is the former name of rope.theta, which is given, too",
        ),
        ({"rope_theta": 0.5}, "rope_theta: 0.5 is not a number of at least 1"),
        ({"rope_theta": 1.0, "rope_scaling": YARN}, "rope.scaling: yarn needs pairs of different"),
        ({"rope": "yarn"}, "rope: 'yarn' is not a mapping"),
    ],
)
def test_a_wrong_field_of_rope_is_named(fields: Plain, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        tree.parse(AttentionMixer, {"head_dim": 8} | fields)


@pytest.mark.parametrize("number", range(len(STORED)))
def test_a_stored_architecture_keeps_its_fingerprint_and_cost(number: int) -> None:
    stored = STORED[number]
    architecture = Architecture.parse(stored["architecture"])
    assert architecture.fingerprint == stored["fingerprint"]
    assert architecture.cost(64).plain() == stored["cost"]
    assert Architecture.parse(architecture.plain()) == architecture
    short = brief(stored["architecture"])
    assert Architecture.parse(short).canonical() == architecture.canonical()
    assert short == brief(architecture.plain())


FORMER = """
architecture:
  vocab_size: 256
  d_model: 32
  blocks:
    - mixer: {kind: attention, head_dim: 16}
      ffn:
        kind: moe
        n_experts: 4
        d_expert: 16
        router:
          top_k: {choice: [1, 2]}
          balance: {choice: [none, aux_loss, bias]}
          aux_coef: {choice: [0.1, 0.2]}
          bias_rate: {choice: [0.01, 0.02, 0.03]}
require: [bias_rate < 0.025, ffn.router.aux_coef >= 0.1]
objectives: [active_params]
"""
PRESENT = FORMER.replace(
    """          balance: {choice: [none, aux_loss, bias]}
          aux_coef: {choice: [0.1, 0.2]}
          bias_rate: {choice: [0.01, 0.02, 0.03]}
""",
    """          balance:
            choice:
              - none
              - {kind: aux_loss, coef: {choice: [0.1, 0.2]}}
              - {kind: bias, rate: {choice: [0.01, 0.02, 0.03]}}
""",
).replace(
    "[bias_rate < 0.025, ffn.router.aux_coef >= 0.1]",
    "[balance.rate < 0.025, ffn.router.balance.coef >= 0.1]",
)


def test_a_space_of_former_names_is_the_present_one_with_holes_only_where_they_count() -> None:
    former, present = (Space.parse(text, "mine.yaml") for text in (FORMER, PRESENT))
    assert former.plain()["architecture"] == present.plain()["architecture"]
    assert former.size == present.size == 2 * (1 + 2 + 3)
    assert [hole.name.rpartition("router.")[2] for hole in former.holes] == [
        "top_k",
        "balance",
        "balance.aux_loss.coef",
        "balance.bias.rate",
    ]
    assert present.former_names == []
    assert former.former_names == [
        "mine.yaml:14:11: architecture.blocks.0.ffn.router.aux_coef: a former name;"
        " write balance.coef",
        "mine.yaml:15:11: architecture.blocks.0.ffn.router.bias_rate: a former name;"
        " write balance.rate",
        "mine.yaml:16:11: require: bias_rate: a former name; write balance.rate",
        "mine.yaml:16:30: require: ffn.router.aux_coef: a former name;"
        " write ffn.router.balance.coef",
    ]


def test_a_check_names_the_new_place() -> None:
    text = check_text(check_report(Space.parse(FORMER + "data: pydoc\n", "mine.yaml"), 2))
    assert "mine.yaml:15:11: architecture.blocks.0.ffn.router.bias_rate: a former name;" in text
    text = check_text(check_report(Space.parse(PRESENT + "data: pydoc\n", "mine.yaml"), 2))
    assert "former" not in text


def test_a_requirement_with_a_former_name_is_decided_as_the_present_one() -> None:
    former, present = (Space.parse(text, "mine.yaml") for text in (FORMER, PRESENT))
    broken = set()
    for seed in range(40):
        architecture = former.architecture(former.draw(RandomSuggest(seed)))
        values = [list(s.violations(architecture).values()) for s in (former, present)]
        assert values[0] == values[1]
        broken.add(values[0][0] > 0)
    assert broken == {True, False}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("blocks.0.ffn.router.balance.bias.rate", "blocks.0.ffn.router.bias_rate"),
        ("blocks.0.ffn.router.balance.rate", "blocks.0.ffn.router.bias_rate"),
        ("router.loss_reduce", "router.aux_reduce"),
        ("router.logits.hidden/8", "router.hidden/8"),
        ("router.balance", None),
        ("mixer.rate", None),
        ("blocks.1.mixer.rope.theta", "blocks.1.mixer.rope_theta"),
        ("mixer.attention.rope.scaling", "mixer.attention.rope_scaling"),
        ("mixer.rope.scaling.yarn.factor", "mixer.rope_scaling.yarn.factor"),
        ("mixer.rope.scaling.factor", "mixer.rope_scaling.factor"),
        ("mixer.rope_dim/2", None),
    ],
)
def test_a_hole_is_known_by_its_former_name(name: str, wanted: str | None) -> None:
    former = Space.parse(PRESENT, "mine.yaml").former_fields
    assert former_hole_name(name, former) == wanted


PATH = "blocks.0.ffn.router."


def test_points_of_an_earlier_version_are_points_of_this_one() -> None:
    """36 former points answered every hole; 12 of them differ."""
    space = Space.parse(FORMER, "mine.yaml")
    points = Points(space)
    for top_k in (1, 2):
        for balance in ("none", "aux_loss", "bias"):
            for coef in (0.1, 0.2):
                for rate in (0.01, 0.02, 0.03):
                    assert not points.exhausted or (top_k, balance, coef) == (2, "bias", 0.2)
                    fields = {"top_k": top_k, "balance": balance}
                    fields |= {"aux_coef": coef, "bias_rate": rate}
                    points.add({PATH + name: value for name, value in fields.items()})
    assert points.exhausted
    assert points.unseen() is None


FORMER_ROPE = """
architecture:
  vocab_size: 256
  d_model: 32
  blocks:
    - mixer:
        kind: attention
        head_dim: 16
        rope_theta: {choice: [100.0, 10000.0]}
        rope_scaling:
          choice:
            - null
            - {kind: linear, factor: {choice: [2.0, 4.0, 8.0]}}
        rope_fraction: {float: [0.5, 1.0], step: 0.5}
require: [rope_fraction > 0.4, mixer.rope_scaling.factor < 7]
objectives: [active_params]
"""
PRESENT_ROPE = """
architecture:
  vocab_size: 256
  d_model: 32
  blocks:
    - mixer:
        kind: attention
        head_dim: 16
        rope:
          theta: {choice: [100.0, 10000.0]}
          scaling:
            choice:
              - null
              - {kind: linear, factor: {choice: [2.0, 4.0, 8.0]}}
          partial_rotary_factor: {float: [0.5, 1.0], step: 0.5}
require: [rope.partial_rotary_factor > 0.4, mixer.rope.scaling.factor < 7]
objectives: [active_params]
"""


def test_a_space_of_former_rope_fields_is_the_present_one() -> None:
    former, present = (Space.parse(text, "mine.yaml") for text in (FORMER_ROPE, PRESENT_ROPE))
    assert former.plain()["architecture"] == present.plain()["architecture"]
    assert [hole.name for hole in former.holes] == [hole.name for hole in present.holes]
    assert former.size == present.size == 2 * (1 + 3) * 2
    assert present.former_names == []
    assert [line.rpartition(" write ")[2] for line in former.former_names] == [
        *("rope.theta", "rope.scaling", "rope.partial_rotary_factor"),
        *("rope.partial_rotary_factor", "mixer.rope.scaling.factor"),
    ]
    broken = set()
    for seed in range(20):
        architecture = former.architecture(former.draw(RandomSuggest(seed)))
        values = [list(s.violations(architecture).values()) for s in (former, present)]
        assert values[0] == values[1]
        broken.add(max(values[0]) > 0)
    assert broken == {True, False}


def test_points_of_former_rope_fields_are_points_of_the_present_space() -> None:
    points = Points(Space.parse(PRESENT_ROPE, "mine.yaml"))
    path = "blocks.0.mixer.rope_"
    for theta in (100.0, 10000.0):
        for fraction in (0.5, 1.0):
            held = {path + "theta": theta, path + "fraction": fraction}
            points.add(held | {path + "scaling": None})
            for factor in (2.0, 4.0, 8.0):
                assert not points.exhausted
                points.add(
                    held | {path + "scaling": "linear", path + "scaling.linear.factor": factor}
                )
    assert points.exhausted


def test_an_interrupted_trial_keeps_the_values_that_it_drew_by_former_names() -> None:
    space = Space.parse(FORMER, "mine.yaml")
    study = optuna.create_study()
    study.enqueue_trial({PATH + "top_k": 2, PATH + "balance": "bias", PATH + "bias_rate": 0.03})
    trial = study.ask()
    trial.suggest_categorical(PATH + "top_k", (1, 2))
    trial.suggest_categorical(PATH + "balance", ("none", "aux_loss", "bias"))
    trial.suggest_categorical(PATH + "bias_rate", (0.01, 0.02, 0.03))
    held = Points(space).held(dict(trial.params), trial)
    drawn = Architecture.parse(space.draw(held)).blocks[0].ffn.router
    assert (drawn.top_k, drawn.balance.kind, drawn.balance.rate) == (2, "bias", 0.03)
    assert held.answers[PATH + "balance.bias.rate"] == 0.03
