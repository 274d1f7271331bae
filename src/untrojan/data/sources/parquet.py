"""Parquet in Hugging Face's image layout: a struct of ``bytes`` and ``path``, and an integer label."""

from __future__ import annotations

import io
import json
import re
from typing import Any

from untrojan.data.image_set import Splits
from untrojan.data.sources.decoding import Encoded, decode_splits
from untrojan.data.sources.files import Files
from untrojan.data.sources.names import base, natural_key, printable
from untrojan.data.sources.options import ReadOptions, parsing
from untrojan.errors import UntrojanError

LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "y")
TEST_NAME = re.compile(r"(^|[/_.-])(test|val|valid|validation)([/_.-]|$)")


def is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet")


def read_parquet(files: Files, options: ReadOptions) -> Splits:
    """All files, those named test or validation as the test set. Ids are ``file#row``.

    Raises UntrojanError where pyarrow is not installed, and where there is no image or label column.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise UntrojanError("reading parquet needs pyarrow: pip install 'untrojan[parquet]'") from None
    del pyarrow
    sets: dict[bool, list[Encoded]] = {False: [], True: []}
    names: tuple[str, ...] | None = None
    total = 0
    for name in sorted(filter(is_parquet, files.names), key=natural_key):
        with parsing(printable(name)):
            entries, named, size = _entries(files, name, options, total)
        names, total = names or named, total + size
        sets[TEST_NAME.search(name) is not None] += entries
    train, test = (sets[False], sets[True]) if sets[False] else (sets[True], [])
    highest = max((one.label for one in (*train, *test)), default=-1)
    if names is None:
        names = tuple(map(str, range(highest + 1)))
    elif highest >= len(names):
        raise UntrojanError(
            f"the labels of {files.path} reach {highest} but it names {len(names)} classes: mend it"
        )
    return decode_splits(train, test or None, tuple(printable(name) for name in names), options)


def _entries(
    files: Files, name: str, options: ReadOptions, before: int
) -> tuple[list[Encoded], tuple[str, ...] | None, int]:
    """The rows of one file, the class names it gives, and the bytes of its images."""
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(io.BytesIO(files.read(name)))
    image_column, label_column = _columns(table.schema_arrow, name)
    entries: list[Encoded] = []
    size = 0
    for batch in table.iter_batches(batch_size=64, columns=[image_column, label_column]):
        pictures, labels = batch.column(0).to_pylist(), batch.column(1).to_pylist()
        for picture, label in zip(pictures, labels, strict=True):
            data = picture.get("bytes") if isinstance(picture, dict) else picture
            id = f"{name}#{len(entries)}"
            if not isinstance(data, bytes):
                raise UntrojanError(f"{printable(id)} has no image bytes: embed the images in the file")
            if not isinstance(label, int) or not 0 <= label < options.limits.classes:
                raise UntrojanError(f"{printable(id)} has the label {label!r}: give whole numbers from 0 on")
            size += len(data)
            entries.append(Encoded(id, label, lambda data=data: data))  # type: ignore[misc]
        if before + size > options.limits.total_bytes:
            raise UntrojanError(f"{files.path} holds over {options.limits.total_bytes >> 30} GiB: split it")
    return entries, _class_names(table.schema_arrow, label_column), size


def _columns(schema: Any, name: str) -> tuple[str, str]:
    import pyarrow.types as types

    def holds_images(kind: Any) -> bool:
        if types.is_struct(kind):
            return bool(kind.get_field_index("bytes") >= 0)
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    image = next((field.name for field in schema if holds_images(field.type)), None)
    label = next(
        (n for n in LABEL_COLUMNS if n in schema.names and types.is_integer(schema.field(n).type)), None
    )
    if image is None or label is None:
        missing = "image" if image is None else f"label ({', '.join(LABEL_COLUMNS)})"
        shown = printable(", ".join(schema.names)[:200])
        raise UntrojanError(f"{printable(base(name))} has no {missing} column among {shown}: rename it")
    return image, label


def _class_names(schema: Any, label_column: str) -> tuple[str, ...] | None:
    """The names Hugging Face keeps as JSON in the schema's metadata; None where there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label_column]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        return None
    return tuple(names)
