"""The usual layout: one folder a class, or ``train/`` and ``test/`` of those."""

from __future__ import annotations

from collections import defaultdict
from functools import partial

from untrojan.data.image_set import Splits
from untrojan.data.sources.decoding import IMAGE_SUFFIXES, Encoded, decode_splits
from untrojan.data.sources.files import Files
from untrojan.data.sources.names import is_hidden, natural_key, printable
from untrojan.data.sources.options import ReadOptions
from untrojan.errors import UntrojanError

TRAIN_FOLDERS = ("train", "training")
TEST_FOLDERS = ("test", "testing", "val", "valid", "validation")
"""The first of these that is there is the test set."""

ByClass = dict[str, list[str]]


def read_image_folder(files: Files, options: ReadOptions) -> Splits:
    """Images by class. Classes are the folders in natural order; ids are paths inside the source.

    Folders around everything (``dataset/train/...``) are looked through; a class may have folders of its
    own. Raises UntrojanError for loose images, classes without images, and a test set of other classes.
    """
    images = [name for name in files.names if name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(name)]
    if not images:
        raise UntrojanError(
            f"{files.path} holds no images ({', '.join(IMAGE_SUFFIXES)}): it should have one folder a class"
        )
    prefix = _folders_around(images)
    splits = _by_split(files, images, prefix)
    train, test, left_out = _choose(splits)
    class_names = tuple(sorted(train, key=natural_key))
    shown_names = tuple(printable(name) for name in class_names)
    if len(set(shown_names)) < len(shown_names):
        raise UntrojanError(f"{files.path} has class folders whose names look the same: rename one")
    if test is not None:
        _check_same_classes(files, train, test)
    splits_read = decode_splits(
        _encoded(files, train, class_names),
        None if test is None else _encoded(files, test, class_names),
        shown_names,
        options,
    )
    notes = [*splits_read.notes]
    if left_out:
        notes.append(f"left out the folders {', '.join(left_out)}")
    if others := sum(not is_hidden(name) for name in files.names) - len(images):
        notes.append(f"left out what is no image: {others} files")
    return Splits(splits_read.train, splits_read.test, tuple(notes))


def _folders_around(images: list[str]) -> str:
    """The leading folders that all images share and that are neither a class nor a split's only class."""
    prefix = ""
    while True:
        below = [name[len(prefix) :].split("/") for name in images]
        first = below[0][0]
        if any(len(parts) < 3 or parts[0] != first for parts in below):
            return prefix
        prefix += first + "/"


def _by_split(files: Files, images: list[str], prefix: str) -> dict[str, ByClass]:
    """Files by split ("" where there are no splits) and class, empty classes included."""
    below = [name[len(prefix) :].split("/") for name in images]
    in_train = [len(parts) for parts in below if parts[0].lower() in TRAIN_FOLDERS]
    # A folder "train" with images but no folders of its own is a class.
    is_split = bool(in_train) and min(in_train) > 2
    depth = 2 if is_split else 1
    splits: dict[str, ByClass] = defaultdict(lambda: defaultdict(list))
    for name in images:
        parts = name[len(prefix) :].split("/")
        if len(parts) <= depth:
            raise UntrojanError(
                f"{printable(name)} in {files.path} is in no class's folder: put it into one or remove it"
            )
        splits[parts[0].lower() if is_split else ""][parts[depth - 1]].append(name)
    for folder in files.folders:
        parts = folder[len(prefix) :].split("/")
        if folder.startswith(prefix) and len(parts) == depth and not is_hidden(folder):
            split = parts[0].lower() if is_split else ""
            if split in splits:
                splits[split].setdefault(parts[depth - 1], [])
    return splits


def _choose(splits: dict[str, ByClass]) -> tuple[ByClass, ByClass | None, list[str]]:
    """The training set, the test set, and the names of the splits that are neither."""
    train = next(name for name in ("", *TRAIN_FOLDERS) if name in splits)
    test = next((name for name in TEST_FOLDERS if name in splits), None)
    left_out = sorted(splits.keys() - {train, test})
    return splits[train], splits[test] if test else None, left_out


def _check_same_classes(files: Files, train: ByClass, test: ByClass) -> None:
    if odd := sorted(train.keys() ^ test.keys(), key=natural_key):
        where = "training" if odd[0] in train else "test"
        raise UntrojanError(
            f"class {printable(odd[0])!r} of {files.path} is in the {where} set only: both sets need the "
            "same class folders"
        )


def _encoded(files: Files, by_class: ByClass, class_names: tuple[str, ...]) -> list[Encoded]:
    return [
        Encoded(name, label, partial(files.read, name))
        for label, class_name in enumerate(class_names)
        for name in sorted(by_class[class_name], key=natural_key)
    ]
