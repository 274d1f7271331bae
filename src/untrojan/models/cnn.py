"""The three-convolution network: the fastest one here that still learns colour photographs."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from untrojan.models.layers import conv_bn_relu, scaled


def cnn(num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """32, 64 and 128 filters of 3x3, each with batch norm, ReLU and 2x2 max pooling, and one linear layer.

    The linear layer sees places (at most 4x4 of them), not only their mean. 0.06 GFLOP a training step and
    image at 32 px.
    """
    layers: list[nn.Module] = []
    channels = in_channels
    for filters in (scaled(32, width), scaled(64, width), scaled(128, width)):
        layers += [*conv_bn_relu(channels, filters), nn.MaxPool2d(2)]
        channels = filters
    side = min(4, image_size // 8)
    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*layers),
            pool=nn.AdaptiveAvgPool2d(side),
            flatten=nn.Flatten(),
            linear=nn.Linear(channels * side * side, num_classes),
        )
    )
