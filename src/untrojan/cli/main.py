"""``untrojan``: the commands put together, and every failure turned into a line and an exit status."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence

import typer
from typer.main import get_command

from untrojan import __version__
from untrojan.cli import audit, bench, data, demo, evaluate, federated, options, poison, repair, scan, train
from untrojan.errors import UntrojanError

BAD_INPUT, CRASH, INTERRUPTED, PIPE_CLOSED = 2, 70, 130, 141

app = typer.Typer(
    name="untrojan",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
    epilog=(
        "Exit status: 0 done (audit, scan: no backdoor found), 1 they found one, 2 bad input or usage, "
        "3 they are undecided, 70 a bug in this program, 130 interrupted."
    ),
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"untrojan {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Find, remove and prevent backdoors (trojans) in image classifiers.

    Try it on a data set that is made on the spot: [bold]untrojan demo[/bold]
    """


app.command("demo")(demo.demo)
app.command("audit")(audit.audit)
app.command("poison")(poison.poison)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("scan")(scan.scan)
app.command("repair")(repair.repair)
app.command("federated")(federated.federated)
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")


def run() -> None:
    """The console script."""
    if not sys.warnoptions:
        # Libraries' warnings are for their callers; a user can do nothing about them.
        warnings.simplefilter("ignore")
    status = main(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        status = _close_pipe()
    sys.exit(status)


def main(arguments: Sequence[str]) -> int:
    """Run one command line. Returns its exit status; nothing but that and a line on stderr comes out."""
    try:
        command = get_command(app)
        # Not ``command.main``, which has exit statuses and error boxes of its own.
        with command.make_context("untrojan", list(arguments)) as context:
            command.invoke(context)
        return 0
    except typer.Exit as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command again to resume", INTERRUPTED, prefix="")
    except BrokenPipeError:
        return _close_pipe()
    except SystemExit as stop:
        # Rich ends the program with status 1, which an audit reads otherwise, where the reader has gone.
        if isinstance(stop.__context__, BrokenPipeError):
            return _close_pipe()
        return _fail(f"something ended the program from inside ({stop.code!r})", CRASH)
    except Exception as error:
        line = _line_for(error)
        if line is not None:
            return _fail(line, BAD_INPUT)
        traceback.print_exc()
        return _fail("this is a bug in untrojan: please report it with the lines above", CRASH)


def _line_for(error: Exception) -> str | None:
    """What a user can act on, in a line; None where it is the program's fault."""
    if isinstance(error, UntrojanError):
        return str(error)
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "untrojan"
        # An empty message is `no_args_is_help`, whose help has been printed by then.
        return f"{error.format_message().rstrip('.') or 'no command given'} (see: {command} --help)"
    text = str(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        return "out of memory: use fewer or smaller images (--size), or a smaller --net"
    try:
        from untrojan.runs import raise_if_disk_full

        raise_if_disk_full(error)
    except UntrojanError as full:
        return str(full)
    except ImportError:
        pass
    return None


def _fail(line: str, status: int, prefix: str = "error: ") -> int:
    text = " ".join(options.visible(line).split())
    print(f"{prefix}{text}", file=sys.stderr)
    return status


def _close_pipe() -> int:
    # The reader has gone, as in `untrojan ... | head`: say nothing more, at exit neither.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return PIPE_CLOSED
