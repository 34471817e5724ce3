"""Architectures to start from: mapped into the space, evaluated first, each once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from studies import SMALL, assert_sound, fake, scripted, space

from moenas.errors import InputError
from moenas.model.architecture import Architecture
from moenas.records import Evaluation, Failure, Job, Plain
from moenas.report.summary import trial_report, trial_text
from moenas.resources import to_yaml
from moenas.search.start_points import start_points
from moenas.space.sections import SAMPLERS
from moenas.space.space import Space
from moenas.store.store import Store
from moenas.study.launch import Study, load_study, run

pytestmark = pytest.mark.usefixtures("study_folder")

MINE = """\
architecture:
  vocab_size: 256
  d_model: {width}
  blocks:
    - repeat: {layers}
      mixer: {{kind: attention, head_dim: 8}}
      ffn: {{kind: dense, activation: swiglu, d_ff: 16}}
"""


def mine(width: int = 24, layers: int = 2) -> str:
    """Write an architecture of the spaces of `studies`; return the path."""
    path = Path(f"mine_{width}_{layers}.yaml")
    path.write_text(MINE.format(width=width, layers=layers))
    return f"./{path}"


def sources(study: Study) -> dict[int, str]:
    reports = ((e.trial, trial_report(study.store, "s", e.trial)) for e in study.view.evaluations)
    return {number: r["enqueued_from"] for number, r in reports if r["enqueued_from"]}


def architectures(study: Study) -> list[tuple[int, int]]:
    """Width and layers of each trial."""
    plains = [study.store.architecture("s", e.trial) for e in study.view.evaluations]
    return [(p["d_model"], sum(group["repeat"] for group in p["blocks"])) for p in plains]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_evaluates_them_first_and_once(sampler: str, jobs: list[Job]) -> None:
    small = space(SMALL).with_search(sampler=sampler, start_from=(mine(32, 2), mine(16, 1)))
    study = run(small, trials=3, workers="inline")
    assert architectures(study)[:2] == [(32, 2), (16, 1)]
    assert sources(study) == {0: "./mine_32_2.yaml", 1: "./mine_16_1.yaml"}
    study = run(small, trials=5, workers="inline")
    assert_sound(study, 5)
    assert sources(study) == {0: "./mine_32_2.yaml", 1: "./mine_16_1.yaml"}
    text = trial_text(trial_report(study.store, "s", 1))
    assert "enqueued from ./mine_16_1.yaml" in text


def test_the_list_may_grow_between_two_runs(jobs: list[Job]) -> None:
    first = space(SMALL).with_search(start_from=(mine(32, 2),))
    run(first, trials=1, workers="inline")
    more = space(SMALL).with_search(start_from=(mine(32, 2), mine(24, 1)))
    study = run(more, trials=3, workers="inline")
    assert architectures(study)[:2] == [(32, 2), (24, 1)]
    assert_sound(study, 3)


def test_a_killed_run_enqueues_none_twice() -> None:
    wanted = space(SMALL).with_search(start_from=(mine(32, 2), mine(16, 1), mine(24, 2)))

    def stop(job: Job) -> Evaluation | Failure:
        raise KeyboardInterrupt

    with pytest.raises(Exception, match="Ctrl-C"):
        run(wanted, trials=4, pool=scripted(stop))
    states = [t.state.name for t in load_study("s").optuna.trials]
    assert states == ["RUNNING", "RUNNING", "WAITING"]
    study = run(wanted, trials=4, pool=scripted(lambda job: fake(job)[0]))
    assert_sound(study, 4)
    assert architectures(study)[:3] == [(32, 2), (16, 1), (24, 2)]
    assert list(sources(study)) == [0, 1, 2]


def test_a_model_of_the_zoo_is_a_point_of_a_space_around_it() -> None:
    text = Path(__file__).parents[2].joinpath("spaces/zoo/olmoe_1b_7b.yaml").read_text()
    around = Space.parse(text.replace("repeat: 16", "repeat: {int: [8, 16]}"), "olmoe.yaml")
    (points,) = start_points(around, ["zoo/olmoe_1b_7b"], Store.open)
    assert points.params == {"blocks.0.repeat": 16}
    assert points.source == "zoo/olmoe_1b_7b"


def test_the_front_of_another_study_is_mapped_by_its_architectures(jobs: list[Job]) -> None:
    other = run(space(SMALL, name="other"), trials=6, workers="inline")
    members = [other.store.architecture("other", m.trial) for m in other.front()]
    study = run(space().with_search(start_from=("study:other",)), trials=6, workers="inline")
    plains = [study.store.architecture("s", i) for i in range(len(members))]
    assert plains == members
    wanted = {i: f"study:other trial {m.trial}" for i, m in enumerate(other.front())}
    assert sources(study) == wanted


def test_an_export_and_the_output_of_show_are_architectures(jobs: list[Job]) -> None:
    first = run(space(SMALL, name="other"), trials=1, workers="inline")
    plain = first.store.architecture("other", 0)
    Path("out").mkdir()
    Path("out/config.json").write_text(json.dumps({"study": "other", "architecture": plain}))
    Path("shown.yaml").write_text(
        trial_text(trial_report(first.store, "other", 0)).split("\n\n")[1]
    )
    wanted = Architecture.parse(plain).fingerprint
    for ref in ("out", "out/config.json", "shown.yaml"):
        (points,) = start_points(space(SMALL), [ref], Store.open)
        assert points.fingerprint == wanted
    assert len(start_points(space(SMALL), ["out", "shown.yaml"], Store.open)) == 1


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        (
            "./mine_40_1.yaml",
            "mine_40_1.yaml:3:12: architecture.d_model: ./mine_40_1.yaml is not in the space 's':"
            " 40 is not one of 16, 24, 32 (s.yaml:5:12)",
        ),
        ("./none.yaml", "s.yaml:20:23: search.start_from.0: ./none.yaml: no such file"),
        ("zoo/olmoee", "s.yaml:20:23: search.start_from.0: no 'zoo/olmoee' in spaces/"),
        ("study:other", "s.yaml:20:23: search.start_from.0: "),
        ("./open.yaml", "open.yaml:3:12: architecture.d_model: a hole; an architecture to start"),
        ("./wide.yaml", "s.yaml:20:23: search.start_from.0: ./wide.yaml: breaks the requirement"),
        ("./empty.yaml", "empty.yaml:1:1: the section 'architecture' is missing"),
        ("[]", "s.yaml:20:23: search.start_from.0: [] is not a word"),
    ],
)
def test_nothing_is_created_where_one_does_not_fit(ref: str, message: str, jobs: list[Job]) -> None:
    mine(40, 1)
    Path("open.yaml").write_text(MINE.format(width="{choice: [16, 24]}", layers=1))
    Path("wide.yaml").write_text(MINE.format(width=32, layers=4))
    Path("empty.yaml").write_text("a: 1\n")
    before = sorted(Path().iterdir())
    text = space().text.replace("search: {", f"search: {{start_from: [{ref}], ")
    with pytest.raises(InputError) as refused:
        run(Space.parse(f"{text}require: [n_layers < 4]\n", "s.yaml"), workers="inline")
    assert str(refused.value).startswith(message)
    assert sorted(Path().iterdir()) == before


def test_a_study_without_a_front_cannot_be_started_from(jobs: list[Job]) -> None:
    failing = scripted(lambda job: Failure("diverged", "always"))
    with pytest.raises(Exception, match="none of its"):
        run(space(SMALL, name="other"), trials=2, pool=failing)
    with pytest.raises(InputError, match="study 'other' has no complete trial"):
        start_points(space(SMALL), ["study:other"], Store.open)


def test_a_fixed_value_without_effect_may_differ() -> None:
    """The positions are not learned, so the number of their rows means nothing."""
    plain: Plain = space(SMALL).draw(_First())
    Path("mine.yaml").write_text(to_yaml({"architecture": {**plain, "max_positions": 512}}))
    (points,) = start_points(space(SMALL), ["mine.yaml"], Store.open)
    assert points.params == {"d_model": 16, "blocks.0.repeat": 1}


class _First:
    """Answers each hole with its first option."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return choices[0]

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        return low

    def suggest_float(self, name: str, low: float, high: float, *, step: Any, log: bool) -> float:
        return low
