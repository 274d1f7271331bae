"""``untrojan repair``: a model without its backdoor, from the model and a few clean images."""

from __future__ import annotations

from dataclasses import replace
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from untrojan.cli import inputs, options
from untrojan.errors import UntrojanError

if TYPE_CHECKING:
    from untrojan.repair import CleanImages, Repaired, RepairOptions
    from untrojan.runs import RunFolder


def repair(
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL", help="A checkpoint.", show_default=False)
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="CLEAN", help="Clean images. " + options.DATA_HELP, show_default=False
        ),
    ] = None,
    out: options.MaybeOut = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="auto: try the quick ones, and moth where a scan finds a patch, else deck; keep the best; "
            "or finetune, fine-pruning, nad, anp, moth, deck and others, which an unknown name lists.",
        ),
    ] = "auto",
    method_option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A setting of the method; repeatable.")
    ] = None,
    tried: Annotated[
        list[str] | None,
        typer.Option(
            "--try", metavar="NAME", help="What auto tries instead; repeatable, or all."
        ),
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Share of the training images to learn from, in equal numbers of each class; "
            "by default a twentieth, or all where that is little.",
        ),
    ] = None,
    hold_out: Annotated[
        float, typer.Option(min=0, max=1, help="Share kept to measure on, where there is no test split.")
    ] = 0.2,
    tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="Accuracy that auto lets a repair cost.")
    ] = 0.03,
    scan: Annotated[
        bool, typer.Option("--scan", help="Look for triggers before and after; auto always does.")
    ] = False,
    distance: Annotated[
        Literal["mask", "filter", "feature", "none"] | None,
        typer.Option(
            help="Measure class distances before and after, with patches, filters or features of an encoder; "
            "moth and deck do, unless none is asked for.",
        ),
    ] = None,
    train_decoder: Annotated[
        str | None,
        typer.Option(
            metavar="IMAGES",
            help="Train deck's decoder on these images, of any classes, and keep it in the cache for later; "
            "without MODEL, that is all.",
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="deck's encoder: vgg, vgg-pool2, efficientnet-lite0, local, local-pool2, one that "
            "--train-decoder has named, or your module:factory.",
        ),
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write model.onnx too.")] = False,
    architecture: options.Architecture = None,
    mean: options.Mean = None,
    std: options.Std = None,
    size: options.Size = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:  # fmt: skip
    """Mend a model that may be backdoored, with a few clean images; the given file is never touched.

    Writes model.safetensors (the repaired model), report.html, history.csv and metrics.json: accuracy on
    clean images held out, before and after, and what it cost. A run that was cut off goes on where it was.

    Example: [bold]untrojan repair model/model.safetensors --data signs --out repaired[/bold]

    One method: [bold]untrojan repair m.safetensors --data photos/ --method nad --out repaired[/bold]

    A decoder for deck: [bold]untrojan repair --train-decoder photos/ --encoder vgg[/bold]
    """
    options.begin(threads, quiet)
    if model is None:
        if train_decoder is None:
            raise UntrojanError(
                "give a MODEL to repair, or --train-decoder IMAGES (see: untrojan repair --help)"
            )
        _only_train(train_decoder, encoder, size, seed, json, quiet, out or data or method_option or tried)
        return
    if data is None or out is None:
        raise UntrojanError(f"{'--data CLEAN' if data is None else '--out DIR'} is missing")
    from untrojan.data.load import load
    from untrojan.models.checkpoints import save_checkpoint
    from untrojan.registry import validated
    from untrojan.repair import RepairOptions, clean_images, metrics_of, run_repair
    from untrojan.runs import RunFolder

    given: dict[str, Any] = {
        "method": method, "method_options": inputs.key_values(method_option, "--method-option"),
        "share": share, "hold_out": hold_out, "tolerance": tolerance, "scan": scan, "distance": distance,
        "encoder": encoder, "seed": seed, **_tried(tried, method),
    }  # fmt: skip
    asked = validated(RepairOptions, given, "repair")
    repairs = asked.repairs()
    asked.distances()
    if train_decoder is not None and "deck" not in repairs:
        raise UntrojanError("--train-decoder is for --method deck: name it, or leave out MODEL")
    inputs.keep_apart(
        out,
        {"the model to be repaired": model, "the clean images": data, "the decoder's images": train_decoder},
    )
    if onnx:
        from untrojan.models.onnx import check_exporter

        check_exporter()
    config = {
        "model": model, "model_sha256": inputs.sha256(model), "data": data, "size": size, "onnx": onnx,
        "architecture": architecture, "mean": mean, "std": std, "options": asked, "methods": repairs,
        "train_decoder": train_decoder, "seed": seed,
    }  # fmt: skip
    with RunFolder(out, "repair", config, overwrite=overwrite) as folder:
        splits = load(data, size=size, minimum_per_class=0)
        classifier = inputs.load_model(model, splits.train, architecture, mean, std)
        images = clean_images(splits, asked)
        folder.use_data("repair", images.repair)
        folder.use_data("held out", images.held_out)
        if train_decoder is not None:
            asked = _with_decoder(asked, train_decoder, size, folder.work)
        done = run_repair(classifier, images, asked, folder.work)
        metrics = metrics_of(done)
        folder.write_json("metrics.json", metrics)
        _write(folder, done, asked, str(model), asked.repairs())
        save_checkpoint(folder.staged("model.safetensors"), done.model, splits.train.class_names)
        if onnx:
            from untrojan.models.onnx import export_onnx

            export_onnx(folder.staged("model.onnx"), done.model, splits.train.image_shape)
    if json:
        options.print_json(metrics)
    elif not quiet:
        _summary(done, images, out)


def _tried(tried: list[str] | None, method: str) -> dict[str, Any]:
    """What ``--try`` says, as an option."""
    if not tried:
        return {}
    if method != "auto":
        raise UntrojanError("--try is for auto: leave out --method, or --try")
    if tried == ["all"]:
        from untrojan.defenses.repair.registry import REPAIRS

        return {"tried": list(REPAIRS.names())}
    return {"tried": list(dict.fromkeys(tried))}


def _only_train(
    source: str, encoder: str | None, size: int | None, seed: int, json: bool, quiet: bool, idle: object
) -> None:
    """``--train-decoder`` without a model: train, keep and tell."""
    if idle:
        raise UntrojanError(
            "without MODEL, --train-decoder trains a decoder and no more: drop the other options"
        )
    told = _trained_decoder(source, encoder or "local", size, seed)
    if json:
        options.print_json(told)
    elif not quiet:
        options.say(f"encoder: {told['encoder']}")
        options.say(f"decoder: {told['psnr']:.1f} dB of PSNR on images that it was not trained on")
        options.say(
            f"kept in {told['decoder']}" if told["decoder"] else "kept nowhere: the cache is not writable"
        )
        options.say(f"use it: --method deck --encoder {told['encoder']}")


def _trained_decoder(source: str, encoder: str, size: int | None, seed: int) -> dict[str, Any]:
    from untrojan.data.load import load
    from untrojan.models.decoders import decoder_file, prepare_decoder
    from untrojan.models.registry import is_user_code

    images = load(source, size=size, minimum_per_class=0).train
    made, decoder = prepare_decoder(encoder, images, seed=seed, retrain=True)
    place = decoder_file(made)
    # A user's encoder goes by the name it was asked for.
    name = encoder if is_user_code(encoder) else made.name
    return {
        "encoder": name, "encoder_sha256": made.fingerprint(), "psnr": decoder.psnr, "images": len(images),
        "decoder": str(place) if place.is_file() else None,
    }  # fmt: skip


def _with_decoder(asked: RepairOptions, source: str, size: int | None, work: Path) -> RepairOptions:
    """The options with the encoder whose decoder is trained here, once in a run's life."""
    from untrojan.runs import json_text, write_bytes_atomically

    place = work / "decoder.json"
    if place.is_file():
        told = loads(place.read_text(encoding="utf-8"))
    else:
        encoder = asked.encoder or asked.method_options.get("encoder", "local")
        told = _trained_decoder(source, encoder, size, asked.seed)
        write_bytes_atomically(place, json_text(told).encode())
    settings = {key: value for key, value in asked.method_options.items() if key != "encoder"}
    return replace(asked, encoder=told["encoder"], method_options=settings)


def _write(folder: RunFolder, done: Repaired, asked: RepairOptions, subject: str, methods: Any) -> None:
    from untrojan.repair import history_table
    from untrojan.report.assemble_repair import assemble_repair
    from untrojan.report.repair_page import render_repair

    folder.write_csv("history.csv", *history_table(done.report.history))
    page = assemble_repair(done, asked, subject, methods[done.method])
    folder.write_text("report.html", render_repair(page))


def _summary(done: Repaired, images: CleanImages, out: Path) -> None:
    from untrojan.defenses.repair.inverted import smallest_mask

    for each in done.candidates:
        found = each.error or f"accuracy {options.share(each.benign_accuracy)}"
        options.say(f"tried {each.name}: {found}")
    if not done.within_tolerance and done.candidates:
        options.say("none kept accuracy within the tolerance: the one that cost least is kept")
    options.say(f"repaired by {done.method}, with {len(images.repair)} clean images")
    options.say(
        f"accuracy on {len(images.held_out)} {'test' if images.split == 'test' else 'held-out'} images: "
        f"{options.share(done.accuracy_before)} before, {options.share(done.accuracy_after)} after"
    )
    if done.distance is not None:
        change = done.distance.to_json()
        grown = "not measurable" if change["increase"] is None else f"{change['increase']:+.0%}"
        options.say(f"class distance ({change['measure']}): {grown} over {change['pairs']} pairs")
    for when, scan in (("before", done.scan_before), ("after", done.scan_after)):
        if scan is not None:
            smallest = smallest_mask(scan)
            size = f"{smallest[1]:.1f} pixels" if smallest else "none works"
            options.say(f"smallest trigger {when}: {size} ({scan.verdict})")
    options.say(f"model: {out / 'model.safetensors'}")
    options.say(f"report: {out / 'report.html'}")
