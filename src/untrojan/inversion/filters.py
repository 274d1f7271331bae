"""A filter as a trigger: every pixel is a linear function of its own colour and its neighbourhood's.

The one-layer transformation of Liu et al., "ABS: Scanning Neural Networks for Back-doors by Artificial Brain
Stimulation", CCS 2019, section 5.5, with which DECK (Tao et al., table III) measures class distances, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from untrojan.inversion.masked import target_loss
from untrojan.seeding import generator


def neighbourhoods(images: Tensor, window: int = 11) -> Tensor:
    """What a filter sees of each pixel: (..., 4C, H, W) from (..., C, H, W).

    The pixel, and the maximum, minimum and mean of the square of an odd ``window`` about it, or of as much of
    it as lies inside the image.
    """
    flat, half = images.flatten(0, -4), window // 2
    # A square's mean and extremes are those of its rows' means and extremes.
    rows = F.avg_pool2d(flat, (1, window), 1, (0, half), count_include_pad=False)
    mean = F.avg_pool2d(rows, (window, 1), 1, (half, 0), count_include_pad=False)
    largest = _sliding_maximum(_sliding_maximum(flat, window, -1), window, -2)
    smallest = -_sliding_maximum(_sliding_maximum(-flat, window, -1), window, -2)
    seen: Tensor = torch.cat([flat, largest, smallest, mean], 1).unflatten(0, images.shape[:-3])
    return seen


def _sliding_maximum(values: Tensor, window: int, dim: int) -> Tensor:
    """The largest of an odd ``window`` about each place along ``dim``.

    By doubling, log2(window) times over the tensor; pooling would go over it ``window`` times.
    """
    half, length = window // 2, values.shape[dim]
    border = [0, 0] * (-dim - 1) + [half, half]
    widest, reach = F.pad(values, border, value=float("-inf")), 1
    while reach < window:
        step = min(reach, window - reach)
        kept = widest.shape[dim] - step
        widest = torch.maximum(widest.narrow(dim, 0, kept), widest.narrow(dim, step, kept))
        reach += step
    return widest.narrow(dim, 0, length)


def second_moments(images: Tensor, window: int = 11) -> Tensor:
    """E[v v'] (4C, 4C) over all pixels' neighbourhoods v of images (N, C, H, W) in [0, 1]."""
    total = torch.zeros(4 * images.shape[1], 4 * images.shape[1], dtype=torch.float64)
    for batch in images.split(256):
        seen = neighbourhoods(batch, window).transpose(0, 1).flatten(1).double()
        total += seen @ seen.T
    return (total / (len(images) * images[0, 0].numel())).float()


@dataclass(frozen=True, eq=False)
class FilterMatrix:
    """x' = clip(M v), v being a pixel's neighbourhood: an :class:`~untrojan.inversion.engine.Problem`.

    Parameters are (P, C, 4C): M, at first the identity beside zeros with a little noise. What is to be small
    is the mean squared change of a pixel, in grey levels (0 to 255): a quadratic form in M and the
    neighbourhoods' second moments, exact but for the clipping. ABS bounds the structural similarity instead.
    """

    moments: Tensor
    """(4C, 4C) from :func:`second_moments` of the images at hand."""
    window: int = 11
    seed: int = 0
    noise: float = 0.01
    """Standard deviation of the noise that M starts with; without it every seed is the same."""
    both_sides: ClassVar[bool] = False

    def initial(self, pairs: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
        channels = image_shape[0]
        drawn = [
            torch.randn(channels, 4 * channels, generator=generator(self.seed, "filter", target))
            for target in pairs[:, 1].tolist()
        ]
        return torch.eye(channels, 4 * channels) + self.noise * torch.stack(drawn)

    def views(self, parameters: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
        return self.embed(parameters, sources)

    def loss(self, logits: Tensor, parameters: Tensor, pairs: Tensor) -> Tensor:
        return target_loss(logits, pairs)

    def embed(self, parameters: Tensor, images: Tensor) -> Tensor:
        seen = neighbourhoods(images, self.window)
        return torch.einsum("aoi,anihw->anohw", parameters, seen).clamp(0, 1)

    def size(self, parameters: Tensor) -> Tensor:
        """Mean squared change of a pixel before clipping, in squared grey levels."""
        channels = parameters.shape[1]
        change = parameters - torch.eye(channels, 4 * channels, device=parameters.device)
        moments = self.moments.to(parameters.device)
        return 255**2 * torch.einsum("aoi,ij,aoj->a", change, moments, change) / channels
