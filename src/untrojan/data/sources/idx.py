"""IDX, the format of MNIST and its kin: ``train-images-idx3-ubyte``, gzip or not."""

from __future__ import annotations

import gzip
import io
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from untrojan.data.image_set import ImageSet, Splits
from untrojan.data.sources.arrays import checked_labels, image_set, names_for
from untrojan.data.sources.files import Files
from untrojan.data.sources.names import base, printable
from untrojan.data.sources.options import Limits, ReadOptions, parsing
from untrojan.errors import UntrojanError

NAME = re.compile(
    r"(?P<stem>.*?)(?P<split>train|t10k|test)[-_.](?P<what>images|labels)[-_.]idx[134][-_.]ubyte(\.gz)?$"
)


def is_idx(name: str) -> bool:
    return NAME.match(base(name)) is not None


def siblings(path: Path) -> frozenset[str]:
    """The names of the set that one of its files belongs to: same folder, same beginning."""
    match = NAME.match(path.name)
    stem = match["stem"] if match else ""
    found = (NAME.match(each.name) for each in path.parent.iterdir())
    return frozenset(each.string for each in found if each and each["stem"] == stem)


def read_idx(files: Files, options: ReadOptions) -> Splits:
    """Train and test by their file names. Raises UntrojanError where one of a pair is missing."""
    found: dict[tuple[str, str], str] = {}
    for name in sorted(files.names):
        if match := NAME.match(base(name)):
            split = "train" if match["split"] == "train" else "test"
            if (split, match["what"]) in found:
                raise UntrojanError(f"{files.path} holds more than one IDX set: give the folder of one")
            found[split, match["what"]] = name
    needed = [("train", "images"), ("train", "labels")]
    if any(split == "test" for split, _ in found):
        needed += [("test", "images"), ("test", "labels")]
    for split, what in needed:
        if (split, what) not in found:
            file = f"{'t10k' if split == 'test' else split}-{what}-idx{3 if what == 'images' else 1}-ubyte"
            raise UntrojanError(f"{files.path} has no {file} (.gz or not): put it beside the others")
    arrays = {part: _array(files, name, options.limits) for part, name in found.items()}
    labels = {
        split: checked_labels(array, f"{printable(found[split, what])}", options.limits)
        for (split, what), array in arrays.items()
        if what == "labels"
    }
    names = names_for(None, str(files.path), *labels.values())

    def one(split: str) -> ImageSet:
        where = printable(found[split, "images"])
        return image_set(arrays[split, "images"], labels[split], names, options, name=where)

    return Splits(one("train"), one("test") if "test" in labels else None)


def _array(files: Files, name: str, limits: Limits) -> npt.NDArray[np.uint8]:
    data, shown = files.read(name), printable(name)
    with parsing(shown):
        if data[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
                data = stream.read(limits.member_bytes + 1)
            if len(data) > limits.member_bytes:
                raise UntrojanError(
                    f"{shown} unpacks to more than {limits.member_bytes >> 20:,} MiB: shrink it"
                )
        if len(data) < 4 or data[:2] != b"\0\0" or not 1 <= data[3] <= 4:
            raise ValueError("it does not begin as an IDX file does")
        if data[2] != 8:
            raise UntrojanError(f"{shown} holds IDX type 0x{data[2]:02x}, not bytes (0x08): save it as bytes")
        start = 4 + 4 * data[3]
        shape = tuple(int(n) for n in np.frombuffer(data[4:start], dtype=">u4"))
        array = np.frombuffer(data, dtype=np.uint8, offset=start)
        return array.reshape(shape)
