"""Consistency: what a trigger does to a label does not survive the same changes of the image as what its
object does.

A shrunken, turned or colourless photograph of a ship is a ship. A trigger is bound to its place, its scale or
its colours, or else holds where the object would not, under whatever changes. Li et al., "Backdoor Attack in
the Physical World" (2021), undo triggers by shrinking; Liu et al., "Detecting Backdoors During the Inference
Stage Based on Corruption Robustness Consistency", CVPR 2023, tell triggered images by how unevenly they bear
corruptions. The views, their joint distribution and the test are ours. No training loss on features, such as
SDRM's, speaks of views.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor
from torch.nn import functional as F

from untrojan.data.image_set import ImageSet
from untrojan.defenses.cleansing.by_class import ClassFinding, JointClassCleanser
from untrojan.defenses.cleansing.features import Features
from untrojan.models.classifier import Classifier, evaluating, to_float
from untrojan.progress import task

CERTAIN = 12.0
"""ln odds beyond which a network is certain: how far beyond says nothing."""
FEWEST_A_CLASS = 20
"""Images of a class below which its limit is chance."""
RIDGE = 1e-3
"""Of the mean variance, added to every direction of a covariance."""


def _shrunk(images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    size = (max(1, height * 7 // 8), max(1, width * 7 // 8))
    small = F.interpolate(images, size, mode="bilinear", antialias=True)
    down, right = height - small.shape[-2], width - small.shape[-1]
    return F.pad(small, (right // 2, right - right // 2, down // 2, down - down // 2))


def _turned(images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    sine, cosine = math.sin(math.radians(10)), math.cos(math.radians(10))
    turn = torch.tensor([[cosine, sine * height / width, 0], [-sine * width / height, cosine, 0]])
    return _mapped(images, turn)


def _enlarged(images: Tensor) -> Tensor:
    return _mapped(images, torch.tensor([[13 / 16, 0, 0], [0, 13 / 16, 0]]))


def _shifted(images: Tensor) -> Tensor:
    return _mapped(images, torch.tensor([[1, 0, 1 / 8], [0, 1, -1 / 8]]))


def _mapped(images: Tensor, affine: Tensor) -> Tensor:
    places = affine.to(images).expand(len(images), 2, 3)
    grid = F.affine_grid(places, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _grey(images: Tensor) -> Tensor:
    return images.mean(1, keepdim=True).expand_as(images)


def _blurred(images: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, 1)


VIEWS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda images: images,
    "shrunk": _shrunk,
    "turned": _turned,
    "enlarged": _enlarged,
    "mirrored": lambda images: images.flip(-1),
    "shifted": _shifted,
    "grey": _grey,
    "blurred": _blurred,
}
"""Of float images (n, C, H, W), 3 pixels a side at least: an eighth smaller, on black; by 10 degrees; the
middle 13/16; left to right; by a sixteenth of a side; without colour; the mean of 3x3 pixels. Chosen of about
40 by triggered images of SDRM's four attacks on a small VGG-11, and so no blind choice for these."""


@torch.no_grad()
def margins_in_views(
    model: Classifier, images: Tensor, labels: Tensor, images_a_forward: int = 512
) -> Tensor:
    """ln of the odds the model gives each label in each of :data:`VIEWS`, float32 (n, V), within ±12.

    ``images`` (n, C, H, W) are uint8, ``labels`` int64 (n,). Costs V n / ``images_a_forward`` forwards.
    """
    margins = torch.empty(len(images), len(VIEWS))
    with evaluating(model), task("looking at views", len(images), "images") as bar:
        for rows in torch.arange(len(images)).split(images_a_forward):
            batch, label = to_float(images[rows], model.device), labels[rows].to(model.device).unsqueeze(1)
            for column, view in enumerate(VIEWS.values()):
                logits = model(view(batch)).float()
                others = logits.scatter(1, label, -math.inf).logsumexp(1)
                margins[rows, column] = (logits.gather(1, label).squeeze(1) - others).cpu()
            bar.advance(len(rows))
    return margins.clamp(-CERTAIN, CERTAIN)


def strangeness(margins: Tensor, clean: Tensor) -> Tensor:
    """Squared Mahalanobis distances (n,) of margins (n, V) from clean images' (m, V), m > 1."""
    mean = clean.double().mean(0)
    covariance = (clean.double() - mean).T @ (clean.double() - mean) / (len(clean) - 1)
    # Certain in every view, clean images have no variance at all.
    ridge = RIDGE * covariance.diagonal().mean().clamp_min(1e-6)
    covariance = covariance + ridge * torch.eye(len(mean), dtype=mean.dtype)
    apart = margins.double() - mean
    distances: Tensor = (apart * torch.linalg.solve(covariance, apart.T).T).sum(1)
    return distances.float()


def limit_of(scores: Tensor, share: float) -> float:
    """What one more score, drawn as ``scores`` (m,) were, exceeds with a chance of ``share`` at most.

    The ceil((m + 1)(1 - ``share``))th smallest, as in split conformal prediction (Vovk, Gammerman & Shafer,
    2005): the plain quantile of a hundred is exceeded by 5.9 % where 5 are promised. Infinite for so few
    scores that no limit could hold.
    """
    place = math.ceil((len(scores) + 1) * (1 - share) - 1e-9)
    return math.inf if place > len(scores) else float(scores.sort().values[place - 1])


def fewest_for(share: float) -> int:
    """Images of a class that a limit of its own takes."""
    return max(FEWEST_A_CLASS, math.ceil(1 / share - 1 - 1e-9))


def limit_for_every_class(scores: Tensor, labels: Tensor, share: float) -> float:
    """The largest of the classes' own limits of clean images' scores (m,) with labels (m,), for classes
    differ in how well they bear views; that of all scores where no class has :data:`FEWEST_A_CLASS`."""
    of_class = [scores[labels == label] for label in labels.unique()]
    enough = [each for each in of_class if len(each) >= fewest_for(share)] or [scores]
    return max(limit_of(each, share) for each in enough)


@dataclass(frozen=True)
class Consistency(JointClassCleanser):
    """A class is poisoned where its strangest images are stranger than those of other classes; its suspects
    are the images stranger than nearly all clean ones.

    Clean images are the trusted ones where there are some, else those of all other classes.
    """

    threshold: float | Literal["calibrated"] = "calibrated"
    """The limit of a class's statistic, the mean ln of the highest strangenesses, or p-values instead."""
    tail: Annotated[float, Interval(gt=0, le=1)] = 0.02
    """The share of a class's images, the strangest, that its statistic looks at."""
    expected: Literal["class", "all"] = "class"
    """A class's clean images are expected around its own median, for which poison must be a minority, or
    around that of all classes, which are then taken to bear the views alike."""
    false_suspects: Annotated[float, Interval(gt=0, lt=0.5)] = 0.05
    """The share of clean images that may be suspected: of their own class where enough of its images are
    trusted, else of each other class. Suspects are stranger than all but so many."""
    images_a_forward: Annotated[int, Ge(1)] = 512
    significance: Annotated[float, Interval(gt=0, lt=1)] = 0.05
    seed: int = 0

    # No field: predictions are all that is looked at.
    level = "penultimate"
    looks_at_features = False

    def examine_all(self, features: Features) -> dict[int, ClassFinding]:
        data, trusted = features.data, features.trusted
        margins = self._margins(features.model, data)
        known = data if trusted is None else trusted.data
        known_margins = margins if trusted is None else self._margins(features.model, known)
        expected = self._expected(known_margins, known)
        apart, clean = margins - expected[data.labels], known_margins - expected[known.labels]
        found = {}
        for label in range(data.num_classes):
            own = data.labels == label
            judging = known.labels != (label if trusted is None else -1)
            if int(own.sum()) >= self.fewest and int(judging.sum()) > 1:
                limiting = judging
                enough = fewest_for(self.false_suspects)
                if trusted is not None and int((known.labels == label).sum()) >= enough:
                    limiting = known.labels == label
                limit = self._limit(clean, known.labels, judging, limiting)
                found[label] = self._finding(apart[own], clean[judging], limit)
        return found

    def _limit(self, clean: Tensor, labels: Tensor, judging: Tensor, limiting: Tensor) -> float:
        """The strangeness that few of the images ``limiting`` exceed, seen from those ``judging``."""
        strange = strangeness(clean[limiting], clean[judging])
        return limit_for_every_class(strange, labels[limiting], self.false_suspects)

    def _margins(self, model: Classifier, images: ImageSet) -> Tensor:
        margins = margins_in_views(model, images.images, images.labels, self.images_a_forward)
        # Distances are the same for views or their differences from the image as it is. Medians are not: one
        # view may say nearly the same as another, and each view's own median may lie where no image is.
        margins[:, 1:] -= margins[:, :1]
        return margins

    def _expected(self, margins: Tensor, images: ImageSet) -> Tensor:
        """(K, V): where clean images of each class are expected; a class without any, where all are."""
        centre = margins.median(0).values
        of_class = [margins[images.labels == label] for label in range(images.num_classes)]
        alone = self.expected == "class"
        return torch.stack([each.median(0).values if alone and len(each) else centre for each in of_class])

    def _finding(self, margins: Tensor, clean: Tensor, limit: float) -> ClassFinding:
        scores = strangeness(margins, clean)
        suspects = scores > limit
        highest = scores.sort().values[-max(1, round(self.tail * len(scores))) :]
        # Strangenesses span orders of magnitude; those below a hundredth are nobody's.
        statistic = float(highest.clamp_min(1e-2).log().mean())
        return ClassFinding(statistic, suspects, scores, {"share": float(suspects.float().mean())})
