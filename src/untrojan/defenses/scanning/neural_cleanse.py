"""Neural Cleanse: invert a trigger for every class, and suspect the class whose trigger is far too small.

Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", S&P 2019.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Gt, Interval
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.defenses.outliers import anomaly_indices
from untrojan.defenses.scanning.report import InvertedTrigger, ScanReport, blind_to
from untrojan.inversion.engine import ANY, Adam, Inversion, Schedule, Shrink, invert
from untrojan.inversion.masked import MaskedPattern
from untrojan.metrics.accuracy import benign_accuracy
from untrojan.models.classifier import Classifier

PAPER = Schedule(
    Adam(0.1, (0.5, 0.9)),
    images_a_side=32,
    flip_fraction=0.99,
    most_steps=31_000,
    shrink=Shrink(cost=0.0, look_every=31, patience=5, rise=2.0, fall=2.0**1.5, give_up=25),
)
"""The constants of the authors' GTSRB example: 1,000 rounds at most of 31 batches of 32 images."""

FAST = Schedule(
    Adam(0.1, (0.5, 0.9)),
    images_a_side=32,
    flip_fraction=0.99,
    most_steps=600,
    shrink=Shrink(cost=1e-3, look_every=8, patience=2, rise=2.0, fall=2.0**1.5, give_up=12),
)

FEWEST_CLASSES = 3
"""Fewer classes with a working trigger have no median to stand out from."""


@dataclass(frozen=True)
class NeuralCleanse:
    """Neural Cleanse on the inversion engine, all classes in one batch."""

    schedule: Literal["fast", "paper"] = "fast"
    flip_fraction: Annotated[float, Interval(gt=0, le=1)] = 0.99
    """The share of clean images that a trigger must carry over."""
    anomaly_limit: Annotated[float, Gt(0)] = 2.0
    """A class is suspected where its mask lies more deviations below the median than this; 2 is the paper's,
    for 95 % of a normal distribution."""
    seed: int = 0

    def __call__(self, model: Classifier, clean: ImageSet, *, checkpoint: Path | None = None) -> ScanReport:
        """Scan ``model`` with clean images, rightly labelled. Neither is changed.

        Raises UntrojanError where the model's classes are not the images'.
        """
        return self.judge(self.invert(model, clean, checkpoint), model, clean)

    def invert(self, model: Classifier, clean: ImageSet, checkpoint: Path | None = None) -> Inversion:
        """The smallest mask found for every class."""
        schedule = replace(PAPER if self.schedule == "paper" else FAST, flip_fraction=self.flip_fraction)
        pairs = torch.tensor([[ANY, target] for target in range(clean.num_classes)])
        return invert(
            model, clean, pairs, MaskedPattern(self.seed), schedule, seed=self.seed,
            checkpoint=checkpoint, description="inverting triggers",
        )  # fmt: skip

    def judge(self, found: Inversion, model: Classifier, clean: ImageSet) -> ScanReport:
        """The verdict on inverted triggers, one a class."""
        problem = MaskedPattern(self.seed)
        masks, patterns = problem.trigger(found.parameters)
        sizes = problem.size(found.parameters)
        solved = found.solved.nonzero().flatten()
        indices = dict(zip(solved.tolist(), anomaly_indices(-sizes[solved]).tolist(), strict=True))
        suspected = [label for label, index in indices.items() if index > self.anomaly_limit]
        suspected.sort(key=lambda label: -indices[label])
        statistics = {
            label: {"mask_size": float(sizes[label]), "flip_fraction": float(found.flip_fraction[label])}
            | ({"anomaly_index": indices[label]} if label in indices else {})
            for label in range(clean.num_classes)
        }
        blind = self._blind(model, clean, len(solved))
        return ScanReport(
            verdict="undecided" if blind else "poisoned" if suspected else "clean",
            targets=() if blind else tuple(suspected),
            statistics=statistics,
            triggers={label: InvertedTrigger(masks[label], patterns[label]) for label in indices},
            failed=tuple((~found.solved).nonzero().flatten().tolist()),
            reason=blind or self._reason(clean, suspected, indices, sizes),
            evidence={"steps": found.steps.tolist(), "benign_accuracy": benign_accuracy(model, clean)},
        )

    def _blind(self, model: Classifier, clean: ImageSet, solved: int) -> str:
        """Why triggers carry no verdict, or nothing where they do."""
        if solved < max(FEWEST_CLASSES, clean.num_classes / 2):
            return (
                f"a working trigger was found for {solved} of {clean.num_classes} classes: too few to compare"
            )
        return blind_to(model, clean)

    def _reason(self, clean: ImageSet, suspected: list[int], indices: dict[int, float], sizes: Tensor) -> str:
        worst = max(indices, key=lambda label: indices[label])
        size, median = float(sizes[worst]), float(sizes[list(indices)].median())
        measure = f"{size:.1f} pixels against a median of {median:.1f}, anomaly index {indices[worst]:.1f}"
        name = clean.class_names[worst]
        if suspected:
            return f"a trigger far smaller than other classes need leads to {name!r} ({measure})"
        return (
            f"no class's trigger is far smaller than the others'; the smallest leads to {name!r} ({measure})"
        )
