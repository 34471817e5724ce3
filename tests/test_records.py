"""Records: what they are as JSON, and what files of former versions give."""

from __future__ import annotations

import dataclasses

import made_up_views
import pytest

from moenas.errors import InputError
from moenas.records import Cost, Evaluation, Failure


def test_a_cost_is_stored_with_the_bytes_of_its_weights() -> None:
    cost = Cost(params=10, active_params=4, flops_per_token=20, kv_bytes_per_token=6)
    assert list((cost + cost * 2).plain().items()) == [
        ("params", 30),
        ("active_params", 12),
        ("flops_per_token", 60),
        ("kv_bytes_per_token", 18),
        ("weight_bytes", 60),  # bfloat16
    ]


def test_a_file_of_a_former_version_gives_the_same_cost() -> None:
    assert Cost(10, 4, 20, 6, 20) == Cost(
        params=10, active_params=4, flops_per_token=20, kv_bytes_per_token=6
    )


def test_a_failure_is_a_record_of_its_evaluation_both_ways() -> None:
    failed = Evaluation("s", 0, 1, "failed", "f", failure=Failure("timeout", "60 s"))
    plain = failed.plain()
    assert plain["failure"]["kind"] == "timeout"
    assert Evaluation.parse(plain) == failed
    assert Evaluation.parse(plain | {"failure": None}).failure is None


def test_a_stored_failure_of_another_version_is_read() -> None:
    assert Failure.parse({"kind": "of_tomorrow", "message": "x", "y": 1}) == Failure("error", "x")


@pytest.mark.parametrize("space", [{}, {"train": {}}, {"train": {"tokens": 5}}])
def test_a_stored_space_that_lacks_a_field_is_named(space: dict[str, dict[str, int]]) -> None:
    record = dataclasses.replace(made_up_views.view(0).study, name="s", space=space)
    with pytest.raises(InputError, match=r"^study 's': its row .* lacks `train\.context`"):
        record.setting("train", "context")
