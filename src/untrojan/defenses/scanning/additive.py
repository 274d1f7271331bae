"""RE's test after training: does a pattern too small to be chance carry one class into another?

Xiang, Miller & Kesidis, "Detection of Backdoors in Trained Classifiers Without Access to the Training Set",
TNNLS 2022: their test of a model alone, with clean images in place of the training set.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.defenses.cleansing.reverse_engineering import ReverseEngineering
from untrojan.defenses.scanning.report import AddedPattern, ScanReport, blind_to
from untrojan.inversion.additive import FlippingPattern
from untrojan.inversion.engine import Inversion
from untrojan.models.classifier import Classifier


@dataclass(frozen=True)
class AdditiveTest:
    """The smallest added pattern for every pair of classes, and the order-statistic test of their norms."""

    schedule: Literal["fast", "paper"] = "fast"
    flip_fraction: Annotated[float, Interval(gt=0, lt=1)] = 0.95
    """The share of a class that a pattern must carry over."""
    significance: Annotated[float, Interval(gt=0, lt=1)] = 0.05
    """The p-value under which a model is called backdoored."""
    location: Literal["free", "zero"] = "free"
    """The Gamma null's location, as in RE."""
    seed: int = 0

    def __call__(self, model: Classifier, clean: ImageSet, *, checkpoint: Path | None = None) -> ScanReport:
        """Scan ``model`` with clean images, rightly labelled. Neither is changed.

        Raises UntrojanError where the model's classes are not the images', or a class has no image.
        """
        method = ReverseEngineering(
            self.schedule, self.flip_fraction, significance=self.significance, location=self.location,
            seed=self.seed,
        )  # fmt: skip
        inversion, weights = method.estimate_patterns(clean, model, FlippingPattern(), checkpoint)
        inferred = method.infer(inversion, clean.class_names, weights)
        blind = blind_to(model, clean) or inferred.blind
        norms = inferred.evidence["norms"]
        p_values = inferred.evidence.get("class_log10_p_values")
        statistics = {
            label: {"smallest_norm": min(column)} | ({"log10_p_value": p_values[label]} if p_values else {})
            for label in range(clean.num_classes)
            if (column := [row[label] for row in norms if row[label] == row[label]])
        }
        return ScanReport(
            verdict="undecided" if blind else "poisoned" if inferred.found else "clean",
            targets=() if blind else tuple(test.target for test in inferred.found),
            statistics={label: statistics.get(label, {}) for label in range(clean.num_classes)},
            triggers={},
            patterns=_patterns(inversion, norms),
            failed=tuple(label for label in range(clean.num_classes) if label not in statistics),
            reason=blind or inferred.reason,
            evidence=inferred.evidence | {"sources": {str(k): list(v) for k, v in inferred.sources.items()}},
        )


def _patterns(inversion: Inversion, norms: list[list[float]]) -> dict[int, AddedPattern]:
    """By class, the smallest pattern that leads there."""
    smallest: dict[int, tuple[float, Tensor]] = {}
    for (source, target), pattern in zip(inversion.pairs.tolist(), inversion.parameters, strict=True):
        norm = norms[source][target]
        if norm == norm and norm < smallest.get(target, (float("inf"),))[0]:
            smallest[target] = norm, pattern
    return {target: AddedPattern(pattern) for target, (_, pattern) in smallest.items()}
