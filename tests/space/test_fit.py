"""The width of a fit gives each draw the target: by its cost, by the built module, by brute force."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moenas.errors import SpaceError
from moenas.grammar.sampling import RandomSuggest
from moenas.model.architecture import Architecture
from moenas.model.moe.experts import MoEFFN
from moenas.search.neighbours import neighbour, point
from moenas.search.points import Points
from moenas.space.architecture_file import read_architecture
from moenas.space.space import Space, file_schema

MOE = """
architecture:
  vocab_size: 256
  d_model: {choice: [32, 64]}
  blocks:
    - repeat: {int: [1, 3]}
      mixer: {kind: attention, head_dim: 16}
      ffn:
        kind: moe
        n_experts: {choice: [4, 8]}
        d_expert: FIT
        n_shared_experts: {choice: [0, 1]}
        d_shared: {choice: [null, 32]}
        router: {top_k: {choice: [1, 2]}}
objectives: [total_params]
"""


def space(fit: str, text: str = MOE) -> Space:
    return Space.parse(text.replace("FIT", f"{{fit: {{{fit}}}}}"), "f")


def mixtures(architecture: Architecture) -> Iterator[MoEFFN]:
    for layer in architecture.layers:
        if isinstance(layer.ffn, MoEFFN):
            yield layer.ffn


def test_every_draw_of_the_shipped_space_has_the_active_parameters() -> None:
    one = Space.load("granularity")
    assert one.fit is not None
    widths = set()
    for seed in range(200):
        drawn = one.drawn(RandomSuggest(seed))
        assert abs(drawn.cost(128).active_params - 2e6) <= 0.02 * 2e6
        assert one.violations(drawn)[one.fit.text] <= 0
        widths |= {ffn.d_expert for ffn in mixtures(drawn)}
    assert len(widths) > 4


def test_the_built_module_has_the_parameters_of_the_target() -> None:
    one = space("params: 600_000, within: 0.05")
    for seed in range(200):
        built = one.drawn(RandomSuggest(seed)).outline()
        params = sum(weight.numel() for weight in built.parameters())
        assert abs(params - 600_000) <= 0.05 * 600_000


@pytest.mark.parametrize("cost", ["active_params", "params", "flops_per_token", "weight_bytes"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.0, 1.2), step=st.sampled_from([8, 24]))
def test_the_width_is_the_nearest_of_all(cost: str, seed: int, share: float, step: int) -> None:
    plain = space("params: 1").draw(RandomSuggest(seed))
    costs = {}
    for width in range(step, 400, step):
        blocks = [dict(block) for block in plain["blocks"]]
        blocks[0]["ffn"] = {**blocks[0]["ffn"], "d_expert": width}
        one = Architecture.parse({**plain, "blocks": blocks})
        costs[width] = one.cost(1024).plain()[cost]
    target = max(1, int(costs[step] + share * (costs[384] - costs[step])))
    nearest = min(costs, key=lambda width: (abs(costs[width] - target), width))
    parsed = space(f"{cost}: {target}, multiple_of: {step}", MOE + "train: {context: 1024}\n")
    drawn = parsed.draw(RandomSuggest(seed))
    assert drawn["blocks"][0]["ffn"]["d_expert"] == nearest or share > 1
    assert abs(parsed.cost(parsed.drawn(RandomSuggest(seed))).plain()[cost] - target) <= abs(
        costs[nearest] - target
    )


def test_a_fit_is_no_hole_and_the_draw_holds_a_plain_number() -> None:
    one = space("active_params: 100_000, within: 0.1")
    assert not any(hole.name.endswith(".d_expert") for hole in one.holes)
    # 2 widths, 3 depths, 2 numbers of experts, 1 + 2 shared, 2 top_k
    assert one.size == 2 * 3 * 2 * 3 * 2
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    points = Points(one)
    for _ in range(20):
        trial = study.ask()
        plain = one.draw(trial)
        assert not any(name.endswith(".d_expert") for name in trial.params)
        again = Architecture.parse(json.loads(json.dumps(plain))).canonical()
        assert again == one.drawn(RandomSuggest(0, trial.params))
        points.add(trial.params)


def test_points_and_mutations_meet_the_target() -> None:
    one = space("active_params: 100_000, within: 0.05")
    first = next(mutated for seed in range(100) if (mutated := point(one, seed)) is not None)
    for seed in range(20):
        mutated = neighbour(one, first.params, seed)
        if mutated is not None:
            assert abs(one.cost(mutated.architecture).active_params - 100_000) <= 5_000


def test_an_unreachable_target_names_the_nearest_width_and_its_cost() -> None:
    one = space("active_params: 1000, within: 0.01")
    with pytest.raises(
        SpaceError, match=r"binds is fit: active_params = 1,000 within 1%: 20 of 20"
    ):
        one.require_feasible(20)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trial = study.ask()
    architecture = one.architecture(one.draw(trial))
    cost = one.cost(architecture).active_params
    assert one.violations(architecture)[one.fit.text] == pytest.approx(cost / 1000 - 1.01)
    assert one.missed_fit(RandomSuggest(0, trial.params)) == (
        f"fit: active_params = 1,000 within 1%: the nearest width, 8, gives {cost:,}"
        " (architecture.blocks.0.ffn.d_expert)"
    )


def test_a_fit_in_a_named_layer_gives_all_its_uses_one_width() -> None:
    text = """
layers:
  mixture: {kind: moe, n_experts: {choice: [4, 8]}, d_expert: FIT, router: {top_k: 2}}
architecture:
  vocab_size: 256
  d_model: 32
  blocks:
    - {ffn: mixture}
    - {ffn: {kind: dense, d_ff: 64}}
    - {ffn: mixture}
objectives: [total_params]
"""
    one = space("params: 300_000, within: 0.03", text)
    for seed in range(10):
        drawn = one.drawn(RandomSuggest(seed))
        assert len({ffn.d_expert for ffn in mixtures(drawn)}) == 1
        assert abs(one.cost(drawn).params - 300_000) <= 9_000


def test_an_option_without_the_width_must_have_the_cost_itself() -> None:
    text = """
architecture:
  vocab_size: 256
  d_model: 32
  blocks:
    - ffn: {choice: [{kind: dense, d_ff: 64}, {kind: moe, n_experts: 4, d_expert: FIT}]}
objectives: [total_params]
"""
    one = space("params: 100_000, within: 0.05", text)
    dense = {"blocks.0.ffn": "dense"}
    assert one.violations(one.drawn(RandomSuggest(0, dense)))[one.fit.text] > 0
    assert "the draw has no architecture.blocks.0.ffn.moe.d_expert" in one.missed_fit(
        RandomSuggest(0, dense)
    )
    assert one.violations(one.drawn(RandomSuggest(0, {"blocks.0.ffn": "moe"})))[one.fit.text] <= 0


def test_the_plain_form_reads_back_as_the_same_space() -> None:
    one = space("flops_per_token: 4e6, within: 0.05, multiple_of: 16")
    plain = one.plain()["architecture"]
    assert plain["blocks"][0]["ffn"]["d_expert"] == {
        "fit": {"flops_per_token": 4_000_000, "within": 0.05, "multiple_of": 16}
    }
    again = Space.parse(json.dumps({"architecture": plain, "objectives": ["total_params"]}))
    assert again.plain()["architecture"] == plain
    other = space("flops_per_token: 4e6, within: 0.06, multiple_of: 16")
    assert one.sha256 != other.sha256


@pytest.mark.parametrize(
    ("fit", "place", "reason"),
    [
        ("active_params: 2e6, params: 3e6", "f:11:25", "a fit has one target, not 2"),
        ("within: 0.1", "f:11:25", "a fit has one target, not 0"),
        ("activ_params: 2e6", "f:11:26", "Did you mean 'active_params'?"),
        ("params: many", "f:11:34", "'many' is not a number from 1"),
        ("params: 2.5", "f:11:34", "2.5 is not a whole number"),
        ("params: 0", "f:11:34", "0 is not a number from 1"),
        ("params: 2e6, within: 1.5", "f:11:47", "1.5 is not a share"),
        ("params: 2e6, multiple_of: 12", "f:11:52", "12 is not a multiple of 8"),
    ],
)
def test_a_wrong_fit_is_refused_at_its_place(fit: str, place: str, reason: str) -> None:
    with pytest.raises(SpaceError) as error:
        space(fit)
    assert str(error.value).startswith(f"{place}: architecture.blocks.0.ffn.d_expert.fit")
    assert reason in str(error.value)


def test_only_widths_have_a_fit_and_a_space_has_one(tmp_path: Any) -> None:
    text = MOE.replace("n_experts: {choice: [4, 8]}", "n_experts: FIT").replace("expert: FIT", "8")
    with pytest.raises(SpaceError, match=r"f:10:20: .*n_experts: a 'fit' is for widths; give a wh"):
        space("params: 2e6", text.replace("d_8", "d_expert: 8"))
    with pytest.raises(
        SpaceError, match=r"f:13:19: .*d_shared: a second fit, beside the fit of arch"
    ):
        space("params: 2e6", MOE.replace("{choice: [null, 32]}", "FIT"))
    with pytest.raises(SpaceError, match=r"d_expert\.step: not allowed beside 'fit'"):
        Space.parse(MOE.replace("FIT", "{fit: {params: 2e6}, step: 8}"))
    (tmp_path / "mine.yaml").write_text(MOE.replace("FIT", "{fit: {params: 2e6}}"))
    with pytest.raises(SpaceError, match="a hole; an architecture to start from"):
        read_architecture(str(tmp_path / "mine.yaml"))


def test_the_schema_knows_a_fit() -> None:
    ffn = json.dumps(file_schema()["definitions"])
    assert '"required": ["fit"]' in ffn
