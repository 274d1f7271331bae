"""What cleansers that look at one class at a time have in common: a statistic for each class, its limit or
its p-value, and the report that follows.

Published limits were tuned on known attacks. Without one (``limit`` None), a class's statistic is held
against those of classes taken to be clean, the trusted ones' where the auditor has trusted images and the
others' where not, so that ``significance`` is the share of clean sets that raise an alarm.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.defenses.cleansing.features import Features
from untrojan.defenses.cleansing.order_statistics import log_smallest_of
from untrojan.defenses.cleansing.report import CleansingReport, Verdict
from untrojan.models.classifier import Classifier


@dataclass(frozen=True, eq=False)
class ClassFinding:
    """What a detector has found in one class."""

    statistic: float
    """The larger, the more it looks poisoned."""
    suspects: Tensor
    """bool (n,): the images to remove if it is."""
    scores: Tensor
    """float (n,): the higher, the more suspicious within the class."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further figures for the evidence, as JSON types."""
    unjudged: str = ""
    """Why no weight can be put on the statistic; empty where it can."""


REMOVES_ALWAYS = -math.inf
"""The limit of methods that, as published, detect nothing and remove the suspects of every class."""


class ClassCleanser(ABC):
    """A cleanser made of :meth:`examine`. Its dataclass has the fields ``level``, ``significance`` and
    ``threshold``."""

    level: str
    """Where features are taken, see :mod:`untrojan.models.taps`; ``s1+s2+s3`` fuses levels."""
    significance: float
    """The share of clean sets that may be called poisoned where there is no limit."""
    threshold: float | Literal["published", "calibrated"]
    """The limit of the statistic, or where it comes from."""
    published_limit: ClassVar[float] = REMOVES_ALWAYS
    fewest: ClassVar[int] = 4
    """Smaller classes are left out, and named in the evidence."""
    looks_at_features: ClassVar[bool] = True
    """Whether a class of images with equal features at ``level`` leaves nothing to judge by."""
    least_spread: ClassVar[float] = 0.0
    """The least standard deviation of clean classes' statistics, however alike those at hand are."""

    @property
    def limit(self) -> float | None:
        """Classes above it are poisoned; None judges by p-values. See :data:`REMOVES_ALWAYS`."""
        if self.threshold == "published":
            return self.published_limit
        return None if isinstance(self.threshold, str) else self.threshold

    @abstractmethod
    def examine(self, features: Features, label: int, rows: Tensor) -> ClassFinding:
        """Look at the images ``rows``, int64 (n,), all labelled ``label``."""

    def __call__(
        self, train: ImageSet, model: Classifier, *, checkpoint: Path | None = None
    ) -> CleansingReport:
        """Judge ``train`` by the features of ``model``, trained on it. ``checkpoint`` is not needed."""
        return self.judge(Features(model, train))

    def judge(self, features: Features) -> CleansingReport:
        """Judge a set by features that other cleansers may share."""
        features.extract([self.level])
        return self.report(features, self.examine_all(features))

    def report(self, features: Features, found: Mapping[int, ClassFinding]) -> CleansingReport:
        """The report on what :meth:`examine_all` has found."""
        train = features.data
        statistics = {label: finding.statistic for label, finding in found.items()}
        log_p_values: dict[int, float] = {}
        if self.limit is not None:
            targets = [label for label, value in statistics.items() if value > self.limit]
            targets.sort(key=lambda label: -statistics[label])
        else:
            null = None if features.trusted is None else self.examine_all(features.trusted)
            values = None if null is None else [finding.statistic for finding in null.values()]
            targets, log_p_values = outlying_classes(statistics, self.significance, values, self.least_spread)
        flagged, scores = torch.zeros(len(train), dtype=torch.bool), torch.zeros(len(train))
        for label, finding in found.items():
            rows = train.indices_of(label)
            scores[rows] = finding.scores.float()
            flagged[rows] = finding.suspects & (label in targets)
        unjudged = self._unjudged(features, found)
        return CleansingReport(
            verdict=self._verdict(targets, statistics, unjudged),
            flagged=flagged,
            scores=scores,
            targets=tuple(targets),
            sources=tuple(() for _ in targets),
            reason=self._reason(train, targets, statistics, log_p_values, unjudged),
            evidence=self._evidence(train, found, log_p_values, unjudged),
        )

    def examine_all(self, features: Features) -> dict[int, ClassFinding]:
        """:meth:`examine` for every class that has images enough."""
        data = features.data
        rows = {label: data.indices_of(label) for label in range(data.num_classes)}
        return {c: self.examine(features, c, r) for c, r in rows.items() if len(r) >= self.fewest}

    def _unjudged(self, features: Features, found: Mapping[int, ClassFinding]) -> dict[int, str]:
        """Classes with images that this method can say nothing of, and why."""
        unjudged: dict[int, str] = {}
        for label, count in enumerate(features.data.class_counts.tolist()):
            if not count:
                continue
            if label not in found:
                unjudged[label] = self._too_few(features, label, count)
            elif found[label].unjudged:
                unjudged[label] = found[label].unjudged
            elif self.looks_at_features and self.limit != REMOVES_ALWAYS:
                values = features.at(self.level, features.data.indices_of(label))
                if bool((values == values[:1]).all()):
                    unjudged[label] = "the features of all its images are equal"
        return unjudged

    def _too_few(self, features: Features, label: int, count: int) -> str:
        if count < self.fewest:
            return f"it has {count} of the {self.fewest} images that are needed"
        return "there are too few other or trusted images to hold it against"

    def _verdict(
        self, targets: list[int], statistics: Mapping[int, float], unjudged: Mapping[int, str]
    ) -> Verdict:
        if targets:
            return "poisoned"
        too_few = len(statistics) < (3 if self.limit is None else 1)
        return "undecided" if too_few or unjudged else "clean"

    def _reason(
        self,
        train: ImageSet,
        targets: list[int],
        statistics: Mapping[int, float],
        log_p_values: Mapping[int, float],
        unjudged: Mapping[int, str],
    ) -> str:
        if not statistics:
            return f"no class has {self.fewest} images to look at"
        if self.limit == REMOVES_ALWAYS:
            return "as published this method detects nothing: it removes suspects from every class"
        worst = targets[0] if targets else max(statistics, key=lambda label: statistics[label])
        measure = f"statistic {statistics[worst]:.3g}"
        if self.limit is not None:
            measure += f", limit {self.limit:.3g}"
        elif log_p_values:
            measure += f", p = {math.exp(log_smallest_of(log_p_values[worst], len(log_p_values))):.2g}"
        name = train.class_names[worst]
        if targets:
            return f"class {name!r} holds two kinds of images ({measure})"
        if unjudged:
            label, why = next(iter(unjudged.items()))
            more = f", and {len(unjudged) - 1} more" if len(unjudged) > 1 else ""
            return (
                f"no class that could be judged stands out, but {train.class_names[label]!r} could not be: "
                f"{why}{more}"
            )
        return f"no class stands out; the nearest to it is {name!r} ({measure})"

    def _evidence(
        self,
        train: ImageSet,
        found: Mapping[int, ClassFinding],
        log_p_values: Mapping[int, float],
        unjudged: Mapping[int, str],
    ) -> dict[str, Any]:
        evidence: dict[str, Any] = {
            "class_statistics": {str(label): finding.statistic for label, finding in found.items()},
            "class_suspects": {str(label): int(f.suspects.sum()) for label, f in found.items()},
            "class_details": {str(label): dict(f.details) for label, f in found.items() if f.details},
            "classes_left_out": [label for label in range(train.num_classes) if label not in found],
            "classes_unjudged": {str(label): why for label, why in unjudged.items()},
        }
        if log_p_values:
            smallest = log_smallest_of(min(log_p_values.values()), len(log_p_values))
            evidence["p_value"] = math.exp(smallest)
            evidence["log10_p_value"] = smallest / math.log(10)
            evidence["class_log10_p_values"] = {
                str(label): value / math.log(10) for label, value in log_p_values.items()
            }
        return evidence


class JointClassCleanser(ClassCleanser):
    """A cleanser made of :meth:`examine_all`: it judges a class by the others, so looks at all together."""

    @abstractmethod
    def examine_all(self, features: Features) -> dict[int, ClassFinding]:
        """What is found in every class that has images enough."""

    def examine(self, features: Features, label: int, rows: Tensor) -> ClassFinding:
        """As :meth:`examine_all` does, at its full cost."""
        return self.examine_all(features)[label]


def with_statistics(
    found: Mapping[int, ClassFinding], scale: Callable[[Tensor], Tensor]
) -> dict[int, ClassFinding]:
    """The findings with their statistics put on another scale, which may be one that compares classes."""
    scaled = scale(torch.tensor([each.statistic for each in found.values()], dtype=torch.float64)).tolist()
    return {
        label: replace(each, statistic=value)
        for (label, each), value in zip(found.items(), scaled, strict=True)
    }


def outlying_classes(
    statistics: Mapping[int, float],
    significance: float,
    null: list[float] | None = None,
    least_spread: float = 0.0,
) -> tuple[list[int], dict[int, float]]:
    """Classes whose statistic the null does not explain, the clearest first, and each class's ln p-value.

    ``null`` are statistics of clean classes; without them the null of a class is all the others, less those
    found before. Either way the class is taken as one more draw from a normal distribution of unknown mean
    and variance: Student's prediction interval, exact for any number of classes. The smallest of the p-values
    is corrected for the number of classes. Further classes are found at a hundredth of ``significance``: as
    in RE, a second target that is none costs a clean class its images.
    """
    targets: list[int] = []
    first: dict[int, float] = {}
    while len(targets) < max(1, len(statistics) // 2):
        left = {label: value for label, value in statistics.items() if label not in targets}
        log_p = {
            label: log_upper_prediction(
                value, null or [v for c, v in left.items() if c != label], least_spread
            )
            for label, value in left.items()
        }
        first = first or log_p
        if not log_p:
            break
        clearest = min(log_p, key=lambda label: log_p[label])
        level = significance / 100 if targets else significance
        if log_smallest_of(log_p[clearest], len(log_p)) > math.log(level):
            break
        targets.append(clearest)
    return targets, first


def log_upper_prediction(value: float, null: list[float], least_spread: float = 0.0) -> float:
    """ln of the chance that one more draw from the normal distribution behind ``null`` reaches ``value``.

    0 (a chance of one) where fewer than two values leave nothing to judge by. Equal values show no spread:
    all that can be said of one above them is that it ranks first, unless a ``least_spread`` is known.
    """
    from scipy.stats import t

    count = len(null)
    if count < 2:
        return 0.0
    mean, deviation = float(np.mean(null)), max(float(np.std(null, ddof=1)), least_spread)
    if deviation <= 1e-9 * max(abs(mean), abs(value), 1e-300):
        return -math.log(count + 1) if value > max(null) else 0.0
    return float(t.logsf((value - mean) / (deviation * math.sqrt(1 + 1 / count)), count - 1))
