"""``untrojan data``: which data sets are known by name, what a set holds, and fetching one."""

from __future__ import annotations

from typing import Annotated

import typer

from untrojan.cli import options

app = typer.Typer(no_args_is_help=True, help="Known data sets; what a set holds; fetching one.")


@app.command("list")
def list_names() -> None:
    """List the names that stand for a data set.

    Example: [bold]untrojan data list[/bold]
    """
    from untrojan.data import known

    rows = []
    for name in known.known_names():
        facts = known.info(name)
        here = known.is_built_in(name) or known.locate(name) is not None
        size = f"{facts.image_size}x{facts.image_size}"
        rows.append([name, facts.title, facts.classes, size, "yes" if here else "no", facts.terms])
    options.print_table(["name", "what", "classes", "size", "here", "terms"], rows)


@app.command()
def info(
    data: options.Data,
    size: options.Size = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Load a data set and say what is in it: classes, counts, image size, fingerprint.

    Example: [bold]untrojan data info photos/[/bold]
    """
    options.begin(threads, quiet)
    from untrojan.data.load import load

    splits = load(data, size=size)
    parts = {"train": splits.train, "test": splits.test}
    facts = {
        name: {
            "images": len(part),
            "shape": list(part.image_shape),
            "classes": dict(zip(part.class_names, part.class_counts.tolist(), strict=True)),
            "fingerprint": part.fingerprint(),
        }
        for name, part in parts.items()
        if part is not None
    }
    if json:
        options.print_json({**facts, "notes": splits.notes})
        return
    for name, part in parts.items():
        if part is not None:
            channels, height, width = part.image_shape
            options.say(f"{name}: {len(part)} images, {height}x{width}, {channels} channels")
            options.say(f"  fingerprint {part.fingerprint()}")
    for note in splits.notes:
        options.say(f"note: {note}")
    counts = [None if part is None else part.class_counts.tolist() for part in parts.values()]
    options.print_table(
        ["index", "class", *(name for name, part in parts.items() if part is not None)],
        [
            [i, name, *(column[i] for column in counts if column is not None)]
            for i, name in enumerate(splits.train.class_names)
        ],
    )


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="See: untrojan data list.", show_default=False)],
    quiet: options.Quiet = False,
) -> None:
    """Download a known data set, verified by checksum, and decode it into the cache.

    Example: [bold]untrojan data fetch cifar10[/bold]
    """
    options.begin(None, quiet)
    from untrojan.data import known
    from untrojan.data.load import load

    known.info(name)
    splits = load(name)
    tested = 0 if splits.test is None else len(splits.test)
    options.say(f"{name}: {len(splits.train)} training and {tested} test images", quiet=quiet)
