"""Activation Clustering: a poisoned class's activations fall into two clusters, one of them the poison.

Chen et al., "Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering", SafeAI 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Interval
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.defenses.cleansing.by_class import REMOVES_ALWAYS, ClassCleanser, ClassFinding
from untrojan.defenses.cleansing.features import Features
from untrojan.models.classifier import predictions_of
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


@dataclass(frozen=True, eq=False)
class Clusters:
    """One class's activations in two."""

    smaller: Tensor
    """bool (n,): the members of the smaller cluster."""
    leaning: Tensor
    """float (n,): by how much nearer an activation is to the smaller cluster's centre than to the other."""
    silhouette: float
    """Mean silhouette, -1..1: how well the two are apart."""


def two_clusters(
    activations: Tensor, components: int, reduction: Literal["pca", "ica"] = "pca", seed: int = 0
) -> Clusters:
    """Reduce activations (n, D) to ``components`` dimensions and split them by k-means (section 3.2)."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    points = reduced(activations, components, reduction, seed)
    if len(np.unique(points, axis=0)) < 2:
        nothing = torch.zeros(len(points))
        return Clusters(nothing.bool(), nothing, 0.0)
    means = KMeans(2, n_init=10, random_state=seed).fit(points)
    distances = means.transform(points)
    small = int(np.bincount(means.labels_, minlength=2).argmin())
    return Clusters(
        torch.from_numpy(means.labels_ == small),
        torch.from_numpy(distances[:, 1 - small] - distances[:, small]).float(),
        float(silhouette_score(points, means.labels_)),
    )


def reduced(
    activations: Tensor, components: int, reduction: Literal["pca", "ica"] = "pca", seed: int = 0
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(n, D) to at most (n, components): principal components, or the independent ones within these."""
    from sklearn.decomposition import PCA, FastICA

    values = activations.double().numpy()
    if (values == values[:1]).all():
        return np.zeros((len(values), 1))
    points = np.asarray(PCA(min(components, *values.shape), random_state=seed).fit_transform(values))
    spread = points.std(0)
    varied = points[:, spread > 1e-9 * max(float(spread.max()), 1e-300)]
    if reduction == "pca" or varied.shape[1] < 2:
        return points
    # FastICA would whiten to the leading principal components itself, by a full decomposition.
    ica = FastICA(whiten="unit-variance", max_iter=1000, tol=0.005, random_state=seed)
    return np.asarray(ica.fit_transform(varied))


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
        )

    def examine_all(self, features: Features) -> dict[int, ClassFinding]:
        found = super().examine_all(features)
        if self.rule != "exclusionary-reclassification":
            return found
        ratios = self._reclassified(features, found)
        return {
            label: ClassFinding(
                -ratios[label], each.suspects, each.scores, {**each.details, "ratio": ratios[label]}
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
