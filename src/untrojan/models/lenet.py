"""LeNet-5 (LeCun et al., "Gradient-Based Learning Applied to Document Recognition", 1998)."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from untrojan.models.layers import he_initialise, scaled


def lenet5(num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """6 and 16 filters of 5x5, then 120 and 84 units, with ReLU and max pooling in place of tanh and
    subsampling.

    Images below 32 px are padded by two pixels, as 28 px digits are in the paper; above 32 px the last
    feature map is averaged down to its 5x5.
    """
    first, second = scaled(6, width), scaled(16, width)
    padding = 2 if image_size < 32 else 0
    side = min(5, ((image_size + 2 * padding - 4) // 2 - 4) // 2)
    hidden, penultimate = scaled(120, width), scaled(84, width)
    return he_initialise(
        nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(in_channels, first, 5, padding=padding),
                relu1=nn.ReLU(),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(first, second, 5),
                relu2=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                pool=nn.AdaptiveAvgPool2d(side),
                flatten=nn.Flatten(),
                fc1=nn.Linear(second * side * side, hidden),
                relu3=nn.ReLU(),
                fc2=nn.Linear(hidden, penultimate),
                relu4=nn.ReLU(),
                linear=nn.Linear(penultimate, num_classes),
            )
        )
    )
