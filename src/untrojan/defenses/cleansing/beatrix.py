"""Beatrix: a trigger changes which features are active together, which Gram matrices show.

Ma et al., "The Beatrix Resurrections: Robust Backdoor Detection via Gram Matrices", NDSS 2023.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from untrojan.defenses.cleansing.by_class import ClassFinding, JointClassCleanser, with_statistics
from untrojan.defenses.cleansing.features import FUSED, Features
from untrojan.defenses.outliers import anomaly_indices
from untrojan.models.taps import features_of
from untrojan.progress import task
from untrojan.seeding import generator

PUBLISHED_LIMIT = math.exp(2)
"""The anomaly index above which a class is poisoned."""
BLOCK = 512
"""Images whose Gram matrices are in memory at once."""


def gram_features(maps: Tensor, order: int = 1) -> Tensor:
    """Upper triangles (n, C (C + 1) / 2) of the Gram matrices of order p of feature maps (n, C, places).

    Entry (i, j) is the p-th root, with its sign, of the sum over places of f_i^p f_j^p. Feature vectors are
    maps of one place; all orders are alike for them, but for signs.
    """
    # Each channel relative to its peak, or ninth powers leave the range of float32.
    peaks = maps.abs().amax(2)
    powers = (maps / peaks.clamp_min(1e-30).unsqueeze(2)).pow(order)
    grams = powers @ powers.mT
    roots = grams.sign() * grams.abs().pow(1 / order) * peaks.unsqueeze(2) * peaks.unsqueeze(1)
    rows, columns = torch.triu_indices(maps.shape[1], maps.shape[1])
    return roots[:, rows, columns]


@dataclass(frozen=True, eq=False)
class Bounds:
    """Where each entry of clean Gram features lies."""

    low: Tensor
    """(E,)."""
    high: Tensor
    """(E,)."""

    @classmethod
    def of(cls, grams: Tensor, width: float) -> Bounds:
        """Of each column of ``grams`` (n, E): the median -+ ``width`` median absolute deviations."""
        middle = grams.median(0).values
        reach = width * (grams - middle).abs().median(0).values
        return cls(middle - reach, middle + reach)

    def deviations(self, grams: Tensor) -> Tensor:
        """How far outside Gram features (n, E) lie, summed over entries: (n,), 0 or more.

        Each excess is relative to its bound, as in the paper, or to the mean bound where that is larger:
        else an entry that is zero in nearly all images would outweigh the rest. That floor is ours.
        """
        floor = self.high.abs().mean().clamp_min(1e-30)
        below = (self.low - grams).clamp_min(0) / self.low.abs().maximum(floor)
        above = (grams - self.high).clamp_min(0) / self.high.abs().maximum(floor)
        return (below + above).sum(1)


def regularised_mmd(first: Tensor, second: Tensor, regularisation: float) -> float:
    """Squared maximum mean discrepancy of points (n, E) and (m, E), n, m > 1, less ``regularisation`` times
    the squared norms of both mean embeddings.

    The estimate is unbiased: it may be negative. The kernel is Gaussian, of variance half the median squared
    distance of different points.
    """
    points = torch.cat([first, second])
    squares = torch.cdist(points, points).square()
    apart = squares[~torch.eye(len(points), dtype=torch.bool)]
    kernel = (-squares / apart.median().clamp_min(1e-30)).exp()
    n, m = len(first), len(second)
    of_first = float((kernel[:n, :n].sum() - n) / (n * (n - 1)))
    of_second = float((kernel[n:, n:].sum() - m) / (m * (m - 1)))
    across = float(kernel[:n, n:].mean())
    return of_first + of_second - 2 * across - regularisation * (of_first + of_second)


@dataclass(frozen=True)
class Beatrix(JointClassCleanser):
    """Beatrix: images whose Gram features lie outside their class's bounds, and the classes in which such
    images are many and a kind of their own.

    Bounds are those of the trusted images of the class where there are some. Without these they are the
    class's own medians and deviations, which poison moves little while it is a small part of the class. An
    image is a suspect where it deviates more than all but ``false_positive_rate`` of the trusted images, or,
    without these, of the images of all other classes.

    The class's statistic is the regularised MMD of suspects and others, times both their shares: a few odd
    images do not make a class stand out. The shares are ours, as is the kernel's width.
    """

    threshold: float | Literal["published", "calibrated"] = "published"
    """The limit of the anomaly index of a class's statistic among all, or p-values in its place."""
    orders: Annotated[int, Interval(ge=1, le=16)] = 3
    """Gram matrices of orders 1 to this. The paper has 9, at three times the cost; higher orders come ever
    closer to the product of two channels' peaks. Feature vectors need the first order alone."""
    width: Annotated[float, Ge(0)] = 10.0
    """Half of the bounds' interval, in median absolute deviations; the paper's k."""
    channels: Annotated[int, Ge(1)] = 64
    """Channels that are looked at, those that vary most in the class. The paper has all; but the entries grow
    with the square: 2,080 for 64 channels and 131,328 for 512."""
    references: Annotated[int, Ge(4)] = 1000
    """At most so many images, drawn at random, set a class's bounds, or stand for a group in the MMD."""
    false_positive_rate: Annotated[float, Interval(gt=0, lt=0.5)] = 0.05
    """The share of clean images that may be suspects; ours."""
    regularisation: Annotated[float, Ge(0)] = 0.01
    """Of the MMD; ours."""
    level: str = "s2"
    """Maps, for vectors have one order. At the deepest level most features are zero in most images, and clean
    images deviate too. Deviations at fused levels add up."""
    significance: Annotated[float, Interval(gt=0, lt=1)] = 0.05
    seed: int = 0

    # Squared discrepancies times shares: where no class has suspects, all are exactly 0.
    least_spread: ClassVar[float] = 0.01

    published_limit: ClassVar[float] = PUBLISHED_LIMIT

    def examine_all(self, features: Features) -> dict[int, ClassFinding]:
        data = features.data
        labels = [c for c in range(data.num_classes) if int(data.class_counts[c]) >= self.fewest]
        deviations: dict[int, Tensor] = {}
        clean: dict[int, Tensor] = {}
        with task("comparing Gram matrices", len(labels), "classes") as bar:
            for label in labels:
                deviations[label], clean[label] = self._deviations(features, label)
                bar.advance()
        found = {}
        for label in labels:
            judges = [clean[c] for c in labels if features.trusted is not None or c != label]
            if judges:
                allowed = torch.cat(judges).quantile(1 - self.false_positive_rate)
                suspects = deviations[label] > allowed
                found[label] = ClassFinding(
                    self._separation(features, label, suspects),
                    suspects,
                    deviations[label],
                    {"allowed_deviation": float(allowed), "share": float(suspects.float().mean())},
                )
        return found if self.limit is None else with_statistics(found, anomaly_indices)

    def _deviations(self, features: Features, label: int) -> tuple[Tensor, Tensor]:
        """(n,) of the class's images and of its trusted ones; the former twice where none are trusted."""
        random = generator(self.seed, "beatrix", "bounds", label)
        total = total_trusted = torch.zeros(())
        for own, trusted in self._maps(features, label):
            known = own if trusted is None or len(trusted) < self.fewest else trusted
            known = known[torch.randperm(len(known), generator=random)[: self.references]]
            for order in range(1, (self.orders if own.shape[2] > 1 else 1) + 1):
                bounds = Bounds.of(gram_features(known, order), self.width)
                total = total + _in_blocks(bounds, own, order)
                if trusted is not None:
                    total_trusted = total_trusted + _in_blocks(bounds, trusted, order)
        return total, total if features.trusted is None else total_trusted

    def _separation(self, features: Features, label: int, suspects: Tensor) -> float:
        """The regularised MMD of the class's suspects and others, by first-order Gram features, times the
        shares of both; 0 where either has less than two images."""
        if min(int(suspects.sum()), int((~suspects).sum())) < 2:
            return 0.0
        random = generator(self.seed, "beatrix", "mmd", label)
        drawn = [
            rows[torch.randperm(len(rows), generator=random)[: self.references]]
            for rows in (suspects.nonzero().flatten(), (~suspects).nonzero().flatten())
        ]
        parts = []
        for own, _ in self._maps(features, label):
            grams = gram_features(own[torch.cat(drawn)])
            parts.append(grams / grams.square().sum(1).mean().sqrt().clamp_min(1e-30))
        first, second = torch.cat(parts, 1).split([len(rows) for rows in drawn])
        share = float(suspects.float().mean())
        return share * (1 - share) * regularised_mmd(first, second, self.regularisation)

    def _maps(self, features: Features, label: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """For each level: feature maps (n, C, places) of a class's images, and of its trusted ones if any.

        Only of the channels that vary most among the class's images.
        """
        data, trusted = features.data, features.trusted
        for level in self.level.split(FUSED):
            width = features_of(features.model, data.images[:1], level).shape[1]
            own = features.at(level, data.indices_of(label)).unflatten(1, (width, -1))
            kept = own.var(0).mean(1).argsort(descending=True)[: self.channels]
            if trusted is None:
                yield own[:, kept], None
            else:
                rows = trusted.data.indices_of(label)
                yield own[:, kept], trusted.at(level, rows).unflatten(1, (width, -1))[:, kept]


def _in_blocks(bounds: Bounds, maps: Tensor, order: int) -> Tensor:
    blocks = [bounds.deviations(gram_features(block, order)) for block in maps.split(BLOCK)]
    return torch.cat(blocks)
