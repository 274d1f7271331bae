"""STL-10: ``train_X.bin``, ``train_y.bin`` and the test pair."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from untrojan.data.image_set import ImageSet, Splits
from untrojan.data.sources.arrays import checked_labels, image_set, names_for
from untrojan.data.sources.files import Files
from untrojan.data.sources.names import base
from untrojan.data.sources.options import ReadOptions
from untrojan.errors import UntrojanError


def read_stl10(files: Files, options: ReadOptions) -> Splits:
    """``train_X.bin``, ``train_y.bin`` and the test pair, stored column by column; labels from 1."""
    found = {base(name): name for name in files.names}
    for needed in ("train_X.bin", "train_y.bin"):
        if needed not in found:
            raise UntrojanError(f"{files.path} has no {needed}: put it beside the others")
    given = None
    if "class_names.txt" in found:
        given = tuple(files.read(found["class_names.txt"]).decode("utf-8", "replace").split())

    def one(split: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        pixels = np.frombuffer(files.read(found[f"{split}_X.bin"]), np.uint8)
        labels = np.frombuffer(files.read(found[f"{split}_y.bin"]), np.uint8).astype(np.int64) - 1
        if len(pixels) % (3 * 96 * 96):
            raise UntrojanError(f"{split}_X.bin in {files.path} is cut short: fetch it again")
        images = pixels.reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
        return images, checked_labels(labels, f"{split}_y.bin", options.limits)

    parts = {
        split: one(split)
        for split in ("train", "test")
        if {f"{split}_X.bin", f"{split}_y.bin"} <= found.keys()
    }
    names = names_for(given, str(files.path), *(labels for _, labels in parts.values()))
    sets: dict[str, ImageSet] = {
        split: image_set(pixels, labels, names, options, name=f"{split}_X.bin")
        for split, (pixels, labels) in parts.items()
    }
    return Splits(sets["train"], sets.get("test"), ("left out the unlabelled images",))
