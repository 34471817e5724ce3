"""The runner: starts the drivers of queued studies, restarts those that die, and ends others."""

from __future__ import annotations

import logging
import threading
import time
from functools import partial

from moenas.errors import MoenasError
from moenas.records import Plain
from moenas.service.drivers import DriverProcess, Drivers, process_of
from moenas.service.settings import ServerSettings
from moenas.store import leases, runners, submissions
from moenas.store.store import Store
from moenas.store.submissions import Submission

log = logging.getLogger(__name__)

TICK_S = 0.5
"""Seconds between two looks at the queue and the drivers."""
BEAT_S = 5.0
"""Seconds between the signs of life of this server."""
GRACE_S = 60.0
"""Seconds that an interrupted driver has to end."""
LONGEST_BACKOFF_S = 300.0
BUSY_S = 10.0
"""Seconds before a study is tried again that another process runs."""

FINAL_CODES = {
    1: "the study stopped",
    2: "the space or the corpus is not valid any more",
    3: "no candidate is complete",
}
"""Exit code -> why the same command would end the same way again."""
BUSY_CODE = 6
INTERRUPTED_CODES = (129, 130, 143)
RESUME_HINT = "`resume` starts it again"


class Runner:
    """Looks after the queue of a database in a thread, until `stop`."""

    def __init__(self, store: Store, settings: ServerSettings) -> None:
        self._store, self._settings = store, settings
        self.drivers = Drivers(settings, store.url)
        self._thread = threading.Thread(target=self._run, name="moenas-runner", daemon=True)
        self._end, self._wake = threading.Event(), threading.Event()
        self._interrupted: dict[str, float] = {}
        """Study -> when its driver was asked to end."""
        self._beaten = float("-inf")
        self.id = ""

    def start(self) -> None:
        """Register this server and begin."""
        self.id = self._store.transact(runners.register)
        self._thread.start()

    def wake(self) -> None:
        """Look at the queue at once."""
        self._wake.set()

    def stop(self, *, interrupt_drivers: bool) -> None:
        """End the thread; drivers go on, or are interrupted and queued again."""
        self._end.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        if interrupt_drivers:
            self._interrupt_all()
        self._store.transact(lambda c: runners.unregister(c, self.id))

    def _interrupt_all(self) -> None:
        held = self._held()
        for submission in held:
            if (process := process_of(submission)) is not None and process.is_local:
                self.drivers.interrupt(process)
                self._interrupted.setdefault(submission.study, time.monotonic())
        deadline = time.monotonic() + GRACE_S
        while held and time.monotonic() < deadline:
            time.sleep(0.1)
            held = [f for f in self._held() if not self._look_after(f)]
        for submission in held:
            if (process := process_of(submission)) is not None and process.is_local:
                self.drivers.kill(process)

    def _held(self) -> list[Submission]:
        return self._store.query(lambda c: submissions.held(c, self.id))

    def _run(self) -> None:
        while not self._end.is_set():
            try:
                self.tick()
            except MoenasError as error:
                log.warning("the queue waits for its database: %s", error)
            except Exception:
                log.exception("the queue failed and goes on")
            self._wake.wait(TICK_S)
            self._wake.clear()

    def tick(self) -> None:
        """Do once what there is to do."""
        self._beat()
        held = self._held()
        left = [submission for submission in held if not self._look_after(submission)]
        for _ in range(self._settings.max_running - len(left)):
            if not self._start_next():
                return

    def _beat(self) -> None:
        """Say that this server lives, and take over what dead ones have left."""
        if time.monotonic() < self._beaten + BEAT_S:
            return
        if not self._store.transact(lambda c: runners.renew(c, self.id)):
            self.id = self._store.transact(runners.register)
        taken = self._store.transact(lambda c: runners.take_over(c, self.id))
        if taken:
            log.info("took over %s", ", ".join(taken))
        self._beaten = time.monotonic()

    # --- the start of a driver -------------------------------------------------------------------

    def _start_next(self) -> bool:
        """Start the study that comes first in the queue; say whether there was one."""
        if not self._store.query(submissions.counts)["queued"]:
            return False
        submission = self._store.transact(
            lambda c: submissions.claim_next(c, self.id, leases.clock(c)),
        )
        if submission is None:
            return False
        self._interrupted.pop(submission.study, None)
        try:
            process = self.drivers.start(submission)
        except OSError as error:
            reason = f"its driver cannot be started: {error}"
            self._ended(submission.study, lambda _: {"state": "failed", "reason": reason})
            return True
        self._store.transact(
            lambda c: submissions.set_driver(
                c, submission.study, process.machine, process.pid, process.process_start
            )
        )
        return True

    # --- drivers that run ------------------------------------------------------------------------

    def _look_after(self, submission: Submission) -> bool:
        """Bring a driver to where its study is to be; say whether the driver has ended."""
        process = process_of(submission)
        if self._is_alive(submission, process):
            if process is not None and process.is_local:
                self._steer(submission, process)
            return False
        code = self.drivers.exit_code(submission.study)
        clock = self._store.query(leases.clock)
        self._interrupted.pop(submission.study, None)
        self._ended(submission.study, partial(self._after, code=code, clock=clock))
        return True

    def _is_alive(self, submission: Submission, process: DriverProcess | None) -> bool:
        """Say whether a driver lives; one on another host shows its life in the database alone."""
        if process is not None and process.is_local:
            return self.drivers.is_alive(process)
        try:
            return self._store.driver(submission.study) is not None
        except MoenasError:  # it has not created its study
            return False

    def _steer(self, submission: Submission, process: DriverProcess) -> None:
        """Interrupt the driver of a study that is paused or cancelled, once; later kill it."""
        asked = self._interrupted.get(submission.study)
        if submission.state in ("paused", "cancelled") and asked is None:
            self.drivers.interrupt(process)
            self._interrupted[submission.study] = time.monotonic()
        elif asked is not None and time.monotonic() > asked + GRACE_S:
            self.drivers.kill(process)
        elif submission.state == "queued" and asked is None:  # resumed before it was interrupted
            self._store.transact(lambda c: submissions.keep_running(c, submission.study, self.id))

    # --- drivers that have ended -----------------------------------------------------------------

    def _ended(self, study: str, decide: submissions.Decide) -> None:
        self._store.transact(lambda c: submissions.driver_ended(c, study, self.id, decide))

    def _after(self, submission: Submission, *, code: int | None, clock: float) -> Plain:
        """Return what becomes of a running study whose driver has ended with an exit code."""
        if submission.driver_pid is None:
            return {"state": "queued", "reason": "its driver was not started"}
        if code == 0:
            more = submission.trials > (submission.driven_trials or 0)
            return {"state": "queued" if more else "finished", "reason": None}
        if code == BUSY_CODE:
            return {"state": "queued", "not_before": clock + BUSY_S, "reason": "another driver"}
        if code in INTERRUPTED_CODES:
            wait = clock + self._settings.backoff_s
            return {"state": "queued", "not_before": wait, "reason": "its driver was interrupted"}
        tail = self.drivers.log_tail(submission.study)
        if code in FINAL_CODES:
            return {"state": "failed", "reason": f"{FINAL_CODES[code]}:\n{tail}"}
        how = "was killed" if code is None else f"ended with exit code {code}"
        restarts = submission.restarts + 1
        if restarts > self._settings.restart_limit:
            times = f"its driver {how}, {restarts} times in all; {RESUME_HINT}"
            return {"state": "failed", "reason": f"{times}:\n{tail}"}
        wait = min(LONGEST_BACKOFF_S, self._settings.backoff_s * 2.0**submission.restarts)
        return {
            "state": "queued",
            "restarts": restarts,
            "not_before": clock + wait,
            "reason": f"its driver {how}:\n{tail}",
        }
