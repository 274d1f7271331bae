"""How well a detector tells triggered images at the time of use, from a model's features of them.

Xia et al., "Enhancing Backdoor Attacks with Multi-Level MMD Regularization" (2022), section 6.1: of the test
images that a model takes for the target class, some are clean and some carry the trigger.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from untrojan.data.image_set import ImageSet, numbered
from untrojan.defenses.cleansing.features import Features
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier, predictions_of
from untrojan.seeding import generator

if TYPE_CHECKING:
    from untrojan.attacks.poisoning import TriggeredTest
    from untrojan.defenses.cleansing.by_class import ClassCleanser

FEWEST = 10
"""Images a side below which no rate is worth stating."""


@dataclass(frozen=True)
class Exposure:
    """One detector on one model. The first five look at the target class alone, as the paper does."""

    f1: float | None
    """Of the detector's own suspects. As many triggered as clean images leave open which of two groups is the
    suspect one: then that of the better reading, as the paper's."""
    best_f1: float | None
    """The most that any threshold of its scores gives: chosen by the truth, as the paper chooses it."""
    auc: float | None
    """The chance that a triggered image scores above a clean one."""
    power: float | None
    """The share of triggered images among the detector's own suspects."""
    false_suspects: float | None
    """The share of the target class's clean images among them."""
    detected: bool
    """Whether the detector, which knows of no target, names the target class alone."""
    false_alarm: bool
    """Whether it names any class where no image carries the trigger."""
    clean: int
    """Clean images of each class."""
    triggered: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class SortedTest:
    """A model's test images, clean and triggered, with the classes it gives them: seen once for all that
    detectors are asked about."""

    model: Classifier
    clean: ImageSet
    predicted: Tensor
    """int64 (N,): of the clean images."""
    triggered: Tensor
    """uint8 (M, C, H, W): the triggered images that the model takes for ``target``."""
    target: int

    @classmethod
    def of_clean(cls, model: Classifier, clean_test: ImageSet) -> SortedTest:
        """Of a model without a backdoor: nothing is triggered, and its target is any class."""
        predicted = predictions_of(model, clean_test.images)
        return cls(model, clean_test, predicted, clean_test.images[:0], 0)

    @classmethod
    def of(cls, model: Classifier, clean_test: ImageSet, triggered: TriggeredTest, target: int) -> SortedTest:
        """Raises UntrojanError for an unknown target."""
        if not 0 <= target < model.num_classes:
            raise UntrojanError(f"no class {target}: the model has classes 0..{model.num_classes - 1}")
        fooled = predictions_of(model, triggered.images) == target
        predicted = predictions_of(model, clean_test.images)
        return cls(model, clean_test, predicted, triggered.images[fooled], target)

    def question(
        self, clean: int = 500, ratio: float = 1.0, trusted: ImageSet | None = None, seed: int = 0
    ) -> Question:
        """``clean`` test images of every *predicted* class, and ``ratio`` times as many triggered ones;
        fewer where there are fewer."""
        labels = range(self.model.num_classes)
        rows = [_drawn(self.predicted == label, clean, seed, label) for label in labels]
        ordinary = replace(self.clean.select(torch.cat(rows)), labels=self.predicted[torch.cat(rows)])
        all_triggered = torch.ones(len(self.triggered), dtype=torch.bool)
        carriers = _drawn(all_triggered, round(ratio * len(rows[self.target])), seed, -1)
        attacked = _joined(ordinary, self.triggered[carriers], self.target)
        return Question(
            Features(self.model, ordinary, trusted), Features(self.model, attacked, trusted), self.target,
            clean=len(rows[self.target]), triggered=len(carriers),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Question:
    """Test images that detectors are asked about, with the features that those share."""

    ordinary: Features
    """Of clean images, labelled as predicted."""
    attacked: Features
    """Of the same images and, last and labelled ``target``, the triggered ones."""
    target: int
    clean: int
    """Clean images of the target class."""
    triggered: int

    def put_to(self, detector: ClassCleanser) -> Exposure:
        """The detector's answer, held against the truth.

        A detector with a ``count`` is told how many carry the trigger, as the paper tells spectral
        signatures. With less than :data:`FEWEST` images a side, rates are None. Raises UntrojanError as the
        detector does.
        """
        asked = self._told(detector)
        # First, for it refuses what the detector cannot do without.
        alarm = asked.judge(self.ordinary)
        findings = asked.examine_all(self.attacked)
        report, found = asked.report(self.attacked, findings), findings.get(self.target)
        rates: tuple[float | None, float | None, float | None, float | None, float | None] = (None,) * 5
        if found is not None and min(self.triggered, self.clean) >= FEWEST:
            of_target = self.attacked.data.labels == self.target
            truth = (torch.arange(len(of_target)) >= len(self.ordinary.data))[of_target]
            rates = (
                _f1(found.suspects, truth, self.clean == self.triggered), *_by_score(found.scores, truth),
                float(found.suspects[truth].float().mean()), float(found.suspects[~truth].float().mean()),
            )  # fmt: skip
        return Exposure(
            *rates, report.targets == (self.target,), bool(alarm.targets), self.clean, self.triggered
        )

    def alarms(self, detector: ClassCleanser) -> bool:
        """Whether the detector names a class where no image carries a trigger: all that can be asked about a
        model without a backdoor. Raises UntrojanError as the detector does."""
        return bool(self._told(detector).judge(self.ordinary).targets)

    def _told(self, detector: ClassCleanser) -> ClassCleanser:
        if not any(field.name == "count" for field in fields(cast("Any", detector))):
            return detector
        told: ClassCleanser = replace(cast("Any", detector), count=max(1, self.triggered))
        return told


def exposure(
    model: Classifier,
    clean_test: ImageSet,
    triggered: TriggeredTest,
    target: int,
    detector: ClassCleanser,
    *,
    clean: int = 500,
    ratio: float = 1.0,
    trusted: ImageSet | None = None,
    seed: int = 0,
) -> Exposure:
    """Ask one ``detector`` one question: :meth:`SortedTest.of`, :meth:`SortedTest.question`,
    :meth:`Question.put_to`."""
    seen = SortedTest.of(model, clean_test, triggered, target)
    return seen.question(clean, ratio, trusted, seed).put_to(detector)


def as_predicted(model: Classifier, images: ImageSet) -> ImageSet:
    """The images labelled with what ``model`` takes them for: clean ones among which its honest mistakes are
    nothing strange, as they are not at the time of use."""
    return replace(images, labels=predictions_of(model, images.images))


def _drawn(mask: Tensor, count: int, seed: int, label: int) -> Tensor:
    rows = mask.nonzero().flatten()
    return rows[torch.randperm(len(rows), generator=generator(seed, "exposure", label))[:count]]


def _joined(ordinary: ImageSet, images: Tensor, target: int) -> ImageSet:
    labels = torch.cat([ordinary.labels, torch.full((len(images),), target)])
    return ImageSet(torch.cat([ordinary.images, images]), labels, ordinary.class_names, numbered(len(labels)))


def _f1(suspects: Tensor, truth: Tensor, either_side: bool) -> float:
    from sklearn.metrics import f1_score

    readings = [suspects, ~suspects] if either_side else [suspects]
    return max(float(f1_score(truth, reading, zero_division=0.0)) for reading in readings)


def _by_score(scores: Tensor, truth: Tensor) -> tuple[float, float]:
    from sklearn.metrics import precision_recall_curve, roc_auc_score

    precision, recall, _ = precision_recall_curve(truth, scores)
    harmonic = 2 * precision * recall / (precision + recall).clip(1e-12)
    return float(harmonic.max()), float(roc_auc_score(truth, scores))
