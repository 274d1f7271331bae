"""DenseNet-BC for small images (Huang et al., "Densely Connected Convolutional Networks", 2017)."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from untrojan.models.layers import GlobalAveragePool, scaled


def densenet(num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """DenseNet-BC of depth 100 and growth 12: three blocks of 16 layers, transitions that halve channels
    and resolution (section 4.2; RE, section 11, evaluates one of this family). The width multiplier scales
    the growth.
    """
    growth = scaled(12, width)
    channels = 2 * growth
    features: OrderedDict[str, nn.Module] = OrderedDict(
        conv0=nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
    )
    for number in (1, 2, 3):
        block = [DenseLayer(channels + index * growth, growth) for index in range(16)]
        features[f"denseblock{number}"] = nn.Sequential(*block)
        channels += 16 * growth
        if number < 3:
            features[f"transition{number}"] = _transition(channels, channels // 2)
            channels //= 2
    features["norm_final"] = nn.BatchNorm2d(channels)
    features["relu_final"] = nn.ReLU()
    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(features),
            pool=GlobalAveragePool(),
            classifier=nn.Linear(channels, num_classes),
        )
    )


class DenseLayer(nn.Module):
    """A 1x1 bottleneck of four times the growth, then 3x3; its output is appended to its input."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        new = self.conv1(self.relu1(self.norm1(features)))
        new = self.conv2(self.relu2(self.norm2(new)))
        return torch.cat([features.to(new.dtype), new], 1)


def _transition(in_channels: int, filters: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            norm=nn.BatchNorm2d(in_channels),
            relu=nn.ReLU(),
            conv=nn.Conv2d(in_channels, filters, 1, bias=False),
            pool=nn.AvgPool2d(2),
        )
    )
