"""The triggers that a repair undoes when it is given none: Neural Cleanse's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from untrojan.data.image_set import ImageSet
from untrojan.defenses.scanning.neural_cleanse import NeuralCleanse
from untrojan.defenses.scanning.report import InvertedTrigger, ScanReport
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier


def smallest_mask(scan: ScanReport) -> tuple[int, float] | None:
    """The class whose working trigger has the smallest mask, and that mask's sum in pixels; None without any
    working trigger."""
    sizes = {label: scan.statistics[label]["mask_size"] for label in scan.triggers}
    return min(sizes.items(), key=lambda item: item[1]) if sizes else None


def backdoors_of(scan: ScanReport) -> dict[int, InvertedTrigger]:
    """By target class: the suspected triggers, the most certain first; without any, that of smallest mask.

    Raises UntrojanError where there is no working trigger at all.
    """
    smallest = smallest_mask(scan)
    if smallest is None:
        raise UntrojanError(
            "no trigger could be inverted for any class, so there is none to undo: "
            "choose a repair that needs none, such as nad"
        )
    return {label: scan.triggers[label] for label in scan.targets or (smallest[0],)}


def inversion_file(folder: Path, schedule: str, seed: int) -> Path:
    """Where the inversion of the given model on the repair's images is kept, for all repairs in a folder."""
    return folder / f"inversion-{schedule}-{seed}.safetensors"


def invert_backdoors(
    model: Classifier,
    clean: ImageSet,
    schedule: Literal["fast", "paper"],
    seed: int,
    checkpoint: Path | None = None,
) -> tuple[dict[int, InvertedTrigger], dict[str, Any]]:
    """What :func:`backdoors_of` says of a scan of ``model``, and a record of it for a repair's history.

    Raises UntrojanError as that does, and where the model's classes are not the images'.
    """
    scan = NeuralCleanse(schedule=schedule, seed=seed)(
        model, clean, checkpoint=checkpoint and inversion_file(checkpoint.parent, schedule, seed)
    )
    triggers = backdoors_of(scan)
    sizes = {str(label): scan.statistics[label]["mask_size"] for label in triggers}
    told = {"verdict": scan.verdict, "reason": scan.reason, "undone": list(triggers), "mask_sizes": sizes}
    return triggers, {"scan": told}
