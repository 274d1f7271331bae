"""Accuracy under a white-box attack: what DECK's tables call robustness."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from untrojan.data.image_set import ImageSet
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier, to_float
from untrojan.models.frozen import frozen
from untrojan.progress import task
from untrojan.seeding import generator
from untrojan.training.adversarial import PGD

PROTOCOLS: Mapping[str, PGD] = {
    "cifar10": PGD(8 / 255, 2 / 255, 20),
    "svhn": PGD(0.03, 0.001, 100),
    "gtsrb": PGD(0.03, 0.001, 100),
    "lisa": PGD(0.1, 0.01, 100),
}
"""The attack by data set. DECK's bounds (appendix III-C); steps and their length as in MOTH's code, whose
protocol it is."""


def robust_accuracy(
    model: Classifier,
    data: ImageSet,
    attack: PGD | None = None,
    *,
    most: int | None = 1000,
    batch_size: int = 100,
    seed: int = 0,
) -> float:
    """Share, 0 to 1, of the first ``most`` images classified rightly under ``attack`` (CIFAR-10's, if none).

    ``data`` are held-out clean images, in DECK the first thousand for validation; ``None`` takes them all.
    Random starts are drawn from ``seed`` batch by batch. The model is attacked in evaluation mode and left as
    it was. Raises UntrojanError for an empty set.
    """
    count = len(data) if most is None else min(most, len(data))
    if count < 1:
        raise UntrojanError("robustness needs clean images: the set is empty")
    attack = attack or PROTOCOLS["cifar10"]
    attacked, right = frozen(model), 0
    with task("attacking", count, "images") as bar:
        for number, rows in enumerate(torch.arange(count).split(batch_size)):
            labels = data.labels[rows].to(model.device)
            images = to_float(data.images[rows], model.device)
            adversarial = attack(attacked, images, labels, generator(seed, "attack", number))
            with torch.no_grad():
                right += int((attacked(adversarial).argmax(1) == labels).sum())
            bar.advance(len(rows))
    return right / count
