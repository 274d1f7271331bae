"""What every reader is told, and what every reader is held to."""

from __future__ import annotations

import lzma
import struct
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from untrojan.errors import UntrojanError

OnCorrupt = Literal["fail", "skip"]

GIB = 1 << 30

PARSER_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    struct.error,
    tokenize.TokenError,
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
)
"""All that the standard library's and NumPy's parsers were seen to raise on damaged or hostile bytes."""


@dataclass(frozen=True)
class Limits:
    """Bounds that stop a small hostile file from becoming a large one."""

    members: int = 2_000_000
    """Files in one source."""
    member_bytes: int = GIB // 2
    """One file, decompressed."""
    total_bytes: int = 6 * GIB
    """A whole archive, decompressed."""
    ratio: int = 200
    """Decompressed to compressed, once more than 256 MiB have come out."""
    image_pixels: int = 64_000_000
    """Width times height of one image."""
    decoded_bytes: int = 16 * GIB
    """All images of a set, decoded and resized."""
    classes: int = 10_000


@dataclass(frozen=True)
class ReadOptions:
    """How a source is read: see :func:`untrojan.data.load.load`."""

    size: int | None = None
    on_corrupt: OnCorrupt = "fail"
    limits: Limits = field(default_factory=Limits)


@contextmanager
def parsing(name: str, way_out: str = "it is damaged or of another type, so replace it") -> Iterator[None]:
    """Turn what a parser raises on damaged bytes into one line that names the file."""
    try:
        yield
    except PARSER_ERRORS as error:
        reason = "it needs more memory than there is" if isinstance(error, MemoryError) else one_line(error)
        raise UntrojanError(f"{name} cannot be read ({reason}): {way_out}") from error


def one_line(error: BaseException, longest: int = 160) -> str:
    """An exception's text, fit for the middle of a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= longest else text[: longest - 3] + "..."
