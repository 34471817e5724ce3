"""The command that measures on a GPU, run dry: all groups, results, page, and what may go wrong."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gpu import run as command
from gpu.figures import FIGURES, GROUPS, Figure, Group
from gpu.page import page, summary
from gpu.report import Report
from gpu.results import Found, Results, gathered, stored

from moenas.processes import state

ROOT = Path(__file__).parents[1]
GROUP = {group.name: group for group in GROUPS}
SCRIPT = str(ROOT / "benchmarks" / "gpu" / "run.py")
LONG = {"ray", "mixers", "memory", "same"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in GROUP],
)
def test_each_group_runs_dry_and_gives_the_figures_of_the_table(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # a study goes to a folder of its own
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    group, report = GROUP[name], Report(name, tmp_path / "figures.jsonl")
    module = importlib.import_module(f"gpu.{group.module or name}")
    with report.part(name):
        getattr(module, group.function)(report)
    assert report.failures == []
    of_several = {f.name for f in FIGURES if "spread of processes" in f.name}
    wanted = {f.name for f in FIGURES if f.name.startswith(f"{name}/") and f.dry} - of_several
    assert wanted - set(report.figures) == set()
    results = gathered([tmp_path / "figures.jsonl"], "done", 1.0)
    assert {k: row["value"] for k, row in results.figures.items()} == report.figures


def test_the_command_writes_results_and_a_page_and_says_that_there_was_no_gpu(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    line = [sys.executable, SCRIPT, "--only", "grouped,ceilings", "--into", str(tmp_path)]
    done = subprocess.run(
        line, env={**os.environ, "OUT": str(out)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.index("ceilings: done") < done.stdout.index("grouped: done")
    assert "\nceilings/copy  " in done.stdout.partition("grouped: done")[2]
    path = tmp_path / "benchmarks" / "results" / "gpu-none.json"
    parsed = json.loads(path.read_text())
    assert parsed["card"] is None
    assert list(parsed["groups"]) == ["ceilings", "grouped"]
    assert {group["status"] for group in parsed["groups"].values()} == {"done"}
    text = (tmp_path / "docs" / "gpu.md").read_text()
    assert "dry run on a CPU without a GPU" in text
    assert "| ceilings/copy |" in text
    assert sorted(p.name for p in out.iterdir()) == ["gpu-log.txt", "gpu-none.json", "gpu.md"]
    assert (out / "gpu.md").read_text() == text


def test_the_page_is_that_of_the_stored_results() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert text == page(stored(ROOT / "benchmarks" / "results"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "steps,stpes"], "no group 'stpes'; there are ceilings, "),
        (["--budget", "soon"], "'soon' is not a number of seconds above 0"),
        (["--budget", "-3"], "'-3' is not a number of seconds above 0"),
    ],
)
def test_a_wrong_flag_is_named(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        command.main(flags)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


# --- groups that go wrong ----------------------------------------------------------------------

TELL = """
import json, os, signal, subprocess, sys, time
file = open(sys.argv[1], "a")
def tell(**row):
    file.write(json.dumps(row) + "\\n")
    file.flush()
sys.stdin.readline()
tell(machine={"card": "Card X 1", "date": "2026-01-01"})
tell(figure=sys.argv[2] + "/before", value=1.5, unit="ms", text="")
"""
WAYS = {
    "good": "",
    "dies": "os.kill(os.getpid(), signal.SIGSEGV)",
    "hangs": (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
        " start_new_session=True)\n"
        "print('child', child.pid, flush=True)\n"
        'file.write(\'{"figure": "cut o\')\n'
        "file.flush()\n"
        "time.sleep(600)"
    ),
}


def run_of(
    names: list[str], into: Path, monkeypatch: pytest.MonkeyPatch, budget: float = 60.0
) -> command.Run:
    """A run of groups that are scripts."""
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(command, "GRACE", 0.5)
    monkeypatch.setattr(command, "LEAST", 1.0)
    groups = [Group(name, "a script", 1, 3) for name in names]
    run = command.Run(groups, budget, into, keep=False)
    run.command = lambda group, figures: [
        *(sys.executable, "-c", TELL + WAYS[group.name], str(figures), group.name)
    ]
    return run


def test_a_crash_or_a_hang_costs_only_what_was_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(["dies", "hangs", "good"], tmp_path, monkeypatch)
    assert run.go() == 1
    groups = run.results.groups
    assert {name: group.status for name, group in groups.items()} == {
        "dies": "crashed with -11",
        "hangs": "timed out",
        "good": "done",
    }
    for name, group in groups.items():
        assert group.figures[f"{name}/before"]["value"] == 1.5
    child = int(run.log.read_text().partition("child ")[2].split()[0])
    for _ in range(50):
        if not state(child):
            break
        time.sleep(0.1)
    assert not state(child)
    stored_ones = stored(tmp_path / "benchmarks" / "results")
    assert [results.card for results in stored_ones] == ["Card X 1"]
    text = (tmp_path / "docs" / "gpu.md").read_text()
    assert "Measured on Card X 1." in text
    assert "- hangs: timed out." in text


def test_what_no_time_is_left_for_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(["good", "hangs", "good"], tmp_path, monkeypatch, budget=4.5)
    run.groups[2] = Group("late", "a script", 1, 3)
    WAYS["late"] = ""
    assert run.go() == 1
    statuses = {name: group.status for name, group in run.results.groups.items()}
    assert statuses == {"good": "done", "hangs": "timed out", "late": "no time left"}


def test_ctrl_c_keeps_what_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(["good", "hangs"], tmp_path, monkeypatch)
    monkeypatch.setattr(command.Process, "run", interrupt_second())
    with pytest.raises(KeyboardInterrupt):
        run.go()
    (results,) = stored(tmp_path / "benchmarks" / "results")
    assert {name: f.status for name, f in results.groups.items()} == {
        "good": "done",
        "hangs": "interrupted",
    }


def interrupt_second() -> object:
    """A turn of a process that Ctrl-C ends, for the second one."""
    real, count = command.Process.run, [0]

    def run(self: command.Process, limit: float) -> tuple[str, float]:
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt
        return real(self, limit)

    return run


# --- results -----------------------------------------------------------------------------------


def figures_of(card: str | None, **values: float) -> Found:
    figures = {
        f"steps/{name}": {"value": value, "unit": "ms", "text": "", "values": [value]}
        for name, value in values.items()
    }
    return Found("done", 1.0, {"card": card, "date": "2026-01-01"}, figures)


def test_some_groups_alone_leave_the_others_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OUT", raising=False)
    folder = tmp_path / "benchmarks" / "results"
    earlier = Results(
        {"steps": figures_of("Card X 1", a=1.0), "study": figures_of("Card X 1", b=2.0)}
    )
    assert earlier.write(folder).name == "gpu-card-x-1.json"
    for keep, left in ((True, {"steps", "study"}), (False, {"steps"})):
        run = command.Run([], 10.0, tmp_path, keep=keep)
        run.results.groups["steps"] = figures_of("Card X 1", a=5.0)
        run.write()
        (now,) = stored(folder)
        assert set(now.groups) == left
        assert now.values()["steps/a"] == 5.0


def test_times_of_several_processes_have_a_spread(tmp_path: Path) -> None:
    paths = []
    for turn, value in enumerate((1.0, 1.1, 0.9)):
        paths.append(tmp_path / f"{turn}.jsonl")
        rows = [
            {"figure": "latency/x", "value": value, "unit": "ms", "text": ""},
            {"figure": "latency/captured", "value": turn != 1, "unit": "", "text": ""},
        ]
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = gathered(paths, "done", 1.0).figures
    assert figures["latency/x"]["values"] == [1.0, 1.1, 0.9]
    assert figures["latency/x: spread of processes"]["value"] == pytest.approx(10.0)
    assert figures["latency/captured"]["value"] is False  # of one that is not, none is


@pytest.mark.parametrize(
    ("goal", "value", "met"),
    [
        (("<=", 2.5), 2.5, True),
        (("<=", 2.5), 2.6, False),
        ((">=", 19.0), 20.0, True),
        ((">=", 19.0), float("nan"), False),
        (("is", True), True, True),
        (("is", True), "called a synchronizing operation", False),
        (("is", 0), 0, True),
        (None, 3.0, None),
    ],
)
def test_a_goal_is_met_or_not(
    goal: tuple[str, float | bool] | None, value: float | str, met: bool | None
) -> None:
    assert Figure("steps/x", goal=goal).met(value) is met


def test_nothing_is_judged_without_a_card() -> None:
    name = "steps/d256 L8 E16k2, 2k tokens: graph"
    for card, met in (("Card X 1", True), (None, None)):
        results = Results({"steps": figures_of(card, **{name.removeprefix("steps/"): 2.0})})
        judged = {figure.name: (value, verdict) for figure, value, verdict in results.judged()}
        assert judged[name] == (2.0, met)
        assert all(verdict is None for key, (_, verdict) in judged.items() if key != name)
        assert list(summary(results))[-1].startswith("1 of 1" if met else "0 of 0")


def test_names_of_figures_are_unique_and_of_groups() -> None:
    names = [figure.name for figure in FIGURES]
    assert len(names) == len(set(names))
    assert {name.partition("/")[0] for name in names} == set(GROUP)


# --- a machine without a network ---------------------------------------------------------------


def test_every_dependency_has_a_source_for_a_machine_without_a_network() -> None:
    script = str(ROOT / "benchmarks" / "gpu" / "prepare.sh")
    subprocess.run(["bash", script, "--check"], check=True)


def test_a_missing_folder_of_wheels_is_named(tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks" / "gpu" / "run.sh")
    environment = {**os.environ, "GPU_WHEELS": str(tmp_path / "none"), "PYTHON": sys.executable}
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "run benchmarks/gpu/prepare.sh where there is a network" in done.stderr


def test_tests_are_collected_without_databases() -> None:
    probe = "import sys; sys.modules.update(psycopg=None, sqlalchemy=None); import conftest"
    subprocess.run([sys.executable, "-c", probe], cwd=ROOT / "tests", check=True)
