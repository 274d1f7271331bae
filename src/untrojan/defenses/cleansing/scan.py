"""SCAn: representations are a class's identity plus a variation that all classes share; a class that fits
better as two identities is poisoned.

Tang et al., "Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor Contamination Detection",
USENIX Security 2021.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from untrojan.defenses.cleansing.by_class import ClassFinding, JointClassCleanser, with_statistics
from untrojan.defenses.cleansing.features import Features
from untrojan.defenses.outliers import anomaly_indices

PUBLISHED_LIMIT = math.exp(2)
"""The anomaly index above which a class is poisoned."""
IMAGES_A_DIMENSION = 10
"""Fewer images to a dimension leave a covariance too uncertain to divide by: our choice."""


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Covariances of the two components of a representation, r = identity + variation."""

    identity: Tensor
    """S_mu (D, D), between the identities of classes."""
    scatters: Tensor
    """(K, D, D): the expected scatter of each class about its identity; a ridge is part of each."""
    counts: Tensor
    """(K,): points of each class."""

    @property
    def variation(self) -> Tensor:
        """S_eps (D, D), within every class."""
        return self.scatters.sum(0) / self.counts.sum()

    def variation_without(self, label: int) -> Tensor:
        """S_eps by all classes but one, whose own points can then be judged by it; by all if alone."""
        others = torch.arange(len(self.counts)) != label
        if not self.counts[others].sum():
            return self.variation
        return self.scatters[others].sum(0) / self.counts[others].sum()


def decompose(
    points: Tensor, labels: Tensor, iterations: int = 100, tolerance: float = 1e-6
) -> Decomposition:
    """Maximum likelihood of the two components by EM, on float64 points (N, D) of labels (N,).

    Points are taken about their mean. The posterior of a class's identity is exact, so one step needs no
    more than class means, counts and the scatters about them. A ridge of a millionth of the mean variance
    keeps S_eps invertible.
    """
    centred = points - points.mean(0)
    counts = torch.bincount(labels).to(points.dtype)
    n, width = counts.clamp_min(1), points.shape[1]
    means = torch.zeros(len(n), width, dtype=points.dtype).index_add_(0, labels, centred) / n.unsqueeze(1)
    residuals = [centred[labels == label] - mean for label, mean in enumerate(means)]
    about_means = torch.stack([each.T @ each for each in residuals])
    ridge = 1e-6 * centred.square().mean().clamp_min(1e-300) * torch.eye(width, dtype=points.dtype)
    present = counts > 0
    identity = means.T @ means / present.sum() + ridge
    found = Decomposition(identity, about_means + counts.view(-1, 1, 1) * ridge, counts)
    for _ in range(iterations):
        of_means = identity + found.variation / n.view(-1, 1, 1)
        gains = torch.linalg.solve(of_means, identity.expand_as(of_means), left=False)
        expected = torch.einsum("kde,ke->kd", gains, means)
        uncertainty = identity - gains @ identity
        apart = means - expected
        identity = (expected.T @ expected + uncertainty[present].sum(0)) / present.sum() + ridge
        around = apart.unsqueeze(2) * apart.unsqueeze(1) + uncertainty + ridge
        before = torch.stack([found.identity, found.variation])
        found = Decomposition(identity, about_means + counts.view(-1, 1, 1) * around, counts)
        moved = (torch.stack([identity, found.variation]) - before).norm(dim=(1, 2))
        if bool((moved < tolerance * before.norm(dim=(1, 2))).all()):
            break
    return found


@dataclass(frozen=True, eq=False)
class Groups:
    """One class's points in two groups."""

    first: Tensor
    """bool (n,)."""
    leaning: Tensor
    """float (n,): ln of how much likelier a point is in the first group than in the other."""
    statistic: float
    """J: twice the ln of the likelihood ratio of two groups against one."""


def two_groups(points: Tensor, variation: Tensor, iterations: int = 50) -> Groups:
    """Untangle float64 points (n, D), n > 1, of one class into two groups of covariance ``variation`` (D, D).

    Points are projected on Fisher's discriminant of the two groups and cut where that separates them best,
    which gives the next two groups. No step lessens J: the projection on the discriminant has all of it. The
    first projections are the principal axes of the class, relative to ``variation``; all are followed and the
    best end counts. Nothing changes where points and ``variation`` undergo the same invertible linear map.
    """
    root = torch.linalg.cholesky(variation)
    white = torch.linalg.solve_triangular(root, (points - points.mean(0)).T, upper=False).T
    directions = torch.linalg.eigh(white.T @ white).eigenvectors
    reached = torch.tensor(0.0)
    for _ in range(iterations):
        members = best_cuts(white @ directions)
        sizes = members.sum(0)
        difference = white.T @ members * (len(white) / (sizes * (len(white) - sizes)))
        statistics = difference.square().sum(0) * sizes * (len(white) - sizes) / len(white)
        if statistics.sum() <= reached * (1 + 1e-9):
            break
        reached, directions = statistics.sum(), difference
    best = int(statistics.argmax())
    first = members[:, best] > 0
    share = float(first.double().mean())
    # The means lie on either side of the origin, by shares: their midpoint is where a point leans to neither.
    leaning = white @ difference[:, best] - (0.5 - share) * difference[:, best].square().sum()
    return Groups(first, leaning, float(statistics[best]))


def best_cuts(values: Tensor) -> Tensor:
    """The two groups of each column of ``values`` (n, S), of mean 0, with the least variance inside them.

    float (n, S): 1 in the group of lower values, which is never all of them.
    """
    count = len(values)
    order = values.argsort(0)
    below = torch.arange(1, count, dtype=values.dtype).unsqueeze(1)
    sums = values.gather(0, order).cumsum(0)[:-1]
    cuts = (sums.square() / (below * (count - below))).argmax(0)
    return (order.argsort(0) <= cuts).to(values.dtype)


def logarithms(values: Tensor) -> Tensor:
    """ln of each value, or of a hundredth where that is larger. For clean classes ln J is nearly normal."""
    return values.clamp_min(1e-2).log()


@dataclass(frozen=True)
class StatisticalContamination(JointClassCleanser):
    """SCAn. The covariance within classes is learned from the trusted images where there are some. Where not,
    it is learned from the set itself, for each class from all others: neither its poison nor its chance
    variation is then part of what it is judged by. This is ours.

    Of a class's two groups, the suspects are the one whose mean is farther from the trusted images' of that
    class; without these, the smaller one. J is divided by the class's images, so that classes of any size
    compare: the paper's classes are of like size.
    """

    threshold: float | Literal["published", "calibrated"] = "published"
    """The limit of the anomaly index of a class's J among all, or p-values of ln J in its place."""
    components: Annotated[int, Ge(1)] = 32
    """Principal components of the set's features that are looked at, fewer where a tenth of the images that
    the covariance is learned from are fewer. The paper has all features; this many are ours."""
    level: str = "penultimate"
    significance: Annotated[float, Interval(gt=0, lt=1)] = 0.05
    seed: int = 0

    published_limit: ClassVar[float] = PUBLISHED_LIMIT

    def examine_all(self, features: Features) -> dict[int, ClassFinding]:
        data, trusted = features.data, features.trusted
        labels = [c for c in range(data.num_classes) if int(data.class_counts[c]) >= self.fewest]
        if not labels:
            return {}
        known = trusted or features
        points, known_points = self._reduced(features, known)
        decomposed = decompose(known_points, known.data.labels)
        found = {}
        for label in labels:
            own = points[data.labels == label]
            if trusted is None:
                found[label] = self._finding(own, decomposed.variation_without(label), None)
            else:
                theirs = known_points[trusted.data.labels == label]
                found[label] = self._finding(own, decomposed.variation, theirs)
        return with_statistics(found, logarithms if self.limit is None else anomaly_indices)

    def _reduced(self, features: Features, known: Features) -> tuple[Tensor, Tensor]:
        """float64 (N, components) of both sets, by the first one's principal components."""
        from sklearn.decomposition import PCA

        values = features.at(self.level).numpy()
        affordable = max(1, (len(known.data) - known.data.num_classes) // IMAGES_A_DIMENSION)
        axes = PCA(min(self.components, affordable, *values.shape), random_state=self.seed).fit(values)
        points = torch.from_numpy(axes.transform(values)).double()
        if known is features:
            return points, points
        return points, torch.from_numpy(axes.transform(known.at(self.level).numpy())).double()

    def _finding(self, points: Tensor, variation: Tensor, trusted: Tensor | None) -> ClassFinding:
        groups = two_groups(points, variation)
        first = groups.first
        if trusted is None or not len(trusted):
            suspected = float(first.double().mean()) <= 0.5
        else:
            apart = torch.stack([points[first].mean(0), points[~first].mean(0)]) - trusted.mean(0)
            distances = (apart * torch.linalg.solve(variation, apart.T).T).sum(1)
            suspected = bool(distances[0] > distances[1])
        suspects = first if suspected else ~first
        return ClassFinding(
            groups.statistic / len(points),
            suspects & (groups.statistic > 1e-6 * len(points)),
            groups.leaning if suspected else -groups.leaning,
            {"likelihood_ratio": groups.statistic, "share": float(suspects.double().mean())},
        )
