"""The requirement that binds is the one without which most draws are feasible."""

from __future__ import annotations

import re

from moenas.grammar.sampling import RandomSuggest
from moenas.report.space_check import check_report, check_text
from moenas.space.feasibility import binding
from moenas.space.space import Space

TEXT = """
architecture:
  vocab_size: 256
  d_model: {int: [16, 256], step: 16}
  blocks:
    - repeat: {int: [1, 8]}
      mixer: {kind: attention, head_dim: 16}
      ffn: {kind: dense, d_ff: {int: [16, 512], step: 16}}
require: [params < 60e3, n_layers < 8, d_ff > 16]
objectives: [total_params]
"""


def test_the_binding_requirement_is_the_one_whose_removal_gives_most_draws() -> None:
    space = Space.parse(TEXT)
    report = binding(space, 200)
    assert report is not None
    assert report.text == "params < 60e3"
    drawn = [space.drawn(RandomSuggest(seed)) for seed in range(200)]
    broken = [{t for t, by in space.violations(one).items() if by > 0} for one in drawn]
    freed = {r.text: sum(b == {r.text} for b in broken) for r in space.requirements}
    assert report.alone == freed[report.text] == max(freed.values())
    amounts = [space.violations(one)[report.text] for one in drawn]
    assert not report.hint
    assert report.breaking == sum(amount > 0 for amount in amounts)
    assert report.nearest == min(amount for amount in amounts if amount > 0)


def test_check_names_it_where_nearly_all_draws_are_infeasible() -> None:
    report = check_report(Space.parse(TEXT), 100)
    assert 0 < report["feasible"] < 10
    text = check_text(report)
    assert re.search(
        r"the requirement that binds is params < 60e3: \d+ of 100 draws break it", text
    )
    wider = check_report(Space.parse(TEXT.replace("60e3", "30e6")), 100)
    assert wider["feasible"] > 10
    assert wider["binding"] is None
    assert "binds" not in check_text(wider)


def test_check_names_the_fit_and_its_nearest_width() -> None:
    text = TEXT.replace("{int: [16, 512], step: 16}", "{fit: {params: 60_000, within: 0.001}}")
    space = Space.parse(text.replace("params < 60e3, ", ""))
    report = binding(space, 200)
    assert report is not None
    assert report.text == "fit: params = 60,000 within 0.1%"
    assert re.fullmatch(r"the nearest width, \d+, gives [\d,]+ \(arch.*d_ff\)", report.hint)


def test_without_a_broken_requirement_none_binds() -> None:
    assert binding(Space.parse(TEXT.replace("60e3", "30e9").replace("< 8", "< 9")), 1) is None
