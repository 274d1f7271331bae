"""VGG in its CIFAR form: batch norm, global pooling and one linear layer.

Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (2015), table 1.
VGG-9 is RE's (section 19): VGG-11 without its last two convolutions, with 16 to 128 filters.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from untrojan.models.layers import GlobalAveragePool, conv_bn_relu, scaled

_Blocks = Sequence[Sequence[int]]

_VGG5: _Blocks = ((32, 32), (64,), (128,))
_VGG9: _Blocks = ((16,), (32,), (64, 64), (128, 128))
_VGG11: _Blocks = ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2)
_VGG13: _Blocks = ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2)
_VGG16: _Blocks = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)
_VGG19: _Blocks = ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4)


def vgg5(num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """Four convolutions, 32-32-64-128: VGG-16's first block at half width, and just enough to train it."""
    return _vgg(_VGG5, num_classes, in_channels, image_size, width)


def vgg9(num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """Six convolutions, 16-32-64-64-128-128 (RE, section 19)."""
    return _vgg(_VGG9, num_classes, in_channels, image_size, width)


def vgg11(num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """Configuration A."""
    return _vgg(_VGG11, num_classes, in_channels, image_size, width)


def vgg13(num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """Configuration B."""
    return _vgg(_VGG13, num_classes, in_channels, image_size, width)


def vgg16(num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """Configuration D."""
    return _vgg(_VGG16, num_classes, in_channels, image_size, width)


def vgg19(num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """Configuration E."""
    return _vgg(_VGG19, num_classes, in_channels, image_size, width)


def _vgg(blocks: _Blocks, num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    layers: list[nn.Module] = []
    channels, side = in_channels, image_size
    for block in blocks:
        for filters in block:
            layers += conv_bn_relu(channels, scaled(filters, width), bias=True)
            channels = scaled(filters, width)
        # Below 32 px the last pool would leave nothing.
        if side >= 2:
            layers.append(nn.MaxPool2d(2))
            side //= 2
    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*layers),
            pool=GlobalAveragePool(),
            classifier=nn.Linear(channels, num_classes),
        )
    )
