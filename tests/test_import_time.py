"""``untrojan --help`` answers at once: nothing heavy is imported before a command needs it."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "numpy",
    "scipy",
    "sklearn",
    "matplotlib",
    "PIL",
    "pyarrow",
    "pooch",
    "jinja2",
    "flwr",
    "ray",
)
COMMANDS = ("demo", "audit", "poison", "train", "evaluate", "scan", "repair", "federated", "data", "bench")
SHOW_HEAVY = (
    "import sys; from untrojan.cli.main import main; status = main(sys.argv[1:]); "
    f"print([m for m in {HEAVY!r} if m in sys.modules], status)"
)


def python(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["audit", "--help"], ["bench", "run", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    lines = python("-c", SHOW_HEAVY, *arguments).splitlines()
    assert lines[-1] == "[] 0"
    assert any("Usage:" in line for line in lines)


def test_help_names_every_command() -> None:
    shown = python("-m", "untrojan", "--help")
    assert all(f" {command} " in shown for command in COMMANDS)


def processor_seconds(*arguments: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    python(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_takes_under_half_a_second() -> None:
    """The least of several tries, by turns with what it cannot do without: on a slow or busy machine, whose
    processor time grows with what its other core does, at most two and a half times what Typer's takes."""
    helps, least = [], []
    for _ in range(4):
        helps.append(processor_seconds("-m", "untrojan", "--help"))
        least.append(processor_seconds("-c", "import typer.rich_utils"))
    assert min(helps) < max(0.5, 2.5 * min(least))


def test_the_package_itself_is_light_and_still_offers_load() -> None:
    assert python("-c", "import untrojan, sys; print('torch' in sys.modules)") == "False\n"
    assert python("-c", "import untrojan; print(untrojan.load.__module__)") == "untrojan.data.load\n"
