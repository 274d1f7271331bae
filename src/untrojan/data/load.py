"""``load(source)``: whatever a data owner has, as images, labels, class names and ids."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from untrojan.data import cache as decoded_cache
from untrojan.data import known
from untrojan.data.image_set import ImageSet, Splits
from untrojan.data.sources.files import Files, FolderFiles, SingleFile, TarFiles, ZipFiles, decompressed
from untrojan.data.sources.idx import is_idx, siblings
from untrojan.data.sources.names import base, printable
from untrojan.data.sources.options import Limits, OnCorrupt, ReadOptions, parsing
from untrojan.errors import UntrojanError

MINIMUM_PER_CLASS = 10
ACCEPTED = (
    "a folder or archive (tar, zip) of class folders, .npz, IDX, CIFAR python batches, .parquet, "
    "or a known name"
)


def load(
    source: str | Path,
    *,
    size: int | None = None,
    on_corrupt: OnCorrupt = "fail",
    cache: bool = True,
    minimum_per_class: int = MINIMUM_PER_CLASS,
    limits: Limits | None = None,
) -> Splits:
    """Read a data set, whole, into memory.

    ``source`` is a folder ``class/*.png|jpg|jpeg|ppm|pgm|webp|bmp`` or ``train/`` and ``test/`` of such; a
    tar (plain, gzip, xz, bzip2) or zip of one; ``.npz`` with ``x`` and ``y`` or Keras' ``x_train``...; IDX
    files; CIFAR's python batches; Hugging Face's parquet; or a known name (``untrojan data list``), where
    ``signs@K`` is ``signs`` with K classes, ``signs@KxN`` with N training images of each. A known name wins
    over a file of the same name: write ``./signs`` for the file.

    Classes of folders are in natural order ("10" after "9"), ids are paths inside the source (``file#row``
    in batches and parquet, the row number in ``.npz`` and IDX). Control characters in names come back as
    visible escapes.

    Images of several sizes are brought to the most common one, or to ``size`` x ``size``: cropped about
    their centre to its proportions (so that the shorter side fits whole), then scaled with antialiasing.
    They are grey only where all are grey. Alpha is laid over white, EXIF's orientation applied. What was
    done stands in ``notes``.

    Decoded sets are kept in the cache folder (``cache=False``: neither used nor written), found again by
    the source's path, size and time of change.

    ``on_corrupt`` "skip" leaves out images that can't be decoded. ``minimum_per_class`` holds for the
    training set; 0 also admits classes without images, as in a triggered test set. ``limits`` bound what
    hostile files can cost.

    Raises UntrojanError, one line, for anything wrong with the source.
    """
    limits = limits or Limits()
    if size is not None and not 1 <= size <= 4096:
        raise UntrojanError(f"size {size} is out of range: give 1 to 4096 pixels")
    if on_corrupt not in ("fail", "skip"):
        raise UntrojanError(f"on_corrupt is {on_corrupt!r}: give 'fail' or 'skip'")
    options = ReadOptions(size, on_corrupt, limits)
    name, _, parameter = str(source).partition("@")
    if name in known.known_names() and (not parameter or name == "signs"):
        splits = _load_known(name, parameter, options, cache)
    else:
        splits = _load_path(Path(source).expanduser(), options, cache)
    _check_classes(splits.train, printable(str(source)), minimum_per_class)
    return splits


def _load_known(name: str, parameter: str, options: ReadOptions, cache: bool) -> Splits:
    facts = known.info(name)
    if name == "signs":
        from untrojan.data import signs

        asked = re.fullmatch(r"([0-9]{1,4})(?:x([0-9]{1,6}))?", parameter or str(facts.classes))
        if not asked:
            raise UntrojanError(
                f"signs@{printable(parameter)}: give the number of classes, as in signs@43, or that and the "
                "training images of each, as in signs@43x1000"
            )
        made = {"num_classes": int(asked[1]), "size": options.size or facts.image_size}
        if asked[2]:
            made["train_per_class"] = int(asked[2])
        return _cached(Path(signs.__file__), options.limits, made, cache, lambda: signs.make_signs(**made))
    if name == "digits":
        from untrojan.data.sources.digits import read_digits

        return read_digits(options)
    path = known.fetch(name)
    splits = _load_path(path, replace(options, size=options.size or facts.image_size), cache)
    return known.with_known_names(facts, splits)


def _load_path(path: Path, options: ReadOptions, cache: bool) -> Splits:
    if not path.exists():
        close = difflib.get_close_matches(str(path), known.known_names(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"give {ACCEPTED}"
        raise UntrojanError(f"{printable(str(path))} does not exist: {hint}")
    if path.is_file() and path.suffix.lower() == ".npz":
        from untrojan.data.sources.npz import read_npz

        return read_npz(path, options)
    how = {"size": options.size, "on_corrupt": options.on_corrupt}
    # One file of an IDX set stands for all: its own time of change says too little to be remembered by.
    cache = cache and not is_idx(path.name)
    return _cached(path, options.limits, how, cache, lambda: _read(path, options))


def _cached(
    path: Path, limits: Limits, how: Mapping[str, object], cache: bool, make: Callable[[], Splits]
) -> Splits:
    if not cache:
        return make()
    key = decoded_cache.key_of(path, limits, how)
    if (splits := decoded_cache.recall(key)) is None:
        splits = make()
        decoded_cache.keep(key, splits)
    return splits


def _read(path: Path, options: ReadOptions) -> Splits:
    files = open_files(path, options.limits)
    return _reader(files)(files, options)


def open_files(path: Path, limits: Limits) -> Files:
    """The files behind a path, by what its first bytes say rather than by its suffix."""
    if path.is_dir():
        return FolderFiles(path, limits)
    if is_idx(path.name):
        return FolderFiles(path.parent, limits, siblings(path))
    if not path.is_file():
        raise UntrojanError(f"{path} is neither a file nor a folder: give {ACCEPTED}")
    with parsing(str(path)), path.open("rb") as raw:
        if raw.read(4) in (b"PK\x03\x04", b"PK\x05\x06"):
            return ZipFiles(path, limits)
        raw.seek(0)
        start = decompressed(raw).read(512)
    if start[257:262] == b"ustar":
        return TarFiles(path, limits)
    if start.startswith((b"PAR1", b"\x80")):
        return SingleFile(path, limits)
    raise UntrojanError(f"{path} is of no type known here: give {ACCEPTED}")


def _reader(files: Files) -> Callable[[Files, ReadOptions], Splits]:
    """The reader for the layout these names show."""
    from untrojan.data.sources import celeba, cifar, gtsrb, idx, image_folder, parquet, stl10, svhn

    names = files.names
    if celeba.is_celeba(names):
        return celeba.read_celeba
    if gtsrb.is_gtsrb(names):
        return gtsrb.read_gtsrb
    if any(map(idx.is_idx, names)):
        return idx.read_idx
    if any(base(name) in ("train_32x32.mat", "test_32x32.mat") for name in names):
        return svhn.read_svhn
    if any(base(name) == "train_X.bin" for name in names):
        return stl10.read_stl10
    if any(map(parquet.is_parquet, names)):
        return parquet.read_parquet
    if isinstance(files, SingleFile) or any(map(cifar.is_cifar, names)):
        return cifar.read_cifar
    return image_folder.read_image_folder


def _check_classes(train: ImageSet, source: str, minimum: int) -> None:
    if minimum and not len(train):
        raise UntrojanError(f"{source} has no training images: give {ACCEPTED}")
    if train.num_classes < 2:
        raise UntrojanError(
            f"{source} has one class only ({', '.join(train.class_names)}): give one folder for each class, "
            "two at least"
        )
    for name, count in zip(train.class_names, train.class_counts.tolist(), strict=True):
        if not count and minimum:
            raise UntrojanError(f"class {name!r} of {source} has no images: add some or remove the class")
        if count < minimum:
            raise UntrojanError(
                f"class {name!r} of {source} has {count} images, and {minimum} are needed: add some or "
                "remove the class"
            )
