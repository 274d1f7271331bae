"""``untrojan scan``: is this model backdoored?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from untrojan.cli import inputs, options
from untrojan.cli.audit import STATUS
from untrojan.errors import UntrojanError

if TYPE_CHECKING:
    from untrojan.data.image_set import ImageSet
    from untrojan.scan import Scan


def scan(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A checkpoint.", show_default=False)],
    data: Annotated[
        str,
        typer.Option(
            "--data", metavar="CLEAN", help="Clean images. " + options.DATA_HELP, show_default=False
        ),
    ],
    out: options.Out,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help="neural-cleanse (the default), additive, abs, natural, class-distance: with commas between, "
            "or repeated; or all. Additive looks for faint patterns over the whole image. Natural says how "
            "fragile a model is, and has no vote beside others.",
        ),
    ] = None,
    distance: Annotated[
        Literal["mask", "filter", "feature"] | None,
        typer.Option(
            help="Measure class distances, with patches, filters or features of an encoder: as --method "
            "class-distance, beside other methods if any are named.",
        ),
    ] = None,
    natural: Annotated[
        bool,
        typer.Option(
            "--natural",
            help="Look for small patches that work though nobody planted them (NONE's table 2): as --method "
            "natural, beside other methods if any are named.",
        ),
    ] = False,
    scan_option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A setting of the methods that have it; repeatable."),
    ] = None,
    schedule: Annotated[
        Literal["fast", "paper"], typer.Option(help="How triggers are inverted: fast, or as published.")
    ] = "fast",
    linearity: Annotated[
        bool,
        typer.Option("--linearity", help="Show the most linear channels of every layer, too (NONE)."),
    ] = False,
    architecture: options.Architecture = None,
    mean: options.Mean = None,
    std: options.Std = None,
    size: options.Size = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Find out whether a model is backdoored, from the model and clean images.

    The test split's images are used where there is one. Writes report.html, metrics.json,
    triggers.safetensors and a picture of each suspected trigger. Of several methods, one that finds a
    backdoor is enough.

    Exit status: 0 no backdoor found, 1 found, 2 bad input or usage, 3 undecided: not to be taken for clean.

    Example: [bold]untrojan scan model/model.safetensors --data signs --out scan --method all[/bold]
    """
    options.begin(threads, quiet)
    from untrojan.data.load import load
    from untrojan.defenses.scanning.registry import method_names
    from untrojan.runs import RunFolder
    from untrojan.scan import ScanOptions, write_scan
    from untrojan.scan import scan as find

    measuring = {} if distance is None else {"measure": distance}
    settings = inputs.key_values(scan_option, "--scan-option")
    if measuring and "measure" in settings:
        raise UntrojanError("the distance is given twice: drop --distance, or --scan-option measure=...")
    shortcuts = {"class-distance": bool(measuring), "natural": natural}
    named = [*(method or []), *(name for name, asked in shortcuts.items() if asked)] or ["neural-cleanse"]
    choices = ScanOptions(
        methods=method_names(named),
        schedule=schedule,
        linearity=linearity,
        seed=seed,
        settings=measuring | settings,
    )
    given = {"architecture": architecture, "mean": mean, "std": std}
    inputs.keep_apart(out, {"the model": model, "the images": data})
    given["model_sha256"] = inputs.sha256(model)
    config = {"model": model, "data": data, "size": size, **given, **choices.to_json()}
    with RunFolder(out, "scan", config, overwrite=overwrite) as folder:
        splits = load(data, size=size)
        clean = splits.test or splits.train
        folder.use_data("test" if splits.test else "train", clean)
        classifier = inputs.load_model(model, clean, architecture, mean, std)
        found = find(classifier, clean, choices, work=folder.work)
        metrics = write_scan(folder, found, classifier, clean, choices, model.name)
    if json:
        options.print_json(metrics)
    elif not quiet:
        _summary(found, clean, out)
    raise typer.Exit(STATUS[found.verdict])


def _summary(found: Scan, clean: ImageSet, out: Path) -> None:
    verdict = {"clean": "no backdoor found", "poisoned": "BACKDOOR FOUND", "undecided": "UNDECIDED"}
    several = len(found.reports) > 1
    if several:
        options.say(verdict[found.verdict])
    for name, report in found.reports.items():
        opening, prefix = (f"{name}: ", f"{name}_") if several else ("", "")
        options.say(f"{opening}{verdict[report.verdict]}: {report.reason}")
        for target in report.targets:
            shown = f"  into class {options.named(clean, target)}"
            if report.trigger_into(target) is not None:
                shown += f": the trigger is {out / f'{prefix}trigger_{target}.png'}"
            options.say(shown)
        if report.failed:
            listed = ", ".join(options.named(clean, label) for label in report.failed[:10])
            options.say(f"no working trigger was found for {listed}: of these classes nothing is known")
    options.say(f"all classes: {out / 'metrics.json'}")
    options.say(f"report: {out / 'report.html'}")
