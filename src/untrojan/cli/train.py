"""``untrojan train``: a classifier from a data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from untrojan.cli import options

if TYPE_CHECKING:
    from untrojan.training.recipe import Recipe


def train(
    data: options.Data,
    out: options.Out,
    net: options.Net = "patch-cnn",
    preset: Annotated[
        str, typer.Option(metavar="NAME", help="Training recipe; the options below change it.")
    ] = "desk-victim",
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=2)] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0, help="The peak, for one_cycle.")] = None,
    optimizer: Annotated[Literal["adam", "sgd"] | None, typer.Option()] = None,
    lr_schedule: Annotated[Literal["constant", "one_cycle", "steps"] | None, typer.Option()] = None,
    precision: Annotated[Literal["float32", "bfloat16"] | None, typer.Option()] = None,
    augment: Annotated[
        bool | None, typer.Option("--augment/--no-augment", help="--no-augment: no crops, flips, rotations.")
    ] = None,
    size: options.Size = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a classifier; a run that was cut off goes on where it was.

    Writes model.safetensors, history.csv and metrics.json to the folder.

    Example: [bold]untrojan train signs --net cnn --epochs 5 --out model[/bold]
    """
    options.begin(threads, quiet)
    from untrojan.data.load import load
    from untrojan.metrics.accuracy import benign_accuracy
    from untrojan.models.checkpoints import save_checkpoint
    from untrojan.models.registry import check_name
    from untrojan.runs import RunFolder
    from untrojan.training.loop import train_new

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
    config = {"data": data, "size": size, "net": net, "recipe": recipe, "seed": seed}
    with RunFolder(out, "train", config, overwrite=overwrite) as folder:
        splits = load(data, size=size)
        folder.use_data("train", splits.train)
        checkpoint = folder.work / "training.pt"
        model, history = train_new(splits.train, net, recipe, seed=seed, checkpoint=checkpoint)
        metrics = {
            "training_accuracy": history.epochs[-1].accuracy,
            "benign_accuracy": benign_accuracy(model, splits.test) if splits.test else None,
        }
        rows = history.to_json()
        folder.write_csv(
            "history.csv", ["epoch", *rows[0]], [[i + 1, *e.values()] for i, e in enumerate(rows)]
        )
        folder.write_json("metrics.json", metrics)
        save_checkpoint(folder.staged("model.safetensors"), model, splits.train.class_names)
    options.say(f"accuracy while training: {options.share(metrics['training_accuracy'])}", quiet=quiet)
    options.say(f"accuracy on test images: {options.share(metrics['benign_accuracy'])}", quiet=quiet)
    options.say(f"model: {out / 'model.safetensors'}", quiet=quiet)


def _recipe(preset: str, changes: dict[str, object]) -> Recipe:
    from untrojan.registry import options_of, validated
    from untrojan.training.presets import preset as known_preset
    from untrojan.training.recipe import Recipe

    return validated(Recipe, {**options_of(known_preset(preset)), **changes}, "the training recipe")
