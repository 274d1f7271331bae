"""``untrojan train``: a classifier from a data set."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from untrojan.cli import inputs, options
from untrojan.errors import UntrojanError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from untrojan.cost import Cost
    from untrojan.data.image_set import ImageSet
    from untrojan.defenses.training.registry import TrainingDefense
    from untrojan.defenses.training.report import TrainingReport
    from untrojan.runs import RunFolder
    from untrojan.training.recipe import Recipe


def train(
    data: options.Data,
    out: options.Out,
    net: options.Net = "patch-cnn",
    defense: Annotated[
        Literal["plain", "none", "abl", "dp-sgd", "dbd", "cleanse-none", "pgd", "uap"],
        typer.Option(
            help="plain; none (NONE): find the neurons a backdoor needs, reset them, train on; abl: unlearn "
            "the images that are learned first; dp-sgd: bound each image's pull and add noise; dbd: learn "
            "features without labels, then believe half of these; cleanse-none: audit, remove, then NONE; "
            "pgd, uap: adversarial training, with a perturbation for each image or one for all."
        ),
    ] = "plain",
    defense_option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A setting of the defence; repeatable.")
    ] = None,
    preset: Annotated[
        str, typer.Option(metavar="NAME", help="Training recipe; the options below change it.")
    ] = "desk-victim",
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=2)] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0, help="The peak, for one_cycle.")] = None,
    optimizer: Annotated[Literal["adam", "sgd"] | None, typer.Option()] = None,
    lr_schedule: Annotated[Literal["constant", "one_cycle", "steps"] | None, typer.Option()] = None,
    precision: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="bfloat16: mixed precision where the hardware has it, float32 elsewhere."),
    ] = None,
    augment: Annotated[
        bool | None, typer.Option("--augment/--no-augment", help="--no-augment: no crops, flips, rotations.")
    ] = None,
    size: options.Size = None,
    write_clean: options.WriteClean = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a classifier; a run that was cut off goes on where it was.

    Writes model.safetensors, history.csv, metrics.json and report.html to the folder and, with a defence,
    dropped.csv: the images it did not trust in the end. What a network has learned from these may outlast
    what the defence does; --write-clean keeps the others, for a training anew.

    Example: [bold]untrojan train signs --net cnn --epochs 5 --out model[/bold]

    On data nobody vouches for: [bold]untrojan train photos/ --defense none --out model[/bold]
    """
    options.begin(threads, quiet)
    from untrojan.data.load import load
    from untrojan.data.save import write_clean as save
    from untrojan.metrics.accuracy import benign_accuracy
    from untrojan.models.checkpoints import save_checkpoint
    from untrojan.models.registry import check_name
    from untrojan.registry import options_of
    from untrojan.runs import RunFolder

    check_name(net)
    changes = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "optimizer": optimizer,
        "schedule": lr_schedule,
        "precision": precision,
        **({"crop_padding": 0, "flip": False, "rotation": 0.0} if augment is False else {}),
    }
    recipe = _recipe(preset, {key: value for key, value in changes.items() if value is not None})
    inputs.keep_apart(out, {"the data": data})
    chosen = _defense(defense, defense_option, seed)
    if write_clean is not None:
        if chosen is None:
            raise UntrojanError("--write-clean needs a defence that drops images: add --defense none, say")
        inputs.new_data(write_clean, overwrite, "--write-clean")
    config: dict[str, Any] = {"data": data, "size": size, "net": net, "recipe": recipe, "seed": seed}
    if chosen is not None:
        config["defense"] = {"name": defense, **options_of(chosen)}
    with RunFolder(out, "train", config, overwrite=overwrite) as folder:
        splits = load(data, size=size)
        folder.use_data("train", splits.train)
        metrics: dict[str, Any] = {}
        report, cost = _trained(chosen, splits.train, net, recipe, seed, folder.work / "training.pt")
        model, rows = report.model, report.history
        if chosen is not None:
            _write_dropped(folder, splits.train, report.dropped)
            metrics |= {"dropped": int(report.dropped.sum()), "defense": report.evidence}
        metrics |= {
            "training_accuracy": report.training_accuracy,
            "benign_accuracy": benign_accuracy(model, splits.test) if splits.test else None,
        }
        folder.write_csv(
            "history.csv", ["epoch", *rows[0]], [[i + 1, *e.values()] for i, e in enumerate(rows)]
        )
        folder.write_json("metrics.json", metrics)
        save_checkpoint(folder.staged("model.safetensors"), model, splits.train.class_names)
        _write_page(folder, splits.train, report, config, metrics, cost)
        if write_clean is not None:
            save(write_clean, replace(splits, train=splits.train.select(~report.dropped)))
    if chosen is not None:
        options.say(
            f"images dropped: {metrics['dropped']} of {len(splits.train)}, see {out / 'dropped.csv'}",
            quiet=quiet,
        )
    if write_clean is not None:
        options.say(f"the set without them: {write_clean}", quiet=quiet)
    options.say(f"accuracy while training: {options.share(metrics['training_accuracy'])}", quiet=quiet)
    options.say(f"accuracy on test images: {options.share(metrics['benign_accuracy'])}", quiet=quiet)
    options.say(f"model: {out / 'model.safetensors'}", quiet=quiet)
    options.say(f"report: {out / 'report.html'}", quiet=quiet)


def _trained(
    chosen: TrainingDefense | None, data: ImageSet, net: str, recipe: Recipe, seed: int, checkpoint: Path
) -> tuple[TrainingReport, Cost]:
    """By the chosen defence, or plainly, which drops nothing."""
    import torch

    from untrojan.cost import measure
    from untrojan.defenses.training.report import TrainingReport
    from untrojan.training.loop import train_new

    with measure() as cost:
        if chosen is not None:
            return chosen(data, net, recipe, checkpoint=checkpoint), cost
        model, history = train_new(data, net, recipe, seed=seed, checkpoint=checkpoint)
    nothing = torch.zeros(len(data), dtype=torch.bool)
    return TrainingReport(model, nothing, history.to_json()), cost


def _defense(name: str, given: list[str] | None, seed: int) -> TrainingDefense | None:
    from untrojan.defenses.training.registry import TRAINING_DEFENSES

    settings = inputs.key_values(given, "--defense-option")
    if name == "plain":
        if settings:
            raise UntrojanError("--defense-option needs a defence: add --defense none, say, or drop it")
        return None
    return TRAINING_DEFENSES.build(name, {"seed": seed, **settings})


def _write_dropped(folder: RunFolder, train: ImageSet, dropped: Tensor) -> None:
    rows = dropped.nonzero().flatten().tolist()
    lines = [(str(train.ids[row]), train.class_names[int(train.labels[row])]) for row in rows]
    folder.write_csv("dropped.csv", ("id", "label"), lines)


def _write_page(
    folder: RunFolder,
    train: ImageSet,
    report: TrainingReport,
    config: dict[str, Any],
    metrics: dict[str, Any],
    cost: Cost,
) -> None:
    from untrojan.registry import options_of
    from untrojan.report.audit_page import RunFacts, StageCost
    from untrojan.report.training_page import render_training, training_page
    from untrojan.runs import hardware, versions

    defense = config.get("defense")
    facts = RunFacts(
        command=f"untrojan {folder.command}",
        method="plain" if defense is None else defense["name"],
        seed=config["seed"],
        fingerprint=train.fingerprint(),
        settings={
            **options_of(config["recipe"]),
            **{f"defence: {key}": value for key, value in (defense or {}).items() if key != "name"},
        },
        versions=versions(),
        hardware={key: str(value) for key, value in hardware().items()},
        stages=(StageCost("training", **asdict(cost)),),
    )
    weights = ((path, getattr(module, "weight", None)) for path, module in report.model.named_modules())
    page = training_page(
        train,
        defense="plain" if defense is None else defense["name"],
        subject=config["data"],
        architecture=report.model.architecture,
        dropped=None if defense is None else report.dropped,
        evidence=report.evidence,
        widths={path: len(weight) for path, weight in weights if weight is not None},
        history=report.history,
        benign_accuracy=metrics["benign_accuracy"],
        training_accuracy=metrics["training_accuracy"],
        run=facts,
        listing="dropped.csv",
    )
    folder.write_text("report.html", render_training(page))


def _recipe(preset: str, changes: dict[str, object]) -> Recipe:
    from untrojan.registry import options_of, validated
    from untrojan.training.presets import preset as known_preset
    from untrojan.training.recipe import Recipe

    return validated(Recipe, {**options_of(known_preset(preset)), **changes}, "the training recipe")
