"""Strongly altered views of a whole batch, for learning without labels.

Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations" (SimCLR), ICML 2020,
appendix A, at its strengths for small images.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_LUMINANCE = (0.299, 0.587, 0.114)


def strong_view(images: Tensor, random: torch.Generator, *, flip: bool = True) -> Tensor:
    """Random resized crop, mirror, colour jitter, greyscale and blur, drawn anew for each image.

    float (N, C, H, W) in [0, 1], same shape and range out. Crops hold .2 to 1 of the area at an aspect of 3/4
    to 4/3; brightness, contrast and saturation vary by .4 and hue by .1 of a turn in 8 of 10 images, 2 of 10
    turn grey, half are blurred by .1 to 2 pixels at 32 pixels a side. Grey images keep brightness and
    contrast of these. Draws from ``random``, a CPU generator, and from nothing else.
    """
    images = _cropped(images, random, flip)
    draws = torch.rand(7, len(images), 1, 1, 1, generator=random).to(images)
    jittered = _jittered(images, 2 * draws[:4] - 1)
    images = torch.where(draws[4] < 0.8, jittered, images)
    if images.shape[1] == 3:
        images = torch.where(draws[5] < 0.2, _grey(images), images)
    sigma = 0.1 + 1.9 * torch.rand(len(images), generator=random).to(images)
    return torch.where(draws[6] < 0.5, _blurred(images, sigma * images.shape[-1] / 32), images)


def _cropped(images: Tensor, random: torch.Generator, flip: bool) -> Tensor:
    """Windows of random area, aspect and place, stretched to the images' own size."""
    count = len(images)
    draws = torch.rand(5, count, generator=random).to(images)
    area = 0.2 + 0.8 * draws[0]
    aspect = torch.exp((2 * draws[1] - 1) * math.log(4 / 3))
    wide, tall = (area * aspect).sqrt().clamp_max(1), (area / aspect).sqrt().clamp_max(1)
    # In grid coordinates an image runs from -1 to 1, so a window of half the width leaves a shift of ±.5.
    right, down = (2 * draws[2] - 1) * (1 - wide), (2 * draws[3] - 1) * (1 - tall)
    mirror = torch.where(draws[4] < 0.5, -1.0, 1.0) if flip else torch.ones_like(wide)
    zero = torch.zeros_like(wide)
    maps = torch.stack([torch.stack([wide * mirror, zero, right], 1), torch.stack([zero, tall, down], 1)], 1)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _jittered(images: Tensor, strengths: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue by (4, N, 1, 1, 1) strengths in [-1, 1]."""
    images = (images * (1 + 0.4 * strengths[0])).clamp(0, 1)
    mean = _grey(images).mean((1, 2, 3), keepdim=True)
    images = (mean + (images - mean) * (1 + 0.4 * strengths[1])).clamp(0, 1)
    if images.shape[1] != 3:
        return images
    grey = _grey(images)
    images = (grey + (images - grey) * (1 + 0.4 * strengths[2])).clamp(0, 1)
    return _turned(images, 0.1 * strengths[3]).clamp(0, 1)


def _turned(images: Tensor, turns: Tensor) -> Tensor:
    """Hue turned by (N, 1, 1, 1) turns: a rotation of the colours about the grey axis."""
    angle = 2 * math.pi * turns
    across = (images.roll(1, 1) - images.roll(-1, 1)) / math.sqrt(3)
    mean = images.mean(1, keepdim=True)
    return mean + (images - mean) * angle.cos() + across * angle.sin()


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    weights = images.new_tensor(_LUMINANCE).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True).expand_as(images)


def _blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur by sigma (N,) pixels, over five pixels each way at most."""
    count, channels, height, width = images.shape
    radius = max(1, min(5, math.ceil(2 * float(sigma.max())), (min(height, width) - 1) // 2))
    steps = torch.arange(-radius, radius + 1).to(images)
    kernel = torch.exp(-steps.square() / (2 * sigma[:, None].square()))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    planes = F.pad(images.reshape(1, count * channels, height, width), [radius] * 4, mode="reflect")
    planes = F.conv2d(planes, kernel[:, None, :, None], groups=count * channels)
    return F.conv2d(planes, kernel[:, None, None, :], groups=count * channels).view_as(images)
