"""Subspace Reconstruction: a subspace that holds a class's clean features loses much of the poison's.

Javaheripi et al., "CLEANN: Accelerated Trojan Shield for Embedded Neural Networks", ICCAD 2020, in the form
in which SDRM (Xia et al.) has it as a defence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from untrojan.defenses.cleansing.by_class import ClassCleanser, ClassFinding
from untrojan.defenses.cleansing.features import Features
from untrojan.defenses.cleansing.report import CleansingReport
from untrojan.errors import UntrojanError

FOLDS = 20
"""Of the trusted images, each scored by a fit to the others."""


@dataclass(frozen=True, eq=False)
class Subspace:
    """Where the clean features of a class lie."""

    mean: Tensor
    """float64 (D,)."""
    directions: Tensor
    """float64 (r, D), orthonormal."""

    def lost(self, features: Tensor) -> Tensor:
        """float64 (n,): the norm of what the subspace leaves of features (n, D)."""
        rest = features.double() - self.mean
        lost: Tensor = (rest - rest @ self.directions.T @ self.directions).norm(dim=1)
        return lost


def fitted_subspace(clean: Tensor, energy: float = 0.9) -> Subspace:
    """The smallest centred subspace that holds a share ``energy`` of clean features' (m, D) variance."""
    mean = clean.double().mean(0)
    _, sizes, directions = torch.linalg.svd(clean.double() - mean, full_matrices=False)
    held = sizes.square().cumsum(0)
    # Rounding may leave the last sum below the whole.
    rank = int((held < energy * held[-1] * (1 - 1e-12)).sum()) + 1
    return Subspace(mean, directions[:rank])


def held_out_losses(clean: Tensor, energy: float = 0.9) -> Tensor:
    """float64 (m,): what is lost of each of the clean features (m, D) by a subspace fitted without it.

    The subspace that they helped to fit loses too little of them to compare others with.
    """
    fold = torch.arange(len(clean)) % FOLDS
    losses = torch.empty(len(clean), dtype=torch.float64)
    for each in range(min(FOLDS, len(clean))):
        losses[fold == each] = fitted_subspace(clean[fold != each], energy).lost(clean[fold == each])
    return losses


@dataclass(frozen=True)
class SubspaceReconstruction(ClassCleanser):
    """Subspace Reconstruction with a subspace for each class, fitted to trusted images of it.

    SDRM compares by the best F1 over all thresholds, which takes the truth. Here an image is suspect where it
    loses more than nearly all trusted images do that were left out of the fit. The statistic is the share of
    suspects beyond the share expected, the null that of the trusted images not fitted.
    """

    threshold: float | Literal["calibrated"] = "calibrated"
    energy: Annotated[float, Interval(gt=0, le=1)] = 0.9
    trusted_images: Annotated[int, Ge(4)] = 50
    """Of each class, fitted at most: 1 % of CIFAR-10's training images, as in SDRM. Never more than half of
    the trusted ones. With 50 the quantile is uncertain by 3 % of the class: more find rarer poison, and many
    fewer raise more false alarms than ``significance`` says."""
    quantile: Annotated[float, Interval(gt=0, lt=1)] = 0.95
    """Of the trusted images' losses: images that lose more are suspect."""
    level: str = "penultimate"
    significance: Annotated[float, Interval(gt=0, lt=1)] = 0.05
    seed: int = 0

    def judge(self, features: Features) -> CleansingReport:
        """Raises UntrojanError without trusted images."""
        if features.trusted is None:
            raise UntrojanError(
                "subspace reconstruction needs trusted images of each class: give some "
                "(untrojan audit --trusted), or choose a cleanser that needs none"
            )
        return super().judge(features)

    def examine_all(self, features: Features) -> dict[int, ClassFinding]:
        trusted = _trusted(features).data
        enough = trusted.class_counts >= 2 * self.fewest
        rows = {label: features.data.indices_of(label) for label in range(features.data.num_classes)}
        return {
            label: self.examine(features, label, each)
            for label, each in rows.items()
            if len(each) >= self.fewest and enough[label]
        }

    def examine(self, features: Features, label: int, rows: Tensor) -> ClassFinding:
        trusted = _trusted(features)
        of_class = trusted.data.indices_of(label)
        random = torch.Generator().manual_seed(self.seed)
        order = of_class[torch.randperm(len(of_class), generator=random)]
        fitted, rest = order.tensor_split([min(self.trusted_images, len(order) // 2)])
        clean = trusted.at(self.level, fitted)
        # Trusted images that are themselves examined must not be those fitted.
        examined = rest if features.trusted is None else rows
        losses = fitted_subspace(clean, self.energy).lost(features.at(self.level, examined))
        expected = held_out_losses(clean, self.energy)
        # A class without spread is lost whole or not at all, but for rounding.
        suspects = losses > expected.quantile(self.quantile) + 1e-6 * clean.norm(dim=1).mean()
        return ClassFinding(
            float(suspects.double().mean()) - (1 - self.quantile),
            suspects,
            losses / expected.median().clamp_min(1e-300),
            {"fitted": len(fitted)},
        )


def _trusted(features: Features) -> Features:
    """The trusted images; the base class also examines these by themselves."""
    return features if features.trusted is None else features.trusted
