"""RE: reverse-engineer imperceptible backdoor patterns, detect the attack, cleanse the training set.

Xiang, Miller & Kesidis, "Reverse Engineering Imperceptible Backdoor Attacks on Deep Neural Networks for
Detection and Training Set Cleansing", algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Gt, Interval
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.defenses.cleansing.order_statistics import (
    ClassTest,
    Detection,
    Floats,
    Location,
    find_targets,
    order_statistic_test,
)
from untrojan.defenses.cleansing.pair_screening import ALL_PAIRS_UP_TO, screen
from untrojan.defenses.cleansing.pattern_removal import Removal, Threshold, remove, threshold_between
from untrojan.defenses.cleansing.report import CleansingReport
from untrojan.inversion.additive import AdditivePattern
from untrojan.inversion.engine import (
    FAST,
    PAPER,
    Inversion,
    Problem,
    ProportionalStep,
    Schedule,
    all_pairs,
    invert,
)
from untrojan.models.classifier import Classifier

POLISH = Schedule(
    ProportionalStep(share=0.02, least=9e-5, memory=0.5),
    images_a_side=128,
    confirm_every=1,
    most_steps=600,
    stall_steps=100,
)
"""The pattern that cleanses is estimated once more with small steps and confirmed on every source image:
a coarse pattern detects as well, but flags more clean images."""
REPETITIONS = 2
"""Times that the pattern is estimated anew with the images it has flagged in place of all the target's. Most
of a class is clean, and a pattern that has to unflip all of it moves clean images too; one that has to unflip
the flagged images alone comes nearer to what these have in common.

In the end it is asked to unflip as many of them as it flips of the source. A net that was trained on shifted
images answers to a fraction of the true pattern, and a pattern that just carries the source over is then far
too faint to take the true one away. Earlier it would have to unflip what was flagged by mistake, too."""
STILL_FLAGGED = 0.95
"""The share of the flagged images that the last estimate must flag again, or it is not taken: unable to
unflip the carriers, it has grown into something else."""
MORE_REPETITIONS, GROWTH = 5, 1.02
"""Times that the last estimate is made once more with what it has flagged, while each flags a fiftieth more.
Where a pattern is clipped away in many images, the first to be flagged are those that carry most of it."""
FEWEST_FLAGGED = 8
"""Below that there is nothing to repeat the estimate with."""


@dataclass(frozen=True, eq=False)
class _Carriers:
    pattern: Tensor
    removal: Removal
    threshold: Threshold
    flagged: Tensor
    """bool, one for each of the removal's rows."""


@dataclass(frozen=True, eq=False)
class _Cleansed:
    kept: tuple[ClassTest, ...]
    flagged: Tensor
    scores: Tensor
    evidence: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Inference:
    """What the patterns of all pairs say."""

    found: tuple[ClassTest, ...]
    sources: dict[int, tuple[int, ...]]
    """By target found."""
    blind: str
    """Why nothing can be said; empty where it can."""
    reason: str
    evidence: dict[str, Any]


@dataclass(frozen=True)
class ReverseEngineering:
    """RE's algorithm 1. The defaults are the paper's, but for the schedule, which is the fast one."""

    schedule: Literal["fast", "paper"] = "fast"
    flip_fraction: Annotated[float, Interval(gt=0, lt=1)] = 0.95
    """pi: the share of a source class that a pattern must carry over."""
    balance: Annotated[float, Gt(0)] = 1.0
    """lambda: how much flipping the source counts against unflipping the target."""
    significance: Annotated[float, Interval(gt=0, lt=1)] = 0.05
    """theta: the p-value under which an attack is declared."""
    location: Literal["free", "zero"] = "free"
    """The Gamma null's location: free as the paper's author fits it, or zero. Both are reported."""
    cleansing: Literal["shift", "paper"] = "shift"
    """``paper`` flags what the estimated pattern's removal unflips (equation 12). ``shift`` flags what the
    removal moves back about as far as the pattern moves the source class forth: images near the border unflip
    whether they carry the pattern or not, and a pattern that just carries a class over is too weak to unflip
    all that do."""
    calibrate: bool = True
    """Correct the p-value for the null having been estimated. Off, the test is the paper's to the letter,
    and alarms on about one clean set in ten."""
    seed: int = 0

    def __call__(
        self, train: ImageSet, model: Classifier, *, checkpoint: Path | None = None
    ) -> CleansingReport:
        """Algorithm 1 on ``model``, a classifier trained on ``train`` without augmentation.

        Raises UntrojanError for fewer than three classes (no null can be fitted) or a class without images.
        """
        inversion, weights = self.estimate_patterns(train, model, AdditivePattern(self.balance), checkpoint)
        inferred = self.infer(inversion, train.class_names, weights)
        if inferred.blind:
            nothing = torch.zeros(len(train))
            return CleansingReport(
                "undecided", nothing.bool(), nothing, reason=inferred.blind, evidence=inferred.evidence
            )
        cleansed = self._cleanse(train, model, inversion, inferred.found)
        return CleansingReport(
            verdict="poisoned" if inferred.found else "clean",
            flagged=cleansed.flagged,
            scores=cleansed.scores,
            targets=tuple(test.target for test in cleansed.kept),
            sources=tuple(inferred.sources[test.target] for test in cleansed.kept),
            reason=inferred.reason,
            evidence=inferred.evidence | cleansed.evidence,
        )

    def estimate_patterns(
        self, data: ImageSet, model: Classifier, problem: Problem, checkpoint: Path | None = None
    ) -> tuple[Inversion, Floats | None]:
        """Lines 3-8 for every pair, or for those that :func:`screen` chooses, whose weights come second.

        Raises UntrojanError for a class without images.
        """
        pairs, weights = all_pairs(data.num_classes), None
        if data.num_classes > ALL_PAIRS_UP_TO and self.schedule == "fast":
            pairs, weights = screen(model, data, problem, self.seed)
        schedule = replace(PAPER if self.schedule == "paper" else FAST, flip_fraction=self.flip_fraction)
        inversion = invert(
            model, data, pairs, problem, schedule, seed=self.seed, checkpoint=checkpoint,
            description="estimating patterns",
        )  # fmt: skip
        return inversion, weights

    def infer(
        self, inversion: Inversion, class_names: Sequence[str], weights: Floats | None = None
    ) -> Inference:
        """Lines 9-17: which classes a pattern leads to that is too small to be chance."""
        reciprocals = reciprocals_of(inversion, len(class_names))
        evidence: dict[str, Any] = _evidence(inversion, reciprocals)
        blind = _too_many_failures(reciprocals, len(inversion.pairs))
        if blind:
            return Inference((), {}, blind, blind, evidence)
        found, overall, log_p_value = find_targets(
            reciprocals, self.significance, location=self.location, weights=weights, calibrate=self.calibrate
        )
        return Inference(
            found=found,
            sources={test.target: _sources(reciprocals, test, self.significance) for test in found},
            blind="",
            reason=_reason(found, overall, log_p_value, class_names),
            evidence=evidence | self._statistics(reciprocals, overall, log_p_value, weights),
        )

    def _cleanse(
        self, train: ImageSet, model: Classifier, inversion: Inversion, found: tuple[ClassTest, ...]
    ) -> _Cleansed:
        """Lines 18-22, for every target found."""
        flagged, scores, readings = _none(train), torch.zeros(len(train)), train.labels.clone()
        kept: list[ClassTest] = []
        patterns: dict[int, Tensor] = {}
        thresholds: dict[int, Threshold] = {}
        for test in found:
            carriers = self._carriers(train, train, model, inversion, test)
            if kept and float((carriers.removal.readings != test.target).float().mean()) > 0.5:
                # Poison is a minority. What unflips most of a class after a first attack was found is that
                # attack seen from behind: removing minus its pattern adds it.
                continue
            kept.append(test)
            refining = self.cleansing == "shift" and self.schedule == "fast"
            for number in range(REPETITIONS + 1 + MORE_REPETITIONS if refining else 0):
                if int(carriers.flagged.sum()) < FEWEST_FLAGGED:
                    break
                chosen = train.labels != test.target
                chosen[carriers.removal.rows] = carriers.flagged
                last = number >= REPETITIONS
                again = self._carriers(train.select(chosen), train, model, inversion, test, both_ways=last)
                if last and not _flags_again(carriers, again):
                    break
                if number > REPETITIONS and again.flagged.sum() < GROWTH * carriers.flagged.sum():
                    break
                carriers = again
            removal, threshold, rows = carriers.removal, carriers.threshold, carriers.removal.rows
            flagged[rows] = carriers.flagged
            scores[rows] = ((removal.drops - threshold.at) / max(threshold.spread, 1e-6)).sigmoid()
            readings[rows] = torch.where(carriers.flagged, removal.readings, test.target)
            patterns[test.target], thresholds[test.target] = carriers.pattern, threshold
        evidence = {
            "patterns": patterns,
            "readings": readings,
            "removal_thresholds": {target: each.at for target, each in thresholds.items()},
            "separations": {target: each.separation for target, each in thresholds.items()},
            "dismissed_targets": [test.target for test in found if test not in kept],
        }
        return _Cleansed(tuple(kept), flagged, scores, evidence)

    def _carriers(
        self,
        images: ImageSet,
        train: ImageSet,
        model: Classifier,
        inversion: Inversion,
        test: ClassTest,
        both_ways: bool = False,
    ) -> _Carriers:
        """Which images of ``train`` carry the pattern that is estimated on ``images``."""
        pattern = self._polish(images, model, inversion, test, both_ways)
        removal = remove(model, train, test.source, test.target, pattern)
        threshold = threshold_between(removal.drops, removal.gains)
        shifted, unflipped = removal.drops > threshold.at, removal.readings != test.target
        flagged = shifted if self.cleansing == "shift" else unflipped
        return _Carriers(pattern, removal, threshold, flagged)

    def _statistics(
        self, reciprocals: Floats, overall: Detection, log_p_value: float, weights: Floats | None
    ) -> dict[str, Any]:
        other: Location = "zero" if self.location == "free" else "free"
        alternative = order_statistic_test(reciprocals, location=other, weights=weights)
        suspect = overall.suspect
        return {
            "p_value": float(np.exp(log_p_value)),
            "log10_p_value": log_p_value / np.log(10),
            "log10_p_value_uncalibrated": overall.log_p_value / np.log(10),
            "location": suspect.location,
            "null": {
                "shape": suspect.null.shape, "location": suspect.null.location, "scale": suspect.null.scale,
            },
            "class_log10_p_values": [test.log_p_value / np.log(10) for test in overall.tests],
            f"log10_p_value_location_{other}": alternative.log_p_value / np.log(10),
        }  # fmt: skip

    def _polish(
        self, images: ImageSet, model: Classifier, inversion: Inversion, test: ClassTest, both_ways: bool
    ) -> Tensor:
        row = int(((inversion.pairs == torch.tensor([test.source, test.target])).all(1)).nonzero())
        if self.schedule == "paper":
            return inversion.parameters[row]
        schedule = replace(POLISH, flip_fraction=self.flip_fraction, both_ways=both_ways)
        refined = invert(
            model, images, inversion.pairs[row : row + 1], AdditivePattern(self.balance), schedule,
            seed=self.seed, description="refining the pattern",
        )  # fmt: skip
        return refined.parameters[0] if refined.solved[0] else inversion.parameters[row]


def reciprocals_of(inversion: Inversion, num_classes: int) -> Floats:
    """Section 4.2.2's r = 1/||v||, (K, K) as [source, target]; NaN where a pair failed or was left out."""
    reciprocals = np.full((num_classes, num_classes), np.nan)
    norms = inversion.parameters.double().flatten(1).norm(dim=1).numpy()
    solved = inversion.solved.numpy()
    source, target = inversion.pairs[solved].numpy().T
    # A pair that needs no pattern at all has norm 0; one grey level in one pixel stands for it.
    reciprocals[source, target] = 1 / np.maximum(norms[solved], 1 / 255)
    return reciprocals


def _flags_again(before: _Carriers, after: _Carriers) -> bool:
    kept = int((before.flagged & after.flagged).sum())
    return kept >= STILL_FLAGGED * int(before.flagged.sum())


def _none(train: ImageSet) -> Tensor:
    return torch.zeros(len(train), dtype=torch.bool)


def _too_many_failures(reciprocals: Floats, tried: int) -> str:
    """Why the reciprocals carry no verdict, or nothing where they do."""
    solved = int(np.isfinite(reciprocals).sum())
    if len(reciprocals) < 3:
        return "a null distribution needs at least three classes"
    if solved < tried / 2:
        return f"only {solved} of {tried} class pairs reached the constraint: the model resists inversion"
    return ""


def _sources(reciprocals: Floats, test: ClassTest, significance: float) -> tuple[int, ...]:
    """Classes whose own reciprocal into the target no null pair explains, the strongest first."""
    column = reciprocals[:, test.target]
    threshold = np.log(significance / (len(column) - 1))
    standing_out = [
        source
        for source in np.argsort(-np.nan_to_num(column, nan=-1.0)).tolist()
        if np.isfinite(column[source]) and test.null.log_survival(float(column[source])) < threshold
    ]
    return tuple(standing_out) or (test.source,)


def _reason(
    found: tuple[ClassTest, ...], overall: Detection, log_p_value: float, names: Sequence[str]
) -> str:
    suspect = found[0] if found else overall.suspect
    pair = f"from {names[suspect.source]!r} to {names[suspect.target]!r}"
    norm = 1 / suspect.largest
    if found:
        return (
            f"a pattern of norm {norm:.3g} carries images {pair}, far smaller than other class pairs need "
            f"(p = {_readable(log_p_value)})"
        )
    return (
        f"the smallest pattern, {pair} with norm {norm:.3g}, is as large as chance allows "
        f"(p = {_readable(log_p_value)})"
    )


def _readable(log_p_value: float) -> str:
    if log_p_value > -20:
        return f"{np.exp(log_p_value):.2g}"
    exponent = int(np.floor(log_p_value / np.log(10)))
    return f"{np.exp(log_p_value - exponent * np.log(10)):.0f}e{exponent}"


def _evidence(inversion: Inversion, reciprocals: Floats) -> dict[str, Any]:
    return {
        "reciprocals": reciprocals.tolist(),
        "norms": (1 / reciprocals).tolist(),
        "steps": inversion.steps.tolist(),
        "flip_fractions": inversion.flip_fraction.tolist(),
        "unsolved_pairs": inversion.pairs[~inversion.solved].tolist(),
    }
