"""``untrojan poison --attack`` of the attacks that compute something on clean data before they poison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from untrojan.cli import inputs, options
from untrojan.errors import UntrojanError

if TYPE_CHECKING:
    from untrojan.attacks.crafted import CraftedAttack
    from untrojan.attacks.poisoning import PoisonedData
    from untrojan.data.image_set import ImageSet
    from untrojan.models.classifier import Classifier
    from untrojan.runs import RunFolder
    from untrojan.training.recipe import Recipe

DEFAULT_NET, DEFAULT_PRESET = "cnn", "desk-victim"


@dataclass(frozen=True)
class Request:
    """What was asked for, as it was given; None is the default."""

    attack: str
    data: str
    size: int | None
    settings: Mapping[str, Any]
    """Of the attack, but for its classes."""
    target: str | None
    source: list[str] | None
    surrogate: Path | None
    net: str | None
    preset: str | None
    epochs: int | None
    seed: int


def craft(request: Request, out: Path, *, overwrite: bool, quiet: bool) -> None:
    """Compute, poison and write the set, resuming where such a run was cut off."""
    from untrojan.attacks.crafted import truth
    from untrojan.attacks.files import save_triggered
    from untrojan.data.load import load
    from untrojan.data.save import save_npz
    from untrojan.models.checkpoints import save_checkpoint
    from untrojan.models.registry import check_name
    from untrojan.runs import RunFolder

    check_name(request.net or DEFAULT_NET)
    recipe = _recipe(request)
    # Settings are checked before the data are read; classes need the data.
    _attack(request, None)
    config = {
        "attack": request.attack, "data": request.data, "size": request.size,
        "settings": dict(request.settings), "target": request.target, "source": request.source,
        "surrogate": request.surrogate,
        "surrogate_sha256": None if request.surrogate is None else inputs.sha256(request.surrogate),
        "net": request.net or DEFAULT_NET, "recipe": recipe, "seed": request.seed,
    }  # fmt: skip
    with RunFolder(out, "poison", config, overwrite=overwrite) as folder:
        splits = load(request.data, size=request.size)
        folder.use_data("train", splits.train)
        attack = _attack(request, splits.train)
        model = _surrogate(request, attack.clean(splits), attack, recipe, folder)
        crafted = attack.craft(splits, request.seed, model, folder.work)
        made = attack.poison(splits, request.seed, crafted.tensors)
        save_npz(folder.staged("train.npz"), made.train)
        save_npz(folder.staged("test.npz"), made.test)
        save_triggered(folder.staged("triggered.npz"), made.triggered_test, made.test.class_names)
        folder.write_json("truth/truth.json", truth(attack, made.record, crafted))
        folder.write_tensors("truth/trigger.safetensors", made.record.tensors)
        folder.write_tensors("truth/crafted.safetensors", crafted.tensors)
        folder.write_json("metrics.json", crafted.facts)
        if model is not None and request.surrogate is None:
            names = attack.clean(splits).class_names
            save_checkpoint(folder.staged("surrogate.safetensors"), model, names)
        if crafted.model is not None:
            save_checkpoint(folder.staged("model.safetensors"), crafted.model, made.train.class_names)
    if not quiet:
        _summary(request.attack, made, crafted.facts, out)


def _recipe(request: Request) -> Recipe:
    from dataclasses import replace

    from untrojan.training.presets import preset

    recipe = preset(request.preset or DEFAULT_PRESET)
    return recipe if request.epochs is None else replace(recipe, epochs=request.epochs)


def _attack(request: Request, train: ImageSet | None) -> CraftedAttack:
    from untrojan.attacks.crafted import CRAFTED_ATTACKS
    from untrojan.triggers.registry import TRIGGERS

    chosen = dict(request.settings)
    if train is not None and request.target is not None:
        chosen["target"] = train.class_index(request.target)
    if train is not None and request.source:
        chosen["sources"] = tuple(
            dict.fromkeys(label for text in request.source for label in inputs.classes(text, train))
        )
    known = {field.name for field in fields(cast("Any", CRAFTED_ATTACKS.get(request.attack)))}
    for name, option in (("sources", request.source), ("target", request.target)):
        if option is not None and name not in known:
            raise UntrojanError(f"--attack {request.attack} takes no --{name.removesuffix('s')}: drop it")
    attack = CRAFTED_ATTACKS.build(request.attack, chosen)
    if "trigger" in known:
        TRIGGERS.build(cast("Any", attack).trigger, cast("Any", attack).trigger_options)
    return attack


def _surrogate(
    request: Request, clean: ImageSet, attack: CraftedAttack, recipe: Recipe, folder: RunFolder
) -> Classifier | None:
    from untrojan.training.loop import train_new

    if attack.surrogate == "none":
        if request.surrogate is not None:
            raise UntrojanError(f"--attack {request.attack} needs no --surrogate: drop it")
        return None
    if request.surrogate is not None:
        return inputs.load_model(request.surrogate, clean, request.net, None, None)
    model, _ = train_new(
        clean, request.net or DEFAULT_NET, recipe, seed=request.seed,
        checkpoint=folder.work / "surrogate.pt", description="surrogate",
    )  # fmt: skip
    return model


def _summary(attack: str, made: PoisonedData, facts: Mapping[str, Any], out: Path) -> None:
    record = made.record
    poisoned = int(record.poisoned.sum())
    goal = "" if record.target is None else f" -> {options.named(made.train, record.target)}"
    options.say(f"{poisoned} of {len(made.train)} images poisoned by {attack}{goal}")
    for name, value in facts.items():
        shown = f"{value:.3f}" if isinstance(value, float) else value
        options.say(f"{name.replace('_', ' ')}: {shown}")
    options.say(f"written: {out}/train.npz, test.npz, triggered.npz; the truth: {out}/truth/")
