"""Encoded images to one array of equal sizes, by a stated rule."""

from __future__ import annotations

import io
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from untrojan.data.image_set import ImageSet, Splits
from untrojan.data.sources.names import printable
from untrojan.data.sources.options import Limits, ReadOptions, one_line
from untrojan.errors import UntrojanError
from untrojan.progress import Task, task

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "PPM", "WEBP", "BMP")
GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B"})
CHUNK = 128

Result = TypeVar("Result")
Shape = tuple[int, int, int]
"""(C, H, W)."""


@dataclass(frozen=True)
class Encoded:
    """One image still in its file: where it is from, its 0-based class, and how to get the bytes."""

    id: str
    label: int
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Header:
    """What an image file says of itself before it is decoded."""

    height: int
    width: int
    grey: bool


def decode_splits(
    train: Sequence[Encoded],
    test: Sequence[Encoded] | None,
    class_names: tuple[str, ...],
    options: ReadOptions,
) -> Splits:
    """Decode both sets to one size and one number of channels.

    Size: ``options.size`` squared, else the most common (height, width), the smaller of two equally common
    ones. Other images are cropped about their centre to its proportions, and scaled with antialiasing.
    Channels: 1 where every image of both sets is grey, else 3. Alpha is laid over white, 16 bits are cut
    to 8, EXIF's orientation is applied. What was done stands in the result's ``notes``.

    Raises UntrojanError naming the first file that can't be decoded, unless ``options.on_corrupt`` is
    "skip".
    """
    every = [*train, *(test or ())]
    with warnings.catch_warnings():
        # Pillow warns of odd metadata, which is no trouble, and of bombs, which _open refuses sooner.
        warnings.simplefilter("ignore")
        with task("looking at images", total=len(every), unit="images") as bar:
            headers, unreadable = _each(
                every, lambda row: read_header(every[row], options.limits), range(len(every)), options, bar
            )
        shape, notes = _common_shape(list(headers.values()), options)
        _check_room(len(every), shape, options.limits)
        pixels = np.zeros((len(every), *shape), dtype=np.uint8)

        def decode_into(row: int) -> None:
            pixels[row] = decode(every[row], shape, options.limits)

        with task("decoding", total=len(headers), unit="images") as bar:
            decoded, damaged = _each(every, decode_into, list(headers), options, bar)
    kept = np.zeros(len(every), dtype=bool)
    kept[list(decoded)] = True
    if skipped := unreadable + damaged:
        notes = (*notes, f"skipped {len(skipped)} unreadable images: {', '.join(skipped[:5])}")
    sets = [
        _image_set(every, pixels, kept, slice(start, end), class_names)
        for start, end in ((0, len(train)), (len(train), len(every)))
    ]
    return Splits(train=sets[0], test=sets[1] if test else None, notes=notes)


def _image_set(
    every: Sequence[Encoded],
    pixels: npt.NDArray[np.uint8],
    kept: npt.NDArray[np.bool_],
    part: slice,
    class_names: tuple[str, ...],
) -> ImageSet:
    mask = kept[part]
    images = pixels[part] if mask.all() else pixels[part][mask]
    labels = np.array([one.label for one in every[part]], dtype=np.int64)[mask]
    ids = np.array([printable(one.id) for one in every[part]], dtype=np.str_)[mask]
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels), class_names, ids)


def _common_shape(headers: list[Header], options: ReadOptions) -> tuple[Shape, tuple[str, ...]]:
    """(C, H, W) for all, and what it took."""
    if not headers:
        return (3, 1, 1), ()
    sizes = Counter((each.height, each.width) for each in headers)
    if options.size is None:
        height, width = min(sizes, key=lambda size: (-sizes[size], size[0] * size[1], size))
    else:
        height = width = options.size
    grey = sum(each.grey for each in headers)
    notes: list[str] = []
    if resized := len(headers) - sizes[height, width]:
        notes.append(f"resized {resized} of {len(headers)} images to {height}x{width}")
    if 0 < grey < len(headers):
        notes.append(f"turned {grey} grey images into colour")
    return (1 if grey == len(headers) else 3, height, width), tuple(notes)


def _check_room(count: int, shape: Shape, limits: Limits) -> None:
    channels, height, width = shape
    if count * channels * height * width > limits.decoded_bytes:
        raise UntrojanError(
            f"{count:,} images of {height}x{width} need {count * channels * height * width >> 30:,} GiB of "
            "memory: give a smaller size"
        )


def _open(one: Encoded, limits: Limits) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(one.read()), formats=FORMATS)
    except UnidentifiedImageError:
        raise UntrojanError(
            f"{printable(one.id)} is no image ({', '.join(FORMATS)}): replace or remove it, or skip "
            "unreadable images"
        ) from None
    if image.width * image.height > limits.image_pixels:
        raise UntrojanError(
            f"{printable(one.id)} claims {image.width:,}x{image.height:,} pixels, more than "
            f"{limits.image_pixels:,}: remove or shrink it"
        )
    return image


def read_header(one: Encoded, limits: Limits) -> Header:
    """Size (as it will be shown) and greyness, without decoding."""
    image = _open(one, limits)
    width, height = image.size
    if "exif" in image.info and image.getexif().get(0x0112, 1) in (5, 6, 7, 8):
        width, height = height, width
    return Header(height, width, image.mode in GREY_MODES)


def decode(one: Encoded, shape: Shape, limits: Limits) -> npt.NDArray[np.uint8]:
    """One image as uint8 (C, H, W) of ``shape``."""
    from PIL import Image, ImageOps

    image = _open(one, limits)
    image.load()
    if image.info.keys() & {"exif", "xmp", "XML:com.adobe.xmp"}:
        image = ImageOps.exif_transpose(image)
    channels, height, width = shape
    image = _plain(image, "L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = image.crop(_centre(*image.size, width, height))
        image = image.resize((width, height), Image.Resampling.BILINEAR)  # Pillow's is antialiased
    pixels: npt.NDArray[np.uint8] = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _centre(width: int, height: int, to_width: int, to_height: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the largest centred part with the proportions asked for."""
    cut_width = min(width, max(1, round(height * to_width / to_height)))
    cut_height = min(height, max(1, round(width * to_height / to_width)))
    left, top = (width - cut_width) // 2, (height - cut_height) // 2
    return left, top, left + cut_width, top + cut_height


def _plain(image: Image, mode: str) -> Image:
    """8 bits, no alpha, no palette."""
    from PIL import Image as PillowImage

    if image.mode.startswith("I"):
        high = np.asarray(image).astype(np.int64) >> 8
        image = PillowImage.fromarray(high.clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        above = image.convert("RGBA")
        white = PillowImage.new("RGBA", above.size, (255, 255, 255, 255))
        image = PillowImage.alpha_composite(white, above)
    return image if image.mode == mode else image.convert(mode)


def _each(
    items: Sequence[Encoded],
    work: Callable[[int], Result],
    rows: Sequence[int],
    options: ReadOptions,
    bar: Task,
) -> tuple[dict[int, Result], list[str]]:
    """``work`` on these rows in a few threads: results by row, and the ids of those that failed.

    Pillow's plugins raise nearly anything on hostile bytes, so every Exception counts as a damaged file.
    """

    def attempt(row: int) -> Result | UntrojanError:
        try:
            return work(row)
        except UntrojanError as error:
            return error
        except Exception as error:
            return UntrojanError(
                f"{printable(items[row].id)} cannot be decoded ({one_line(error)}): replace or remove it, "
                "or skip unreadable images"
            )

    def run(chunk: Sequence[int]) -> list[Result | UntrojanError]:
        return [attempt(row) for row in chunk]

    done: dict[int, Result] = {}
    failed: list[str] = []
    chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
    try:
        for chunk, results in zip(chunks, pool.map(run, chunks), strict=True):
            for row, result in zip(chunk, results, strict=True):
                if not isinstance(result, UntrojanError):
                    done[row] = result
                elif options.on_corrupt == "fail":
                    raise result
                else:
                    failed.append(printable(items[row].id))
            bar.advance(len(chunk))
    finally:
        pool.shutdown(cancel_futures=True)
    return done, failed
