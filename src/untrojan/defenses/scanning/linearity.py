"""A model's most linear channels, and what images do to them.

Wang et al., "Training with More Confidence: Mitigating Injected and Natural Backdoors During Training",
NeurIPS 2022, figure 2: a backdoor's neurons answer to its images on one side of their activation function's
bend, and to all other images on the other.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.defenses.training.none import STRONG, WEAK, linearity_by_class
from untrojan.errors import UntrojanError
from untrojan.metrics.grouping import two_groups
from untrojan.models.channels import channel_activations
from untrojan.models.classifier import Classifier

MOST_LAYERS = 24


@dataclass(frozen=True)
class ChannelHistogram:
    """One channel's largest activation in each image, before batch norm and activation function."""

    layer: str
    channel: int
    label: int
    """The class for which it is most linear."""
    score: float
    """Its strongest activation among images that the model is sure are of the class, above the mean and three
    standard deviations of those that it is sure are not (NONE's linearity score)."""
    edges: tuple[float, ...]
    """(B + 1,), rising."""
    strong: tuple[int, ...]
    """(B,): images of the class, probability above .9."""
    weak: tuple[int, ...]
    """(B,): others, probability below .1."""
    positive: float
    """The share of all images with an activation of at least 0: algorithm 1's P(A >= 0)."""
    separation: float
    """How far apart its two groups of images are, see :class:`~untrojan.metrics.grouping.Split`."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def most_linear_channels(
    model: Classifier, data: ImageSet, a_layer: int = 1, bins: int = 40
) -> tuple[ChannelHistogram, ...]:
    """The ``a_layer`` most linear channels of each convolutional and linear layer but the last.

    Layers are in the network's order; of more than 24, every n-th. The model is left as it was. A layer none
    of whose channels scores above 0, because no class has both sure and excluded images, is left out.

    Raises UntrojanError for a network without such layers, or without images.
    """
    if not len(data):
        raise UntrojanError("the linearity view needs images")
    activations, logits = channel_activations(model, data.images)
    if not activations:
        raise UntrojanError(
            "the linearity view needs layers before the last one, with weights that are trained"
        )
    probabilities = logits.softmax(1)
    step = -(-len(activations) // MOST_LAYERS)
    found = []
    for layer in list(activations)[::step]:
        values = activations[layer]
        scores, labels = linearity_by_class(values, probabilities).max(0)
        for channel in scores.argsort(descending=True, stable=True)[:a_layer].tolist():
            if float(scores[channel]) > 0:
                place = (layer, channel, int(labels[channel]), float(scores[channel]))
                found.append(_histogram(values[:, channel], probabilities, place, bins))
    return tuple(found)


def _histogram(
    values: Tensor, probabilities: Tensor, place: tuple[str, int, int, float], bins: int
) -> ChannelHistogram:
    confidence = probabilities[:, place[2]]
    low, high = float(values.min()), float(values.max())
    strong, weak = (
        tuple(torch.histc(values[which], bins, low, high).int().tolist())
        for which in (confidence > STRONG, confidence < WEAK)
    )
    edges = tuple(torch.linspace(low, high, bins + 1).tolist())
    positive = float((values >= 0).double().mean())
    return ChannelHistogram(*place, edges, strong, weak, positive, two_groups(values).separation)
