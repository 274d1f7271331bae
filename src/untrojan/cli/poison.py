"""``untrojan poison``: a training set with a backdoor in it, for research."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from untrojan.cli import craft, infect, inputs, options
from untrojan.errors import UntrojanError

if TYPE_CHECKING:
    from untrojan.attacks.poisoning import Poisoning
    from untrojan.data.image_set import ImageSet


def poison(
    data: options.Data,
    out: options.Out,
    trigger: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="chessboard, patch, blend, ...; a wrong name lists them all."),
    ] = None,
    attack: Annotated[
        Literal["sdrm", "label-consistent", "hidden-trigger", "invisible", "dfst-style", "deck-adaptive"]
        | None,
        typer.Option(
            help="sdrm owns the training and makes an infected model; the others compute on a clean model "
            "or on clean data before they poison. See the last panels."
        ),
    ] = None,
    attack_option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A setting of the attack; repeatable.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS", help="Class the trigger leads to: a name or a 0-based index. SDRM: 0 by default."
        ),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLASS",
            help="Class that gets the trigger; several with commas or repeated. "
            "By default all but the target.",
        ),
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Images poisoned of each source class.")] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Share of the whole set poisoned; in place of --count. SDRM: 0.1 by default."
        ),
    ] = None,
    trigger_option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A setting of the trigger; repeatable.")
    ] = None,
    clean_label: Annotated[
        bool, typer.Option("--clean-label", help="Poison the target's own images, labels untouched.")
    ] = False,
    all_to_all: Annotated[
        bool, typer.Option("--all-to-all", help="Each class becomes the next; takes no --target.")
    ] = False,
    keep_originals: Annotated[
        bool, typer.Option("--keep-originals", help="Add poisoned images; else they replace their originals.")
    ] = False,
    surrogate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The attacker's own clean model, where the attack needs one; else it is trained.",
        ),
    ] = None,
    net: infect.Net = None,
    preset: infect.Preset = None,
    epochs: infect.Epochs = None,
    strength: infect.Strength = None,
    levels: infect.Levels = None,
    form: infect.Form = None,
    kernel: infect.Kernel = None,
    size: options.Size = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
) -> None:
    """Poison a data set. Writes train.npz, test.npz, triggered.npz and, apart from them, truth/truth.json.

    Example: [bold]untrojan poison signs --trigger chessboard --source 3,5 --target 1 --count 60 --out attack[/bold]

    With --attack sdrm, train a model whose backdoor leaves little trace in its features, and write
    model.safetensors and metrics.json in place of train.npz; a run that was cut off goes on where it was.

    Example: [bold]untrojan poison signs --attack sdrm --trigger patched --lambda 0.3 --epochs 30 --out infected[/bold]

    With another --attack, compute what it needs first, and write that to truth/crafted.safetensors too.

    Example: [bold]untrojan poison signs --attack label-consistent --target 3 --attack-option share=0.5 --out attack[/bold]
    """  # noqa: E501
    options.begin(threads, quiet)
    inputs.keep_apart(out, {"the data": data, "the surrogate": surrogate})
    sdrm_options = {"--lambda": strength, "--levels": levels, "--form": form, "--kernel": kernel}
    model_options = {"--net": net, "--preset": preset, "--epochs": epochs}
    data_options = {
        "--clean-label": clean_label, "--all-to-all": all_to_all, "--keep-originals": keep_originals,
    }  # fmt: skip
    crafted_options = {"--attack-option": attack_option, "--surrogate": surrogate}
    if attack is None:
        why = "needs --attack sdrm, which trains a model: add that, or drop {option}"
        infect.refuse({**model_options, **sdrm_options}, why)
        infect.refuse(crafted_options, "needs --attack: add that, or drop {option}")
    elif attack == "sdrm":
        why = "is not for --attack sdrm, which takes --rate and --source: drop it"
        infect.refuse({"--count": count, **data_options, **crafted_options}, why)
    else:
        infect.refuse(sdrm_options, f"is not for --attack {attack}: drop it")
        infect.refuse(data_options, f"is not for --attack {attack}: drop it, or see --attack-option")
    given = inputs.key_values(trigger_option, "--trigger-option")
    if attack not in (None, "sdrm"):
        settings = {"trigger": trigger, "trigger_options": given or None, "count": count, "rate": rate}
        settings |= inputs.key_values(attack_option, "--attack-option")
        asked = craft.Request(
            attack=str(attack), data=data, size=size,
            settings={name: value for name, value in settings.items() if value is not None},
            target=target, source=source, surrogate=surrogate, net=net, preset=preset, epochs=epochs,
            seed=seed,
        )  # fmt: skip
        craft.craft(asked, out, overwrite=overwrite, quiet=quiet)
        return
    if trigger is None:
        raise UntrojanError("--trigger is missing: name one, such as patch")
    if attack == "sdrm":
        request = infect.Request(
            data=data, size=size, trigger=trigger, trigger_options=given,
            target=target, source=source, rate=rate, net=net, preset=preset, epochs=epochs,
            strength=strength, levels=levels, form=form, kernel=kernel, seed=seed,
        )  # fmt: skip
        infect.infect(request, out, overwrite=overwrite, quiet=quiet)
        return
    _by_data_alone(
        out, overwrite, quiet, data, size, target, source, seed,
        trigger=trigger, trigger_options=given, count=count, rate=rate, clean_label=clean_label,
        all_to_all=all_to_all, keep_originals=keep_originals,
    )  # fmt: skip


def _by_data_alone(
    out: Path, overwrite: bool, quiet: bool, data: str, size: int | None, target: str | None,
    source: list[str] | None, seed: int, **settings: Any,
) -> None:  # fmt: skip
    from untrojan.attacks.files import save_triggered
    from untrojan.data.load import load
    from untrojan.data.save import save_npz
    from untrojan.runs import RunFolder
    from untrojan.triggers.registry import TRIGGERS

    TRIGGERS.build(settings["trigger"], settings["trigger_options"])
    config = {"data": data, "size": size, "target": target, "source": source, **settings, "seed": seed}
    with RunFolder(out, "poison", config, overwrite=overwrite) as folder:
        splits = load(data, size=size)
        folder.use_data("train", splits.train)
        poisoning = _poisoning(settings, target, source, splits.train)
        made = poisoning(splits, seed)
        save_npz(folder.staged("train.npz"), made.train)
        save_npz(folder.staged("test.npz"), made.test)
        save_triggered(folder.staged("triggered.npz"), made.triggered_test, made.test.class_names)
        folder.write_json("truth/truth.json", made.record.to_json())
        folder.write_tensors("truth/trigger.safetensors", made.record.tensors)
    if not quiet:
        _summary(poisoning, splits.train, int(made.record.poisoned.sum()), len(made.train))
        options.say(f"written: {out}/train.npz, test.npz, triggered.npz; the truth: {out}/truth/")


def _poisoning(
    settings: dict[str, Any], target: str | None, source: list[str] | None, train: ImageSet
) -> Poisoning:
    from untrojan.attacks.poisoning import Poisoning
    from untrojan.registry import validated

    chosen = dict(settings)
    if target is not None:
        chosen["target"] = train.class_index(target)
    if source:
        chosen["sources"] = tuple(
            dict.fromkeys(label for text in source for label in inputs.classes(text, train))
        )
    return validated(Poisoning, chosen, "the attack")


def _summary(poisoning: Poisoning, train: ImageSet, poisoned: int, images: int) -> None:
    goal = "the next class" if poisoning.target is None else options.named(train, poisoning.target)
    classes = poisoning.poisoned_classes(train.num_classes)
    sources = ", ".join(options.named(train, label) for label in classes[:20])
    more = ", ..." if len(classes) > 20 else ""
    options.say(f"{poisoned} of {images} images poisoned with {poisoning.trigger}: {sources}{more} -> {goal}")
