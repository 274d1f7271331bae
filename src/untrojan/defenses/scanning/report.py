"""What every scanner answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.defenses.cleansing.report import Verdict
from untrojan.metrics.accuracy import benign_accuracy
from untrojan.models.classifier import Classifier


@dataclass(frozen=True, eq=False)
class InvertedTrigger:
    """A trigger that a scanner has found: x' = (1 - mask) x + mask * pattern."""

    mask: Tensor
    """float (1, H, W) in [0, 1]."""
    pattern: Tensor
    """float (C, H, W) in [0, 1]."""

    def __call__(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] with the trigger."""
        mask, pattern = self.mask.to(images.device), self.pattern.to(images.device)
        return (1 - mask) * images + mask * pattern


@dataclass(frozen=True, eq=False)
class AddedPattern:
    """A pattern that a scanner has found: x' = clip(x + pattern)."""

    pattern: Tensor
    """float (C, H, W)."""

    def __call__(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] with the pattern."""
        return (images + self.pattern.to(images.device)).clamp(0, 1)


@dataclass(frozen=True, eq=False)
class ScanReport:
    """A scanner's answer: ``(model: Classifier, clean: ImageSet) -> ScanReport``."""

    verdict: Verdict
    targets: tuple[int, ...]
    """Classes that a backdoor leads to, the most certain first."""
    statistics: dict[int, dict[str, float]]
    """For each class what was measured, by name."""
    triggers: dict[int, InvertedTrigger]
    """By target class, those that work; found for clean classes too, where they are large."""
    patterns: dict[int, AddedPattern] = field(default_factory=dict)
    """By target class, where triggers are added and not laid over."""
    failed: tuple[int, ...] = ()
    """Classes for which no working trigger was found: of them nothing is known."""
    reason: str = ""
    """One sentence for a person: why this verdict."""
    evidence: dict[str, Any] = field(default_factory=dict)

    def trigger_into(self, target: int) -> InvertedTrigger | AddedPattern | None:
        """What was found for a class, of whichever kind."""
        return self.triggers.get(target) or self.patterns.get(target)


def blind_to(model: Classifier, clean: ImageSet) -> str:
    """Why no scan of this model with these images carries a verdict, or nothing where it may."""
    accuracy = benign_accuracy(model, clean)
    if accuracy >= 0.5:
        return ""
    return (
        f"the model is right on {accuracy:.0%} of the clean images: it does not classify these data, "
        "or their classes are in another order"
    )
