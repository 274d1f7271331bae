"""MobileNetV2 in its CIFAR form (Sandler et al., 2018, table 2), as RE, section 11, evaluates it.

Against the ImageNet form, the stem and the second group keep the resolution, ReLU stands for ReLU6, and a
block that keeps the resolution but changes the channels has a projected shortcut.
"""

from __future__ import annotations

from torch import Tensor, nn

from untrojan.models.layers import GlobalAveragePool, scaled

_GROUPS = (
    # expansion, filters, blocks, stride
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileNetV2(nn.Module):
    """Inverted residual blocks: expand 1x1, filter each channel 3x3, project 1x1 without activation."""

    def __init__(self, num_classes: int, in_channels: int, width: float) -> None:
        super().__init__()
        channels, last = scaled(32, width), scaled(1280, width)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        blocks = []
        for expansion, filters, count, stride in _GROUPS:
            for number in range(count):
                blocks.append(
                    InvertedResidual(
                        channels, scaled(filters, width), expansion, stride if number == 0 else 1
                    )
                )
                channels = scaled(filters, width)
        self.layers = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(channels, last, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last)
        self.relu2 = nn.ReLU()
        self.pool = GlobalAveragePool()
        self.linear = nn.Linear(last, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.layers(self.relu1(self.bn1(self.conv1(images))))
        logits: Tensor = self.linear(self.pool(self.relu2(self.bn2(self.conv2(features)))))
        return logits


class InvertedResidual(nn.Module):
    """The shortcut exists only where the resolution is kept."""

    def __init__(self, in_channels: int, filters: int, expansion: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        wide = expansion * in_channels
        self.conv1 = nn.Conv2d(in_channels, wide, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(wide, wide, 3, stride, padding=1, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(wide, filters, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(filters)
        self.shortcut = nn.Sequential()
        if stride == 1 and in_channels != filters:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, filters, 1, bias=False), nn.BatchNorm2d(filters)
            )

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.relu1(self.bn1(self.conv1(features)))
        out = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(out)))))
        return out + self.shortcut(features) if self.stride == 1 else out


def mobilenetv2(num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """MobileNetV2 for small images."""
    return MobileNetV2(num_classes, in_channels, width)
