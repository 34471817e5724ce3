"""Memory that a process keeps is not asked for again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.integration

STEPS = """
import resource, sys, torch
from moenas.evaluate.malloc import tune_malloc
if sys.argv[1] == "kept":
    tune_malloc()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):
    torch.ones(1 << 24)  # 64 MiB
    torch.zeros(1 << 23) + 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of the GNU C library")
def test_kept_memory_is_not_asked_for_again() -> None:
    faults = {
        word: int(subprocess.check_output([sys.executable, "-c", STEPS, word]))
        for word in ("kept", "returned")
    }
    assert faults["kept"] < faults["returned"] / 2
