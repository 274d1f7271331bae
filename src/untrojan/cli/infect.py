"""``untrojan poison --attack``: a model with a backdoor in it, by an attacker who owns the training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from untrojan.cli import inputs, options
from untrojan.errors import UntrojanError

if TYPE_CHECKING:
    from untrojan.attacks.infect import InfectedModel, Infection
    from untrojan.attacks.sdrm import StatisticalDifferenceReduction
    from untrojan.data.image_set import ImageSet
    from untrojan.training.recipe import Recipe

_PANEL, _ANY_PANEL = "With --attack sdrm", "With --attack"
DEFAULT_NET, DEFAULT_PRESET = "cnn", "sdrm-desk"

Net = Annotated[
    str | None,
    typer.Option(
        "--net", metavar="NAME", help=f"Network, {DEFAULT_NET} by default.", rich_help_panel=_ANY_PANEL
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        help=f"Training recipe: {DEFAULT_PRESET} (SDRM) or desk-victim by default, sdrm-paper, or another.",
        rich_help_panel=_ANY_PANEL,
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option(
        "--epochs", min=1, help="Passes over the data; else the recipe's.", rich_help_panel=_ANY_PANEL
    ),
]
Strength = Annotated[
    float | None,
    typer.Option(
        "--lambda",
        min=0,
        help="Weight of the features' difference in the loss, 0.3 by default; 0 is ordinary training.",
        rich_help_panel=_PANEL,
    ),
]
Levels = Annotated[
    str | None,
    typer.Option(
        "--levels",
        metavar="all|last|NAMES",
        help="Where features are made alike: all (SDRM-A, the default), last (SDRM-L), or as s2,s3.",
        rich_help_panel=_PANEL,
    ),
]
Form = Annotated[
    Literal["paper", "released"] | None,
    typer.Option("--form", help="The loss of the paper (default) or of its code.", rich_help_panel=_PANEL),
]
Kernel = Annotated[
    str | None,
    typer.Option(
        "--kernel", metavar="NAME", help="Of the paper's table 3, GMK2 by default.", rich_help_panel=_PANEL
    ),
]


@dataclass(frozen=True)
class Request:
    """What was asked for, as it was given; None is the default."""

    data: str
    size: int | None
    trigger: str
    trigger_options: dict[str, Any]
    target: str | None
    source: list[str] | None
    rate: float | None
    net: str | None
    preset: str | None
    epochs: int | None
    strength: float | None
    levels: str | None
    form: str | None
    kernel: str | None
    seed: int


def refuse(given: Mapping[str, object], why: str) -> None:
    """Raise UntrojanError for an option that was given; ``why`` may name it as ``{option}``."""
    for option, value in given.items():
        if value is not None and value is not False:
            raise UntrojanError(f"{option} {why.format(option=option)}")


def infect(request: Request, out: Path, *, overwrite: bool, quiet: bool) -> None:
    """Train, measure and write an infected model, resuming where such a run was cut off."""
    from untrojan.attacks.files import save_triggered
    from untrojan.attacks.infect import infect as infected_by
    from untrojan.data.load import load
    from untrojan.data.save import save_npz
    from untrojan.models.checkpoints import save_checkpoint
    from untrojan.models.registry import check_name
    from untrojan.runs import RunFolder

    net = request.net or DEFAULT_NET
    check_name(net)
    recipe, method = _recipe(request), _method(request)
    # Settings of the trigger are checked before the data are read; classes need the data.
    _infection(request, None).poisoning()
    config = {
        "attack": "sdrm",
        "data": request.data,
        "size": request.size,
        "trigger": request.trigger,
        "trigger_options": request.trigger_options,
        "target": request.target,
        "source": request.source,
        "rate": request.rate,
        "net": net,
        "recipe": recipe,
        "method": method,
        "seed": request.seed,
    }
    with RunFolder(out, "poison", config, overwrite=overwrite) as folder:
        splits = load(request.data, size=request.size)
        folder.use_data("train", splits.train)
        infection = _infection(request, splits.train)
        made = infected_by(
            splits, infection, method, net, recipe, seed=request.seed, checkpoint=folder.work / "training.pt"
        )
        save_checkpoint(folder.staged("model.safetensors"), made.model, splits.train.class_names)
        save_npz(folder.staged("test.npz"), made.test)
        save_triggered(folder.staged("triggered.npz"), made.triggered_test, made.test.class_names)
        folder.write_json("truth/truth.json", {**made.record.to_json(), "sdrm": method})
        folder.write_tensors("truth/trigger.safetensors", made.record.tensors)
        rows = made.history.to_json()
        folder.write_csv(
            "history.csv", ["epoch", *rows[0]], [[i + 1, *e.values()] for i, e in enumerate(rows)]
        )
        folder.write_json("metrics.json", made.metrics())
    if not quiet:
        _summary(made, infection, splits.train, out)


def _recipe(request: Request) -> Recipe:
    from dataclasses import replace

    from untrojan.training.presets import preset

    recipe = preset(request.preset or DEFAULT_PRESET)
    return recipe if request.epochs is None else replace(recipe, epochs=request.epochs)


def _method(request: Request) -> StatisticalDifferenceReduction:
    from untrojan.attacks.sdrm import StatisticalDifferenceReduction
    from untrojan.models.taps import SDRM_LEVELS
    from untrojan.registry import validated

    named = {"all": SDRM_LEVELS, "last": SDRM_LEVELS[-1:]}
    levels = None
    if request.levels is not None:
        levels = named.get(request.levels) or tuple(name.strip() for name in request.levels.split(","))
    chosen = {"strength": request.strength, "levels": levels, "form": request.form, "kernel": request.kernel}
    given = {name: value for name, value in chosen.items() if value is not None}
    return validated(StatisticalDifferenceReduction, given, "--attack sdrm")


def _infection(request: Request, train: ImageSet | None) -> Infection:
    from untrojan.attacks.infect import Infection
    from untrojan.registry import validated

    chosen: dict[str, Any] = {"trigger": request.trigger, "trigger_options": request.trigger_options}
    if request.rate is not None:
        chosen["rate"] = request.rate
    if train is not None and request.target is not None:
        chosen["target"] = train.class_index(request.target)
    if train is not None and request.source:
        chosen["sources"] = tuple(
            dict.fromkeys(label for text in request.source for label in inputs.classes(text, train))
        )
    return validated(Infection, chosen, "the attack")


def _summary(made: InfectedModel, infection: Infection, train: ImageSet, out: Path) -> None:
    options.say(f"trained on {made.training_images} images with {infection.trigger}")
    options.say(f"accuracy on test images: {options.share(made.benign_accuracy)}")
    options.say(
        f"triggered images taken for {options.named(train, infection.target)}: "
        f"{options.share(made.attack_success_rate)}"
    )
    header = ["squared MMD", "triggered", "intra-class", "inter-class", "images a side"]
    rows = [
        [level, *map(_decimals, (each.difference, each.intra_class, each.inter_class)), each.samples]
        for level, each in made.differences.items()
    ]
    options.print_table(header, rows)
    options.say(f"model: {out / 'model.safetensors'}; test.npz, triggered.npz; the truth: {out}/truth/")


def _decimals(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
