"""Training defences by name."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from untrojan.data.image_set import ImageSet
from untrojan.defenses.training.report import TrainingReport
from untrojan.registry import Registry
from untrojan.training.recipe import Recipe


class TrainingDefense(Protocol):
    """Trains a new classifier on data that may be poisoned; never sees what truly is."""

    def __call__(
        self, data: ImageSet, architecture: str, recipe: Recipe, *, checkpoint: Path | None = None,
        device: str = "cpu",
    ) -> TrainingReport: ...  # fmt: skip


TRAINING_DEFENSES: Registry[TrainingDefense] = Registry(
    "training defence",
    {
        "none": "untrojan.defenses.training.none:NONE",
        "abl": "untrojan.defenses.training.abl:ABL",
        "pgd": "untrojan.defenses.training.adversarial:AdversarialTraining",
        "uap": "untrojan.defenses.training.universal:UniversalAdversarialTraining",
    },
)
