"""Figures as PNG files, drawn by Chromium."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from plotly import graph_objects as go

SCALE = 2
"""Pixels of the file for each CSS pixel, for sharp text on dense screens."""


def save(figure: go.Figure, size: tuple[int, int], file: Path) -> None:
    """Draw a figure into a PNG file; `size` is width and height in CSS pixels."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("the picture needs Chromium; install it, or leave the picture as it is")
    width, height = size
    with tempfile.TemporaryDirectory() as place:
        page = Path(place, "figure.html")
        drawn = figure.update_layout(width=width, height=height)
        text = drawn.to_html(config={"displayModeBar": False}, full_html=True)
        page.write_text(text.replace("<body>", '<body style="margin: 0">'), encoding="utf-8")
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             f"--force-device-scale-factor={SCALE}", f"--screenshot={file}",
             f"--window-size={width},{height}", "--virtual-time-budget=8000", page.as_uri()],
            check=True, capture_output=True,
        )  # fmt: skip
