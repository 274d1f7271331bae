"""How far apart a model's classes are before a repair and after, and the images that say so.

Tao et al., "DECK: Model Hardening for Defending Pervasive Backdoors", section III, on a few pairs of classes
instead of all: what a command can afford beside the repair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.data.sampling import some_of_each
from untrojan.defenses.scanning.class_distance import ClassDistance, Distances
from untrojan.inversion.generators import Generator
from untrojan.metrics.class_distance import mean_distance, measured, relative_increase
from untrojan.models.classifier import Classifier, predictions_of, to_float
from untrojan.registry import validated
from untrojan.triggers.base import to_bytes

Measure = Literal["mask", "filter", "feature"]

PAIRS, IMAGES, STEPS = 12, 40, 150
MOST_SHOWN = 6
"""Pairs of which an image is kept to be looked at."""
UNITS: dict[str, str] = {
    "mask": "pixels of a patch",
    "filter": "squared grey levels a pixel, by a filter",
    "feature": "squared pixel levels of an encoder's features",
}


def few_pairs(measure: Measure, seed: int, **changed: Any) -> ClassDistance:
    """The settings of a quick look: a dozen random pairs, one trial of 150 steps on 40 images of a class.

    ``changed`` are fields of ClassDistance to have otherwise. Raises UntrojanError for a wrong one.
    """
    quick = {"images": IMAGES, "steps": STEPS, "trials": 1, "pairs": PAIRS}
    return validated(ClassDistance, quick | changed | {"measure": measure, "seed": seed}, "distance")


@dataclass(frozen=True, eq=False)
class GeneratedImage:
    """One image that was made to look like another class, for the given model."""

    source: int
    target: int
    clean: Tensor
    """uint8 (C, H, W)."""
    generated: Tensor
    """uint8 (C, H, W)."""
    read_clean: int
    """The given model's answer for the image as it was."""
    read_before: int
    """Its answer for the generated one."""
    read_after: int
    """The repaired model's."""


@dataclass(frozen=True, eq=False)
class DistanceChange:
    """What was measured on one model and on the other."""

    measure: Measure
    before: Tensor
    """float (K, K), sources in rows, NaN where nothing was found."""
    after: Tensor
    pairs: Tensor
    """int64 (P, 2): those tried."""
    works_before: float
    """Mean share of a source's images that the trigger found for the given model turns; NaN without any."""
    works_after: float
    """The same triggers' on the repaired model."""
    relative: bool = False
    """Whether the changes of features alone count: ``ClassDistance.relative``."""
    images: tuple[GeneratedImage, ...] = ()

    @property
    def increase(self) -> float | None:
        """Mean relative increase (DECK, equation 12); None where no pair was measured both times."""
        return _finite(relative_increase(self.before, self.after))

    def to_json(self) -> dict[str, Any]:
        """Figures alone, as JSON types."""
        source, target = self.pairs.unbind(1)
        rows = zip(
            self.pairs.tolist(), self.before[source, target].tolist(), self.after[source, target].tolist(),
            strict=True,
        )  # fmt: skip
        return {
            "measure": self.measure,
            "relative": self.relative,
            "before": _finite(mean_distance(self.before)),
            "after": _finite(mean_distance(self.after)),
            "increase": self.increase,
            "pairs": len(self.pairs),
            "failed_before": len(self.pairs) - int(measured(self.before).sum()),
            "failed_after": len(self.pairs) - int(measured(self.after).sum()),
            "works_before": _finite(self.works_before),
            "works_after": _finite(self.works_after),
            "by_pair": [
                {"source": s, "target": t, "before": _finite(before), "after": _finite(after)}
                for (s, t), before, after in rows
            ],
        }


@dataclass(frozen=True, eq=False)
class DistanceProbe:
    """The given model's distances, to compare a repaired one's with."""

    model: Classifier
    data: ImageSet
    asked: ClassDistance
    generator: Generator
    found: Distances

    @classmethod
    def of(
        cls, model: Classifier, learned: ImageSet, held_out: ImageSet, asked: ClassDistance,
        checkpoint: Path | None = None,
    ) -> DistanceProbe:  # fmt: skip
        """Measure ``model`` on ``held_out``; an encoder is made of ``learned``, as a repair's own is.

        Raises UntrojanError as :class:`~untrojan.defenses.scanning.class_distance.ClassDistance` does.
        """
        generator = asked.generator(model, learned)
        return cls(
            model, held_out, asked, generator,
            asked.distances(model, held_out, generator, checkpoint=checkpoint),
        )  # fmt: skip

    def compare(self, repaired: Classifier, checkpoint: Path | None = None) -> DistanceChange:
        """Measure the repaired model in the same way, and show it the triggers found for the given one."""
        after = self.asked.distances(repaired, self.data, self.generator, checkpoint=checkpoint)
        sizes = self.found.matrix[self.found.pairs[:, 0], self.found.pairs[:, 1]]
        solved = sizes.argsort()[: int(sizes.isfinite().sum())].tolist()
        images: list[GeneratedImage] = []
        works: list[tuple[float, float]] = []
        if self.found.parameters is not None:
            sample = some_of_each(self.data, self.asked.images, self.asked.seed, 0)
            for place in solved:
                image, turned = self._shown(place, sample, repaired)
                images.append(image)
                works.append(turned)
        shares = torch.tensor(works, dtype=torch.float64).view(-1, 2).mean(0).tolist()
        return DistanceChange(
            self.asked.measure, self.found.matrix, after.matrix, self.found.pairs, shares[0], shares[1],
            self.asked.relative, tuple(images[:MOST_SHOWN]),
        )  # fmt: skip

    @torch.no_grad()
    def _shown(
        self, place: int, sample: ImageSet, repaired: Classifier
    ) -> tuple[GeneratedImage, tuple[float, float]]:
        """One pair's first image, and how many of the pair's its trigger turns on either model."""
        assert self.found.parameters is not None
        source, target = self.found.pairs[place].tolist()
        clean = sample.images[sample.indices_of(source)]
        problem = self.generator.problem(self.asked.seed)
        parameters = self.found.parameters[place : place + 1].to(self.model.device)
        generated = to_bytes(problem.embed(parameters, to_float(clean, self.model.device)[None])[0]).cpu()
        before, after = (predictions_of(each, generated) for each in (self.model, repaired))
        image = GeneratedImage(
            source, target, clean[0], generated[0], int(predictions_of(self.model, clean[:1])[0]),
            int(before[0]), int(after[0]),
        )  # fmt: skip
        shares = [float((answers == target).double().mean()) for answers in (before, after)]
        return image, (shares[0], shares[1])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
