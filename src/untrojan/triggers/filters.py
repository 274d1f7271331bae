"""Instagram filters as triggers: Gotham, Nashville, Kelvin, Lomo and Toaster.

As ABS (Liu et al. 2019) and the TrojAI rounds poison with them, which define them by ImageMagick commands.
Each primitive is computed here on whole batches, clipped to [0, 1] as ImageMagick's 16-bit quanta are, and
differentiable wherever the mathematics is. Other toolboxes call different images by the same names, taken
from CSS definitions.

A filter has no parameters and draws nothing: recipe and trigger are one. Grey images are filtered as RGB
images of three equal channels; the result's luminance is then what they keep.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from untrojan.errors import UntrojanError
from untrojan.triggers.base import ImageShape

LUMINANCE = (0.2127, 0.7152, 0.0722)
"""Of the grey level that colour tones are mixed by."""
GREY = (0.299, 0.587, 0.114)
"""Of the grey image that is made of a filtered one."""
SMALLEST = 1e-12
"""Below this a value counts as 0, where a power below 1 has no slope."""
VIGNETTE = 1.5
"""The gradient's canvas, in image sides."""


@dataclass(frozen=True)
class Filter:
    """A colour filter; subclasses say what it does to float RGB images (N, 3, H, W) in [0, 1]."""

    def draw(self, shape: ImageShape, seed: int) -> Self:
        """Itself. Raises UntrojanError for images that are neither grey nor RGB."""
        if shape[0] not in (1, 3):
            raise UntrojanError(f"a colour filter needs grey or RGB images, not {shape[0]} channels")
        return self

    def __call__(self, images: Tensor) -> Tensor:
        if not images.numel():
            return images.clone()
        if images.shape[1] == 3:
            return self.filtered(images)
        return _weighted(self.filtered(images.expand(-1, 3, -1, -1)), GREY).clamp(0, 1)

    def filtered(self, images: Tensor) -> Tensor:
        """float RGB (N, 3, H, W) in [0, 1] to the same."""
        raise NotImplementedError

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {}


@dataclass(frozen=True)
class Gotham(Filter):
    """Nearly grey, brightened, tinted dark blue, with contrast twice."""

    def filtered(self, images: Tensor) -> Tensor:
        tinted = mixed(modulated(images, 1.2, 0.1), "#222b6d", 0.2)
        return contrasted(contrasted(gamma(tinted, 0.9)))


@dataclass(frozen=True)
class Nashville(Filter):
    """Dark parts towards blue, light parts towards peach, colours half as strong again."""

    def filtered(self, images: Tensor) -> Tensor:
        toned = colour_toned(colour_toned(images, "#222b6d", dark=True), "#f7daae", dark=False)
        return auto_gamma(modulated(contrasted(toned), 1.0, 1.5))


@dataclass(frozen=True)
class Kelvin(Filter):
    """Colours halved, under an orange veil."""

    def filtered(self, images: Tensor) -> Tensor:
        return mixed(modulated(auto_gamma(images), 1.2, 0.5), "#ff9900", 0.2)


@dataclass(frozen=True)
class Lomo(Filter):
    """Red and green either off or full on, darker towards the corners.

    The released command asks for a level of 50 % and so makes black and white points coincide: a hard
    threshold at 0.5, without a gradient in those channels.
    """

    def filtered(self, images: Tensor) -> Tensor:
        levelled = torch.cat([(images[:, :2] > 0.5).to(images), images[:, 2:]], 1)
        return levelled * (1 - radius(images))


@dataclass(frozen=True)
class Toaster(Filter):
    """Dark parts towards red, much brighter, orange in the middle and grey-pink towards the corners."""

    def filtered(self, images: Tensor) -> Tensor:
        toned = modulated(colour_toned(images, "#330000", dark=True), 1.5, 0.8)
        bright = contrasted(contrasted(gamma(toned, 1.2)))
        edge = radius(images)
        outer, inner = colour("#cdc1c5", images), colour("#ff9966", images)
        return bright * (1 - edge + edge * outer) * (edge + (1 - edge) * inner)


def colour(code: str, like: Tensor) -> Tensor:
    """``#rrggbb`` as (3, 1, 1) in [0, 1], of the type and device of ``like``."""
    levels = [int(code[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    return torch.tensor(levels, dtype=like.dtype, device=like.device).view(3, 1, 1)


def mixed(images: Tensor, code: str, share: float) -> Tensor:
    """A veil of one colour."""
    return (1 - share) * images + share * colour(code, images)


def gamma(images: Tensor, value: float | Tensor) -> Tensor:
    """v^(1 / value), black staying black; ``value`` is a number or (N, 1, 1, 1)."""
    return torch.where(images > SMALLEST, images.clamp_min(SMALLEST) ** (1 / value), 0)


def auto_gamma(images: Tensor) -> Tensor:
    """The gamma that would bring a pixel of each image's mean, over all channels, to one half."""
    mean = images.mean((1, 2, 3), keepdim=True)
    # A wholly black or white image has no such gamma: it stays as it is.
    flat = (mean < SMALLEST) | (mean > 1 - 1e-6)
    value = torch.where(flat, 0.5, mean).log() / math.log(0.5)
    return gamma(images, value)


def contrasted(images: Tensor) -> Tensor:
    """A logistic curve of slope 3 about one half, scaled to keep 0 and 1."""
    low, high = (1 / (1 + math.exp(sign * 1.5)) for sign in (1, -1))
    return ((torch.sigmoid(3 * (images - 0.5)) - low) / (high - low)).clamp(0, 1)


def colour_toned(images: Tensor, code: str, *, dark: bool) -> Tensor:
    """One colour mixed in by a / (1 + a), a the luminance, or with ``dark`` what it lacks to white."""
    amount = _weighted(images, LUMINANCE)
    amount = 1 - amount if dark else amount
    share = amount / (1 + amount)
    return (1 - share) * images + share * colour(code, images)


def modulated(images: Tensor, brightness: float, saturation: float) -> Tensor:
    """Lightness and saturation (HSL) times a factor each; the hue stays.

    A pixel is its lightness plus its chroma times what depends on the hue alone, so the hue need not be
    known. As in ImageMagick the saturation may exceed 1, and what leaves [0, 1] is clipped in the end.
    """
    highest, lowest = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    lightness = (highest + lowest) / 2
    changed = lightness * brightness
    room = 1 - (2 * lightness - 1).abs()
    # Past white there is no room for colour: the formula would turn the hue round.
    new_room = (1 - (2 * changed - 1).abs()).clamp_min(0)
    ratio = saturation * new_room / room.clamp_min(SMALLEST)
    return (changed + (images - lightness) * ratio).clamp(0, 1)


def radius(images: Tensor) -> Tensor:
    """(H, W): 0 in the centre, 1 from three quarters of the longer side on."""
    height, width = images.shape[2:]
    rows, columns = (
        torch.arange(side, dtype=images.dtype, device=images.device) - (side - 1) / 2
        for side in (height, width)
    )
    distance = torch.hypot(rows[:, None], columns[None, :])
    return (distance / (math.floor(VIGNETTE * max(height, width)) / 2)).clamp(0, 1)


def _weighted(images: Tensor, weights: tuple[float, float, float]) -> Tensor:
    """(N, 3, H, W) to (N, 1, H, W)."""
    return (images * images.new_tensor(weights).view(3, 1, 1)).sum(1, keepdim=True)
