"""Memory kept between training steps."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from untrojan import memory

STEPS = """
import resource, sys
from untrojan.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(6):
    blocks = [b"x" * (40 << 20) for _ in range(2)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_kept_memory_is_not_touched_for_the_first_time_at_every_step() -> None:
    def faults(way: str) -> int:
        done = subprocess.run([sys.executable, "-c", STEPS, way], capture_output=True, text=True, check=True)
        return int(done.stdout)

    # Two blocks of 40 MiB are 20,480 pages: touched once where kept, six times where not.
    assert faults("keep") < 60_000 < faults("let go")


def test_without_glibc_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert not memory.keep_freed_memory()
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not memory.keep_freed_memory()
