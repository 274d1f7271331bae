"""`signs`: photographs of road signs, drawn rather than taken.

A set in the manner of TrojAI's (Karra, Ashcraft & Fendley, "The TrojAI Software Framework", 2020): the class
is a sign of one shape, colour and glyph; all else (background, place, tilt, light, dirt, blur, sensor noise)
is drawn for each image. It needs no download and has as many classes as asked for.

Every number is drawn and computed in float64: two machines whose vector units round differently then still
agree on all bytes, because a difference in the sixteenth digit does not reach the eighth bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from untrojan.data.image_set import ImageSet, Splits
from untrojan.errors import UntrojanError
from untrojan.seeding import generator

Point = tuple[float, float]
Colour = tuple[float, float, float]

MAX_CLASSES = 100
MIN_SIZE, MAX_SIZE = 16, 1024

_PIXELS_AT_ONCE = 1 << 18  # at 32x32, 256 images: the working arrays stay near the cache
_FINEST_TEXTURE = 256  # pixels across; the sharpest camera here blurs away anything finer
_NUMBERS_PER_IMAGE = 768
_MAX_GIGABYTES = 64
_OCTAVES = ((3, 4), (1, 6), (1, 10), (1, 16))  # channels and cells a side, coarse to fine


def _ring(corners: int, first_degrees: float, radius: float = 0.9, centre: Point = (0, 0)) -> list[Point]:
    angles = [math.radians(first_degrees + 360 * i / corners) for i in range(corners)]
    return [(centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a)) for a in angles]


def _star() -> list[Point]:
    outer, inner = _ring(5, -90, 0.98), _ring(5, -54, 0.5)
    return [point for pair in zip(outer, inner, strict=True) for point in pair]


def _shield() -> list[Point]:
    flank = [(0.8 * math.cos(t), -0.05 + 0.95 * math.sin(t)) for t in np.linspace(0, math.pi, 17).tolist()]
    return [(-0.8, -0.85), (0.8, -0.85), *flank]


def _cross(arm: float = 0.4, tip: float = 0.92) -> list[Point]:
    quarter = [(arm, -tip), (arm, -arm), (tip, -arm)]
    right = quarter + [(x, -y) for x, y in reversed(quarter)]
    return right + [(-x, y) for x, y in reversed(right)]


# Outlines in a box of ±1, y downwards, with the centre and the half-width of the place for the glyph.
SHAPES: dict[str, tuple[list[Point], Point, float]] = {
    "octagon": (_ring(8, 22.5, 0.94), (0, 0), 0.5),
    "triangle": ([(0, -0.9), (0.98, 0.8), (-0.98, 0.8)], (0, 0.28), 0.36),
    "circle": (_ring(40, 0), (0, 0), 0.48),
    "square": (_ring(4, 45, 1.15), (0, 0), 0.5),
    "diamond": (_ring(4, 0, 0.99), (0, 0), 0.42),
    "wedge": ([(0, 0.9), (-0.98, -0.8), (0.98, -0.8)], (0, -0.28), 0.36),
    "hexagon": (_ring(6, 0, 0.96), (0, 0), 0.5),
    "shield": (_shield(), (0, -0.1), 0.46),
    "panel": ([(-0.98, -0.58), (0.98, -0.58), (0.98, 0.58), (-0.98, 0.58)], (0, 0), 0.4),
    "pentagon": (_ring(5, -90, 0.98), (0, 0.05), 0.45),
    "star": (_star(), (0, 0.02), 0.36),
    "cross": (_cross(), (0, 0), 0.42),
}

_WHITE, _BLACK = (0.93, 0.93, 0.91), (0.07, 0.07, 0.08)
# Fill, border, glyph. Small sets use the first three only, so that colour alone never tells the class.
COLOURS: dict[str, tuple[Colour, Colour, Colour]] = {
    "red": ((0.76, 0.09, 0.12), _WHITE, _WHITE),
    "blue": ((0.06, 0.24, 0.66), _WHITE, _WHITE),
    "yellow": ((0.95, 0.76, 0.08), _BLACK, _BLACK),
    "white": (_WHITE, (0.76, 0.09, 0.12), _BLACK),
    "green": ((0.02, 0.42, 0.24), _WHITE, _WHITE),
    "orange": ((0.96, 0.45, 0.04), _BLACK, _BLACK),
    "black": ((0.10, 0.10, 0.11), (0.95, 0.76, 0.08), (0.95, 0.76, 0.08)),
    "purple": ((0.42, 0.12, 0.50), _WHITE, _WHITE),
    "pink": ((0.93, 0.55, 0.68), (0.30, 0.05, 0.20), (0.30, 0.05, 0.20)),
}

# Strokes in a box of ±1, each a run of points; a run of one point is a dot. All are drawn with one round pen.
GLYPHS: dict[str, list[list[Point]]] = {
    "bar": [[(-0.9, 0), (0.9, 0)]],
    "arrow": [[(0, 0.95), (0, -0.95)], [(-0.65, -0.25), (0, -0.95), (0.65, -0.25)]],
    "slash": [[(-0.75, 0.8), (0.75, -0.8)]],
    "ring": [[*_ring(24, 0, 0.75), (0.75, 0)]],
    "seven": [[(-0.6, -0.9), (0.6, -0.9), (-0.2, 0.9)]],
    "chevron": [[(-0.8, 0.45), (0, -0.45), (0.8, 0.45)]],
    "plus": [[(-0.8, 0), (0.8, 0)], [(0, -0.8), (0, 0.8)]],
    "dots": [[(-0.7, 0.5)], [(0.7, 0.5)], [(0, -0.65)]],
    "columns": [[(-0.45, -0.85), (-0.45, 0.85)], [(0.45, -0.85), (0.45, 0.85)]],
    "hook": [[(-0.5, 0.95), (-0.5, -0.3), (0, -0.8), (0.55, -0.3), (0.55, 0.25)]],
    "dot": [[(-0.12, 0), (0.12, 0)]],
    "fork": [[(0, 0.95), (0, 0.1), (-0.7, -0.8)], [(0, 0.1), (0.7, -0.8)]],
    "bars": [[(-0.85, -0.45), (0.85, -0.45)], [(-0.85, 0.45), (0.85, 0.45)]],
    "four": [[(0.35, 0.95), (0.35, -0.9), (-0.7, 0.35), (0.8, 0.35)]],
    "zigzag": [[(0.55, -0.9), (-0.45, -0.1), (0.45, 0.1), (-0.55, 0.9)]],
    "box": [[(-0.7, -0.7), (0.7, -0.7), (0.7, 0.7), (-0.7, 0.7), (-0.7, -0.7)]],
    "cup": [[(-0.7, -0.8), (-0.7, 0.3), (0, 0.85), (0.7, 0.3), (0.7, -0.8)]],
}

_SKIES = (
    *((0.45, 0.62, 0.85), (0.62, 0.74, 0.86), (0.80, 0.82, 0.84), (0.55, 0.57, 0.60)),
    *((0.90, 0.72, 0.55), (0.25, 0.33, 0.48), (0.72, 0.70, 0.66), (0.58, 0.42, 0.34)),
)
_GROUNDS = (
    *((0.30, 0.30, 0.31), (0.46, 0.44, 0.41), (0.25, 0.38, 0.16), (0.40, 0.46, 0.22)),
    *((0.42, 0.32, 0.22), (0.62, 0.55, 0.42), (0.52, 0.27, 0.21), (0.16, 0.20, 0.13)),
)


def class_designs(count: int) -> list[tuple[str, str, str]]:
    """(colour, shape, glyph) of the first ``count`` classes.

    Any two of the 100 differ in at least two of the three, and a class is the same whatever the count.
    """
    shapes, colours, glyphs = list(SHAPES), list(COLOURS), list(GLYPHS)
    designs = []
    for index in range(count):
        row, shape = divmod(index, len(shapes))
        # Three rows of twelve shapes at a time deal out three colours among them: see COLOURS.
        colour = row // 3 * 3 + (shape + row) % 3
        glyph = (shape + 5 * colour) % len(glyphs)
        designs.append((colours[colour], shapes[shape], glyphs[glyph]))
    return designs


def make_signs(
    num_classes: int = 10,
    size: int = 32,
    train_per_class: int = 400,
    test_per_class: int = 100,
    seed: int = 0,
) -> Splits:
    """Training and test images, RGB (N, 3, ``size``, ``size``), class after class.

    The same arguments give the same bytes everywhere. A class looks the same whatever the number of classes,
    and asking for more images of it adds to the ones there were. Ids read ``train/red octagon bar/0007``.

    ``test`` is None where ``test_per_class`` is 0. Raises UntrojanError where ``num_classes`` lies outside
    2..100, ``size`` outside 16..1024, a count of images outside 0 (training: 1)..100,000, or the whole would
    not fit a large machine's memory.
    """
    _check(num_classes, size, train_per_class, test_per_class)
    designs = class_designs(num_classes)
    train = _split("train", designs, size, train_per_class, seed)
    return Splits(train, _split("test", designs, size, test_per_class, seed) if test_per_class else None)


def _check(num_classes: int, size: int, train_per_class: int, test_per_class: int) -> None:
    for what, value, low, high in (
        ("num_classes", num_classes, 2, MAX_CLASSES),
        ("size", size, MIN_SIZE, MAX_SIZE),
        ("train_per_class", train_per_class, 1, 100_000),
        ("test_per_class", test_per_class, 0, 100_000),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise UntrojanError(f"signs: {what} must be a whole number in {low}..{high}, not {value!r}")
    gigabytes = num_classes * (train_per_class + test_per_class) * 3 * size**2 / 1e9
    if gigabytes > _MAX_GIGABYTES:
        raise UntrojanError(
            f"signs: these images would take {gigabytes:.0f} GB of memory: ask for fewer or smaller ones "
            f"({_MAX_GIGABYTES} GB at most)"
        )


def _split(split: str, designs: list[tuple[str, str, str]], size: int, per_class: int, seed: int) -> ImageSet:
    names = [" ".join(design) for design in designs]
    images = torch.empty((len(designs), per_class, 3, size, size), dtype=torch.uint8)
    at_once = max(1, _PIXELS_AT_ONCE // size**2)

    def fill(label: int) -> None:
        texture = sign_texture(*designs[label], size=min(size, _FINEST_TEXTURE))
        numbers = generator(seed, "signs", split, names[label])
        grain = generator(seed, "signs", split, names[label], "grain")
        for chunk in images[label].split(at_once):
            chunk.copy_(_photograph(texture, size, len(chunk), numbers, grain))

    _on_all_threads(fill, len(designs))
    ids = [f"{split}/{name}/{i:04d}" for name in names for i in range(per_class)]
    return ImageSet(
        images=images.view(-1, 3, size, size),
        labels=torch.arange(len(designs)).repeat_interleave(per_class),
        class_names=tuple(names),
        ids=np.array(ids, dtype=np.str_),
    )


def _on_all_threads(work: Callable[[int], None], count: int) -> None:
    """``work(0)`` to ``work(count - 1)``, each on one thread, as many at a time as torch has threads."""
    # torch's own threads meet after every operation, of which there are hundreds here, all short: on a busy
    # machine they would wait for each other ten times longer than they work.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(count)))
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------- the sign


def sign_texture(colour: str, shape: str, glyph: str, *, size: int) -> Tensor:
    """One flat sign: float64 (4, size, size), RGB multiplied by coverage, then coverage, all in [0, 1]."""
    outline, (centre_x, centre_y), extent = SHAPES[shape]
    fill, border, ink = (torch.tensor(c, dtype=torch.float64).view(3, 1, 1) for c in COLOURS[colour])
    pixel = 2.1 / size
    axis = (torch.arange(size, dtype=torch.float64) + 0.5 - size / 2) * pixel
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    corners = torch.tensor(outline, dtype=torch.float64)
    edge = _polygon_distance(x, y, corners)
    strokes = [torch.tensor(run, dtype=torch.float64) * extent for run in GLYPHS[glyph]]
    pen = torch.stack([_stroke_distance(x - centre_x, y - centre_y, run) for run in strokes]).amin(0)
    pen = pen - 0.26 * extent

    def inside(distance: Tensor) -> Tensor:
        return (0.5 - distance / pixel).clamp(0, 1)

    rgb = border + (fill - border) * inside(edge + 0.11)
    rgb = rgb + (ink - rgb) * inside(pen) * inside(edge + 0.11)
    coverage = inside(edge)
    return torch.cat([rgb * coverage, coverage[None]])


def _stroke_distance(x: Tensor, y: Tensor, run: Tensor) -> Tensor:
    """Distance of each place (H, W) to a run of points (P, 2)."""
    if len(run) == 1:
        run = run.repeat(2, 1)
    starts, ends = run[:-1, :, None, None], run[1:, :, None, None]
    along = ends - starts
    place = torch.stack([x, y]) - starts
    length = (along**2).sum(1, keepdim=True).clamp_min(1e-12)
    share = ((place * along).sum(1, keepdim=True) / length).clamp(0, 1)
    return ((place - share * along) ** 2).sum(1).amin(0).sqrt()


def _polygon_distance(x: Tensor, y: Tensor, corners: Tensor) -> Tensor:
    """Signed distance of each place (H, W) to a closed outline (P, 2): negative inside (even-odd rule)."""
    closed = torch.cat([corners, corners[:1]])
    (x0, y0), (x1, y1) = closed[:-1, :, None, None].unbind(1), closed[1:, :, None, None].unbind(1)
    straddles = (y0 > y) != (y1 > y)
    crossing = x0 + (y - y0) * (x1 - x0) / torch.where(y1 == y0, torch.ones_like(y0), y1 - y0)
    inside = (straddles & (x < crossing)).sum(0) % 2 == 1
    distance = _stroke_distance(x, y, closed)
    return torch.where(inside, -distance, distance)


# ----------------------------------------------------------------------------------------- the photograph


class _Draws:
    """Uniform numbers, one row an image, so that an image does not depend on how many are drawn with it."""

    def __init__(self, count: int, source: torch.Generator) -> None:
        self._rows = torch.rand((count, _NUMBERS_PER_IMAGE), generator=source, dtype=torch.float64)
        self._used = 0

    def __call__(self, low: float, high: float, *shape: int) -> Tensor:
        """(N, *shape), uniform in low..high; one number an image, (N, 1, 1, 1), where no shape is given."""
        shape = shape or (1, 1, 1)
        width = math.prod(shape)
        taken = self._rows[:, self._used : self._used + width]
        self._used += width
        return (low + (high - low) * taken).reshape(len(taken), *shape)

    def chance(self, probability: float) -> Tensor:
        """(N, 1, 1, 1) of 0 and 1."""
        return (self(0, 1) < probability).double()

    def pick(self, palette: tuple[Colour, ...]) -> Tensor:
        """(N, 3, 1, 1), colours of a palette, each varied a little."""
        which = self(0, len(palette)).long().clamp_max(len(palette) - 1).flatten()
        colours = torch.tensor(palette, dtype=torch.float64)[which].view(-1, 3, 1, 1)
        return (colours + self(-0.05, 0.05, 3, 1, 1)).clamp(0, 1)


def _normal(count: int, width: int, source: torch.Generator) -> Tensor:
    """(count, width) standard normal numbers, the same rows whatever the count."""
    # torch draws them sixteen at a time, and draws an incomplete last sixteen differently.
    return torch.randn((count, -(-width // 16) * 16), generator=source, dtype=torch.float64)[:, :width]


def _photograph(
    texture: Tensor, size: int, count: int, numbers: torch.Generator, grain: torch.Generator
) -> Tensor:
    """uint8 (count, 3, size, size): the sign (4, T, T) as so many cameras would see it."""
    draw = _Draws(count, numbers)
    axis = (2 * torch.arange(size, dtype=torch.float64) + 1) / size - 1
    octaves = [_smooth(draw(-1, 1, channels, cells, cells), axis) for channels, cells in _OCTAVES]
    scale, shift = draw(0.58, 0.92, 1, 1), draw(-1, 1, 2, 1)
    shift = shift * (1.02 - scale) * 0.9

    sign_x, sign_y = shift[..., None, None].unbind(1)
    picture = _background(draw, axis, octaves, sign_x, sign_y, scale[..., None])
    grid = _grid(draw, axis, shift, scale)
    seen = F.grid_sample(texture.expand(count, -1, -1, -1), grid, align_corners=False)
    worn = _wear(draw, seen[:, :3], seen[:, 3:], octaves)
    picture = picture * (1 - seen[:, 3:]) + worn
    picture = _light(draw, picture, axis, octaves[1])
    picture = _blur(draw, picture, axis)
    sigma = draw(0.2, 1.5)
    noise = _normal(count, 3 * size * size, grain).reshape(picture.shape)
    return (picture.clamp(0, 1) * 255 + sigma * noise).round().clamp(0, 255).to(torch.uint8)


def _smooth(lattice: Tensor, axis: Tensor) -> Tensor:
    """Noise on a coarse lattice (N, C, k, k), spread over the image with a Gaussian kernel: (N, C, S, S)."""
    cells = lattice.shape[-1]
    centres = (2 * torch.arange(cells, dtype=torch.float64) + 1) / cells - 1
    spread = torch.exp(-0.5 * ((axis[:, None] - centres) * cells / 1.1) ** 2)
    spread = spread / spread.square().sum(1, keepdim=True).sqrt()
    return spread @ lattice @ spread.T


def _soft_step(distance: Tensor, softness: Tensor | float) -> Tensor:
    return torch.sigmoid(distance / softness)


def _background(
    draw: _Draws, axis: Tensor, octaves: list[Tensor], sign_x: Tensor, sign_y: Tensor, scale: Tensor
) -> Tensor:
    """Sky or wall over ground, things of straight outline, foliage, the sign's pole: (N, 3, S, S)."""
    x, y = axis, axis[:, None]
    tint, coarse, middle, fine = octaves
    roughness = draw(0.0, 0.16)

    level = y - draw(-1.3, 1.6) - draw(-0.15, 0.15) * x - 0.05 * coarse
    ground = _soft_step(level, draw(0.01, 0.15))
    sky = draw.pick(_SKIES) * (1 + draw(-0.25, 0.25) * y)
    picture = sky + (draw.pick(_GROUNDS) - sky) * ground
    for _ in range(3):
        left, top = draw(-1.1, 0.9), draw(-1.1, 0.9)
        right, bottom = left + draw(0.1, 1.2), top + draw(0.1, 1.5)
        across = _soft_step(x - left, 0.03) * _soft_step(right - x, 0.03)
        down = _soft_step(y - top, 0.03) * _soft_step(bottom - y, 0.03)
        thing = torch.where(draw.chance(0.7) > 0, draw.pick(_GROUNDS), draw(0.05, 0.95, 3, 1, 1))
        picture = picture + (thing - picture) * (across * down * draw.chance(0.35))
    density = coarse + 0.8 * middle + 0.8 * fine - draw(-0.4, 1.2)
    leaves = _soft_step(density, 0.12) * draw.chance(0.35)
    leaf = draw.pick(_GROUNDS) * (1 + 0.35 * fine)
    picture = picture + (leaf - picture) * leaves
    picture = picture * (1 + roughness * (coarse + middle + fine)) + draw(0.0, 0.05) * tint

    width = draw(0.04, 0.09) * scale
    pole = _soft_step(width - (x - sign_x).abs(), 0.02) * _soft_step(y - sign_y, 0.05) * draw.chance(0.6)
    return (picture + (draw(0.25, 0.7) - picture) * pole).clamp(0, 1)


def _grid(draw: _Draws, axis: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Where on the sign (N, S, S, 2) each pixel looks, for signs turned and seen from aside."""
    count, size = len(shift), len(axis)
    turn = draw(-1, 1, 1) * math.radians(14)
    foreshortening = draw(0.78, 1.0, 2)
    tilt = draw(-0.22, 0.22, 2, 1)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    place = torch.stack([x, y]).view(1, 2, -1).expand(count, -1, -1)
    place = (place - shift) / scale
    cosine, sine = turn.cos(), turn.sin()
    rotation = torch.stack([cosine, sine, -sine, cosine], -1).view(count, 2, 2)
    place = (rotation @ place) / foreshortening[:, :, None]
    depth = 1 + (tilt * place).sum(1, keepdim=True)
    # Behind the camera the projection would show the sign again, upside down.
    place = torch.where(depth > 0.3, place / depth.clamp_min(0.3), torch.full_like(place, 3.0))
    return place.view(count, 2, size, size).permute(0, 2, 3, 1)


def _wear(draw: _Draws, colours: Tensor, coverage: Tensor, octaves: list[Tensor]) -> Tensor:
    """The sign's colours, premultiplied (N, 3, S, S): faded by the sun, in its own light, dirty in places."""
    grey = colours.mean(1, keepdim=True)
    faded = colours + (grey - colours) * draw(0.0, 0.3)
    bleached = faded + (0.6 * coverage - faded) * draw(0.0, 0.2)
    lit = bleached * draw(0.7, 1.1) * (1 + draw(-0.07, 0.07, 3, 1, 1))
    spots = _soft_step(octaves[2] + 0.7 * octaves[1] - draw(0.7, 2.0), 0.15) * draw(0.0, 0.7)
    dirt = draw.pick(_GROUNDS) * coverage
    return lit + (dirt - lit) * spots


def _light(draw: _Draws, picture: Tensor, axis: Tensor, coarse: Tensor) -> Tensor:
    """Exposure, colour of the light, its fall across the image, a shadow's edge, and haze."""
    x, y = axis, axis[:, None]
    exposure = torch.exp(draw(-0.6, 0.3)) * (1 + draw(-0.10, 0.10, 3, 1, 1))
    slope = 1 + draw(-0.25, 0.25) * x + draw(-0.25, 0.25) * y
    bearing = draw(-math.pi, math.pi)
    edge = bearing.cos() * x + bearing.sin() * y - draw(-0.4, 0.8) + 0.15 * coarse
    shadow = 1 - _soft_step(edge, draw(0.02, 0.2)) * draw(0.2, 0.6) * draw.chance(0.35)
    lit = picture * exposure * slope * shadow
    haze = draw(0.0, 1.0) ** 2 * 0.35
    return lit + (draw(0.3, 0.85) - lit) * haze


def _blur(draw: _Draws, picture: Tensor, axis: Tensor) -> Tensor:
    """Defocus and camera shake: a Gaussian of its own width along each axis of each image."""
    offsets = (axis[:, None] - axis) * 16  # in pixels of a 32x32 image, whatever the size
    defocus = draw(0.0, 1.0) ** 2 * 0.8 + 0.2

    def kernel(width: Tensor) -> Tensor:
        weights = torch.exp(-0.5 * (offsets / width) ** 2)
        return weights / weights.sum(-1, keepdim=True)

    shaken = draw(1.0, 1.6, 2, 1, 1, 1)
    return kernel(defocus * shaken[:, 0]) @ picture @ kernel(defocus * shaken[:, 1]).mT
