"""CIFAR-10's and CIFAR-100's python batches, through an unpickler that can build nothing but data."""

from __future__ import annotations

import io
import pickle
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from untrojan.data.image_set import ImageSet, Splits
from untrojan.data.sources.arrays import checked_labels, image_set, names_for
from untrojan.data.sources.files import Files
from untrojan.data.sources.names import base, natural_key, printable
from untrojan.data.sources.options import PARSER_ERRORS, ReadOptions
from untrojan.errors import UntrojanError

SIDE = 32
TRAIN_BATCH = re.compile(r"(data_batch\w*|train)$")
TEST_BATCH = re.compile(r"(test_batch|test)$")
META = re.compile(r"(batches\.meta|meta)$")
DTYPES = {"u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "b1"}


def is_cifar(name: str) -> bool:
    """True for a batch of CIFAR-10, and for CIFAR-100's ``train``, which is a file there."""
    return re.match(r"data_batch\w*$|test_batch$|train$", base(name)) is not None


def read_cifar(files: Files, options: ReadOptions) -> Splits:
    """All training batches in natural order, the test batch, and the class names of the meta file."""
    train = sorted((n for n in files.names if TRAIN_BATCH.match(base(n))), key=natural_key)
    test = [n for n in files.names if TEST_BATCH.match(base(n))]
    if not train:  # a single batch under another name
        train, test = files.names[:1], []
    given = _class_names(files)
    train_parts = [_batch(files, name, options) for name in train]
    test_parts = [_batch(files, name, options) for name in test]
    names = names_for(given, str(files.path), *(part.labels for part in (*train_parts, *test_parts)))

    def joined(parts: list[_Batch]) -> ImageSet:
        return image_set(
            np.concatenate([part.pixels for part in parts]),
            np.concatenate([part.labels for part in parts]),
            names,
            options,
            name=str(files.path),
            ids=np.concatenate([part.ids for part in parts]),
        )

    return Splits(joined(train_parts), joined(test_parts) if test_parts else None)


@dataclass(frozen=True)
class _Batch:
    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    ids: npt.NDArray[np.str_]


def _batch(files: Files, name: str, options: ReadOptions) -> _Batch:
    shown = printable(name)
    content = unpickled(files.read(name), shown)
    data = content.get("data")
    labels = content.get("labels", content.get("fine_labels"))
    if not isinstance(data, _Array) or not isinstance(labels, list | _Array):
        raise _no_batch(shown, "it has no data and labels")
    pixels = data.to_numpy(shown)
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3 * SIDE * SIDE or not len(pixels):
        raise _no_batch(shown, f"its data are {pixels.dtype} {pixels.shape}")
    if isinstance(labels, list):
        if not all(type(label) is int and 0 <= label < options.limits.classes for label in labels):
            raise UntrojanError(f"the labels of {shown} must be whole numbers from 0 on: mend the batch")
        labels_array = np.array(labels, dtype=np.int64)
    else:
        labels_array = labels.to_numpy(shown)
    ids = np.array([f"{shown}#{row}" for row in range(len(pixels))], dtype=np.str_)
    # Stored as channels, rows, columns; transposed so that the reader of arrays can't mistake the axes.
    images = pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return _Batch(images, checked_labels(labels_array, shown, options.limits), ids)


def _class_names(files: Files) -> tuple[str, ...] | None:
    meta = next((name for name in files.names if META.match(base(name))), None)
    if meta is None:
        return None
    content = unpickled(files.read(meta), printable(meta))
    names = content.get("label_names", content.get("fine_label_names"))
    if not isinstance(names, list):
        return None
    texts = [each.decode("latin-1") if isinstance(each, bytes) else each for each in names]
    if not all(isinstance(each, str) for each in texts):
        raise _no_batch(printable(meta), "its class names are no text")
    return tuple(texts)


def unpickled(data: bytes, name: str) -> dict[str, Any]:
    """The top dictionary of a pickle, keys as text, arrays as :class:`_Array`.

    Raises UntrojanError where the pickle asks for anything but dictionaries, lists, numbers, text, bytes
    and NumPy arrays of integers.
    """
    try:
        content = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except (*PARSER_ERRORS, pickle.UnpicklingError, AttributeError, AssertionError) as error:
        raise _no_batch(name, "it asks for more than plain data") from error
    if not isinstance(content, dict):
        raise _no_batch(name, "it holds no dictionary")
    return {
        key.decode("latin-1") if isinstance(key, bytes) else str(key): value for key, value in content.items()
    }


def _no_batch(name: str, reason: str) -> UntrojanError:
    return UntrojanError(
        f"{name} is a pickle that is no CIFAR batch ({reason}): don't open it, get the original"
    )


class _Dtype:
    """Stands for numpy.dtype: remembers a code, runs nothing."""

    def __init__(self, code: object = None, *_: object) -> None:
        text = code.decode("latin-1") if isinstance(code, bytes) else code
        if text not in DTYPES:
            raise pickle.UnpicklingError(f"dtype {text!r}")
        self.code, self.order = str(text), "="

    def set_state(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        text = order.decode("latin-1") if isinstance(order, bytes) else order
        self.order = {"<": "<", ">": ">"}.get(text, "=")

    def to_numpy(self) -> np.dtype[Any]:
        return np.dtype(self.code).newbyteorder(self.order)  # type: ignore[arg-type]


class _Array:
    """Stands for numpy.ndarray: the parts of one, put together only when all have been checked."""

    def __init__(self, *_: object) -> None:
        self.shape: tuple[Any, ...] = ()
        self.dtype: object = None
        self.fortran: object = False
        self.raw: object = b""

    def set_state(self, state: tuple[Any, ...]) -> None:
        self.shape, self.dtype, self.fortran, self.raw = state[-4:]

    def to_numpy(self, name: str) -> npt.NDArray[Any]:
        try:
            if not isinstance(self.dtype, _Dtype) or not isinstance(self.raw, bytes | bytearray):
                raise ValueError("not an array of numbers")
            flat = np.frombuffer(self.raw, dtype=self.dtype.to_numpy())
            return flat.reshape(self.shape, order="F" if self.fortran else "C")
        except PARSER_ERRORS as error:
            raise _no_batch(name, "its array is damaged") from error


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _from_buffer(raw: object, dtype: object, shape: tuple[Any, ...], order: object, *_: object) -> _Array:
    array = _Array()
    array.set_state((shape, dtype, order == "F", raw))
    return array


def _encode(text: str, codec: str = "latin1") -> bytes:
    if codec not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"codec {codec!r}")
    return text.encode("latin-1")


_ALLOWED: dict[tuple[str, str], Any] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle._Unpickler):
    """The pure-Python unpickler: unlike the C one, its memo can't be made to fill memory by an index."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name}") from None

    def load_build(self) -> None:
        # The inherited one would set attributes on whatever lies on the stack, our own classes included.
        stack: list[object] = self.stack  # type: ignore[attr-defined]
        state, target = stack.pop(), stack[-1]
        if not isinstance(target, _Array | _Dtype) or not isinstance(state, tuple):
            raise pickle.UnpicklingError("state for something that is no array")
        target.set_state(state)

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}
