"""Transfer learning: a trained network's features, kept, beneath a classification layer for other classes."""

from __future__ import annotations

import copy

import torch
from torch import nn

from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier, Float32Conv2d, Float32Linear
from untrojan.models.taps import levels_of
from untrojan.seeding import generator


def with_new_head(model: Classifier, num_classes: int, seed: int = 0) -> Classifier:
    """A copy of ``model`` whose last layer is new, for ``num_classes``, and alone is trained.

    All other weights have ``requires_grad`` False; train it with ``freeze_statistics``, or batch norm would
    still move. The new weights depend on ``seed`` alone. The copy can be saved and loaded by the same
    architecture's name. Raises UntrojanError where the last layer is neither linear nor a convolution or the
    model's image shape is unknown.
    """
    if model.image_shape is None:
        raise UntrojanError("transfer needs the image shape the model was built for: it is not known")
    copied = copy.deepcopy(model).requires_grad_(False)
    image = torch.zeros(1, *model.image_shape, device=model.device)
    place = levels_of(copied, image).get("penultimate")
    layer = None if place is None else copied.get_submodule(place.path)
    if place is None or not isinstance(layer, nn.Linear | nn.Conv2d):
        raise UntrojanError(
            "transfer replaces a last layer that is linear or a 2-D convolution: none was found"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator(seed, "new head").initial_seed())
        new = _like(layer, num_classes).to(layer.weight.device)
    parent, _, name = place.path.rpartition(".")
    setattr(copied.get_submodule(parent), name, new)
    copied.num_classes = num_classes
    return copied


def _like(layer: nn.Linear | nn.Conv2d, outputs: int) -> nn.Linear | nn.Conv2d:
    biased = layer.bias is not None
    if isinstance(layer, nn.Linear):
        kind = Float32Linear if isinstance(layer, Float32Linear) else nn.Linear
        return kind(layer.in_features, outputs, bias=biased)
    if layer.groups != 1:
        raise UntrojanError("transfer can't replace a last layer that is a grouped convolution")
    made = Float32Conv2d if isinstance(layer, Float32Conv2d) else nn.Conv2d
    return made(
        layer.in_channels, outputs, layer.kernel_size, layer.stride, layer.padding, layer.dilation,  # type: ignore[arg-type]
        bias=biased, padding_mode=layer.padding_mode,
    )  # fmt: skip
