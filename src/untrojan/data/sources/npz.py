"""NumPy's ``.npz``: ``x``/``y``, Keras' ``x_train``..., and what :mod:`untrojan.data.save` writes."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from untrojan.data.image_set import ImageSet, Splits
from untrojan.data.sources.arrays import checked_labels, image_set, names_for
from untrojan.data.sources.names import printable
from untrojan.data.sources.options import Limits, ReadOptions, parsing
from untrojan.errors import UntrojanError

TRAIN_KEYS = (("x_train", "y_train"), ("train_images", "train_labels"), ("x", "y"), ("images", "labels"))
TEST_KEYS = (("x_test", "y_test"), ("test_images", "test_labels"))


def read_npz(path: Path, options: ReadOptions) -> Splits:
    """Both splits; test where ``x_test`` is there. Other arrays in the file are not looked at.

    Raises UntrojanError for object arrays, missing keys, and all that
    :func:`~untrojan.data.sources.arrays.checked_pixels` and ``checked_labels`` refuse.
    """
    with parsing(str(path)), zipfile.ZipFile(path) as archive:
        keys = {info.filename.removesuffix(".npy") for info in archive.infolist()}
        train_keys = next((pair for pair in TRAIN_KEYS if keys.issuperset(pair)), None)
        if train_keys is None:
            shown = ", ".join(printable(key) for key in sorted(keys)[:8]) or "nothing"
            raise UntrojanError(f"{path} holds {shown}: it needs x and y, or x_train and y_train")
        test_keys = next((pair for pair in TEST_KEYS if keys.issuperset(pair)), None)
        arrays = {
            key: read_array(archive, key, path, options.limits)
            for key in (*train_keys, *(test_keys or ()), "ids_train", "ids_test", "class_names")
            if key in keys
        }
    train_y = checked_labels(arrays[train_keys[1]], f"{train_keys[1]} in {path}", options.limits)
    # An empty test set is none.
    has_test = test_keys is not None and len(arrays[test_keys[0]]) > 0 and arrays[test_keys[0]].ndim > 0
    test_y = (
        checked_labels(arrays[test_keys[1]], f"{test_keys[1]} in {path}", options.limits)
        if has_test and test_keys
        else np.zeros(0, np.int64)
    )
    given = _texts(arrays.get("class_names"), f"class_names in {path}")
    names = names_for(None if given is None else tuple(given.tolist()), str(path), train_y, test_y)

    def one(keys: tuple[str, str], labels: npt.NDArray[np.int64], ids: str) -> ImageSet:
        where = f"{keys[0]} in {path}"
        texts = _texts(arrays.get(ids), f"{ids} in {path}")
        return image_set(arrays[keys[0]], labels, names, options, name=where, ids=texts)

    return Splits(
        train=one(train_keys, train_y, "ids_train"),
        test=one(test_keys, test_y, "ids_test") if has_test and test_keys else None,
    )


def read_array(archive: zipfile.ZipFile, key: str, path: Path, limits: Limits) -> npt.NDArray[Any]:
    """One array, its header checked against the file before anything is allocated."""
    info = archive.getinfo(f"{key}.npy")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{key}: array format {version}")
        form = np.lib.format
        read_header = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
        shape, _, dtype = read_header(member)
    if dtype.hasobject:
        raise UntrojanError(
            f"{key} in {path} is an object array, which could run code when read: save it again as "
            "plain numbers"
        )
    nbytes = dtype.itemsize * int(np.prod(shape, dtype=object))
    if min(shape, default=0) < 0 or nbytes > limits.decoded_bytes:
        raise UntrojanError(f"{key} in {path} claims {nbytes >> 20:,} MiB: give a smaller array")
    if nbytes > info.file_size:
        raise ValueError(f"{key}: {info.file_size} bytes for an array of {nbytes}")
    with archive.open(info) as member:
        array: npt.NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
        if member.read(1):
            raise ValueError(f"{key}: bytes after the array")
        return array


def _texts(array: npt.NDArray[Any] | None, name: str) -> npt.NDArray[np.str_] | None:
    """A (N,) array of text, control characters made visible."""
    if array is None:
        return None
    if array.dtype.kind not in "US" or array.ndim != 1:
        raise UntrojanError(f"{name} is {array.dtype} {array.shape}: give one text each")
    texts = [each if isinstance(each, str) else each.decode("latin-1") for each in array.tolist()]
    return np.array([printable(each) for each in texts], dtype=np.str_)
