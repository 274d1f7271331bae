"""ABS as a repair: find the channel a backdoor excites, invert its trigger, unlearn it.

Liu et al., "ABS: Scanning Neural Networks for Back-doors by Artificial Brain Stimulation", CCS 2019, with the
unlearning of Neural Cleanse, as DECK compares it (Tao et al., "DECK", section V).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.defenses.repair.report import RepairReport
from untrojan.defenses.repair.tuning import stage_file
from untrojan.defenses.repair.unlearning import Stamp, Unlearning
from untrojan.defenses.scanning.abs import ABS, Candidate, sampled, success_of
from untrojan.defenses.scanning.class_distance import schedule_of
from untrojan.errors import UntrojanError
from untrojan.inversion.engine import ANY, invert
from untrojan.inversion.filters import FilterMatrix, second_moments
from untrojan.inversion.generators import FilterGenerator
from untrojan.inversion.stimulated import StimulatedFilter
from untrojan.models.classifier import Classifier


@dataclass(frozen=True, eq=False)
class Filter:
    """An inverted filter, to be laid over images."""

    matrix: Tensor
    """float (C, 4C)."""
    problem: FilterMatrix

    def __call__(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] with the filter."""
        return self.problem.embed(self.matrix[None].to(images.device), images[None])[0]


@dataclass(frozen=True)
class Inverted:
    """What was found for a candidate."""

    kind: Literal["patch", "filter"]
    candidate: Candidate
    success: float
    """Share of clean images of other classes that it carries to the candidate's class."""

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self.candidate), "reasr": self.success}


@dataclass(frozen=True)
class ABSRepair:
    """Stimulate, invert a patch and a filter for every channel under suspicion, unlearn what works."""

    kinds: tuple[Literal["patch", "filter"], ...] = ("patch", "filter")
    """DECK, whose backdoors are not patches, takes filters."""
    size: Annotated[float, Interval(gt=0, le=1)] = 0.01
    """The share of the image's pixels that a patch may have."""
    limit: Annotated[float, Interval(gt=0, le=1)] = 0.8
    """Success from which a trigger is taken for a backdoor's: of each class the best such one is unlearned.
    DECK unlearns the best of all; so does this where none gets so far."""
    levels: tuple[str, ...] = ()
    """Layers to stimulate, as in :class:`~untrojan.defenses.scanning.abs.Stimulation`."""
    steps: Annotated[int, Ge(1)] = 300
    """Of a filter's search; the released code takes 1,000."""
    stamped: Annotated[float, Interval(ge=0, le=1)] = 0.2
    """What follows is :class:`~untrojan.defenses.repair.unlearning.Unlearning`'s."""
    epochs: Annotated[int, Ge(1)] = 1
    learning_rate: Annotated[float, Gt(0)] = 0.01
    batch_size: Annotated[int, Ge(2)] = 32
    seed: int = 0

    def __call__(self, model: Classifier, clean: ImageSet, *, checkpoint: Path | None = None) -> RepairReport:
        """Repair ``model`` with ``clean``, images known to be rightly labelled.

        Raises UntrojanError where no channel is under suspicion, for a level the network lacks, where the
        model's classes are not the images', or training diverges.
        """
        if not self.kinds:
            raise UntrojanError("abs needs a kind of trigger to invert: patch, filter or both")
        scanner = ABS(size=self.size, levels=self.levels, seed=self.seed)
        candidates = scanner.candidates(model, clean)
        if not candidates:
            raise UntrojanError(
                "no inner channel raises one class on all images, so there is no trigger to undo: "
                "choose a repair that needs none, such as nad"
            )
        found: list[tuple[Inverted, Stamp]] = []
        if "patch" in self.kinds:
            place = stage_file(checkpoint, "patches")
            patches = scanner.invert(model, clean, candidates, (self.size,), place)
            found += [(Inverted("patch", each.candidate, each.success), each.trigger) for each in patches]
        if "filter" in self.kinds:
            found += self._filters(model, clean, candidates, stage_file(checkpoint, "filters"))
        undone = self._working(found)
        unlearning = Unlearning(
            self.stamped, self.epochs, self.learning_rate, self.batch_size, seed=self.seed
        )
        report = unlearning(model, clean, [trigger for _, trigger in undone], checkpoint=checkpoint)
        told: dict[str, Any] = {
            "unlearned": [each.to_json() for each, _ in undone],
            "inverted": [each.to_json() for each, _ in found],
        }
        return RepairReport(report.model, {**report.history, **told})

    def _working(self, found: list[tuple[Inverted, Stamp]]) -> list[tuple[Inverted, Stamp]]:
        """Each class's best trigger among those that work, or the best of all where none does."""
        best: dict[int, tuple[Inverted, Stamp]] = {}
        for each in sorted(found, key=lambda each: -each[0].success):
            best.setdefault(each[0].candidate.label, each)
        ranked = list(best.values())
        return [each for each in ranked if each[0].success >= self.limit] or ranked[:1]

    def _filters(
        self, model: Classifier, clean: ImageSet, candidates: list[Candidate], checkpoint: Path | None
    ) -> list[tuple[Inverted, Stamp]]:
        levels = tuple(dict.fromkeys(each.level for each in candidates))
        sample = sampled(clean, 24, self.seed)
        moments = second_moments(sample.images.float() / 255)
        generator = FilterGenerator(moments)
        problem = StimulatedFilter(levels, generator.problem(self.seed))
        pairs = torch.tensor([
            [ANY, each.label, levels.index(each.level), each.channel] for each in candidates
        ])  # fmt: skip
        searched = invert(
            model, sample, pairs, problem, schedule_of(generator, self.steps, 0.9, paper=False),
            seed=self.seed, checkpoint=checkpoint, description="inverting filters",
        )  # fmt: skip
        stamps = [Filter(matrix, problem.filter) for matrix in searched.parameters]
        return [
            (Inverted("filter", each, success_of(stamp, model, clean, each.label)), stamp)
            for each, stamp in zip(candidates, stamps, strict=True)
        ]
