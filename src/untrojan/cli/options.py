"""What several commands share: their options, their help and how they print."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from untrojan.data.image_set import ImageSet
    from untrojan.runs import RunFolder

DATA_HELP = (
    "A folder of class folders (or of train/ and test/ with those), a .tar or .zip of one, .npz, IDX, CIFAR "
    "batches, parquet, or a known name (see: untrojan data list)."
)

Data = Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP, show_default=False)]
Out = Annotated[
    Path,
    typer.Option(
        "--out",
        "-o",
        metavar="DIR",
        help="Folder for the results; created, locked while the run goes on.",
        show_default=False,
    ),
]
MaybeOut = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="DIR", help="Folder for the results; none by default."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace another configuration's results in the folder.")
]
Seed = Annotated[
    int, typer.Option("--seed", min=0, max=2**32 - 1, help="Every random choice follows from it.")
]
WriteClean = Annotated[
    Path | None,
    typer.Option(
        "--write-clean",
        metavar="PATH",
        help="Write the set without the images that are not trusted: .npz, .zip, .tar.gz or a folder.",
    ),
]
Size = Annotated[
    int | None, typer.Option("--size", min=8, max=512, help="Resize images to this many pixels a side.")
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Processor threads; by default as many as there are cores."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and no summary.")]
Net = Annotated[
    str,
    typer.Option("--net", metavar="NAME", help="Network; @WIDTH for a narrower one; or your module:factory."),
]
Architecture = Annotated[
    str | None,
    typer.Option("--architecture", metavar="NAME", help="The model's network, where its file does not say."),
]
Mean = Annotated[
    str | None,
    typer.Option(
        "--mean", metavar="R,G,B", help="Normalisation of a model from elsewhere, over pixels in 0..1."
    ),
]
Std = Annotated[str | None, typer.Option("--std", metavar="R,G,B", help="See --mean.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print metrics.json to standard output, and nothing else there.")
]


def begin(threads: int | None, quiet: bool) -> None:
    """Apply ``--threads`` and ``--quiet``; called first, before any numerical library is imported."""
    from untrojan import progress
    from untrojan.memory import keep_freed_memory

    keep_freed_memory()
    if threads is not None:
        # The variables reach the pools of libraries that are yet to be loaded, the call the one that is.
        if "torch" not in sys.modules:
            for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
                os.environ[variable] = str(threads)
        import torch

        torch.set_num_threads(threads)
    if not quiet and sys.stderr.isatty():
        progress.enable()


def maybe(out: Path | None, folder: Callable[[Path], RunFolder]) -> AbstractContextManager[RunFolder | None]:
    """The run folder where ``--out`` was given, else nothing."""
    return nullcontext() if out is None else folder(out)


def say(text: str = "", *, quiet: bool = False, to_stderr: bool = False) -> None:
    """One line of a summary. Names in it come from untrusted data: control characters are made visible."""
    if not quiet:
        print(visible(text), file=sys.stderr if to_stderr else sys.stdout)


def visible(text: str) -> str:
    """Text that cannot steer a terminal: a class may be named after an escape sequence."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def print_json(value: Any) -> None:
    from untrojan.runs import json_text

    sys.stdout.write(json_text(value))


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table for people. Cells are plain text: markup in a class name stays what it is."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column, name in enumerate(header):
        numbers = rows and all(isinstance(row[column], int | float) for row in rows)
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(str(cell))) for cell in row))
    # In a pipe there is no width to fit into.
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)


def named(data: ImageSet, index: int) -> str:
    """A class as the reader may write it: its index and its name."""
    return f"{index} ({data.class_names[index]})"


def share(value: float | None, decimals: int = 1) -> str:
    """0.9731 as 97.3 %."""
    return "-" if value is None else f"{100 * value:.{decimals}f} %"
