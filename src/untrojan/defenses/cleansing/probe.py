"""The classifier an audit trains, and the check that it has learned what a victim would learn.

An audit sees a backdoor only through a classifier that has learned it. Faint patterns are learned late, so
a probe may fit every poisoned image by heart and still not react to the pattern: such an audit is blind.
The auditor cannot ask the attacker for a test, but can plant canaries of its own: two faint patterns, one
over the whole image and one of a few pixels, stamped on a few images of all classes that are labelled with
an extra class of their own. A probe that does not take fresh images with a canary for that extra class
would not have learned a backdoor of that strength either. The extra class is no class of the data, so
that no verdict, threshold or estimate depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.models.classifier import Classifier, pixel_statistics, predictions_of
from untrojan.models.registry import build
from untrojan.seeding import generator
from untrojan.training.loop import train
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
    """What the probe has learned, without any ground truth."""

    training_accuracy: float
    """Share of the training images, labels as given, that it predicts as labelled, 0..1."""
    canaries: dict[str, float]
    """For each canary the share of fresh images it carries over, 0..1; empty for a probe not trained here."""
    rounds: int
    """Training runs one after another that it took."""

    @property
    def sees_faint_patterns(self) -> bool:
        return bool(self.canaries) and min(self.canaries.values()) >= POTENT


@dataclass(frozen=True, eq=False)
class Probe:
    """A trained probe. Its model has one output more than the data have classes, for the canaries."""

    model: Classifier
    check: ProbeCheck


def train_probe(
    data: ImageSet,
    architecture: str,
    recipe: Recipe,
    *,
    seed: int = 0,
    most_rounds: int = 3,
    canary_share: float = 0.01,
    checkpoint: Path | None = None,
    device: str = "cpu",
) -> Probe:
    """Train a probe until it has learned the canaries, at most ``most_rounds`` times the recipe.

    ``canary_share`` of the training images carries each canary. The recipe should not augment: the probe
    must learn the true pattern, not shifted copies of it (RE, section 5.2.1).
    """
    canaries = draw_canaries(data.image_shape, seed)
    planted, fresh = plant(data, canaries, canary_share, seed)
    mean, std = pixel_statistics(data)
    model = build(
        architecture, num_classes=data.num_classes + 1, image_shape=data.image_shape, mean=mean, std=std,
        precision=recipe.precision, seed=seed,
    ).to(device)  # fmt: skip
    for turn in range(1, most_rounds + 1):
        path = None if checkpoint is None else checkpoint.with_name(f"{checkpoint.name}.{turn}")
        train(model, planted, recipe, seed=seed + turn - 1, checkpoint=path, description="training the probe")
        check = ProbeCheck(_accuracy(model, data), _potency(model, data, canaries, fresh), turn)
        if check.sees_faint_patterns:
            break
    return Probe(model, check)


def check_model(model: Classifier, data: ImageSet) -> ProbeCheck:
    """What can be said of a model that came with the data: only that it fits them."""
    return ProbeCheck(_accuracy(model, data), {}, 0)


def draw_canaries(shape: tuple[int, int, int], seed: int) -> tuple[Canary, Canary]:
    """A pattern over the whole image, 3/255 strong, and one of four pixels, 70/255 strong.

    The first is a chessboard with its phase turned round in one half of the image: as hard to learn as RE's
    faintest pattern, which lies in the same band, yet orthogonal to it, so that an attack with the very
    chessboard is not confused with it. Place, direction and phase come from the auditor's seed, which an
    attacker can't know.
    """
    random = generator(seed, "canaries")
    _, height, width = shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    across, phase = torch.randint(2, (2,), generator=random).tolist()
    half = columns >= width // 2 if across else rows >= height // 2
    chessboard = torch.zeros(shape)
    chessboard[:, (rows + columns + phase + half) % 2 == 0] = 3 / 255
    dots = torch.zeros(shape)
    row = int(torch.randint(2, height - 4, (), generator=random))
    column = int(torch.randint(2, width - 4, (), generator=random))
    for down, right in ((0, 0), (0, 2), (2, 0), (1, 1)):
        dots[:, row + down, column + right] = 70 / 255
    return Canary("split chessboard, 3/255", chessboard), Canary("four pixels, 70/255", dots)


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


def _potency(
    model: Classifier, data: ImageSet, canaries: tuple[Canary, ...], fresh: Tensor
) -> dict[str, float]:
    """Share of fresh images that each canary, and nothing but the canary, carries into its class."""
    images, canary_class = data.images[fresh], data.num_classes
    ordinary = predictions_of(model, images) != canary_class
    return {
        canary.name: float(
            (ordinary & (predictions_of(model, canary.stamp(images)) == canary_class)).float().mean()
        )
        for canary in canaries
    }


def _accuracy(model: Classifier, data: ImageSet) -> float:
    return float((predictions_of(model, data.images) == data.labels).float().mean())
