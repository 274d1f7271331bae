"""RE's additive patterns: A to F (sections 5.1 and 8) and those of its other data sets (section 19).

Amplitudes are in units of 1/255, rows and columns count from 0. Where a source says "all channels" or "the
first channel", a grey image's one channel is meant. A pattern is drawn once an attack and is then the same
in every image.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from untrojan.errors import UntrojanError
from untrojan.seeding import generator
from untrojan.triggers.additive import Additive
from untrojan.triggers.base import ImageShape

Amplitude = Annotated[float, Interval(gt=0, le=255)]
"""In units of 1/255."""
Index = Annotated[int, Ge(0)]
Place = tuple[Index, Index]
"""(row, column)."""

MARGIN = 3
"""A drawn place keeps this distance from the border, as in the authors' related scripts."""


@dataclass(frozen=True)
class Chessboard:
    """Pattern A: every pixel whose row and column sum to an even number, all channels."""

    amplitude: Amplitude = 2.0

    def draw(self, shape: ImageShape, seed: int) -> Additive:
        return Additive(_board(shape, self.amplitude))


@dataclass(frozen=True)
class EvenPixels:
    """Pattern B: every pixel whose row and column are both even, all channels."""

    amplitude: Amplitude = 3.0

    def draw(self, shape: ImageShape, seed: int) -> Additive:
        pattern = torch.zeros(shape)
        pattern[:, ::2, ::2] = self.amplitude / 255
        return Additive(pattern)


@dataclass(frozen=True)
class Cross:
    """Pattern C: a pixel and its four neighbours, all channels."""

    amplitude: Amplitude = 70.0
    place: Place | None = None
    """The centre; drawn from the seed where none is given."""

    def draw(self, shape: ImageShape, seed: int) -> Additive:
        row, column = self.place or _drawn_place(shape, seed, "cross")
        pixels = [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)]
        return Additive(_shape_at(shape, row, column, pixels, self.amplitude))


@dataclass(frozen=True)
class Square:
    """Pattern D: 2x2 pixels of the first channel."""

    amplitude: Amplitude = 80.0
    place: Place | None = None
    """The upper left pixel; drawn from the seed where none is given."""

    def draw(self, shape: ImageShape, seed: int) -> Additive:
        row, column = self.place or _drawn_place(shape, seed, "square")
        pixels = [(0, 0), (0, 1), (1, 0), (1, 1)]
        return Additive(_shape_at(shape, row, column, pixels, self.amplitude, channels=1))


@dataclass(frozen=True)
class Pixels:
    """Pattern E: single pixels of one channel; place, channel, sign and amplitude are drawn for each.

    The paper's "four pixels are perturbed in one of the three channels" leaves open whether all share one
    channel. Here each draws its own unless ``one_channel``.
    """

    count: Annotated[int, Interval(ge=1, le=1024)] = 4
    lowest: Annotated[int, Interval(ge=1, le=255)] = 80
    """In units of 1/255; every whole number from here to ``highest`` is equally likely."""
    highest: Annotated[int, Interval(ge=1, le=255)] = 96
    one_channel: bool = False

    def draw(self, shape: ImageShape, seed: int) -> Additive:
        channels, height, width = shape
        if self.lowest > self.highest:
            raise UntrojanError(f"pixels: lowest {self.lowest} exceeds highest {self.highest}")
        if self.count > height * width:
            raise UntrojanError(f"pixels: {self.count} pixels do not fit into {height}x{width}")
        random = generator(seed, "pixels")
        places = torch.randperm(height * width, generator=random)[: self.count]
        chosen = torch.randint(channels, (self.count,), generator=random)
        if self.one_channel:
            chosen = chosen[:1].expand(self.count)
        signs = torch.randint(2, (self.count,), generator=random) * 2 - 1
        sizes = torch.randint(self.lowest, self.highest + 1, (self.count,), generator=random)
        pattern = torch.zeros(channels, height * width)
        pattern[chosen, places] = signs * sizes / 255
        return Additive(pattern.view(shape))


@dataclass(frozen=True)
class Ell:
    """Pattern F: an L of four pixels, three up and one to the right, all channels."""

    amplitude: Amplitude = 70.0
    place: Place | None = None
    """The corner of the L; drawn from the seed where none is given."""

    def draw(self, shape: ImageShape, seed: int) -> Additive:
        row, column = self.place or _drawn_place(shape, seed, "ell")
        pixels = [(0, 0), (0, 1), (-1, 0), (-2, 0)]
        return Additive(_shape_at(shape, row, column, pixels, self.amplitude))


@dataclass(frozen=True)
class CornerChessboard:
    """MNIST's pattern (section 19.2): a small chessboard in the bottom right corner."""

    amplitude: Amplitude = 25.0
    size: Annotated[int, Interval(ge=1, le=1024)] = 6

    def draw(self, shape: ImageShape, seed: int) -> Additive:
        channels, height, width = shape
        _must_fit(shape, self.size)
        pattern = torch.zeros(shape)
        pattern[:, height - self.size :, width - self.size :] = _board(
            (channels, self.size, self.size), self.amplitude
        )
        return Additive(pattern)


@dataclass(frozen=True)
class CornerPixel:
    """Fashion-MNIST's pattern (section 19.2): the bottom right pixel, all channels."""

    amplitude: Amplitude = 50.0

    def draw(self, shape: ImageShape, seed: int) -> Additive:
        pattern = torch.zeros(shape)
        pattern[:, -1, -1] = self.amplitude / 255
        return Additive(pattern)


@dataclass(frozen=True)
class YellowSquare:
    """GTSRB's pattern (section 19.2): a square in the red and the green channel, like a sticker on a sign.

    The paper states neither size nor place. Inferred: 4x4, anywhere within the middle half of the image,
    where a sign lies.
    """

    amplitude: Amplitude = 60.0
    size: Annotated[int, Interval(ge=1, le=1024)] = 4
    place: Place | None = None
    """The upper left pixel; drawn from the seed where none is given."""

    def draw(self, shape: ImageShape, seed: int) -> Additive:
        _must_fit(shape, self.size)
        row, column = self.place or self._drawn_place(shape, seed)
        pixels = [(i, j) for i in range(self.size) for j in range(self.size)]
        return Additive(_shape_at(shape, row, column, pixels, self.amplitude, channels=2))

    def _drawn_place(self, shape: ImageShape, seed: int) -> Place:
        random = generator(seed, "yellow square")
        starts = []
        for side in shape[1:]:
            first = min(side // 4, side - self.size)
            last = max(first, side - side // 4 - self.size)
            starts.append(int(torch.randint(first, last + 1, (), generator=random)))
        return starts[0], starts[1]


def _board(shape: ImageShape, amplitude: float) -> Tensor:
    rows, columns = torch.arange(shape[1])[:, None], torch.arange(shape[2])[None, :]
    return ((rows + columns) % 2 == 0).float().mul(amplitude / 255).expand(shape).clone()


def _shape_at(
    shape: ImageShape,
    row: int,
    column: int,
    pixels: Iterable[tuple[int, int]],
    amplitude: float,
    channels: int | None = None,
) -> Tensor:
    """A pattern of the pixels at these offsets, in the first ``channels`` channels (all where None)."""
    pattern = torch.zeros(shape)
    for down, right in pixels:
        i, j = row + down, column + right
        if not (0 <= i < shape[1] and 0 <= j < shape[2]):
            raise UntrojanError(f"the pattern at ({row}, {column}) does not fit into {shape[1]}x{shape[2]}")
        pattern[:channels, i, j] = amplitude / 255
    return pattern


def _drawn_place(shape: ImageShape, seed: int, purpose: str) -> Place:
    if min(shape[1:]) <= 2 * MARGIN:
        raise UntrojanError(
            f"{shape[1]}x{shape[2]} images are too small for a drawn place: {2 * MARGIN + 1} pixels a side"
        )
    random = generator(seed, purpose)
    row, column = (int(torch.randint(MARGIN, side - MARGIN, (), generator=random)) for side in shape[1:])
    return row, column


def _must_fit(shape: ImageShape, size: int) -> None:
    if size > min(shape[1:]):
        raise UntrojanError(f"a pattern of {size}x{size} does not fit into {shape[1]}x{shape[2]}")
