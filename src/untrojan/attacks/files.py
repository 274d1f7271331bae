"""Triggered test images as a file: a set as any other, under their true labels, and the labels wanted."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch

from untrojan.attacks.poisoning import TriggeredTest
from untrojan.data.image_set import ImageSet, numbered
from untrojan.data.save import save_npz
from untrojan.data.sources.arrays import checked_labels
from untrojan.data.sources.npz import read_array
from untrojan.data.sources.options import Limits, parsing
from untrojan.errors import UntrojanError

WANTED = "wanted_labels"


def save_triggered(path: Path, triggered: TriggeredTest, class_names: tuple[str, ...]) -> None:
    """Write an ``.npz`` that :func:`load_triggered` reads. Raises UntrojanError where it can't be written."""
    images = ImageSet(triggered.images, triggered.true_labels, class_names, numbered(len(triggered)))
    save_npz(path, images, extra={WANTED: triggered.wanted_labels})


def load_triggered(path: Path, data: ImageSet) -> TriggeredTest:
    """The triggered images that go with ``data``.

    Raises UntrojanError for a file that is missing, damaged, too large or no triggered set, and where its
    images or labels do not fit the data.
    """
    if not path.is_file():
        raise UntrojanError(f"{path} is not there: give the triggered.npz that untrojan poison wrote")
    limits = Limits()
    with (
        parsing(str(path), "give the triggered.npz that untrojan poison wrote"),
        zipfile.ZipFile(path) as file,
    ):
        images, labels, wanted = (
            read_array(file, key, path, limits) for key in ("x_train", "y_train", WANTED)
        )
    channels, height, width = data.image_shape
    if images.dtype != np.uint8 or images.shape[1:] != (height, width, channels) or not len(images):
        raise UntrojanError(
            f"{path} holds {images.dtype} images {images.shape}, the data need uint8 "
            f"(M, {height}, {width}, {channels}): poison the same data, at the same --size"
        )
    columns = []
    for name, column in (("true labels", labels), (WANTED, wanted)):
        checked = checked_labels(column, f"{path} ({name})", limits)
        if len(checked) != len(images):
            raise UntrojanError(f"{path} has {len(images)} images but {len(checked)} {name}: poison again")
        if checked.max() >= data.num_classes:
            raise UntrojanError(
                f"{path} has {name} up to {checked.max()}, the data have {data.num_classes} classes: "
                "give the data that were poisoned"
            )
        columns.append(torch.from_numpy(checked))
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return TriggeredTest(images=pixels, true_labels=columns[0], wanted_labels=columns[1])
