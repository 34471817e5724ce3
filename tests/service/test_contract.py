"""The API against its own OpenAPI document, by schemathesis: each answer is one that it promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import made_up_views
import pytest
import stored_studies
from served import listening, served

pytestmark = pytest.mark.integration


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Settings of schemathesis: a study that is there, and a stream that ends."""
    path = tmp_path / "schemathesis.toml"
    path.write_text(
        '[parameters]\nname = "made_up"\n'
        '[[operations]]\ninclude-path = "/v1/studies/{name}/events"\n'
        "[operations.parameters]\nfollow = false\n"
    )
    return path


@pytest.mark.parametrize(
    "phases", ["examples,coverage", pytest.param("fuzzing", marks=pytest.mark.slow)]
)
def test_every_answer_is_in_the_document(tmp_path: Path, config: Path, phases: str) -> None:
    stored_studies.shelve(tmp_path, made_up_views.view(4, 2))
    with (
        served(tmp_path, requests_per_s=1e6, burst=10**6) as one,
        listening(one.service) as address,
    ):
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"]
        options = [
            f"{address}/v1/openapi.json",
            "--header", f"Authorization: Bearer {one.tokens['admin']}",
            "--checks", "all",
            "--exclude-checks", "positive_data_acceptance",
            "--phases", phases,
            "--max-examples", "20",
            "--seed", "1",
            "--request-timeout", "60",
            "--exclude-path-regex", "export|report",
            "--no-color",
        ]  # fmt: skip
        done = subprocess.run(
            [*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=280
        )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
