"""The transcripts of README.md and docs/ are what the commands print today."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up_views
import pytest
import stored_studies

from moenas.grammar.summary import one_line
from moenas.records import Evaluation, StudyRecord
from moenas.space.space import Space

ROOT = Path(__file__).parents[1]
PICTURE = runpy.run_path(str(ROOT / "benchmarks" / "front_picture.py"))
TRANSCRIPTS = runpy.run_path(str(ROOT / "benchmarks" / "transcripts.py"))
PARAMS: dict[str, Any] = {"d_model": 64, "norm": "layernorm", "blocks.0.repeat": 2}
TRIAL = 12
"""The candidate that the README shows; its architecture is built from the space of today."""


class Answers:
    """Answers what a draw asks for from the parameters of the candidate."""

    wanted = PARAMS | {
        "blocks.0.mixer.n_kv_heads": 1,
        "blocks.0.ffn": "moe",
        "blocks.0.ffn.moe.n_experts": 4,
        "blocks.0.ffn.moe.d_expert": 256,
        "blocks.0.ffn.moe.activation": "relu2",
        "blocks.0.ffn.moe.router": "option1",
        "blocks.0.ffn.moe.router.option1.top_k": 4,
        "blocks.0.ffn.moe.router.option1.balance": "bias",
    }

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        assert self.wanted[name] in choices, (name, choices)
        return self.wanted[name]

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        return int(self.wanted[name])

    def suggest_float(self, name: str, low: float, high: float, *, step: Any, log: bool) -> float:
        return float(self.wanted[name])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study `tiny` of one trial: the values of the README, the cost of the code."""
    place = tmp_path_factory.mktemp("tiny")
    space = Space.load("tiny")
    architecture = space.architecture(space.draw(Answers()))
    cost, names = space.cost(architecture).plain(), [o.name for o in space.objectives]
    values = {"val_loss": 2.1382, "decode_ms": 0.53992, "flops_per_token": cost["flops_per_token"]}
    assert set(values) == set(names)
    evaluation = replace(
        Evaluation("tiny", TRIAL, 1, "complete", architecture.fingerprint, values=values),
        measurements={"decode_ms": {"ratio": 0.444, "spread": 0.049, "n": 60}},
        metrics={"val_loss": 2.1382},
        cost=cost,
        device=dict(made_up_views.DEVICE),
        weights_sha256="ab" * 32,
    )
    record = StudyRecord(
        **{key: value for key, value in vars(made_up_views.view(1).study).items() if key != "name"}
        | {"name": "tiny", "objectives": [o.info().plain() for o in space.objectives]}
    )
    view = made_up_views.view(0)
    stored_studies.shelve(
        place,
        replace(
            view,
            study=replace(record, reference_point={}),
            evaluations=[evaluation],
            architectures={TRIAL: architecture.plain()},
        ),
    )
    assert one_line(architecture.plain()).startswith("64d layernorm, 2x(attention 4q/1kv, moe 4e")
    return place


def transcripts() -> list[Any]:
    blocks = []
    for page in TRANSCRIPTS["PAGES"]:
        for command, lines in TRANSCRIPTS["blocks"](page.read_text(encoding="utf-8")):
            if command.split()[1] in TRANSCRIPTS["RUN_AGAIN"] and any(lines):
                words = command.partition("#")[0].strip()
                blocks.append(pytest.param(command, lines, id=f"{page.name}: {words}"))
    return blocks


def test_the_readme_shows_check_front_and_show() -> None:
    shown = {case.values[0].split()[1] for case in transcripts()}
    assert shown >= {"check", "front", "show"}


@pytest.mark.parametrize(("command", "lines"), transcripts())
def test_a_transcript_is_what_its_command_prints(
    command: str, lines: list[str], folder: Path
) -> None:
    printed = TRANSCRIPTS["output"](command, folder)
    wanted = [line for line in lines if line.strip()]
    shown = wanted[: wanted.index("...")] if "..." in wanted else wanted
    assert unruled(printed[: len(shown)]) == unruled(shown), "make transcripts"


def unruled(lines: list[str]) -> list[str]:
    """Shorten the rule of a table: it is as wide as the widest row, which may not be shown."""
    return ["---" if set(line) == {"-"} else line for line in lines]


def test_the_picture_joins_the_best_losses_and_names_every_member() -> None:
    view = made_up_views.view(40)
    drawn = PICTURE["front_figure"](view)
    dominated, line, members = drawn.data
    assert len(members.text) == len(members.x) == len(set(view.front))
    assert {int(text.split(":")[0]) for text in members.text} == set(view.front)
    assert len(dominated.x) + len(members.x) == sum(
        e.status == "complete" for e in view.evaluations
    )
    points = [
        (e.values["flops_per_token"], e.values["val_loss"]) for e in view.evaluations if e.values
    ]
    best = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert set(zip(line.x, line.y, strict=True)) == best
    titles = [drawn.layout.xaxis.title.text, drawn.layout.yaxis.title.text]
    assert titles == ["flops_per_token (FLOP/token)", "val_loss (nats/token)"]
