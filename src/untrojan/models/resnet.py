"""Residual networks in their CIFAR form: a 3x3 stem, three or four stages of basic blocks, 1x1 projections.

He et al., "Deep Residual Learning for Image Recognition" (2016), and for the pre-activated one "Identity
Mappings in Deep Residual Networks" (2016). The wide and compact ResNet-18 are those of RE's figure 3.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from untrojan.models.layers import GlobalAveragePool, scaled

_WIDE = (64, 128, 256, 512)
_COMPACT = (16, 32, 64, 64)
_NARROW = (16, 32, 64)


def resnet18(num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """64-128-256-512 filters, two blocks a stage (RE, figure 3, left)."""
    return ResNet((2, 2, 2, 2), [scaled(f, width) for f in _WIDE], num_classes, in_channels)


def resnet18_compact(num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """16-32-64-64 filters, two blocks a stage (RE, figure 3, right)."""
    return ResNet((2, 2, 2, 2), [scaled(f, width) for f in _COMPACT], num_classes, in_channels)


def resnet34(num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """64-128-256-512 filters, 3-4-6-3 blocks."""
    return ResNet((3, 4, 6, 3), [scaled(f, width) for f in _WIDE], num_classes, in_channels)


def preact_resnet18(num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """ResNet-18 with batch norm and ReLU before each convolution, and once more after the last stage."""
    return PreActResNet((2, 2, 2, 2), [scaled(f, width) for f in _WIDE], num_classes, in_channels)


def resnet20(num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """Pre-activated, 16-32-64 filters, three blocks a stage, as DECK's subjects are."""
    return PreActResNet((3, 3, 3), [scaled(f, width) for f in _NARROW], num_classes, in_channels)


def resnet32(num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """:func:`resnet20` with five blocks a stage."""
    return PreActResNet((5, 5, 5), [scaled(f, width) for f in _NARROW], num_classes, in_channels)


class ResNet(nn.Module):
    """``layer1`` keeps the resolution; those after it halve it."""

    def __init__(
        self, blocks: Sequence[int], filters: Sequence[int], num_classes: int, in_channels: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, filters[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters[0])
        self.relu = nn.ReLU()
        self.stages = _add_stages(self, BasicBlock, blocks, filters)
        self.pool = GlobalAveragePool()
        self.linear = nn.Linear(filters[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.relu(self.bn1(self.conv1(images)))
        for stage in self.stages:
            features = self.get_submodule(stage)(features)
        logits: Tensor = self.linear(self.pool(features))
        return logits


class PreActResNet(nn.Module):
    """As :class:`ResNet`, of pre-activated blocks, with the batch norm and ReLU that must close them."""

    def __init__(
        self, blocks: Sequence[int], filters: Sequence[int], num_classes: int, in_channels: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, filters[0], 3, padding=1, bias=False)
        self.stages = _add_stages(self, PreActBlock, blocks, filters)
        self.bn = nn.BatchNorm2d(filters[-1])
        self.relu = nn.ReLU()
        self.pool = GlobalAveragePool()
        self.linear = nn.Linear(filters[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv1(images)
        for stage in self.stages:
            features = self.get_submodule(stage)(features)
        logits: Tensor = self.linear(self.pool(self.relu(self.bn(features))))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside an identity, or a 1x1 projection where the shape changes."""

    def __init__(self, in_channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, filters, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != filters:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, filters, 1, stride, bias=False), nn.BatchNorm2d(filters)
            )
        self.relu2 = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(features)))))
        # The stem's float32 would otherwise spread through the identities to a whole stage.
        out: Tensor = self.relu2(residual + self.shortcut(features).to(residual.dtype))
        return out


class PreActBlock(nn.Module):
    """Batch norm and ReLU first; the projection takes the activated input, the identity the raw one."""

    def __init__(self, in_channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, filters, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.projects = stride != 1 or in_channels != filters
        if self.projects:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, filters, 1, stride, bias=False))

    def forward(self, features: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(features))
        shortcut = self.shortcut(activated) if self.projects else features
        residual = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        out: Tensor = residual + shortcut.to(residual.dtype)
        return out


def _add_stages(
    network: nn.Module,
    block: type[BasicBlock] | type[PreActBlock],
    blocks: Sequence[int],
    filters: Sequence[int],
) -> tuple[str, ...]:
    """Give ``network`` its ``layer1``, ``layer2``, ..., of so many blocks and filters each; their names."""
    names, incoming = [], filters[0]
    for number, (count, outgoing) in enumerate(zip(blocks, filters, strict=True), 1):
        first = block(incoming, outgoing, 1 if number == 1 else 2)
        stage = nn.Sequential(first, *(block(outgoing, outgoing, 1) for _ in range(count - 1)))
        network.add_module(f"layer{number}", stage)
        names.append(f"layer{number}")
        incoming = outgoing
    return tuple(names)
