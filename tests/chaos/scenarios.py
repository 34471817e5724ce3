"""Faults by kind; each function tries some and returns the outcome."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from random import Random

import fuzz
import optuna
from arena import ENDS, Arena, Outcome, died_early, end, traceback_in, wait
from failpoints import POINTS
from oracle import MARK
from postgres import Server, server_programs

STUCK_S = 60
"""Seconds after which reading a space file is given up."""
SLOW_S = 10.0
"""A mutated file that takes more CPU seconds to read hangs."""
LARGE = 4 * 2**30
"""Peak memory, in bytes, that reading files must not reach."""
REFUSALS = (optuna.exceptions.StorageInternalError, optuna.exceptions.UpdateFinishedTrialError)
"""Errors of Optuna in another program: the row is locked, or the run was faster."""

POINT_COUNTS = {"commit": 120, "fsync": 60, "replace": 12, "link": 1, "unlink": 10}
"""About how often a study of ten trials passes each point."""


def driver_kills(
    random: Random, kills: int, url: str | None = None, *, stopping: str = "none"
) -> Outcome:
    """SIGKILL at a chosen commit, fsync, rename or unlink, and at random instants, again and again."""
    name = "driver killed by SIGKILL" + (", PostgreSQL" if url else ", SQLite")
    outcome = Outcome(name if stopping == "none" else f"{name}, {stopping}")
    while outcome.tried < kills:
        with Arena(random, url=url, stopping=stopping) as arena:
            killed, faults = 0, []
            for _ in range(random.randint(4, 7)):
                if random.random() < 0.6:
                    point = random.choice([p for p in POINTS for _ in range(POINT_COUNTS[p])])
                    number = random.randint(1, max(1, POINT_COUNTS[point] // 3))
                    when = random.choice(["before", "after"])
                    process = arena.start(fault=f"kill:{point}:{number}:{when}")
                    code, _, said = end(process)
                else:
                    process = arena.start()
                    time.sleep(random.uniform(1.0, 6.0))
                    process.kill()
                    code, _, said = end(process)
                killed += code == -signal.SIGKILL
                if code not in (0, -signal.SIGKILL):
                    faults.append(f"ends with {code}: {said[-500:]}")
                faults += traceback_in(said)
            outcome.take(killed, faults + arena.resume(outcome))
    return outcome


def signals(random: Random, count: int) -> Outcome:
    """SIGINT, SIGTERM and SIGHUP, once and twice, early and late."""
    outcome = Outcome("SIGINT, SIGTERM, SIGHUP, once and twice")
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    while outcome.tried < count:
        with Arena(random, pause=0.1) as arena:
            faults, sent = [], 0
            for _ in range(5):
                process = arena.start()
                time.sleep(random.choice([random.uniform(0, 1), random.uniform(2, 6)]))
                for _ in range(random.choice([1, 1, 2])):
                    process.send_signal(random.choice(numbers))
                    time.sleep(random.uniform(0, 0.2))
                    sent += 1
                code, _, said = end(process)
                if "<frozen site>" in said:  # Python itself was starting: no code of ours had run
                    continue
                if code not in ENDS and not died_early(code):
                    faults.append(f"ends with {code}: {said[-500:]}")
                if code in (129, 130, 143) and "resume with" not in said and "stopped" not in said:
                    faults.append(f"no word on how to resume: {said[-300:]}")
                faults += traceback_in(said.replace("KeyboardInterrupt", ""))
            outcome.take(sent, faults + arena.resume(outcome))
    return outcome


def worker_kills(random: Random, kills: int, *, stop: int = 0) -> Outcome:
    """SIGKILL of Ray's workers at random instants; SIGSTOP of `stop` of them past their limit."""
    outcome = Outcome("worker killed on Ray" if not stop else "worker stopped past its time limit")
    while outcome.tried < kills:
        limit = 4.0 if stop else 60.0
        with Arena(random, trials=10, pause=0.2, limit=limit) as arena:
            words = ("run", "s.yaml", "--workers", "2", "--storage", arena.url)
            done, faults = 0, []
            process = arena.start(*words)
            killer = _Workers(arena, random)
            while process.poll() is None and done < min(8, kills - outcome.tried):
                time.sleep(random.uniform(0.3, 2.0))
                done += killer.strike(signal.SIGSTOP if stop else signal.SIGKILL)
                if stop and done >= stop:
                    break
            code, _, said = end(process)
            killer.let_go()
            if code not in ENDS | {1}:
                faults.append(f"ends with {code}: {said[-800:]}")
            faults += traceback_in(said)
            if not done:
                continue
            outcome.take(done, faults + arena.resume(outcome, *words))
    return outcome


class _Workers:
    """Finds and strikes the workers of a study on Ray."""

    def __init__(self, arena: Arena, random: Random) -> None:
        self._mark = f"{MARK}={arena.folder}".encode()
        self._random = random
        self._struck: set[int] = set()

    def strike(self, number: signal.Signals) -> int:
        """Send a signal to one worker that is at work; return 1, or 0 if there is none."""
        targets = [pid for pid in self._at_work() if pid not in self._struck]
        if not targets:
            return 0
        pid = self._random.choice(targets)
        with suppress(ProcessLookupError):
            os.kill(pid, number)
            self._struck.add(pid)
            return 1
        return 0

    def let_go(self) -> None:
        """Let stopped workers run on."""
        for pid in self._struck:
            with suppress(OSError):
                os.kill(pid, signal.SIGCONT)

    def _at_work(self) -> list[int]:
        pids = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with suppress(OSError):
                command = (entry / "cmdline").read_bytes()
                busy = command.startswith(b"ray::") and b"IDLE" not in command
                if busy and self._mark in (entry / "environ").read_bytes():
                    pids.append(int(entry.name))
        return pids


def database_restarts(random: Random, restarts: int) -> Outcome:
    """A PostgreSQL server stopped, fast or at once, and started again after up to 5 s."""
    outcome = Outcome("PostgreSQL restarted")
    programs = server_programs()
    assert programs is not None
    with Server(programs) as server:
        while outcome.tried < restarts:
            with Arena(random, url=server.url, trials=14, pause=0.1) as arena:
                process, done, faults = arena.start(), 0, []
                arena.until(1, process)
                while process.poll() is None and done < 4:
                    server.stop(random.choice([signal.SIGINT, signal.SIGQUIT]))
                    time.sleep(random.uniform(0, 5))
                    server.start()
                    done += 1
                    time.sleep(random.uniform(0.2, 1.5))
                code, _, said = end(process)
                if code:
                    faults.append(f"ends with {code}: {said[-800:]}")
                outcome.take(done, faults + traceback_in(said) + arena.resume(outcome))
    return outcome


def double_launches(random: Random, count: int, url: str | None = None) -> Outcome:
    """Two drivers of one study, at once and up to two seconds apart."""
    outcome = Outcome("two drivers at once" + (", PostgreSQL" if url else ", SQLite"))
    while outcome.tried < count:
        with Arena(random, url=url, trials=6) as arena:
            first = arena.start()
            time.sleep(random.choice([0.0, random.uniform(0, 2)]))
            second = arena.start()
            ends = [end(process) for process in (first, second)]
            codes = sorted(code for code, _, _ in ends)
            faults = [] if codes in ([0, 6], [0, 0]) else [f"end with {codes}: {ends}"]
            for _, _, said in ends:
                faults += traceback_in(said)
            outcome.take(1, faults + arena.wrong())
    return outcome


def locked_database(random: Random, seconds: list[float]) -> Outcome:
    """Another program holds the SQLite file for some time."""
    outcome = Outcome(f"database locked for {', '.join(f'{s:g}' for s in seconds)} s")
    for hold in seconds:
        with Arena(random, pause=0.05) as arena:
            process = arena.start()
            arena.until(2, process)
            with closing(sqlite3.connect(arena.folder / "moenas.db", timeout=60)) as other:
                other.execute("BEGIN EXCLUSIVE")
                time.sleep(hold)
                other.rollback()
            code, _, said = end(process)
            faults = [f"ends with {code}: {said[-600:]}"] if code else []
            outcome.take(1, faults + traceback_in(said) + arena.wrong())
    return outcome


def moved_database(random: Random, count: int) -> Outcome:
    """The SQLite file is moved away, deleted or replaced in mid-run."""
    outcome = Outcome("database moved, deleted or replaced")
    for number in range(count):
        with Arena(random, trials=60, pause=0.3) as arena:
            process = arena.start()
            arena.until(2, process)
            file, kept = arena.folder / "moenas.db", arena.folder / "kept"
            kept.mkdir()
            for name in ("moenas.db", "moenas.db-wal", "moenas.db-shm"):
                with suppress(FileNotFoundError):
                    shutil.move(arena.folder / name, kept / name)
            if number % 2:
                with closing(sqlite3.connect(file)) as other:
                    other.execute("CREATE TABLE another (x)")
            code, _, said = end(process)
            faults = [] if code == 4 else [f"ends with {code}: {said[-600:]}"]
            if "moved" not in said and "replaced" not in said and "another" not in said:
                faults.append(f"does not say what happened: {said[-600:]}")
            file.unlink(missing_ok=True)
            for path in kept.iterdir():
                shutil.move(path, arena.folder / path.name)
            arena.trials = 12
            words = ("run", "s.yaml", "--workers", "inline", "--trials", "12")
            outcome.take(1, faults + traceback_in(said) + arena.resume(outcome, *words))
    return outcome


def full_disk(random: Random, count: int) -> Outcome:
    """SQLite's file may not grow, or a file of weights cannot be renamed: no space is left."""
    outcome = Outcome("full disk")
    for number in range(count):
        with Arena(random) as arena:
            patience = {"MOENAS_RETRY_S": "2"}
            if number % 2:
                process = arena.start(
                    fault=f"enospc:replace:{random.randint(1, 8)}", environment=patience
                )
            else:
                pages = {**patience, "CHAOS_PAGES": str(random.randint(90, 130))}
                process = arena.start(environment=pages)
            code, _, said = end(process)
            faults = [] if code in (0, 2, 4) else [f"ends with {code}: {said[-600:]}"]
            if code == 4 and "resume with" not in said:
                faults.append(f"no word on how to resume: {said[-400:]}")
            outcome.take(1, faults + traceback_in(said) + arena.resume(outcome))
    return outcome


def other_programs(random: Random, count: int) -> Outcome:
    """Another program tells, fails, adds, asks, enqueues and deletes in Optuna's tables."""
    outcome = Outcome("told, failed, added, asked, enqueued and deleted by another program")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    while outcome.tried < count:
        with Arena(random, trials=10, pause=0.3) as arena:
            process = arena.start()
            arena.until(1, process)
            done, faults = 0, []
            while process.poll() is None and done < 6:
                with suppress(KeyError, ValueError, *REFUSALS):
                    other = optuna.load_study(study_name=arena.study, storage=arena.url)
                    done += _meddle(other, random)
                time.sleep(random.uniform(0.1, 0.4))
            code, _, said = end(process)
            if code not in ENDS:
                faults.append(f"ends with {code}: {said[-600:]}")
            faults += traceback_in(said)
            faults += [t for t in arena.resume(outcome) if "candidates were evaluated" not in t]
            outcome.take(done, faults)
    return outcome


def _meddle(study: optuna.Study, random: Random) -> int:
    """Do one thing that another program might."""
    running = [t.number for t in study.trials if t.state == optuna.trial.TrialState.RUNNING]
    what = random.choice(["tell", "fail", "enqueue", "nonsense", "add", "delete"])
    if what in ("tell", "fail") and running:
        values = [1.0, 2.0] if what == "tell" else None
        state = optuna.trial.TrialState.COMPLETE if values else optuna.trial.TrialState.FAIL
        study.tell(random.choice(running), values, state=state)
    elif what == "enqueue":
        study.enqueue_trial({"d_model": random.choice([16, 24, 17])})
    elif what == "nonsense":
        study.enqueue_trial({"d_model": "wide", "blocks.0.repeat": 1e9})
    elif what == "add":
        study.add_trial(optuna.trial.create_trial(values=[1.0, 1.0]))
    elif what == "delete" and random.random() < 0.3:
        optuna.delete_study(study_name=study.study_name, storage=study._storage)
    else:
        return 0
    return 1


def changed_data(random: Random, count: int) -> Outcome:
    """The corpus changes in mid-run for some seconds."""
    outcome = Outcome("corpus changed in mid-run")
    for _ in range(count):
        with Arena(random, trials=8, pause=0.2) as arena:
            process = arena.start()
            arena.until(2, process)
            corpus = arena.folder / "corpus.txt"
            before = corpus.read_text()
            corpus.write_text("something else\n" * 2000)
            time.sleep(random.uniform(0.5, 3))
            corpus.write_text(before)
            code, _, said = end(process)
            faults = [] if code in (0, 4) else [f"ends with {code}: {said[-600:]}"]
            faults += traceback_in(said) + arena.resume(outcome)
            code, out, _ = end(arena.start("status", arena.study, "-o", "json"))
            if '"failed": 0' not in out:
                faults.append(f"trials were used up: {out[:600]}")
            outcome.take(1, faults)
    return outcome


def closed_streams(random: Random, count: int) -> Outcome:
    """stdout or stderr closed, a pipe that is closed after a line, a terminal that goes away."""
    outcome = Outcome("closed streams and terminals")
    for number in range(count):
        with Arena(random, trials=4) as arena:
            kind = ("no stderr", "no stdout", "closed pipe", "terminal")[number % 4]
            if kind in ("no stderr", "no stdout"):
                redirect = "2>&-" if kind == "no stderr" else ">&-"
                shell = f"exec {sys.executable} $0 run s.yaml --workers inline {redirect}"
                code = _in_shell(arena, shell)
                ends = {0}
            elif kind == "closed pipe":
                process = arena.start()
                assert process.stderr is not None
                process.stderr.readline()
                process.stderr.close()
                code, ends = wait(process), {0, 141}
            else:
                code, ends = _on_a_terminal(arena), {0, 129, 141}
            faults = [] if code in ends else [f"{kind}: ends with {code}"]
            outcome.take(1, faults + arena.resume(outcome))
    return outcome


def _in_shell(arena: Arena, line: str) -> int:
    script = str(Path(__file__).parent / "failpoints.py")
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        MARK: str(arena.folder),
    }
    done = subprocess.run(
        ["bash", "-c", line, script],
        cwd=arena.folder,
        env=environment,
        capture_output=True,
        timeout=240,
        check=False,
    )
    return done.returncode


def _on_a_terminal(arena: Arena) -> int:
    """Run on a terminal of its own, which is closed after the first words."""
    ours, theirs = pty.openpty()
    process = arena.start(stdout=theirs, stderr=theirs, stdin=theirs, start_new_session=True)
    os.close(theirs)
    os.read(ours, 100)
    time.sleep(1)
    os.close(ours)
    return wait(process)


def _stuck(number: int, frame: object) -> None:
    raise TimeoutError(f"not read within {STUCK_S} s")


def mutated_spaces(random: Random, count: int) -> Outcome:
    """Space files with changed bytes, structure and meaning: read, or refused as the user's error."""
    outcome = Outcome("mutated space files")
    signal.signal(signal.SIGALRM, _stuck)
    for _ in range(count):
        seed, faults = random.randrange(2**31), []
        signal.alarm(STUCK_S)
        try:
            _, seconds, peak = fuzz.outcome(fuzz.mutated(seed))
        except Exception as error:
            faults.append(f"seed {seed}: {type(error).__name__}: {error}")
        else:
            if seconds > SLOW_S or peak > LARGE:
                faults.append(f"seed {seed}: {seconds:.1f} s, {peak / 2**30:.1f} GiB")
        finally:
            signal.alarm(0)
        outcome.take(1, faults)
    return outcome


# --- plain Optuna beside it ----------------------------------------------------------------------

OPTUNA = """
import os, sys, time, optuna
optuna.logging.set_verbosity(optuna.logging.ERROR)
study = optuna.create_study(study_name="s", storage=sys.argv[1], load_if_exists=True,
                            directions=["minimize", "minimize"])
def objective(trial):
    width = trial.suggest_int("width", 1, 64)
    time.sleep(0.15)
    with open("done.txt", "a") as file:
        file.write(f"{trial.number}\\n")
    return 1 / width, width
study.optimize(objective, n_trials=max(0, int(sys.argv[2]) - len(study.trials)))
"""


def plain_optuna(random: Random, kills: int) -> dict[str, int]:
    """Kill `study.optimize` of Optuna alone at random instants; count what it loses."""
    counts = {"kills": 0, "lost": 0, "stuck": 0}
    while counts["kills"] < kills:
        with Arena(random) as arena:
            url = f"sqlite:///{arena.folder}/optuna.db"
            command = [sys.executable, "-c", OPTUNA, url, "10"]
            environment = {**os.environ, MARK: str(arena.folder)}
            for attempt in range(6):
                process = subprocess.Popen(
                    command, cwd=arena.folder, env=environment, stderr=subprocess.DEVNULL
                )
                if attempt < 5:
                    threading.Timer(random.uniform(1.0, 3.5), process.kill).start()
                counts["kills"] += process.wait() == -signal.SIGKILL
            with suppress(KeyError):
                study = optuna.load_study(study_name="s", storage=url)
                complete = sum(t.state == optuna.trial.TrialState.COMPLETE for t in study.trials)
                counts["lost"] += 10 - complete
                counts["stuck"] += sum(not t.state.is_finished() for t in study.trials)
    return counts
