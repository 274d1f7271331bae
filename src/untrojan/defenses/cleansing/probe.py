"""The classifier an audit trains, and the check that such a classifier learns what a victim would learn.

An audit sees a backdoor only through a classifier that has learned it. Faint patterns are learned late, so
a probe may fit every poisoned image by heart and still not react to the pattern: such an audit is blind.
The auditor cannot ask the attacker for a test, but can plant canaries of its own: two faint patterns, one
over the whole image and one of a few pixels, stamped on a few images of all classes that are labelled with
an extra class. A twin of the probe, trained on that set by the same recipe, tells whether the recipe learns
such patterns. If it does not, the probe would not have learned a backdoor of that strength either, and its
"clean" is worth nothing. The probe itself never meets a canary, so that no estimate made through it depends
on what the auditor planted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.models.classifier import Classifier, predictions_of
from untrojan.seeding import generator
from untrojan.training.loop import train_new
from untrojan.training.recipe import Recipe
from untrojan.triggers.base import to_bytes

POTENT = 0.85
"""The share of fresh images a canary must carry over: the weakest attack of RE's table 1 reaches 86.1 %."""


@dataclass(frozen=True, eq=False)
class Canary:
    """A pattern planted by the auditor."""

    name: str
    pattern: Tensor
    """float (C, H, W), added to pixels in [0, 1]."""

    def stamp(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) with the pattern: clipped, then rounded to 8 bits."""
        return to_bytes(images.float() / 255 + self.pattern)


@dataclass(frozen=True)
class ProbeCheck:
    """What a probe has learned, without any ground truth."""

    training_accuracy: float
    """Share of the training images, labels as given, that it predicts as labelled, 0..1."""
    canaries: dict[str, float]
    """For each canary the share of fresh images it carries over in the probe's twin, 0..1; empty where no
    twin was trained."""

    @property
    def sees_faint_patterns(self) -> bool:
        return bool(self.canaries) and min(self.canaries.values()) >= POTENT


def canary_potency(
    data: ImageSet,
    architecture: str,
    recipe: Recipe,
    *,
    seed: int = 0,
    share: float = 0.01,
    checkpoint: Path | None = None,
    device: str = "cpu",
) -> dict[str, float]:
    """How well the probe's twin learns the auditor's canaries, each stamped on ``share`` of the images.

    For each canary the share of fresh images, 0..1, that it and nothing else carries into its class.
    """
    canaries = draw_canaries(data.image_shape, seed)
    planted, fresh = plant(data, canaries, share, seed)
    twin, _ = train_new(
        planted, architecture, recipe, seed=seed, checkpoint=checkpoint, device=device,
        description="training the probe's twin",
    )  # fmt: skip
    images, canary_class = data.images[fresh], data.num_classes
    ordinary = predictions_of(twin, images) != canary_class
    return {
        canary.name: float(
            (ordinary & (predictions_of(twin, canary.stamp(images)) == canary_class)).float().mean()
        )
        for canary in canaries
    }


def training_accuracy(model: Classifier, data: ImageSet) -> float:
    """Share of the set's images predicted as labelled, 0..1."""
    return float((predictions_of(model, data.images) == data.labels).float().mean())


def draw_canaries(shape: tuple[int, int, int], seed: int) -> tuple[Canary, Canary]:
    """A pattern over the whole image, 4/255 strong, and one of four pixels, 70/255 strong.

    The first is a weave: signs alternate from pixel to pixel one way and every two pixels the other. Images
    have little more of it than of a chessboard, RE's faintest pattern, so that it is about as hard to learn,
    and it is orthogonal to a chessboard on every 4x4 patch, so that the two are not confused in a set that
    is poisoned with a chessboard.
    Place, direction and phase come from the auditor's seed, which an attacker can't know.
    """
    random = generator(seed, "canaries")
    _, height, width = shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    turned, fine_phase, coarse_phase = torch.randint(2, (3,), generator=random).tolist()
    fine, coarse = (rows, columns) if turned else (columns, rows)
    weave = torch.zeros(shape)
    weave[:, (fine + fine_phase + coarse // 2 + coarse_phase) % 2 == 0] = 4 / 255
    dots = torch.zeros(shape)
    row = int(torch.randint(2, height - 4, (), generator=random))
    column = int(torch.randint(2, width - 4, (), generator=random))
    for down, right in ((0, 0), (0, 2), (2, 0), (1, 1)):
        dots[:, row + down, column + right] = 70 / 255
    return Canary("weave over the whole image, 4/255", weave), Canary("four pixels, 70/255", dots)


def plant(data: ImageSet, canaries: tuple[Canary, ...], share: float, seed: int) -> tuple[ImageSet, Tensor]:
    """The training set with canaries in an extra class, and rows left untouched to test them on."""
    order = torch.randperm(len(data), generator=generator(seed, "planting"))
    # A backdoor in a small set takes a hundred images as well, or no net would learn it.
    count = max(round(share * len(data)), min(100, round(0.03 * len(data))), 1)
    images, labels = data.images.clone(), data.labels.clone()
    for i, canary in enumerate(canaries):
        rows = order[i * count : (i + 1) * count]
        images[rows] = canary.stamp(images[rows])
        labels[rows] = data.num_classes
    fresh = order[len(canaries) * count :][:1000]
    names = (*data.class_names, "(canary)")
    return replace(data, images=images, labels=labels, class_names=names), fresh
