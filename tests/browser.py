"""Headless Chromium, driven over its own pipe: pages, texts and pictures for the tests."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    "--headless",
    "--no-sandbox",  # root has no sandbox
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]
# Chromium reads commands from descriptor 3 and writes answers to 4; Popen cannot renumber.
RENUMBER = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
PATIENCE_S = 90.0
"""How long a page may take on a busy machine before a test calls it broken."""


class Browser:
    """One page of a running Chromium, by the Chrome DevTools Protocol."""

    def __init__(self, process: subprocess.Popen[bytes], write: int, read: int) -> None:
        self._process, self._write, self._read = process, write, os.fdopen(read, "rb")
        self._number = 0
        self._session: str | None = None
        self.errors: list[str] = []
        """What the page's scripts threw."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        self.call("Page.enable")
        self.call("Runtime.enable")

    def call(self, method: str, **params: Any) -> Any:
        """Send one command and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("method") == "Runtime.exceptionThrown":
                details = answer["params"]["exceptionDetails"]
                self.errors.append(
                    details.get("exception", details).get("description", str(details))
                )
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _message(self) -> Any:
        buffer = bytearray()
        while not buffer.endswith(b"\0"):
            byte = self._read.read(1)
            assert byte, "Chromium went away"
            buffer += byte
        return json.loads(buffer[:-1])

    def open(self, url: str, *, dark: bool = False, size: tuple[int, int] = (1400, 4400)) -> None:
        """Load a page in a window of this size, in the light or the dark scheme."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        width, height = size
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression holds in the page."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < deadline, (
                f"never came true: {condition}\n{self.text()[:2000]}"
            )
            time.sleep(0.1)

    def wait_for(self, words: str) -> None:
        """Wait until the page shows a text."""
        self.wait(f"document.body && document.body.innerText.includes({json.dumps(words)})")

    def text(self) -> str:
        """Return the text that the page shows."""
        return str(self.run("document.body ? document.body.innerText : ''"))

    def picture(self, selector: str) -> bytes:
        """Return a PNG of the first element that a selector finds, if it lies in the window."""
        clip = self.run(
            f"(() => {{const b = document.querySelector({json.dumps(selector)})"
            ".getBoundingClientRect();"
            " return {x: b.x, y: b.y, width: b.width, height: b.height, scale: 1}})()"
        )
        return base64.b64decode(self.call("Page.captureScreenshot", clip=clip)["data"])


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Start Chromium with an empty profile folder and end it, helpers included, afterwards."""
    assert PROGRAM is not None
    their_read, write = os.pipe()
    read, their_write = os.pipe()
    command = [sys.executable, "-c", RENUMBER, str(their_read), str(their_write), PROGRAM]
    process = subprocess.Popen(
        [*command, *FLAGS, f"--user-data-dir={profile}"],
        pass_fds=(their_read, their_write),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(their_read)
    os.close(their_write)
    browser = Browser(process, write, read)
    try:
        yield browser
    finally:
        os.close(write)
        browser._read.close()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
