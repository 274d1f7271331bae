"""``untrojan audit``: is this training set poisoned, by what, which images, give me the clean set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from untrojan.cli import inputs, options
from untrojan.errors import UntrojanError

if TYPE_CHECKING:
    from collections.abc import Mapping

STATUS = {"clean": 0, "poisoned": 1, "undecided": 3}


def audit(
    data: options.Data,
    out: options.Out,
    model: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A checkpoint trained on DATA, in place of a probe trained here."),
    ] = None,
    architecture: options.Architecture = None,
    mean: options.Mean = None,
    std: options.Std = None,
    net: options.Net = "patch-cnn",
    preset: Annotated[str, typer.Option(metavar="NAME", help="The probe's training recipe.")] = "auto",
    second_preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Ask a second probe too, trained by this recipe: desk-victim, which augments, sees local "
            "patterns in photographs better.",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="re, ac, ss, ci, sr, spectre, strip, scan, beatrix, consistency, with commas between; or "
            "all. The first decides; the others' opinions stand beside it.",
        ),
    ] = "re",
    level: Annotated[
        str | None,
        typer.Option(
            metavar="LEVEL",
            help="Where methods that judge by features take them: penultimate, s1, s2, s3, a module path, or "
            "several fused as s1+s2+s3.",
        ),
    ] = None,
    trusted: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Images of the same classes known to be clean, for methods that can use some.",
        ),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Judge by p-values, from the trusted images or else from the other classes, in place of "
            "published thresholds.",
        ),
    ] = False,
    schedule: Annotated[
        Literal["fast", "paper"], typer.Option(help="How patterns are estimated: fast, or as published.")
    ] = "fast",
    false_alarm_rate: Annotated[
        float, typer.Option(min=0.0001, max=0.5, help="Share of clean sets that may be called poisoned.")
    ] = 0.05,
    size: options.Size = None,
    write_clean: options.WriteClean = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Find out whether a training set is poisoned, by which pattern, and which images to remove.

    Exit status: 0 no backdoor found, 1 found, 2 bad input or usage, 3 undecided: not to be taken for clean.

    Example: [bold]untrojan audit photos/ --out audit --write-clean clean.npz[/bold]

    Second opinions: [bold]untrojan audit photos/ --out audit --method re,ac --calibrate[/bold]
    """
    options.begin(threads, quiet)
    from untrojan.audit import AuditOptions, run_audit
    from untrojan.audit import audit as find
    from untrojan.data.load import load
    from untrojan.data.save import write_clean as save
    from untrojan.defenses.cleansing.registry import method_names
    from untrojan.models.registry import check_name
    from untrojan.runs import RunFolder

    check_name(net)
    if model is not None and second_preset is not None:
        raise UntrojanError("--second-preset trains a probe and --model brings one: give one of them")
    choices = AuditOptions(
        methods=method_names(method, trusted is not None),
        level=level,
        calibrate=calibrate,
        schedule=schedule,
        significance=false_alarm_rate,
        net=net,
        recipe=preset,
        second_recipe=second_preset,
        seed=seed,
    )
    choices.training(1)
    choices.cleansers()
    if write_clean is not None:
        inputs.new_data(write_clean, overwrite, "--write-clean")
    inputs.keep_apart(out, {"the data": data, "the trusted images": trusted, "the model": model})
    given: dict[str, Any] = {"model": model, "architecture": architecture, "mean": mean, "std": std}
    if model is not None:
        given["model_sha256"] = inputs.sha256(model)
    config = {"data": data, "size": size, "trusted": trusted, **given, **choices.to_json()}
    with RunFolder(out, "audit", config, overwrite=overwrite) as folder:
        splits = load(data, size=size)
        train = splits.train
        folder.use_data("train", train)
        trained = None if model is None else inputs.load_model(model, train, architecture, mean, std)
        _, height, width = train.image_shape
        alike = height if height == width else size
        known = None if trusted is None else load(trusted, size=alike, minimum_per_class=1).train
        found = find(train, choices, model=trained, trusted=known, work=folder.work)
        result = run_audit(splits, choices, folder, subject=data, found=found)
        written = write_clean is not None and result.verdict != "undecided"
        if write_clean is not None and written:
            save(write_clean, replace(splits, train=train.select(~found.report.flagged)))
    if json:
        options.print_json(result.metrics)
    elif not quiet:
        _summary(result.metrics, out, write_clean if written else None)
    raise typer.Exit(STATUS[result.verdict])


def _summary(metrics: Mapping[str, Any], out: Path, cleaned: Path | None) -> None:
    verdict = {"clean": "no backdoor found", "poisoned": "BACKDOOR FOUND", "undecided": "UNDECIDED"}
    names = metrics["class_names"]
    options.say(f"{verdict[metrics['verdict']]}: {metrics['reason']}")
    for target in metrics["targets"]:
        sources = metrics["sources_by_target"][str(target)]
        listed = ", ".join(f"{source} ({names[source]})" for source in sources)
        options.say(f"  into class {target} ({names[target]}), from {listed or 'no class in particular'}")
    if metrics["p_value"] is not None:
        options.say(f"p-value: {metrics['p_value']:.2g}")
    for name, opinion in metrics["opinions"].items():
        options.say(f"{name}: {verdict[opinion['verdict']]}: {opinion['reason']}")
    if metrics["flagged"]:
        options.say(
            f"images to remove: {metrics['flagged']} of {metrics['images']}, see {out / 'flagged.csv'}"
        )
    if cleaned is not None:
        options.say(f"cleaned set: {cleaned}")
    options.say(f"report: {out / 'report.html'}")
