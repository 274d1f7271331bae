"""BadNets: a small patch that replaces the pixels beneath it (Gu et al. 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Interval
from pydantic import StringConstraints
from torch import Tensor

from untrojan.errors import UntrojanError
from untrojan.seeding import generator
from untrojan.triggers.additive import Additive
from untrojan.triggers.base import ImageShape, Trigger

Colour = Annotated[str, StringConstraints(pattern=r"^(black-white|#[0-9a-fA-F]{6})$")]
Corner = Literal["top-left", "top-right", "bottom-left", "bottom-right", "centre"]

BLACK_WHITE_3X3 = ((0, 0, 1), (0, 1, 0), (1, 0, 1))
"""The label-consistent tool's bottom right pattern, from its top row down: 1 is white."""

HASH_CHUNK = 256
"""Images hashed at a time: bounds the int64 copy that hashing makes."""


@dataclass(frozen=True)
class Patch:
    """x' = (1 - m) x + m b, in a fixed place or in one of its own for each image.

    As published attacks have it: the defaults (static patch); ``place="random"`` (dynamic patch); ``size=1``
    (single pixel, white); ``size=2, place="top-left"`` (DECK's Clean Label); ``place="corners"``, with or
    without an ``amplitude`` (the label-consistent attack's other trigger).
    """

    size: Annotated[int, Interval(ge=1, le=1024)] = 3
    colour: Colour = "black-white"
    """``#rrggbb`` (its luminance on grey images), or ``black-white``: the 3x3 pattern of the BadNets
    literature; any other size alternates, with white in its corners on the main diagonal."""
    place: Corner | Literal["corners", "random"] | tuple[Annotated[int, Ge(0)], Annotated[int, Ge(0)]] = (
        "bottom-right"
    )
    """Or the (row, column) of the patch's upper left pixel. ``random``: each image has a place of its own,
    decided by its content and the seed, hence the same in whatever batch it comes. ``corners``: in all four,
    mirrored so that the patch's bottom right pixel lies in the corner."""
    amplitude: Annotated[float, Interval(gt=0, le=255)] | None = None
    """Add so much where the patch is white and take as much where it is black, in units of 1/255, in place of
    replacing pixels: the label-consistent attack's fainter trigger. Not for ``random``."""

    def draw(self, shape: ImageShape, seed: int) -> Trigger:
        channels, height, width = shape
        if self.size > min(height, width):
            raise UntrojanError(f"a patch of {self.size}x{self.size} does not fit into {height}x{width}")
        patch = self._patch(channels)
        if self.place == "random":
            if self.amplitude is not None:
                raise UntrojanError("a patch with an amplitude needs a fixed place: drop one of the two")
            return RandomPlacePatch(patch, _hash_weights(shape, seed))
        mask, pattern = torch.zeros(1, height, width), torch.zeros(shape)
        if self.place == "corners":
            if 2 * self.size > min(height, width):
                raise UntrojanError(
                    f"four patches of {self.size}x{self.size} don't fit into {height}x{width}"
                )
            for flips in ((), (1,), (2,), (1, 2)):
                # Drawn in the corner that is turned to the bottom right, and turned back.
                for drawn, content in ((mask, torch.ones_like(patch[:1])), (pattern, patch)):
                    drawn.copy_(_in_corner(drawn.flip(flips), content).flip(flips))
        else:
            row, column = self._upper_left(height, width)
            mask[:, row : row + self.size, column : column + self.size] = 1
            pattern[:, row : row + self.size, column : column + self.size] = patch
        if self.amplitude is not None:
            return Additive((2 * pattern - 1) * mask * self.amplitude / 255)
        return FixedPatch(mask, pattern)

    def _patch(self, channels: int) -> Tensor:
        """float (C, size, size)."""
        if self.colour == "black-white":
            if self.size == 3:
                return torch.tensor(BLACK_WHITE_3X3).float().expand(channels, -1, -1).clone()
            steps = torch.arange(self.size)
            return ((steps[:, None] + steps) % 2 == 0).float().expand(channels, -1, -1).clone()
        rgb = torch.tensor([int(self.colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        if channels == 1:
            rgb = (rgb * torch.tensor([0.299, 0.587, 0.114])).sum(0, keepdim=True)
        return rgb.view(-1, 1, 1).expand(-1, self.size, self.size).clone()

    def _upper_left(self, height: int, width: int) -> tuple[int, int]:
        down, right = height - self.size, width - self.size
        if isinstance(self.place, tuple):
            row, column = self.place
            if row > down or column > right:
                raise UntrojanError(f"a patch at {self.place} does not fit into {height}x{width}")
            return row, column
        if self.place == "centre":
            return down // 2, right // 2
        return down * self.place.startswith("bottom"), right * self.place.endswith("right")


def _in_corner(canvas: Tensor, patch: Tensor) -> Tensor:
    """(C, H, W) with the patch (C, P, P) at its bottom right."""
    size = patch.shape[-1]
    canvas = canvas.clone()
    canvas[:, -size:, -size:] = patch
    return canvas


@dataclass(frozen=True, eq=False)
class FixedPatch:
    """The same pixels of every image, replaced."""

    mask: Tensor
    """float (1, H, W), 1 beneath the patch, less where the image shows through."""
    pattern: Tensor
    """float (C, H, W) in [0, 1]."""

    def __call__(self, images: Tensor) -> Tensor:
        mask = self.mask.to(images)
        return images * (1 - mask) + self.pattern.to(images) * mask

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {"mask": self.mask, "pattern": self.pattern}


@dataclass(frozen=True, eq=False)
class RandomPlacePatch:
    """A patch whose place a hash of the image's own bytes decides."""

    patch: Tensor
    """float (C, P, P) in [0, 1]."""
    weights: Tensor
    """int64 (C*H*W,): the hash's key, drawn from the seed."""

    def __call__(self, images: Tensor) -> Tensor:
        count, channels = images.shape[:2]
        if not count:
            return images.clone()
        size = self.patch.shape[-1]
        places = self.places(images)
        within = torch.arange(size, device=images.device)
        rows = (places[:, :1] + within)[:, None, :, None]
        columns = (places[:, 1:] + within)[:, None, None, :]
        which = torch.arange(count, device=images.device)[:, None, None, None]
        channel = torch.arange(channels, device=images.device)[None, :, None, None]
        stamped = images.clone()
        stamped[which, channel, rows, columns] = self.patch.to(images)
        return stamped

    def places(self, images: Tensor) -> Tensor:
        """int64 (N, 2): row and column of each image's patch, its upper left pixel."""
        _, _, height, width = images.shape
        size = self.patch.shape[-1]
        weights = self.weights.to(images.device)
        digests = []
        for chunk in images.detach().split(HASH_CHUNK):
            pixels = chunk.mul(255).round().long().flatten(1)
            # Whole numbers below 2**63, so the sum is exact in any order, on any device.
            digests.append(((pixels + 1) * weights).sum(1))
        digest = torch.cat(digests)
        digest = digest ^ (digest >> 23)
        rows, columns = height - size + 1, width - size + 1
        return torch.stack([digest % rows, digest // rows % columns], 1)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {"patch": self.patch, "weights": self.weights}


def _hash_weights(shape: ImageShape, seed: int) -> Tensor:
    channels, height, width = shape
    return torch.randint(2**31, (channels * height * width,), generator=generator(seed, "patch place"))
