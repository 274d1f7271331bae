"""Triggered test images as a file: ``x`` uint8 (M, H, W, C), ``y`` true labels, ``wanted`` labels."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from untrojan.attacks.poisoning import TriggeredTest
from untrojan.data.image_set import ImageSet
from untrojan.errors import UntrojanError
from untrojan.runs import npz_bytes, write_bytes_atomically

LARGEST = 4 * 2**30
"""Bytes that a file may unpack to."""
_KEYS = ("x", "y", "wanted")


def save_triggered(path: Path, triggered: TriggeredTest, class_names: tuple[str, ...]) -> None:
    """Write an ``.npz`` that :func:`load_triggered` reads. Raises UntrojanError on a full disk."""
    arrays = {
        "x": triggered.images.permute(0, 2, 3, 1).numpy(),
        "y": triggered.true_labels.numpy(),
        "wanted": triggered.wanted_labels.numpy(),
        "class_names": np.array(class_names, dtype=np.str_),
    }
    write_bytes_atomically(path, npz_bytes(arrays))


def load_triggered(path: Path, data: ImageSet) -> TriggeredTest:
    """The triggered images that go with ``data``.

    Raises UntrojanError for a file that is missing, damaged, too large or no triggered set, and where its
    images or labels do not fit the data.
    """
    arrays = _read(path)
    images, labels, wanted = (arrays[key] for key in _KEYS)
    channels, height, width = data.image_shape
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (height, width, channels):
        raise UntrojanError(
            f"{path}: x is {images.dtype} {images.shape}, the data need uint8 (M, {height}, {width}, {channels})"
        )
    for key, values in (("y", labels), ("wanted", wanted)):
        if values.shape != (len(images),) or values.dtype.kind not in "iu":
            raise UntrojanError(f"{path}: {key} must hold {len(images)} integers, one for each image")
        if len(values) and not 0 <= values.min() <= values.max() < data.num_classes:
            raise UntrojanError(f"{path}: {key} has labels outside 0..{data.num_classes - 1}")
    if not len(images):
        raise UntrojanError(f"{path} holds no images")
    return TriggeredTest(
        images=torch.from_numpy(images.transpose(0, 3, 1, 2).copy()),
        wanted_labels=torch.from_numpy(wanted.astype(np.int64)),
        true_labels=torch.from_numpy(labels.astype(np.int64)),
    )


def _read(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > LARGEST:
                raise UntrojanError(f"{path} unpacks to more than {LARGEST} bytes: refused")
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in _KEYS}
    except FileNotFoundError:
        raise UntrojanError(
            f"{path} does not exist: give the triggered.npz that untrojan poison wrote"
        ) from None
    # The parser meets hostile bytes here; whatever it stumbles over, the file is at fault.
    except (OSError, ValueError, KeyError, EOFError, SyntaxError, MemoryError, zipfile.BadZipFile) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UntrojanError(
            f"{path} is no triggered set ({reason}): give what untrojan poison wrote"
        ) from None
