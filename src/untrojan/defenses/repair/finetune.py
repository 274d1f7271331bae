"""Standard fine-tuning: train on with a few clean images, in the hope that the backdoor is forgotten.

A baseline of Tao et al., "DECK: Model Hardening for Defending Pervasive Backdoors", section V, and the first
step of NAD and of mode connectivity repair.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from untrojan.data.image_set import ImageSet
from untrojan.defenses.repair.report import RepairReport
from untrojan.defenses.repair.tuning import Tuning
from untrojan.models.classifier import Classifier
from untrojan.models.frozen import trainable


@dataclass(frozen=True)
class Finetuning(Tuning):
    """Fine-tuning of all weights."""

    def __call__(self, model: Classifier, clean: ImageSet, *, checkpoint: Path | None = None) -> RepairReport:
        """Fine-tune a copy on ``clean``, uint8 images rightly labelled.

        Raises UntrojanError where the model's classes are not the images', or training diverges.
        """
        repaired = trainable(model)
        epochs = self.tune(repaired, clean, "fine-tuning", checkpoint=checkpoint)
        return RepairReport(repaired, {"epochs": epochs})
