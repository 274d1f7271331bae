"""Network in Network (Lin et al., 2014), in the CIFAR form that NONE and DECK evaluate."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from untrojan.models.layers import GlobalAveragePool, he_initialise, scaled


def nin(num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """192(5x5)-160-96, 192(5x5)-192-192, 192(3x3)-192-K: the other convolutions are 1x1.

    ReLU follows every convolution, the last one too, so logits are never negative; max pooling and dropout
    lie between the three groups, global average pooling closes them. No batch norm.
    """
    w160, w96, w192 = scaled(160, width), scaled(96, width), scaled(192, width)
    return he_initialise(
        nn.Sequential(
            OrderedDict(
                features=nn.Sequential(
                    *_mlpconv(in_channels, (w192, w160, w96), kernel=5),
                    nn.MaxPool2d(3, 2, padding=1),
                    nn.Dropout(0.5),
                    *_mlpconv(w96, (w192, w192, w192), kernel=5),
                    nn.MaxPool2d(3, 2, padding=1),
                    nn.Dropout(0.5),
                    *_mlpconv(w192, (w192, w192), kernel=3),
                ),
                classifier=nn.Conv2d(w192, num_classes, 1),
                relu=nn.ReLU(),
                pool=GlobalAveragePool(),
            )
        )
    )


def _mlpconv(in_channels: int, filters: tuple[int, ...], kernel: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for number, out_channels in enumerate(filters):
        size = kernel if number == 0 else 1
        layers += [nn.Conv2d(in_channels, out_channels, size, padding=size // 2), nn.ReLU()]
        in_channels = out_channels
    return layers
