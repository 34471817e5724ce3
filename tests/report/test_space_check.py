"""What `moenas check` prints of a space."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest

from moenas.errors import SpaceError
from moenas.report.space_check import check_report, check_text
from moenas.space.space import Space

LAYER = (
    "{{repeat: {repeat}, vary: true, mixer: {{kind: attention, head_dim: 8}},"
    " ffn: {{kind: dense, d_ff: {{int: [8, 800000000000000]}}}}}}"
)


def checked_in(folder: Path, text: str, draws: int) -> str:
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(f"line {i} of {i * i}\n" for i in range(800)))
    rest = f"objectives: [total_params]\ndata: {{files: [{corpus}]}}\n"
    space = Space.parse(f"{text}\n{rest}", "s.yaml")
    return check_text(check_report(space, draws))


def test_a_number_of_points_of_thousands_of_digits_is_said_by_its_size(tmp_path: Path) -> None:
    blocks = LAYER.format(repeat=330)
    text = checked_in(
        tmp_path, f"architecture: {{vocab_size: 256, d_model: 32, blocks: [{blocks}]}}", 1
    )
    assert text.startswith("s: valid; about 10^4620 points, 1 hole")


def test_a_check_in_which_no_draw_is_feasible_shows_one_of_further_draws(tmp_path: Path) -> None:
    layer = "{mixer: {kind: attention, head_dim: 8}, ffn: {kind: dense, d_ff: 16}}"
    width = "{int: [8, 8000], step: 8}"
    space = f"architecture: {{vocab_size: 256, d_model: {width}, blocks: [{layer}]}}"
    text = checked_in(tmp_path, f'{space}\nrequire: ["d_model < 100"]', 1)
    assert "0 of 1 random draws are feasible" in text
    assert "of the first feasible one that further draws gave" in text
    assert "1 of 1 random draws are feasible" in checked_in(tmp_path, space, 1)


SPACE = """
architecture:
  vocab_size: 256
  d_model: {int: [8, 80000], step: 8}
  blocks:
    - repeat: 2
      mixer: {kind: attention, head_dim: 8}
      ffn: {kind: dense, d_ff: 16}
objectives: [total_params]
data: pydoc
"""


def checked(text: str, n_draws: int | None = None) -> tuple[dict[str, object], str]:
    """Return what `check` finds, through JSON and back, and its text."""
    report = check_report(Space.parse(text, "s.yaml"), n_draws)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    return report, check_text(report)


def test_one_draw_is_enough() -> None:
    value, text = checked(SPACE, 1)
    assert (value["drawn"], value["feasible"]) == (1, 1)
    assert "1 of 1 random draws are feasible" in text


def test_draws_without_a_feasible_one_are_told_and_more_are_looked_at() -> None:
    value, text = checked(SPACE + "require: ['d_model < 200']", 20)
    assert (value["drawn"], value["feasible"]) == (20, 0)
    assert value["refused"] == {"d_model < 200": 20}
    assert "refused 20 times: d_model < 200" in text
    assert "of the first feasible one that further draws gave" in text
    with pytest.raises(SpaceError, match="no architecture satisfies `require`"):
        checked(SPACE + "require: ['d_model < 7']", 20)


def test_a_product_beyond_floats_is_the_largest_of_them() -> None:
    large = "*".join(["9" * 30] * 11)
    value, _ = checked(SPACE + f"require: ['flops_per_token / 3 < {large}']", 5)
    assert value["feasible"] == 5
    with pytest.raises(SpaceError, match="no architecture satisfies"):
        checked(SPACE + f"require: ['flops_per_token / 3 > {large}']", 5)


def test_a_step_that_no_float_can_count_is_refused_at_its_place() -> None:
    step = "norm_eps: {float: [0.001, 0.1], step: 1e-320}"
    with pytest.raises(SpaceError, match=r"s\.yaml:4:\d+: architecture\.norm_eps\.step: .* steps"):
        checked(SPACE.replace("d_model", f"{step}\n  d_model"))


def varied(repeat: int) -> str:
    """A space whose every layer has holes of its own."""
    mixer = (
        "{kind: attention, head_dim: {int: [8, 256]}, n_heads: {int: [1, 64]},"
        " window: {int: [1, 500]}, softcap: {float: [1, 100], step: 1}}"
    )
    return (
        SPACE.replace("repeat: 2", f"repeat: {repeat}\n      vary: true")
        .replace("{kind: attention, head_dim: 8}", mixer)
        .replace("{int: [8, 80000], step: 8}", "64")
    )


def test_more_points_than_can_be_printed_are_told_by_their_digits() -> None:
    value, text = checked(varied(600), 2)
    layer = 32 * 64 * 500 * 100  # a head_dim is a multiple of 8
    assert value["points"] == f"about 10^{int(600 * math.log10(layer))}"
    assert str(value["points"]) in text.splitlines()[0]
    assert len(json.dumps(value["points"])) < 20
    few, _ = checked(varied(2), 2)
    assert few["points"] == layer**2


def test_a_thousand_varied_layers_are_checked_in_seconds() -> None:
    began = time.process_time()
    value, _ = checked(varied(1000))
    assert value["drawn"] == value["feasible"] == 20
    assert time.process_time() - began < 8  # 2.5 s on a machine of its own
    assert checked(SPACE)[0]["drawn"] == 200
