"""``untrojan scan``: is this model backdoored?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from untrojan.cli import inputs, options
from untrojan.cli.audit import STATUS

if TYPE_CHECKING:
    from untrojan.data.image_set import ImageSet
    from untrojan.defenses.scanning.report import InvertedTrigger, ScanReport
    from untrojan.runs import RunFolder


def scan(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A checkpoint.", show_default=False)],
    data: Annotated[
        str,
        typer.Option(
            "--data", metavar="CLEAN", help="Clean images. " + options.DATA_HELP, show_default=False
        ),
    ],
    out: options.Out,
    schedule: Annotated[
        Literal["fast", "paper"], typer.Option(help="How triggers are inverted: fast, or as published.")
    ] = "fast",
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
    """Find out whether a model is backdoored, from the model and clean images (Neural Cleanse).

    The test split's images are used where there is one. Writes metrics.json, triggers.safetensors and a
    picture of each suspected trigger.

    Exit status: 0 no backdoor found, 1 found, 2 bad input or usage, 3 undecided: not to be taken for clean.

    Example: [bold]untrojan scan model/model.safetensors --data signs --out scan[/bold]
    """
    options.begin(threads, quiet)
    from untrojan.cost import measure
    from untrojan.data.load import load
    from untrojan.defenses.scanning.registry import SCANNERS
    from untrojan.runs import RunFolder

    scanner = SCANNERS.build("neural-cleanse", {"schedule": schedule, "seed": seed})
    given = {"architecture": architecture, "mean": mean, "std": std}
    config = {"model": model, "data": data, "size": size, **given, **SCANNERS.describe(scanner)}
    with RunFolder(out, "scan", config, overwrite=overwrite) as folder:
        splits = load(data, size=size)
        clean = splits.test or splits.train
        folder.use_data("test" if splits.test else "train", clean)
        classifier = inputs.load_model(model, clean, architecture, mean, std)
        with measure() as cost:
            found = scanner(classifier, clean, checkpoint=folder.work / "inversion.safetensors")
        metrics = _metrics(found, clean, cost.seconds)
        folder.write_json("metrics.json", metrics)
        _write_triggers(folder, found)
    if json:
        options.print_json(metrics)
    elif not quiet:
        _summary(found, clean, out)
    raise typer.Exit(STATUS[found.verdict])


def _metrics(found: ScanReport, clean: ImageSet, seconds: float) -> dict[str, Any]:
    return {
        "verdict": found.verdict,
        "reason": found.reason,
        "targets": list(found.targets),
        "target_names": [clean.class_names[target] for target in found.targets],
        "failed": list(found.failed),
        "classes": [
            {"class": label, "name": clean.class_names[label], **found.statistics[label]}
            for label in range(clean.num_classes)
        ],
        "evidence": found.evidence,
        "class_names": list(clean.class_names),
        "seconds": seconds,
    }


def _write_triggers(folder: RunFolder, found: ScanReport) -> None:
    tensors = {
        f"{name}_{label}": getattr(trigger, name).contiguous()
        for label, trigger in found.triggers.items()
        for name in ("mask", "pattern")
    }
    folder.write_tensors("triggers.safetensors", tensors)
    for target in found.targets:
        folder.write_bytes(f"trigger_{target}.png", _picture(found.triggers[target]))


def _picture(trigger: InvertedTrigger) -> bytes:
    """The trigger on a grey ground, every pixel enlarged to a whole square."""
    import torch

    from untrojan.report.images import png
    from untrojan.triggers.base import to_bytes

    image = to_bytes(trigger(torch.full_like(trigger.pattern, 0.5)[None]))[0]
    times = max(1, -(-256 // max(image.shape[-2:])))
    return png(image.repeat_interleave(times, 1).repeat_interleave(times, 2))


def _summary(found: ScanReport, clean: ImageSet, out: Path) -> None:
    verdict = {"clean": "no backdoor found", "poisoned": "BACKDOOR FOUND", "undecided": "UNDECIDED"}
    options.say(f"{verdict[found.verdict]}: {found.reason}")
    for target in found.targets:
        options.say(
            f"  into class {options.named(clean, target)}: the trigger is {out / f'trigger_{target}.png'}"
        )
    if found.failed:
        listed = ", ".join(options.named(clean, label) for label in found.failed[:10])
        options.say(f"no working trigger was found for {listed}: of these classes nothing is known")
    options.say(f"all classes: {out / 'metrics.json'}")
