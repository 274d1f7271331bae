"""The traffic-sign network of Neural Cleanse (Wang et al., 2019), which RE, section 19, uses on GTSRB."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from untrojan.models.layers import he_initialise, scaled


def gtsrb_cnn(num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """Three blocks of two 3x3 convolutions (32, 64, 128 filters), 512 hidden units, dropout, no batch norm.

    The second convolution of a block is unpadded, as in the authors' network, except where it would leave
    less than two pixels. Where images are so large that more than 8x8 places are left, they are averaged
    down to that.
    """
    layers: list[nn.Module] = []
    channels, side = in_channels, image_size
    for filters in (scaled(32, width), scaled(64, width), scaled(128, width)):
        padding = 0 if side >= 4 else 1
        layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(filters, filters, 3, padding=padding), nn.ReLU()]
        layers += [nn.MaxPool2d(2), nn.Dropout(0.2)]
        channels, side = filters, (side - 2 + 2 * padding) // 2
    side, hidden = min(8, side), scaled(512, width)
    return he_initialise(
        nn.Sequential(
            OrderedDict(
                features=nn.Sequential(*layers),
                pool=nn.AdaptiveAvgPool2d(side),
                flatten=nn.Flatten(),
                fc=nn.Linear(channels * side * side, hidden),
                relu=nn.ReLU(),
                dropout=nn.Dropout(0.5),
                linear=nn.Linear(hidden, num_classes),
            )
        )
    )
