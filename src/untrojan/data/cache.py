"""Decoded sets kept on disk, so that a source is decoded once.

One folder an entry: the arrays as ``.npy`` files, mapped into memory when read, and ``entry.json`` with
their checksums. An entry is written beside its place and renamed into it; one that does not match its
checksums is thrown away and made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from untrojan.data.image_set import ImageSet, Splits
from untrojan.data.sources.files import FolderFiles
from untrojan.data.sources.options import Limits, one_line

LAYOUT = 1
"""Raised when readers change what they make of the same file."""
STALE_SECONDS = 24 * 3600


def cache_folder() -> Path:
    """Where archives of known sets are looked for and decoded sets are kept: $UNTROJAN_CACHE if set."""
    if given := os.environ.get("UNTROJAN_CACHE"):
        return Path(given).expanduser()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("untrojan"))


def key_of(path: Path, limits: Limits, options: Mapping[str, Any]) -> str:
    """Names a source as it is now (paths, sizes and times of change of its files) and how it is read."""
    if path.is_dir():
        stamps = FolderFiles(path, limits).stamps
    else:
        found = path.stat()
        stamps = [(path.name, found.st_size, found.st_mtime_ns)]
    content = [LAYOUT, str(path.resolve()), stamps, sorted(options.items())]
    return hashlib.sha256(json.dumps(content).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def recall(key: str) -> Splits | None:
    """The set kept under ``key``; None where there is none, or a damaged one (which is removed)."""
    entry = cache_folder() / "decoded" / key
    if not entry.is_dir():
        return None
    try:
        description = json.loads((entry / "entry.json").read_text("utf-8"))
        names = tuple(map(str, description["class_names"]))
        sets = {split: _read_set(entry, split, sums, names) for split, sums in description["sets"].items()}
        return Splits(sets["train"], sets.get("test"), tuple(map(str, description["notes"])))
    except Exception:
        # Whatever a damaged entry leads to, the source it was made from is still there.
        shutil.rmtree(entry, ignore_errors=True)
        return None


def keep(key: str, splits: Splits) -> None:
    """Keep a set under ``key``. A full or read-only disk is only warned about."""
    place = cache_folder() / "decoded" / key
    temporary: Path | None = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _sweep(place.parent)
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=place.parent))
        sets = {"train": splits.train} | ({"test": splits.test} if splits.test is not None else {})
        sums = {split: _write_set(temporary, split, data) for split, data in sets.items()}
        description = {"class_names": splits.train.class_names, "notes": splits.notes, "sets": sums}
        (temporary / "entry.json").write_text(json.dumps(description), "utf-8")
        temporary.rename(place)
    except OSError as error:
        if not place.is_dir():  # else another run was quicker
            warnings.warn(
                f"the decoded images could not be kept in {place.parent} ({one_line(error)}): "
                "they will be decoded again next time; set UNTROJAN_CACHE to a folder with room",
                stacklevel=2,
            )
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_set(folder: Path, split: str, data: ImageSet) -> dict[str, int]:
    arrays = {"images": data.images.numpy(), "labels": data.labels.numpy(), "ids": data.ids}
    sums = {}
    for name, array in arrays.items():
        whole = np.ascontiguousarray(array)
        np.save(folder / f"{split}_{name}.npy", whole, allow_pickle=False)
        sums[name] = _checksum(whole)
    return sums


def _read_set(entry: Path, split: str, sums: Mapping[str, int], class_names: tuple[str, ...]) -> ImageSet:
    arrays = {}
    for name in ("images", "labels", "ids"):
        array = np.load(entry / f"{split}_{name}.npy", mmap_mode="c", allow_pickle=False)
        if _checksum(array) != sums[name]:
            raise ValueError(name)
        arrays[name] = array
    images, labels = (torch.from_numpy(np.asarray(arrays[name])) for name in ("images", "labels"))
    return ImageSet(images, labels, class_names, np.array(arrays["ids"], dtype=np.str_))


def _checksum(array: np.ndarray[Any, Any]) -> int:
    return zlib.crc32(array.reshape(-1).view(np.uint8).data)


def _sweep(folder: Path) -> None:
    """Remove what killed runs left behind."""
    for left in folder.glob(".writing-*"):
        if time.time() - left.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
