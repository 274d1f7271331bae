"""How easily a model falls to small patches that nobody planted.

Wang et al., "Training with More Confidence: Mitigating Injected and Natural Backdoors During Training",
NeurIPS 2022, table 2: ABS on models trained on clean data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Gt, Interval, MinLen

from untrojan.data.image_set import ImageSet
from untrojan.defenses.scanning.abs import Stimulation, best_by_class, class_statistics
from untrojan.defenses.scanning.report import ScanReport, blind_to
from untrojan.models.classifier import Classifier


@dataclass(frozen=True)
class NaturalTrojans(Stimulation):
    """The largest attack success of any inverted patch, for patches of 2 to 12 % of the image.

    The measure of table 2: its mean over the six sizes. It says how fragile a model is, whoever made it so;
    nothing needs to have been poisoned. The paper stimulates one layer, the deepest: ``levels`` ("s3",).
    """

    levels: tuple[str, ...] = ("s3",)
    sizes: Annotated[tuple[Annotated[float, Interval(gt=0, le=1)], ...], MinLen(1)] = (
        0.02, 0.04, 0.06, 0.08, 0.10, 0.12,
    )  # fmt: skip
    """Shares of the image's pixels."""
    limit: Annotated[float, Gt(0)] = 0.8
    """Mean success from which the model is said to have a natural backdoor: ABS' threshold."""

    def __call__(self, model: Classifier, clean: ImageSet, *, checkpoint: Path | None = None) -> ScanReport:
        """Measure ``model`` with clean images, rightly labelled. Neither is changed.

        Raises UntrojanError as ABS does.
        """
        blind = blind_to(model, clean)
        patches = self.invert(model, clean, self.candidates(model, clean), self.sizes, checkpoint)
        by_size = [
            max((patch.success for patch in patches[place :: len(self.sizes)]), default=0.0)
            for place in range(len(self.sizes))
        ]
        mean = sum(by_size) / len(by_size)
        best = best_by_class(patches)
        targets = tuple(
            label for label, patch in best.items() if mean >= self.limit and patch.success >= self.limit
        )
        return ScanReport(
            verdict="undecided" if blind else "poisoned" if targets else "clean",
            targets=() if blind else targets,
            statistics=class_statistics(best, clean.num_classes),
            triggers={label: patch.trigger for label, patch in best.items() if patch.success >= self.limit},
            reason=blind
            or f"the best patches of {self.sizes[0]:.0%} to {self.sizes[-1]:.0%} of the image carry "
            f"{mean:.0%} of other classes' images over in the mean"
            + (": with or without an attack, that is a backdoor" if targets else ""),
            evidence={
                "sizes": list(self.sizes),
                "max_reasr": by_size,
                "mean_max_reasr": mean,
                "candidates": [patch.to_json() for patch in patches],
            },
        )
