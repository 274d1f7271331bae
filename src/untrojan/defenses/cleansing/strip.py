"""STRIP: an image that carries a trigger keeps its label whatever other image is laid over it.

Gao et al., "STRIP: A Defence Against Trojan Attacks on Deep Neural Networks", ACSAC 2019. The paper tests
inputs of a deployed model; here the same test goes over a training set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.defenses.cleansing.by_class import ClassFinding, JointClassCleanser
from untrojan.defenses.cleansing.features import Features
from untrojan.models.classifier import Classifier, evaluating
from untrojan.progress import task
from untrojan.seeding import generator


@torch.no_grad()
def superimposed_entropies(
    model: Classifier,
    images: Tensor,
    partners: Tensor,
    chosen: Tensor,
    weights: tuple[float, float] = (1.0, 1.0),
    images_a_forward: int = 512,
) -> Tensor:
    """Mean entropy in bits (n,), 0..log2(K), of the predictions on each image with others laid over it.

    ``images`` (n, C, H, W) and ``partners`` (m, C, H, W) are uint8; row i of ``chosen``, int64 (n, N), names
    the partners of image i. The sum ``weights[0]`` image + ``weights[1]`` partner is rounded and saturates at
    0 and 255; both weights are 1 in the paper. Costs n N / ``images_a_forward`` forwards.
    """
    overlays = chosen.shape[1]
    entropies = torch.empty(chosen.numel())
    with evaluating(model), task("superimposing", len(entropies), "images") as bar:
        for pairs in torch.arange(len(entropies)).split(images_a_forward):
            image = images[pairs // overlays].to(model.device).float()
            partner = partners[chosen.flatten()[pairs]].to(model.device).float()
            both = image.mul_(weights[0]).add_(partner, alpha=weights[1]).round_().clamp_(0, 255)
            entropies[pairs] = entropy(model(both.div_(255))).cpu()
            bar.advance(len(pairs))
    return entropies.view(-1, overlays).mean(1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy in bits (n,) of the softmax of logits (n, K)."""
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1) / math.log(2)


def draw_partners(count: int, overlays: int, others: int | None, seed: int) -> Tensor:
    """int64 (count, overlays): for each of ``count`` images, rows of ``others`` images, drawn at random.

    With ``others`` None the partners are the images themselves, and none is its own.
    """
    random = generator(seed, "strip", "partners")
    if others is not None:
        return torch.randint(others, (count, overlays), generator=random)
    steps = torch.randint(1, max(count, 2), (count, overlays), generator=random)
    return (torch.arange(count).unsqueeze(1) + steps) % count


def boundary(
    entropies: Tensor, false_rejection_rate: float, fit: Literal["normal", "empirical"] = "normal"
) -> float:
    """The entropy at or below which that share of clean images lies, from those of clean images (n,), n > 1.

    The paper fits a normal distribution. Entropies are skewed, so that its quantile lies too low, at times
    below 0, which no entropy does: then the ``empirical`` quantile stands in.
    """
    from scipy.stats import norm

    values = entropies.double()
    if fit == "normal":
        fitted = float(values.mean() + values.std() * float(norm.ppf(false_rejection_rate)))
        if fitted > 0:
            return fitted
    return float(values.sort().values[int(false_rejection_rate * len(values))])


def shortfall(entropies: Tensor, clean: Tensor, tail: float) -> float:
    """How far the mean of the lowest ``tail`` share of entropies (n,) lies below the mean of clean ones (m,),
    m > 1, in their standard deviations, or thousandths of a bit where these are larger.

    About 2 for normal entropies and a tail of 5 %. Unlike a count of images below the boundary it differs
    from class to class even where none is below, so that clean classes show how much they vary.
    """
    lowest = entropies.double().sort().values[: max(1, round(tail * len(entropies)))]
    mean, deviation = clean.double().mean(), clean.double().std().clamp_min(1e-3)
    return float((mean - lowest.mean()) / deviation)


@dataclass(frozen=True)
class Strip(JointClassCleanser):
    """STRIP over a training set. A class is poisoned where its lowest entropies lie below those of other
    classes, and its suspects are the images below the boundary.

    Boundary and partners come from the trusted images where there are some. Without them, partners are
    images of the set itself, and a class's boundary is set by all other classes. The paper judges images
    alone: the statistic of a class is ours.

    Every image is judged, so the set goes through the net ``overlays`` times. The paper lays 100 images over
    each; 16 is ours, and leaves the mean entropy 2.5 times as uncertain.
    """

    threshold: float | Literal["published", "calibrated"] = "calibrated"
    """The limit of a class's statistic (:func:`shortfall`), or p-values in its place. ``published`` is the
    paper's own decision, image by image: it removes all images below the boundary from every class, and
    so calls every set poisoned."""
    overlays: Annotated[int, Ge(1)] = 16
    """Images laid over each image, N in the paper."""
    false_rejection_rate: Annotated[float, Interval(gt=0, lt=0.5)] = 0.01
    """The share of clean images below the boundary."""
    fit: Literal["normal", "empirical"] = "normal"
    """How the boundary follows from entropies of clean images, see :func:`boundary`."""
    tail: Annotated[float, Interval(gt=0, le=1)] = 0.05
    """The share of a class's images, those of lowest entropy, that its statistic looks at."""
    image_weight: Annotated[float, Gt(0)] = 1.0
    partner_weight: Annotated[float, Gt(0)] = 1.0
    """The paper adds the two images; weights that sum to 1 blend them."""
    images_a_forward: Annotated[int, Ge(1)] = 512
    significance: Annotated[float, Interval(gt=0, lt=1)] = 0.05
    seed: int = 0

    # No field: predictions are all that STRIP looks at.
    level = "penultimate"
    looks_at_features = False

    def examine_all(self, features: Features) -> dict[int, ClassFinding]:
        data, trusted = features.data, features.trusted
        partners = data if trusted is None else trusted.data
        entropies = self._entropies(features.model, data, partners)
        clean = None if trusted is None else self._entropies(features.model, partners, partners)
        found = {}
        for label in range(data.num_classes):
            own = data.labels == label
            judges = entropies[~own] if clean is None else clean
            if int(own.sum()) >= self.fewest and len(judges) > 1:
                found[label] = self._finding(entropies[own], judges)
        return found

    def _entropies(self, model: Classifier, images: ImageSet, partners: ImageSet) -> Tensor:
        others = None if partners is images else len(partners)
        chosen = draw_partners(len(images), self.overlays, others, self.seed)
        weights = (self.image_weight, self.partner_weight)
        return superimposed_entropies(
            model, images.images, partners.images, chosen, weights, self.images_a_forward
        )

    def _finding(self, entropies: Tensor, judges: Tensor) -> ClassFinding:
        lowest = boundary(judges, self.false_rejection_rate, self.fit)
        suspects = entropies <= lowest
        return ClassFinding(
            shortfall(entropies, judges, self.tail),
            suspects,
            -entropies,
            {
                "mean_entropy": float(entropies.mean()),
                "boundary": lowest,
                "share_below": float(suspects.float().mean()),
            },
        )
