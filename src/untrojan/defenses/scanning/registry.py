"""Scanners by name."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from untrojan.data.image_set import ImageSet
from untrojan.defenses.scanning.report import ScanReport
from untrojan.models.classifier import Classifier
from untrojan.registry import Registry


class Scanner(Protocol):
    """Inspects a model with clean images; never sees a triggered one."""

    def __call__(
        self, model: Classifier, clean: ImageSet, *, checkpoint: Path | None = None
    ) -> ScanReport: ...


SCANNERS: Registry[Scanner] = Registry(
    "scanner",
    {
        "neural-cleanse": "untrojan.defenses.scanning.neural_cleanse:NeuralCleanse",
        "class-distance": "untrojan.defenses.scanning.class_distance:ClassDistance",
    },
)
