"""Activation Clustering: a poisoned class's activations fall into two clusters, one of them the poison.

Chen et al., "Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering", SafeAI 2019.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Interval
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.defenses.cleansing.by_class import REMOVES_ALWAYS, ClassCleanser, ClassFinding
from untrojan.defenses.cleansing.features import Features
from untrojan.defenses.cleansing.principal_directions import centred, leading_directions
from untrojan.models.classifier import predictions_of
from untrojan.threads import one_blas_thread
from untrojan.training.loop import train_new
from untrojan.training.presets import preset

Rule = Literal["silhouette", "relative-size", "exclusionary-reclassification", "smaller"]

PUBLISHED_LIMITS: dict[Rule, float] = {
    "silhouette": 0.10,
    "relative-size": -0.35,
    "exclusionary-reclassification": -1.0,
    "smaller": REMOVES_ALWAYS,
}
"""The statistic (silhouette; minus the smaller cluster's share; minus the ratio of reclassification) above
which a class is poisoned. The paper's clean classes had silhouettes below .11; share and ratio are those
of the method's implementations."""


ICA_STEPS = 1000


@dataclass(frozen=True, eq=False)
class Clusters:
    """One class's activations in two."""

    smaller: Tensor
    """bool (n,): the members of the smaller cluster."""
    leaning: Tensor
    """float (n,): by how much nearer an activation is to the smaller cluster's centre than to the other."""
    silhouette: float
    """Mean silhouette, -1..1: how well the two are apart."""
    converged: bool = True
    """Whether independent components were found where they were asked for."""


def two_clusters(
    activations: Tensor, components: int, reduction: Literal["pca", "ica"] = "pca", seed: int = 0
) -> Clusters:
    """Reduce activations (n, D) to ``components`` dimensions and split them by k-means (section 3.2)."""
    from sklearn.cluster import KMeans

    points, converged = reduced(activations, components, reduction, seed)
    if len(np.unique(points, axis=0)) < 2:
        nothing = torch.zeros(len(points))
        return Clusters(nothing.bool(), nothing, 0.0)
    with one_blas_thread():
        means = KMeans(2, n_init=10, random_state=seed).fit(points)
        distances = means.transform(points)
    small = int(np.bincount(means.labels_, minlength=2).argmin())
    return Clusters(
        torch.from_numpy(means.labels_ == small),
        torch.from_numpy(distances[:, 1 - small] - distances[:, small]).float(),
        mean_silhouette(torch.from_numpy(points), torch.from_numpy(means.labels_ == small)),
        converged,
    )


def mean_silhouette(points: Tensor, member: Tensor, block: int = 512) -> float:
    """The mean silhouette, -1..1, of points (n, d) that are split by ``member``, bool (n,).

    scikit-learn's ``silhouette_score`` for two groups, with the distances of each pair of blocks computed
    once; a group of one point has silhouette 0. Raises ValueError where a group is empty.
    """
    sizes = torch.stack([(~member).sum(), member.sum()]).to(points.dtype)
    if not sizes.all():
        raise ValueError("both groups need a point")
    groups = torch.stack([~member, member], 1).to(points.dtype)
    sums = torch.zeros_like(groups)
    around = points - points.mean(0)
    for i in range(0, len(points), block):
        rows = slice(i, i + block)
        for j in range(i, len(points), block):
            columns = slice(j, j + block)
            distances = torch.cdist(around[rows], around[columns])
            sums[rows] += distances @ groups[columns]
            if j > i:
                sums[columns] += distances.T @ groups[rows]
    own = sums.gather(1, member.long()[:, None]).squeeze(1)
    other = sums.gather(1, (~member).long()[:, None]).squeeze(1)
    own_size = sizes[member.long()]
    inside, outside = own / (own_size - 1).clamp_min(1), other / sizes[(~member).long()]
    widths = (outside - inside) / torch.maximum(inside, outside).clamp_min(1e-30)
    return float(torch.where(own_size > 1, widths, 0).mean())


def reduced(
    activations: Tensor, components: int, reduction: Literal["pca", "ica"] = "pca", seed: int = 0
) -> tuple[np.ndarray[Any, np.dtype[np.floating[Any]]], bool]:
    """(n, D) to at most (n, components): principal components, or the independent ones within these; and
    whether the search for these, a thousand steps at most, came to an end."""
    from sklearn.decomposition import FastICA
    from sklearn.exceptions import ConvergenceWarning

    values = centred(activations)
    points = (values @ leading_directions(values, components).T).numpy()
    if not points.shape[1]:
        return np.zeros((len(points), 1)), True
    if reduction == "pca" or points.shape[1] < 2:
        return points, True
    # FastICA would whiten to the leading principal components itself, by a full decomposition.
    ica = FastICA(whiten="unit-variance", max_iter=ICA_STEPS, tol=0.005, random_state=seed)
    with warnings.catch_warnings():
        # Said by ``converged``, class by class.
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = np.asarray(ica.fit_transform(points))
    return found, ica.n_iter_ < ICA_STEPS


@dataclass(frozen=True)
class ActivationClustering(ClassCleanser):
    """Activation Clustering, with each of the rules for which clusters are poison.

    The paper's are relative size, silhouette and exclusionary reclassification. ``smaller`` is no detector:
    it removes the smaller cluster of every class, as where the target is known.
    """

    rule: Rule = "silhouette"
    threshold: float | Literal["published", "calibrated"] = "published"
    """The limit of the rule's statistic (see :data:`PUBLISHED_LIMITS`), or p-values in its place."""
    components: Annotated[int, Ge(1)] = 10
    reduction: Literal["pca", "ica"] = "pca"
    """The paper has independent components; its implementations, and RE's comparison, principal ones."""
    level: str = "penultimate"
    significance: Annotated[float, Interval(gt=0, lt=1)] = 0.05
    recipe: str = "desk-probe"
    """How exclusionary reclassification trains its net."""
    seed: int = 0

    @property
    def limit(self) -> float | None:
        return PUBLISHED_LIMITS[self.rule] if self.threshold == "published" else super().limit

    def examine(self, features: Features, label: int, rows: Tensor) -> ClassFinding:
        found = two_clusters(features.at(self.level, rows), self.components, self.reduction, self.seed)
        share = float(found.smaller.float().mean())
        return ClassFinding(
            {"silhouette": found.silhouette, "relative-size": -share}.get(self.rule, 0.0),
            found.smaller,
            found.leaning / found.leaning.abs().mean().clamp_min(1e-12),
            {"silhouette": found.silhouette, "relative_size": share},
            "" if found.converged else f"its independent components were not found in {ICA_STEPS} steps",
        )

    def examine_all(self, features: Features) -> dict[int, ClassFinding]:
        found = super().examine_all(features)
        if self.rule != "exclusionary-reclassification":
            return found
        ratios = self._reclassified(features, found)
        return {
            label: ClassFinding(
                -ratios[label],
                each.suspects,
                each.scores,
                {**each.details, "ratio": ratios[label]},
                each.unjudged,
            )
            for label, each in found.items()
        }

    def _reclassified(self, features: Features, found: dict[int, ClassFinding]) -> dict[int, float]:
        """Section 3.3: of each smaller cluster, images that a net trained without it gives their own label,
        to those it gives the commonest other.

        One net is trained without any class's smaller cluster, where the paper trains one for each.
        """
        data: ImageSet = features.data
        clusters = {label: data.indices_of(label)[each.suspects] for label, each in found.items()}
        outside = torch.ones(len(data), dtype=torch.bool)
        for rows in clusters.values():
            outside[rows] = False
        judge, _ = train_new(
            data.select(outside), features.model.architecture, preset(self.recipe), seed=self.seed,
            device=str(features.model.device), description="training without the smaller clusters",
        )  # fmt: skip
        ratios = {}
        for label, rows in clusters.items():
            counts = torch.bincount(predictions_of(judge, data.images[rows]), minlength=data.num_classes)
            own = int(counts[label])
            counts[label] = 0
            ratios[label] = own / max(int(counts.max()), 1)
        return ratios
