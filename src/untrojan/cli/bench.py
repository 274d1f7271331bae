"""``untrojan bench``: experiments from a plan file, and the tables made of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from untrojan.cli import options
from untrojan.errors import UntrojanError

if TYPE_CHECKING:
    from untrojan.bench.runner import Summary

app = typer.Typer(no_args_is_help=True, help="Experiments from a plan file, and the tables made of them.")

PlanFile = Annotated[
    Path, typer.Argument(metavar="PLAN", help="A .toml file; see plans/.", show_default=False)
]
BenchOut = Annotated[
    Path, typer.Option("--out", "-o", metavar="DIR", help="Where models and poisoned sets are kept.")
]
Results = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of the result files; inside --out by default.")
]
Only = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Cells to take: data/net/attack/defense/seed, with *; repeatable."),
]
DataPaths = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="NAME=PATH", help="Where one of the plan's data sets lies; repeatable."),
]


@app.command()
def run(
    plan: PlanFile,
    out: BenchOut,
    results: Results = None,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Begin nothing that would not end in 90s, 100m, 2h.")
    ] = None,
    only: Only = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes side by side.")] = 1,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try failed cells again.")] = False,
    data: DataPaths = None,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
) -> None:
    """Do what is left of a plan. Seeds are the plan's. Run it again after an interruption: it goes on.

    Exit status: 0 all done or out of budget, 1 some cells failed.

    Example: [bold]untrojan bench run plans/re-desk-fashion-mnist.toml --out runs/re --budget 100m[/bold]
    """
    options.begin(threads, quiet)
    seconds = None if budget is None else seconds_of(budget)
    from untrojan.bench.runner import run_plan

    summary = run_plan(
        plan,
        out,
        results=results,
        budget=seconds,
        only=only or (),
        workers=workers,
        retry_failed=retry_failed,
        data=paths(data),
    )
    if not quiet:
        _print_summary(summary)
    raise typer.Exit(1 if summary.failed else 0)


@app.command()
def table(
    plan: PlanFile,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="What --out of bench run was.")
    ] = None,
    results: Results = None,
    format: Annotated[Literal["markdown", "csv"], typer.Option()] = "markdown",
) -> None:
    """Print a plan's tables: means, spreads, and the published figures beside them.

    Example: [bold]untrojan bench table plans/re-desk-fashion-mnist.toml --results results/re[/bold]
    """
    from untrojan.bench.table import render

    print(render(plan, results, out, format))


@app.command("list")
def list_cells(
    plan: PlanFile,
    out: BenchOut,
    results: Results = None,
    only: Only = None,
    data: DataPaths = None,
) -> None:
    """List a plan's cells and how each stands. Nothing is run.

    Example: [bold]untrojan bench list plans/re-desk-fashion-mnist.toml --out runs/re[/bold]
    """
    from untrojan.bench.runner import list_plan

    cells = list_plan(plan, out, results=results, only=only or (), data=paths(data))
    rows = [
        [cell["cell"], cell["status"], ", ".join(s["label"] for s in cell["stages"] if s["status"] != "done")]
        for cell in cells
    ]
    options.print_table(["cell", "status", "stages left"], rows)


def seconds_of(text: str) -> float:
    """``90s``, ``100m`` or ``2h`` in seconds; a bare number is seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if match is None:
        raise UntrojanError(f"--budget {text!r} is not a time such as 90s, 100m or 2h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def paths(pairs: list[str] | None) -> Mapping[str, str]:
    """``--data NAME=PATH`` as a dictionary; paths are text, whatever they look like."""
    found = {}
    for pair in pairs or ():
        name, equals, path = pair.partition("=")
        if not (name and equals and path):
            raise UntrojanError(f"--data {pair!r} is not NAME=PATH")
        found[name] = path
    return found


def _print_summary(summary: Summary) -> None:
    for line in summary.failed:
        options.say(f"failed: {line}")
    reason = ", the budget is used up" if summary.out_of_budget else ""
    options.say(f"{summary.done} cells done, {len(summary.failed)} failed, {summary.left} left{reason}")
    options.say(f"results: {summary.results}")
