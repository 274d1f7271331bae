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


def ssim(clean: Tensor, triggered: Tensor) -> Tensor:
    """Structural similarity, float (N,), of uint8 images (N, C, H, W); 1 where equal."""
    return structural_similarity(clean.double(), triggered.double())


def structural_similarity(first: Tensor, second: Tensor, pixel_range: float = 255.0) -> Tensor:
    """Mean structural similarity (N,) of float images (N, C, H, W), differentiable, channels averaged.

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity" (2004): an 11x11
    Gaussian window of deviation 1.5 wherever it lies within the image, K1 = .01 and K2 = .03. On images
    smaller than that the window is as large as they are.
    """
    rows, columns = (_windows(side, first) for side in first.shape[2:])
    maps = torch.stack([first, second, first * first, second * second, first * second])
    mean, other, square, other_square, product = rows @ maps @ columns.T
    small, large = (0.01 * pixel_range) ** 2, (0.03 * pixel_range) ** 2
    means, squares = mean * other, mean * mean + other * other
    luminance = (2 * means + small) / (squares + small)
    structure = (2 * (product - means) + large) / (square + other_square - squares + large)
    similarity: Tensor = luminance * structure
    return similarity.flatten(1).mean(1)


def _windows(side: int, like: Tensor) -> Tensor:
    """(places, side): the Gaussian window at each place along a side, a row each."""
    width = min(11, side)
    offsets = torch.arange(width, dtype=like.dtype, device=like.device) - (width - 1) / 2
    weights = (-offsets.square() / (2 * 1.5**2)).exp()
    banded = like.new_zeros(side - width + 1, side)
    for place in range(len(banded)):
        banded[place, place : place + width] = weights / weights.sum()
    return banded


def _difference(clean: Tensor, triggered: Tensor) -> Tensor:
    return (triggered.double() - clean.double()).div(255).flatten(1)
