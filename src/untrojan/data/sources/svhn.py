"""SVHN: ``train_32x32.mat`` and ``test_32x32.mat``."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt

from untrojan.data.image_set import Splits
from untrojan.data.sources.arrays import checked_labels, image_set
from untrojan.data.sources.files import Files
from untrojan.data.sources.names import base, printable
from untrojan.data.sources.options import ReadOptions, parsing
from untrojan.errors import UntrojanError


def read_svhn(files: Files, options: ReadOptions) -> Splits:
    """``train_32x32.mat`` and ``test_32x32.mat``; the label 10 is the digit 0."""
    found = {base(name): name for name in files.names}
    parts = {
        split: _mat(files, found[f"{split}_32x32.mat"], options)
        for split in ("train", "test")
        if f"{split}_32x32.mat" in found
    }
    if "train" not in parts:
        raise UntrojanError(f"{files.path} has no train_32x32.mat: put it beside test_32x32.mat")
    names = tuple(map(str, range(10)))
    sets = {
        split: image_set(pixels, labels, names, options, name=f"{split}_32x32.mat")
        for split, (pixels, labels) in parts.items()
    }
    return Splits(sets["train"], sets.get("test"))


def _mat(files: Files, name: str, options: ReadOptions) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    import scipy.io

    data, shown = files.read(name), printable(name)
    with parsing(shown):
        shapes = {key: shape for key, shape, _ in scipy.io.whosmat(io.BytesIO(data))}
        count = shapes.get("X", (0,))[-1]
        if shapes.get("X") != (32, 32, 3, count) or shapes.get("y") != (count, 1) or count > 1_000_000:
            raise UntrojanError(f"{shown} is no SVHN file: it needs X (32, 32, 3, N) and y (N, 1)")
        content = scipy.io.loadmat(io.BytesIO(data), variable_names=("X", "y"))
    labels = checked_labels(content["y"], shown, options.limits)
    if len(labels) and not 1 <= labels.min() <= labels.max() <= 10:
        raise UntrojanError(f"the labels of {shown} must lie in 1..10: get the original file")
    return content["X"].transpose(3, 0, 1, 2), labels % 10
