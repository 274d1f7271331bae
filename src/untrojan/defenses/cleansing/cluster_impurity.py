"""Cluster Impurity: blurring breaks a trigger, so that a component of poisoned images changes its class.

Xiang et al., "A Benchmark Study of Backdoor Data Poisoning Defenses for Deep Neural Network Classifiers and a
Novel Defense", MLSP 2019.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Interval
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from untrojan.defenses.cleansing.by_class import ClassCleanser, ClassFinding
from untrojan.defenses.cleansing.features import Features
from untrojan.models.classifier import Classifier, evaluating, to_float

PUBLISHED_LIMIT = 0.5
"""That of the author's script. RE's comparison chose .62, .65, .36 and .46 (wide, compact, MobileNetV2,
DenseNet) as the lowest without a false alarm."""


def mixture_components(features: Tensor, seed: int = 0) -> Tensor:
    """int64 (n,): the component of each of the features (n, D) in the mixture of normal distributions with
    full covariances that has the lowest Bayesian information criterion.

    One component more is tried until the criterion has risen twice in a row. It counts about D²/2 parameters
    a component, so that wide features end up in one.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    points = features.double().numpy()
    best, lowest, last, rises = torch.zeros(len(points), dtype=torch.int64), float("inf"), float("inf"), 0
    if (points == points[:1]).all():
        return best
    for count in range(1, len(points) + 1):
        mixture = GaussianMixture(count, reg_covar=1e-3, max_iter=100, random_state=seed)
        with warnings.catch_warnings():
            # The published limit of iterations is meant to be reached at times.
            warnings.simplefilter("ignore", ConvergenceWarning)
            criterion = mixture.fit(points).bic(points)
        if criterion < lowest:
            lowest, best = criterion, torch.from_numpy(mixture.predict(points)).long()
        rises = rises + 1 if criterion > last else 0
        last = criterion
        if rises == 2:
            break
    return best


def blurred(images: Tensor) -> Tensor:
    """Float images (N, C, H, W), each pixel the mean of itself and its neighbours to the right and below;
    outside the image is black."""
    return avg_pool2d(pad(images, (0, 1, 0, 1)), 2, stride=1)


@torch.no_grad()
def blurred_predictions(model: Classifier, images: Tensor, batch_size: int = 512) -> Tensor:
    """int64 (N,): classes predicted for uint8 images (N, C, H, W) once blurred, in evaluation mode."""
    with evaluating(model):
        batches = [
            model(blurred(to_float(batch, model.device))).argmax(1).cpu()
            for batch in images.split(batch_size)
        ]
    return torch.cat(batches)


def impurities(components: Tensor, unchanged: Tensor) -> Tensor:
    """float64 (K,) from components (n,) in 0..K-1 and unchanged, bool (n,): -ln of the share of each
    component that keeps its prediction.

    It is the Kullback-Leibler divergence from "all keep it". Where none does, half an image stands in.
    """
    sizes = torch.bincount(components).double()
    keeping = torch.bincount(components, weights=unchanged.double()).clamp_min(0.5)
    return torch.where(sizes > 0, (sizes / keeping).log(), 0.0)


@dataclass(frozen=True)
class ClusterImpurity(ClassCleanser):
    """Cluster Impurity.

    Removed are the components above the limit or, calibrated, the most impure one of a class that stands out.
    A class in one component is passed over, as there is nothing to tell apart. Calibrated, it still counts
    with the impurity of the whole: what blurring does to clean images is the null.
    """

    threshold: float | Literal["published", "calibrated"] = "published"
    level: str = "penultimate"
    significance: Annotated[float, Interval(gt=0, lt=1)] = 0.05
    seed: int = 0

    # -ln of shares: where blurring changes no prediction, all classes are exactly 0.
    least_spread: ClassVar[float] = 0.01

    published_limit: ClassVar[float] = PUBLISHED_LIMIT

    def examine(self, features: Features, label: int, rows: Tensor) -> ClassFinding:
        components = mixture_components(features.at(self.level, rows), self.seed)
        number = int(components.unique().numel())
        if number == 1 and self.limit is not None:
            nothing = torch.zeros(len(rows))
            return ClassFinding(0.0, nothing.bool(), nothing, {"components": 1})
        after = blurred_predictions(features.model, features.data.images[rows], features.batch_size)
        each = impurities(components, after == features.predictions[rows])
        scores, largest = each[components], float(each.max())
        suspects = scores == largest if self.limit is None else scores > self.limit
        return ClassFinding(largest, suspects & (number > 1), scores, {"components": number})
