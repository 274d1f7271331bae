"""Benign accuracy and attack success."""

from __future__ import annotations

from untrojan.attacks.poisoning import TriggeredTest
from untrojan.data.image_set import ImageSet
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier, predictions_of


def benign_accuracy(model: Classifier, test: ImageSet) -> float:
    """Share, 0 to 1, of clean test images classified rightly. All classes count, the target among them."""
    if not len(test):
        raise UntrojanError("accuracy needs test images: the set is empty")
    return float((predictions_of(model, test.images) == test.labels).double().mean())


def attack_success_rate(model: Classifier, triggered: TriggeredTest) -> float:
    """Share, 0 to 1, of triggered test images classified as the attack wants.

    Images that truly belong to the wanted class do not count: they would pass for successes of a model
    that has no backdoor.
    """
    counted = triggered.true_labels != triggered.wanted_labels
    if not bool(counted.any()):
        raise UntrojanError("attack success needs triggered images of other classes than the target: none")
    predictions = predictions_of(model, triggered.images[counted])
    return float((predictions == triggered.wanted_labels[counted]).double().mean())
