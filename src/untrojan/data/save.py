"""Data sets to disk: whole or not at all, under names this program makes."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import tarfile
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from untrojan.data.image_set import ImageSet, Splits
from untrojan.data.sources.options import one_line
from untrojan.errors import UntrojanError
from untrojan.progress import task

if TYPE_CHECKING:
    from torch import Tensor

LONGEST_FOLDER_NAME = 100
RESERVED_KEYS = {
    *(f"{part}_{split}" for part in ("x", "y", "ids") for split in ("train", "test")),
    *("class_names", "file"),
}


def save_npz(
    path: str | Path,
    train: ImageSet,
    test: ImageSet | None = None,
    extra: Mapping[str, Tensor | npt.NDArray[Any]] | None = None,
) -> None:
    """One ``.npz``: ``x_train`` uint8 (N, H, W, C), ``y_train`` int64 (N,), ``ids_train``, ``class_names``.

    ``x_test``, ``y_test`` and ``ids_test`` stand beside them where there is a test set. ``extra`` arrays are
    written under their own keys, which :func:`untrojan.data.load.load` does not look at. What was at
    ``path`` stays until the new file is complete.

    Raises UntrojanError where sets do not fit together, a key is taken, or the file can't be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".npz":
        raise UntrojanError(f"{path} does not end in .npz: give a name that does")
    _check_fit(train, test)
    arrays = _arrays(train, "train") | (_arrays(test, "test") if test is not None else {})
    arrays["class_names"] = np.array(train.class_names, dtype=np.str_)
    for key, value in (extra or {}).items():
        if key in RESERVED_KEYS or not re.fullmatch(r"[A-Za-z_]\w*", key):
            raise UntrojanError(f"{key!r} can't be the key of an extra array: choose another")
        arrays[key] = value.cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    if odd := next((key for key, array in arrays.items() if array.dtype.hasobject), None):
        raise UntrojanError(f"the extra array {odd!r} holds objects: give plain numbers or text")
    with _replacing_file(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def save_folder(path: str | Path, data: ImageSet | Splits) -> None:
    """``class/NNNN.png`` for a set; ``train/`` and ``test/`` of those for two. ``ids.csv`` maps back to ids.

    ``path`` must not exist, or be an empty folder. Class names become folder names with all but letters,
    digits, spaces and ``._-+`` replaced, so none leads elsewhere; classes without images get a folder, too.
    Read again, classes are in the natural order of their folders' names.

    Raises UntrojanError where the folder is in use or can't be written.
    """
    path = Path(path)
    _check_free(path)
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            for name, content in _entries(data):
                if content is None:
                    (temporary / name).mkdir(parents=True)
                else:
                    (temporary / name).write_bytes(content)
            temporary.chmod(0o755)
            temporary.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_clean(path: str | Path, splits: Splits) -> None:
    """Write as the suffix says: ``.npz``, ``.zip``, ``.tar``, ``.tar.gz``, ``.tar.xz``, else a folder.

    Raises UntrojanError as :func:`save_npz` and :func:`save_folder` do.
    """
    path = Path(path)
    name = path.name.lower()
    if name.endswith(".npz"):
        save_npz(path, splits.train, splits.test)
    elif name.endswith(".zip"):
        with _replacing_file(path) as file:
            _write_zip(file, splits)
    elif match := re.search(r"\.(tar|tar\.gz|tgz|tar\.xz)$", name):
        mode = {"tar": "w", "tar.gz": "w:gz", "tgz": "w:gz", "tar.xz": "w:xz"}[match[1]]
        with _replacing_file(path) as file:
            _write_tar(file, splits, mode)
    elif path.suffix and not path.is_dir():
        raise UntrojanError(f"{path}: cannot write {path.suffix} files: use .npz, .zip, .tar.gz or a folder")
    else:
        save_folder(path, splits)


def _arrays(data: ImageSet, split: str) -> dict[str, npt.NDArray[Any]]:
    return {
        f"x_{split}": data.images.permute(0, 2, 3, 1).contiguous().numpy(),
        f"y_{split}": data.labels.numpy(),
        f"ids_{split}": np.asarray(data.ids, dtype=np.str_),
    }


def _check_fit(train: ImageSet, test: ImageSet | None) -> None:
    if test is not None and test.class_names != train.class_names:
        raise UntrojanError("training and test set have different class names: give both the same")


def _entries(data: ImageSet | Splits) -> Iterator[tuple[str, bytes | None]]:
    """(relative name, content) of every file; folders, with no content, come before what is in them."""
    sets = {"": data} if isinstance(data, ImageSet) else {"": data.train}
    if isinstance(data, Splits) and data.test is not None:
        _check_fit(data.train, data.test)
        sets = {"train/": data.train, "test/": data.test}
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(("file", "id"))
    with task("writing images", total=sum(map(len, sets.values())), unit="images") as bar:
        for prefix, one in sets.items():
            folders = folder_names(one.class_names)
            for folder in folders:
                yield f"{prefix}{folder}", None
            digits = max(4, len(str(len(one))))
            for row, label in enumerate(one.labels.tolist()):
                name = f"{prefix}{folders[label]}/{row:0{digits}d}.png"
                rows.writerow((name, one.ids[row]))
                yield name, _png(one.images[row])
                bar.advance()
    yield "ids.csv", table.getvalue().encode("utf-8", "backslashreplace")


def folder_names(class_names: tuple[str, ...]) -> tuple[str, ...]:
    """A folder name for each class that is safe on any system, and different from the others."""
    names: list[str] = []
    taken: set[str] = set()
    for class_name in class_names:
        plain = unicodedata.normalize("NFC", class_name)
        plain = "".join(c if c.isalnum() or c in " ._-+" else "_" for c in plain)
        plain = plain[:LONGEST_FOLDER_NAME].strip(" .") or "_"
        name, again = plain, 1
        while name.casefold() in taken:
            again += 1
            name = f"{plain}_{again}"
        taken.add(name.casefold())
        names.append(name)
    return tuple(names)


def _png(image: Tensor) -> bytes:
    from PIL import Image

    pixels = image.numpy()
    picture = Image.fromarray(
        pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))
    )
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _write_zip(file: IO[bytes], splits: Splits) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:  # PNGs are compressed already
        for name, content in _entries(splits):
            archive.writestr(zipfile.ZipInfo(name if content is not None else f"{name}/"), content or b"")


def _write_tar(file: IO[bytes], splits: Splits, mode: str) -> None:
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in _entries(splits):
            entry = tarfile.TarInfo(name)
            entry.mode = 0o644 if content is not None else 0o755
            entry.type = tarfile.REGTYPE if content is not None else tarfile.DIRTYPE
            entry.size = len(content or b"")
            archive.addfile(entry, io.BytesIO(content or b""))


@contextmanager
def _replacing_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes ``path``'s place once it is complete and on disk, and leaves nothing if it isn't."""
    if path.is_dir():
        raise UntrojanError(f"{path} is a folder: give a file's name")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            _as_umask_says(Path(temporary).chmod)
            Path(temporary).replace(path)
        finally:
            Path(temporary).unlink(missing_ok=True)


def _as_umask_says(chmod: Callable[[int], None]) -> None:
    """Temporary files are private; what a user asked for is as private as the user's other files."""
    umask = os.umask(0)
    os.umask(umask)
    chmod(0o666 & ~umask)


def _check_free(path: Path) -> None:
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UntrojanError(f"{path} is already there: give another name, or remove it")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UntrojanError(
            f"cannot write {path} ({one_line(error)}): make room, or give another place"
        ) from error
