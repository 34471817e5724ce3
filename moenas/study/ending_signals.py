"""Signals that end a run, and the errors that a run ends with."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import optuna

from moenas.errors import StorageLostError
from moenas.study.events import Interrupted

RESEND_S = 0.05
"""Seconds after which a signal is sent again whose exception was swallowed."""


class EndingSignals:
    """Lets SIGTERM and SIGHUP end a run as Ctrl-C does, and loses none of the three."""

    HEEDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.reason = ("Ctrl-C", 130)
        """What ended the run, and the exit code for it."""
        self._number: int | None = None
        """The latest signal."""
        self._hook = sys.unraisablehook

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Heed the signals meanwhile.

        A signal that is ignored, as SIGHUP is under nohup, stays ignored. A caller's own handler of
        SIGINT stays, too.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.getsignal(s) for s in self.HEEDED}
        before = {s: handler for s, handler in before.items() if handler != signal.SIG_IGN}
        if before.get(signal.SIGINT) is not signal.default_int_handler:
            before.pop(signal.SIGINT, None)
        for number in before:
            signal.signal(number, self._stop)
        hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        self._hook = hook
        try:
            yield
        finally:
            sys.unraisablehook = hook
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def _stop(self, number: int, frame: object) -> None:
        """Raise what no `except Exception` swallows, and what Ray's waiting lets through."""
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        self.reason, self._number = (name, 128 + number), number
        raise KeyboardInterrupt

    def _unraisable(self, lost: sys.UnraisableHookArgs) -> None:
        """Send a signal again whose exception a finalizer or a weak reference has swallowed."""
        if self._number is None or not issubclass(lost.exc_type, KeyboardInterrupt):
            self._hook(lost)
            return
        again = threading.Timer(RESEND_S, os.kill, (os.getpid(), self._number))
        again.daemon = True
        again.start()


@contextmanager
def plain_endings(signals: EndingSignals) -> Iterator[None]:
    """Keep Optuna quiet, and turn what may end a run from outside into errors of moenas."""
    quiet = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    except optuna.exceptions.StorageInternalError as error:
        raise StorageLostError(f"the database: {error.__cause__ or error}") from error
    except KeyboardInterrupt:
        raise Interrupted(*signals.reason) from None
    finally:
        optuna.logging.set_verbosity(quiet)
