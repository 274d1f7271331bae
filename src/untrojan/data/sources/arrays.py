"""Arrays of pixels and labels from anyone, checked and brought to (N, C, H, W) uint8 and (N,) int64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from untrojan.data.image_set import ImageSet, numbered
from untrojan.data.sources.names import printable
from untrojan.data.sources.options import Limits, ReadOptions
from untrojan.errors import UntrojanError

RESIZE_CHUNK = 512


def image_set(
    pixels: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    class_names: tuple[str, ...],
    options: ReadOptions,
    *,
    name: str,
    ids: npt.NDArray[np.str_] | None = None,
) -> ImageSet:
    """Pixels as :func:`checked_pixels` takes them, labels as :func:`checked_labels` gives them."""
    images = resized(checked_pixels(pixels, name), options)
    if len(images) != len(labels):
        raise UntrojanError(f"{name} has {len(images)} images but {len(labels)} labels: give one for each")
    if ids is None:
        ids = numbered(len(images))
    elif len(ids) != len(images):
        raise UntrojanError(f"{name} has {len(images)} images but {len(ids)} ids: give one for each")
    return ImageSet(images, torch.from_numpy(np.ascontiguousarray(labels)), class_names, ids)


def checked_pixels(pixels: npt.NDArray[Any], name: str) -> Tensor:
    """uint8 (N, C, H, W) from (N, H, W, C), (N, C, H, W) or (N, H, W), C 1 or 3.

    Where both the last and the second axis could be channels, the last is taken. uint8 is used as it is;
    other numbers must be finite and lie in [0, 1] (floats: scaled by 255) or [0, 255], and are rounded.
    """
    array = np.asarray(pixels)
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or 0 in array.shape:
        raise UntrojanError(
            f"the images of {name} have shape {array.shape}: give (N, H, W), with C last or second"
        )
    if array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    elif array.shape[1] not in (1, 3):
        raise UntrojanError(f"the images of {name} have shape {array.shape}: give 1 or 3 channels")
    if array.dtype != np.uint8:
        array = _to_bytes(array, name)
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _to_bytes(array: npt.NDArray[Any], name: str) -> npt.NDArray[np.uint8]:
    if array.dtype.kind not in "uif":
        raise UntrojanError(f"the images of {name} are {array.dtype}, not numbers: give uint8 or floats")
    floats = array.dtype.kind == "f"
    if floats and not np.isfinite(array).all():
        first = int(np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))[0])
        raise UntrojanError(f"image {first} of {name} holds NaN or infinity: mend or remove it")
    lowest, highest = float(array.min()), float(array.max())
    if lowest < 0 or highest > 255:
        raise UntrojanError(
            f"the images of {name} range over {lowest:g}..{highest:g}: undo the normalisation, and give "
            "values in [0, 1] or [0, 255]"
        )
    # In float32: 255 * (k / 255) rounds back to k for every k, float16's k / 255 included.
    scale = 255.0 if floats and highest <= 1 else 1.0
    out = np.empty(array.shape, dtype=np.uint8)
    for start in range(0, len(array), RESIZE_CHUNK):
        part = array[start : start + RESIZE_CHUNK].astype(np.float32)
        out[start : start + RESIZE_CHUNK] = np.rint(part * np.float32(scale))
    return out


def checked_labels(labels: npt.NDArray[Any], name: str, limits: Limits) -> npt.NDArray[np.int64]:
    """int64 (N,) from integers (N,) or (N, 1), all at least 0."""
    array = np.asarray(labels)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.dtype.kind not in "ui" or array.ndim != 1:
        way_out = "take the argmax of one-hot rows" if array.ndim == 2 else "give whole numbers from 0 on"
        raise UntrojanError(f"the labels of {name} are {array.dtype} {array.shape}: {way_out}")
    if len(array) and not 0 <= int(array.min()) <= int(array.max()) < limits.classes:
        raise UntrojanError(
            f"the labels of {name} range over {int(array.min())}..{int(array.max())}: they must lie in "
            f"0..{limits.classes - 1:,}"
        )
    return array.astype(np.int64)


def names_for(given: tuple[str, ...] | None, name: str, *labels: npt.NDArray[np.int64]) -> tuple[str, ...]:
    """The class names given, checked to cover the labels; else the labels' numbers as text."""
    needed = max((int(each.max()) + 1 for each in labels if len(each)), default=0)
    if given is None:
        return tuple(map(str, range(needed)))
    if needed > len(given):
        raise UntrojanError(
            f"the labels of {name} reach {needed - 1} but {len(given)} classes have names: name them all"
        )
    return tuple(printable(each) for each in given)


def resized(images: Tensor, options: ReadOptions) -> Tensor:
    """uint8 (N, C, size, size): the largest centred square, scaled with antialiasing."""
    size = options.size
    count, channels, height, width = images.shape
    if size is None or (height, width) == (size, size):
        return images
    if count * channels * size * size > options.limits.decoded_bytes:
        raise UntrojanError(f"{count:,} images of {size}x{size} do not fit in memory: give a smaller size")
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    out = torch.empty(count, channels, size, size, dtype=torch.uint8)
    for start in range(0, count, RESIZE_CHUNK):
        part = images[start : start + RESIZE_CHUNK, :, top : top + side, left : left + side].float()
        part = torch.nn.functional.interpolate(part, (size, size), mode="bilinear", antialias=True)
        out[start : start + RESIZE_CHUNK] = part.round().clamp(0, 255).to(torch.uint8)
    return out
