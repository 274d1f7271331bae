"""Linearity: channels that answer to a trigger alone have the images of a class in two groups.

Wang et al., "Training with More Confidence: Mitigating Injected and Natural Backdoors During Training",
NeurIPS 2022. NONE trains on without the images that it finds; a model does not always forget in a few epochs
what they taught it, and one that is trained anew never learns it. So here its look at the images alone,
within classes (which is ours), as a cleanser.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from untrojan.data.image_set import ImageSet
from untrojan.defenses.cleansing.report import CleansingReport, Verdict
from untrojan.defenses.training.none import FEWEST, NONE, Analysis
from untrojan.models.classifier import Classifier


@dataclass(frozen=True)
class Linearity:
    """The images that :class:`~untrojan.defenses.training.none.NONE` would drop; settings as there.

    Raises UntrojanError for a model without layers before its last.
    """

    layer_separation: Annotated[float, Ge(0)] = NONE.layer_separation
    layers: Annotated[int, Ge(1)] = NONE.layers
    excess: Annotated[float, Ge(0)] = NONE.excess

    def __call__(
        self, train: ImageSet, model: Classifier, *, checkpoint: Path | None = None
    ) -> CleansingReport:
        """Judge ``train`` by the channels of ``model``, trained on it: one pass. No ``checkpoint`` needed."""
        method = NONE(layer_separation=self.layer_separation, layers=self.layers, excess=self.excess)
        found = method.analyse(model, train)
        unjudged = [
            k for k, count in enumerate(train.class_counts.tolist()) if count and k not in found.separations
        ]
        targets = sorted(found.classes, key=lambda label: -sum(found.separations[label].values()))
        return CleansingReport(
            verdict=_verdict(found, unjudged),
            flagged=method.dropped(found),
            scores=found.votes if found.votes is not None else found.suspects.float(),
            targets=tuple(targets),
            sources=tuple(() for _ in targets),
            reason=self._reason(train, found, targets, unjudged),
            evidence={
                "separations": {str(label): own for label, own in found.separations.items()},
                "compromised": {path: each.tolist() for path, each in found.compromised.items()},
                "classes_unjudged": unjudged,
            },
        )

    def _reason(self, train: ImageSet, found: Analysis, targets: list[int], unjudged: list[int]) -> str:
        if targets:
            own = [each for each in found.separations[targets[0]].values() if each >= self.layer_separation]
            more = f", and {len(targets) - 1} more classes" if len(targets) > 1 else ""
            return (
                f"{len(own)} layers have class {train.class_names[targets[0]]!r} in two groups of images, up "
                f"to {max(own):.1f} of their deviations apart{more}"
            )
        if unjudged:
            more = f", nor on {len(unjudged) - 1} more classes" if len(unjudged) > 1 else ""
            return (
                f"the model takes fewer than {FEWEST} images for {train.class_names[unjudged[0]]!r}: "
                f"no judgement on it{more}"
            )
        return f"in no class do layers agree on two groups of images (the clearest: {found.separation:.1f})"


def _verdict(found: Analysis, unjudged: list[int]) -> Verdict:
    if found.apart:
        return "poisoned"
    return "undecided" if unjudged or not found.compromised else "clean"
