"""Ratios of two ways to do the same work: taken in turns in one run, so that a busy machine slows both."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from untrojan.runs import hardware, versions


def in_turns(ways: dict[str, Callable[[], Any]], rounds: int = 5) -> dict[str, float]:
    """Median seconds of each way over ``rounds``, after one unmeasured turn each."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def in_turns_apart(script: str, ways: Iterable[str], what: str, rounds: int = 3) -> dict[str, float]:
    """Median seconds of ways that must not share a process: ``python SCRIPT WAY WHAT`` prints what it took.

    Memory that one way keeps (:func:`untrojan.memory.keep_freed_memory`) is kept for all of a process.
    """
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            command = [sys.executable, script, way, what]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds[way].append(float(done.stdout))
    return {way: statistics.median(values) for way, values in seconds.items()}


def report(name: str, seconds: dict[str, float], slow: str, fast: str, wanted: float) -> None:
    """Print the ratio and write it to ``results/benchmarks/NAME.json``."""
    ratio = seconds[slow] / seconds[fast]
    print(f"{name}: {fast} is {ratio:.2f} times as fast as {slow} (at least {wanted:g} wanted)")
    _write(name, seconds, ratio, wanted)


def report_cost(name: str, seconds: dict[str, float], more: str, less: str, at_most: float) -> None:
    """:func:`report` where the ratio is a price."""
    ratio = seconds[more] / seconds[less]
    print(f"{name}: {more} takes {ratio:.2f} times as long as {less} (at most {at_most:g} wanted)")
    _write(name, seconds, ratio, at_most)


def _write(name: str, seconds: dict[str, float], ratio: float, wanted: float) -> None:
    print("  " + ", ".join(f"{way} {value:.3f} s" for way, value in seconds.items()))
    write(name, {"ratio": round(ratio, 3), "wanted": wanted, "seconds": seconds})


def write(name: str, figures: dict[str, Any]) -> None:
    """``results/benchmarks/NAME.json``: the figures, and what they were measured on."""
    found = {"name": name, **figures, "hardware": hardware(), "versions": versions()}
    place = Path(__file__).parent.parent / "results" / "benchmarks" / f"{name}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
