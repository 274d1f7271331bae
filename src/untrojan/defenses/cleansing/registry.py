"""Cleansers by name."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from untrojan.data.image_set import ImageSet
from untrojan.defenses.cleansing.report import CleansingReport
from untrojan.models.classifier import Classifier
from untrojan.registry import Registry


class Cleanser(Protocol):
    """Inspects a training set by way of a classifier trained on it; never sees what is truly poisoned."""

    def __call__(
        self, train: ImageSet, model: Classifier, *, checkpoint: Path | None = None
    ) -> CleansingReport: ...


CLEANSERS: Registry[Cleanser] = Registry(
    "cleanser",
    {"reverse-engineering": "untrojan.defenses.cleansing.reverse_engineering:ReverseEngineering"},
)
