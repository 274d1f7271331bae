"""How visible a trigger is: distances between images with and without it, one value an image."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(clean: Tensor, triggered: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, float (N,), of uint8 images (N, C, H, W); infinite where equal."""
    return -10 * torch.log10(_difference(clean, triggered).square().mean(1))


def linf(clean: Tensor, triggered: Tensor) -> Tensor:
    """The largest change of any pixel, float (N,), in units of the pixel range [0, 1]."""
    return _difference(clean, triggered).abs().amax(1)


def l2(clean: Tensor, triggered: Tensor) -> Tensor:
    """The change's Euclidean norm, float (N,), pixels in [0, 1]."""
    norms: Tensor = torch.linalg.vector_norm(_difference(clean, triggered), dim=1)
    return norms


def _difference(clean: Tensor, triggered: Tensor) -> Tensor:
    return (triggered.double() - clean.double()).div(255).flatten(1)
