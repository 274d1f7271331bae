"""``untrojan audit``: is this training set poisoned, by what, which images, give me the clean set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from untrojan.cli import inputs, options

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
    net: options.Net = "resnet18-compact",
    preset: Annotated[str, typer.Option(metavar="NAME", help="The probe's training recipe.")] = "desk-probe",
    schedule: Annotated[
        Literal["fast", "paper"], typer.Option(help="How patterns are estimated: fast, or as published.")
    ] = "fast",
    false_alarm_rate: Annotated[
        float, typer.Option(min=0.0001, max=0.5, help="Share of clean sets that may be called poisoned.")
    ] = 0.05,
    size: options.Size = None,
    write_clean: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the set without the flagged images, as .npz.")
    ] = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Find out whether a training set is poisoned, by which pattern, and which images to remove.

    Exit status: 0 no backdoor found, 1 backdoor found, 2 bad input or usage, 3 undecided (the evidence
    carries neither answer: don't take it for clean).

    Example: [bold]untrojan audit photos/ --out audit --write-clean clean.npz[/bold]
    """
    options.begin(threads, quiet)
    from untrojan.audit import AuditOptions, run_audit
    from untrojan.data.load import load
    from untrojan.data.save import save_npz
    from untrojan.models.registry import check_name
    from untrojan.runs import RunFolder
    from untrojan.training.presets import preset as known_preset

    check_name(net)
    known_preset(preset)
    if write_clean is not None:
        inputs.new_file(write_clean, overwrite, "--write-clean")
    config = {
        "data": data,
        "size": size,
        "model": model,
        "architecture": architecture,
        "mean": mean,
        "std": std,
        "net": net,
        "preset": preset,
        "schedule": schedule,
        "false_alarm_rate": false_alarm_rate,
        "seed": seed,
    }
    with RunFolder(out, "audit", config, overwrite=overwrite) as folder:
        splits = load(data, size=size)
        folder.use_data("train", splits.train)
        given = None if model is None else inputs.load_model(model, splits.train, architecture, mean, std)
        choices = AuditOptions(
            net=net,
            preset=preset,
            schedule=schedule,
            false_alarm_rate=false_alarm_rate,
            seed=seed,
            model=given,
        )
        result = run_audit(splits, choices, folder)
        if write_clean is not None:
            save_npz(write_clean, splits.train.select(~result.flagged), splits.test)
    if json:
        options.print_json(result.metrics)
    elif not quiet:
        _summary(result.metrics, out, write_clean)
    raise typer.Exit(STATUS[result.verdict])


def _summary(metrics: Mapping[str, Any], out: Path, write_clean: Path | None) -> None:
    verdict = {"clean": "no backdoor found", "poisoned": "BACKDOOR FOUND", "undecided": "UNDECIDED"}
    options.say(f"{verdict[metrics['verdict']]}: {metrics['reason']}")
    for key, label in (
        ("target", "target class"),
        ("sources", "source classes"),
        ("p_value", "p-value"),
        ("flagged", "images to remove"),
    ):
        value = metrics.get(key)
        if value not in (None, []):
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            options.say(f"{label + ':':<18}{shown}")
    options.say(f"{'report:':<18}{out / 'report.html'}")
    if write_clean is not None:
        options.say(f"{'cleaned set:':<18}{write_clean}")
