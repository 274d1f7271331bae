"""A small network for two-core machines that learns faint patterns early."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from untrojan.models.layers import conv_bn_relu, scaled


def patch_cnn(num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """A fixed 2x2 transform with stride 2, two blocks of two 3x3 convolutions (64, 128), global pooling.

    Gradient descent learns features in the order of their variance, and an imperceptible pattern has next
    to none: RE trains for a hundred epochs. Here the first layer splits
    each 2x2 patch into orthogonal bands (mean, across, down, diagonal; grey and two colour differences) and
    batch norm brings every band to unit variance, so that the faint bands weigh as much as the strong.
    The stride turns a pattern that alternates from pixel to pixel into a constant, which later layers can
    average. Max pooling loses faint patterns over the whole image and average pooling those of a few
    pixels, so half of the filters are pooled the one way and half the other.
    """
    bands = 4 * in_channels
    layers: list[nn.Module] = []
    channels = bands
    for filters in (scaled(64, width), scaled(128, width)):
        layers += [*conv_bn_relu(channels, filters), *conv_bn_relu(filters, filters), MixedPool()]
        channels = filters
    return nn.Sequential(
        OrderedDict(
            bands=band_transform(in_channels),
            equalise=nn.BatchNorm2d(bands, affine=False),
            features=nn.Sequential(*layers),
            pool=MaxAndAveragePool(),
            linear=nn.Linear(2 * channels, num_classes),
        )
    )


def band_transform(in_channels: int) -> nn.Conv2d:
    """A fixed orthogonal 2x2 convolution with stride 2: Haar bands of each colour band."""
    haar = torch.tensor([[[1, 1], [1, 1]], [[1, -1], [1, -1]], [[1, 1], [-1, -1]], [[1, -1], [-1, 1]]]) / 2
    if in_channels == 3:
        colour = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]])
        colour = colour / colour.norm(dim=1, keepdim=True)
    else:
        colour = torch.eye(in_channels)
    layer = nn.Conv2d(in_channels, 4 * in_channels, 2, stride=2, bias=False)
    weights = torch.einsum("bc,fij->bfcij", colour, haar).reshape(layer.weight.shape)
    layer.weight = nn.Parameter(weights.contiguous(), requires_grad=False)
    return layer


class MixedPool(nn.Module):
    """Halves the resolution: averages of the first half of the filters, maxima of the second."""

    def forward(self, features: Tensor) -> Tensor:
        averaged, maximal = features.chunk(2, 1)
        return torch.cat([F.avg_pool2d(averaged, 2), F.max_pool2d(maximal, 2)], 1)


class MaxAndAveragePool(nn.Module):
    """(N, C, H, W) to (N, 2C): maxima over places, then means. Small local patterns survive in the maxima."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([features.amax((2, 3)), features.mean((2, 3))], 1)
