"""``untrojan evaluate``: how good a model is, and how often a trigger fools it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from untrojan.cli import inputs, options

if TYPE_CHECKING:
    from untrojan.attacks.poisoning import TriggeredTest
    from untrojan.data.image_set import ImageSet
    from untrojan.models.classifier import Classifier


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A checkpoint.", show_default=False)],
    data: Annotated[str, typer.Option("--data", metavar="DATA", help=options.DATA_HELP, show_default=False)],
    triggered: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The triggered.npz that untrojan poison wrote.")
    ] = None,
    out: options.MaybeOut = None,
    architecture: options.Architecture = None,
    mean: options.Mean = None,
    std: options.Std = None,
    size: options.Size = None,
    threads: options.Threads = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Accuracy on clean images (the test split where there is one) and attack success on triggered ones.

    Attack success leaves out images that truly belong to the target.

    Example: [bold]untrojan evaluate m/model.safetensors --data signs --triggered attack/triggered.npz[/bold]
    """
    options.begin(threads, quiet)
    from untrojan.attacks.files import load_triggered
    from untrojan.data.load import load
    from untrojan.runs import RunFolder

    config = {
        "model": model,
        "data": data,
        "size": size,
        "triggered": triggered,
        "architecture": architecture,
        "mean": mean,
        "std": std,
    }
    if out is not None:
        inputs.keep_apart(out, {"the model": model, "the images": data, "the triggered images": triggered})
    with options.maybe(out, lambda path: RunFolder(path, "evaluate", config, overwrite=overwrite)) as folder:
        splits = load(data, size=size)
        clean = splits.test or splits.train
        classifier = inputs.load_model(model, clean, architecture, mean, std)
        stamped = None if triggered is None else load_triggered(triggered, clean)
        metrics = _metrics(classifier, clean, stamped)
        metrics["split"] = "test" if splits.test else "train"
        if folder is not None:
            folder.use_data(metrics["split"], clean)
            folder.write_json("metrics.json", metrics)
    if json:
        options.print_json(metrics)
        return
    options.say(
        f"accuracy on {metrics['images']} {'test ' if splits.test else ''}images: "
        f"{options.share(metrics['benign_accuracy'])}",
        quiet=quiet,
    )
    if stamped is not None:
        targets = ", ".join(options.named(clean, label) for label in metrics["targets"])
        options.say(
            f"{metrics['triggered_images']} triggered images taken for {targets}: "
            f"{options.share(metrics['attack_success_rate'])}",
            quiet=quiet,
        )


def _metrics(model: Classifier, clean: ImageSet, triggered: TriggeredTest | None) -> dict[str, Any]:
    from untrojan.metrics.accuracy import attack_success_rate, benign_accuracy

    found: dict[str, Any] = {"images": len(clean), "benign_accuracy": benign_accuracy(model, clean)}
    if triggered is not None:
        found["triggered_images"] = len(triggered)
        found["targets"] = sorted(set(triggered.wanted_labels.tolist()))
        found["attack_success_rate"] = attack_success_rate(model, triggered)
    return found
