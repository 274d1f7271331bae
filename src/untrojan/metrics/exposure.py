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
    """Ask ``detector`` about ``clean`` test images of every *predicted* class, and ``ratio`` times as many
    triggered ones that the model takes for ``target``; fewer where there are fewer.

    A detector with a ``count`` is told how many carry the trigger, as the paper tells spectral signatures.
    Where less than :data:`FEWEST` triggered images succeed, rates are None.
    Raises UntrojanError for an unknown target, and as the detector does.
    """
    if not 0 <= target < model.num_classes:
        raise UntrojanError(f"no class {target}: the model has classes 0..{model.num_classes - 1}")
    predicted = predictions_of(model, clean_test.images)
    rows = [_drawn(predicted == label, clean, seed, label) for label in range(model.num_classes)]
    ordinary = clean_test.select(torch.cat(rows))
    ordinary = replace(ordinary, labels=predicted[torch.cat(rows)])
    fooled = predictions_of(model, triggered.images) == target
    carriers = _drawn(fooled, round(ratio * len(rows[target])), seed, -1)
    attacked = _joined(ordinary, triggered.images[carriers], target)
    asked = detector
    if any(field.name == "count" for field in fields(cast("Any", detector))):
        asked = replace(cast("Any", detector), count=max(1, len(carriers)))
    # First, for it refuses what the detector cannot do without.
    alarm = asked.judge(Features(model, ordinary, trusted))
    seen = Features(model, attacked, trusted)
    findings = asked.examine_all(seen)
    report, found = asked.report(seen, findings), findings.get(target)
    rates: tuple[float | None, float | None, float | None, float | None, float | None] = (None,) * 5
    if found is not None and min(len(carriers), len(rows[target])) >= FEWEST:
        truth = (torch.arange(len(attacked)) >= len(ordinary))[attacked.labels == target]
        even = len(carriers) == len(rows[target])
        rates = (
            _f1(found.suspects, truth, even), *_by_score(found.scores, truth),
            float(found.suspects[truth].float().mean()), float(found.suspects[~truth].float().mean()),
        )  # fmt: skip
    return Exposure(
        *rates, report.targets == (target,), bool(alarm.targets), len(rows[target]), len(carriers)
    )


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
