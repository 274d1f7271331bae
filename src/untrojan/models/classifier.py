"""The wrapper every network runs in: normalisation, precision and cost counting in one place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from untrojan.cost import count_pass
from untrojan.data.image_set import ImageSet
from untrojan.models.precision import Precision, autocast


class Classifier(nn.Module):
    """Images in [0, 1] to logits, whatever the network inside.

    The input is normalised and the first weighted layer runs in float32 even under mixed precision: a
    2/255 pattern is a few units of bfloat16's last place on a normalised pixel, and would be rounded away
    before the network could see it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        mean: Tensor,
        std: Tensor,
        architecture: str = "custom",
        precision: Precision = "float32",
        image_shape: tuple[int, int, int] | None = None,
    ) -> None:
        """``mean`` and ``std`` are (C,), over pixels in [0, 1]; ``architecture`` is the registry's name;
        ``image_shape`` is the (C, H, W) the network was built for, where it is known."""
        super().__init__()
        self.network = skip_before_narrow_projections(keep_stem_in_float32(network))
        self.num_classes = num_classes
        self.architecture = architecture
        self.precision: Precision = precision
        self.image_shape = image_shape
        self.register_buffer("mean", mean.float().view(1, -1, 1, 1))
        self.register_buffer("std", std.float().view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """float32 (N, C, H, W) in [0, 1] to float32 logits (N, K)."""
        normalised = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        with autocast(self.precision, images.device):
            logits: Tensor = self.network(normalised)
        logits = logits.float()
        count_pass(images, logits)
        return logits

    @property
    def device(self) -> torch.device:
        return self.mean.device


class Float32Conv2d(nn.Conv2d):
    """A convolution that ignores autocast."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


class SkippingConv2d(nn.Conv2d):
    """A strided 1x1 convolution as an unstrided one of every so manieth pixel."""

    def forward(self, input: Tensor) -> Tensor:
        rows, columns = self.stride
        return F.conv2d(input[:, :, ::rows, ::columns], self.weight, self.bias)


class Float32Linear(nn.Linear):
    """A linear layer that ignores autocast."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


def keep_stem_in_float32(network: nn.Module) -> nn.Module:
    """Make the first weighted layer, in definition order, ignore autocast. Weights and names stay."""
    for module in network.modules():
        if isinstance(module, Float32Conv2d | Float32Linear):
            break
        # Only plain layers: a subclass may have a forward of its own, which must be kept.
        if type(module) is nn.Conv2d:
            module.__class__ = Float32Conv2d
            break
        if type(module) is nn.Linear:
            module.__class__ = Float32Linear
            break
    return network


def skip_before_narrow_projections(network: nn.Module) -> nn.Module:
    """Make strided 1x1 convolutions of fewer than eight channels skip pixels first. Weights and names stay.

    On processors without AVX-512 the gradient of their weights ends the process: oneDNN 3 writes past its
    buffer there, with channels last.
    """
    for module in network.modules():
        # Only plain layers: a subclass may have a forward of its own, which must be kept.
        if type(module) is not nn.Conv2d or module.in_channels >= 8 or module.groups > 1:
            continue
        if module.kernel_size == (1, 1) and module.stride != (1, 1) and module.padding == (0, 0):
            module.__class__ = SkippingConv2d
    return network


def pixel_statistics(data: ImageSet) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of a set's pixels in [0, 1]."""
    # Sums of squares in float64 from byte histograms: exact, and no float copy of the whole set.
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in data.images.unbind(1):
        histogram = torch.bincount(channel.flatten().int(), minlength=256).double()
        weights = histogram / histogram.sum()
        mean = (weights * levels).sum()
        means.append(mean)
        stds.append((weights * (levels - mean) ** 2).sum().sqrt().clamp_min(1 / 255))
    return torch.stack(means).float(), torch.stack(stds).float()


@contextmanager
def evaluating(model: nn.Module, gradients_to_weights: bool = False) -> Iterator[None]:
    """Evaluation mode and frozen weights inside; every mode and gradient flag as before after."""
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    if not gradients_to_weights:
        model.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@torch.no_grad()
def logits_of(model: Classifier, images: Tensor, batch_size: int = 512) -> Tensor:
    """float32 logits (N, K), on the CPU, of uint8 images (N, C, H, W), in evaluation mode."""
    if not len(images):
        return torch.empty(0, model.num_classes)
    with evaluating(model):
        batches = [model(to_float(batch, model.device)).cpu() for batch in images.split(batch_size)]
    return torch.cat(batches)


def predictions_of(model: Classifier, images: Tensor, batch_size: int = 512) -> Tensor:
    """int64 predicted classes (N,) of uint8 images (N, C, H, W), in evaluation mode."""
    return logits_of(model, images, batch_size).argmax(1)


def to_float(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 images as float32 in [0, 1], on ``device``."""
    return images.to(device).float().div_(255)
