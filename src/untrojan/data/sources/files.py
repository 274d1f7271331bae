"""A folder, a zip or a tar as the same thing: names, and the bytes behind each.

No reader sees a path of its own making: it asks for a name that was listed, and gets bytes. Archives are
read in memory, member by member; nothing is unpacked to disk.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol, Self, cast

from untrojan.data.sources.names import base, is_hidden, member_name, printable
from untrojan.data.sources.options import GIB, Limits, parsing
from untrojan.errors import UntrojanError
from untrojan.progress import task

RATIO_COUNTS_FROM = GIB // 4


class Files(Protocol):
    """The files of one source."""

    path: Path
    names: list[str]
    """Relative POSIX paths of the files."""
    folders: set[str]
    """The same of the directories, where the source lists them."""

    def read(self, name: str) -> bytes:
        """The bytes of one listed file. Raises UntrojanError where they can't be had."""
        ...


class FolderFiles:
    """Files under a directory, links followed where they don't loop, all but regular files left out."""

    def __init__(self, path: Path, limits: Limits, only: frozenset[str] | None = None) -> None:
        """``only`` restricts the listing to these names at the top."""
        self.path, self._limits, self._only = path, limits, only
        self.names: list[str] = []
        self.folders: set[str] = set()
        self.stamps: list[tuple[str, int, int]] = []
        """(name, bytes, mtime in ns) of each file: what a cache key needs."""
        with parsing(str(path), "check that you may read it"):
            self._walk(path, "", frozenset())

    def _walk(self, folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        here = folder.stat()
        if (here.st_dev, here.st_ino) in above or prefix.count("/") > 32:
            raise UntrojanError(f"{folder} links to a folder above it, or lies too deep: remove it")
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda each: each.name):
                if prefix or self._only is None or entry.name in self._only:
                    self._add(entry, prefix + entry.name, above | {(here.st_dev, here.st_ino)})

    def _add(self, entry: os.DirEntry[str], name: str, above: frozenset[tuple[int, int]]) -> None:
        if is_hidden(entry.name):
            return
        if entry.is_dir():
            self.folders.add(name)
            self._walk(Path(entry.path), name + "/", above)
        elif entry.is_file():
            found = entry.stat()
            self.names.append(name)
            self.stamps.append((name, found.st_size, found.st_mtime_ns))
            if len(self.names) > self._limits.members:
                raise too_many(self.path, self._limits)

    def read(self, name: str) -> bytes:
        return _read_bounded(self.path, name, self._limits)


class ZipFiles:
    """Members of a zip, inflated when asked for."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path, self._limits = path, limits
        self.folders: set[str] = set()
        self._members: dict[str, zipfile.ZipInfo] = {}
        with parsing(str(path)):
            self._zip = zipfile.ZipFile(path)
            archive_bytes, total = path.stat().st_size, 0
            for info in self._zip.infolist():
                self._add(info)
                total += info.file_size
                check_total(path, total, archive_bytes, len(self._members), limits)
        self.names = list(self._members)

    def _add(self, info: zipfile.ZipInfo) -> None:
        name = member_name(info.filename, str(self.path))
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise not_a_file(self.path, name)
        if info.is_dir():
            self.folders |= {name} - {""}
        elif name in self._members:
            raise twice(self.path, name)
        else:
            self._members[name] = info

    def read(self, name: str) -> bytes:
        info = self._members[name]
        if info.file_size > self._limits.member_bytes:
            raise too_large(self.path, name, self._limits)
        with parsing(f"{printable(name)} in {self.path}"), self._zip.open(info) as member:
            # zipfile stops at the size in the header and checks the sum, so a lying header is an error.
            return member.read()


class TarFiles:
    """Members of a tar, compressed or not, read in one pass and kept as they are (still encoded)."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path, self._limits = path, limits
        self.folders: set[str] = set()
        self._members: dict[str, bytes | None] = {}
        done = 0
        with parsing(str(path)), path.open("rb") as raw:
            size = os.fstat(raw.fileno()).st_size
            with task(f"reading {path.name}", total=size, unit="bytes") as bar:
                for name, data in self._stream(raw, size):
                    if name in self._members:
                        raise twice(path, name)
                    self._members[name] = data
                    bar.advance(raw.tell() - done)
                    done = raw.tell()
        self.names = list(self._members)

    def _stream(self, raw: IO[bytes], archive_bytes: int) -> Iterator[tuple[str, bytes | None]]:
        counted = _Counted(decompressed(raw), self.path, archive_bytes, self._limits)
        with tarfile.open(fileobj=cast("IO[bytes]", counted), mode="r|", tarinfo=_StrictInfo) as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else a million headers stay in memory
                name = member_name(info.name, str(self.path))
                counted.members += 1
                if info.isdir():
                    self.folders |= {name} - {""}
                elif not info.isreg() or info.issparse():
                    raise not_a_file(self.path, name)
                elif info.size > self._limits.member_bytes:
                    yield name, None
                else:
                    member = tar.extractfile(info)
                    assert member is not None
                    yield name, member.read()
        while counted.read(1 << 20):
            pass  # to the end: only there is the compression's checksum compared

    def read(self, name: str) -> bytes:
        data = self._members[name]
        if data is None:
            raise too_large(self.path, name, self._limits)
        return data


class _StrictInfo(tarfile.TarInfo):
    """tarfile takes a damaged header for the archive's end, and would silently lose the rest."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} where a file or the archive's end should follow") from error


class _Counted(io.RawIOBase):
    """A decompressed stream that stops a bomb while it goes off."""

    def __init__(self, stream: IO[bytes], path: Path, archive_bytes: int, limits: Limits) -> None:
        self._stream, self._path, self._archive_bytes, self._limits = stream, path, archive_bytes, limits
        self._total = self.members = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._total += len(data)
        check_total(self._path, self._total, self._archive_bytes, self.members, self._limits)
        return data


class SingleFile:
    """One file, as a source of its own."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path, self._limits = path, limits
        self.names = [path.name]
        self.folders: set[str] = set()

    def read(self, name: str) -> bytes:
        return _read_bounded(self.path.parent, name, self._limits)


def inner_zips(files: Files, wanted: re.Pattern[str], limits: Limits) -> list[ZipFiles]:
    """Zips lying in a folder; one inside an archive is not looked into."""
    if not isinstance(files, FolderFiles):
        return []
    return [ZipFiles(files.path / n, limits) for n in files.names if wanted.match(base(n))]


def _read_bounded(folder: Path, name: str, limits: Limits) -> bytes:
    try:
        with (folder / name).open("rb") as file:
            data = file.read(limits.member_bytes + 1)
    except OSError as error:
        raise UntrojanError(f"cannot read {printable(name)} in {folder}: {error.strerror}") from error
    if len(data) > limits.member_bytes:
        raise too_large(folder, name, limits)
    return data


def decompressed(raw: IO[bytes]) -> IO[bytes]:
    """A stream as it is, or through gzip, xz or bzip2 if it begins like one of them."""
    start = raw.read(6)
    raw.seek(0)
    if start.startswith(b"\x1f\x8b"):
        return cast("IO[bytes]", gzip.GzipFile(fileobj=raw))
    if start.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMAFile(raw)
    if start.startswith(b"BZh"):
        return bz2.BZ2File(raw)
    return raw


def check_total(path: Path, total: int, archive_bytes: int, members: int, limits: Limits) -> None:
    """Raise UntrojanError where an archive holds more, or unpacks to more, than the limits allow."""
    if members > limits.members:
        raise too_many(path, limits)
    if total > limits.total_bytes or total > max(RATIO_COUNTS_FROM, limits.ratio * archive_bytes):
        raise UntrojanError(
            f"{path} unpacks to more than {total >> 20:,} MiB from {max(1, archive_bytes >> 20):,} MiB: if "
            "you trust it, unpack it yourself and give the folder"
        )


def too_many(path: Path, limits: Limits) -> UntrojanError:
    return UntrojanError(f"{path} holds more than {limits.members:,} files: split it")


def too_large(path: Path, name: str, limits: Limits) -> UntrojanError:
    return UntrojanError(
        f"{printable(name)} in {path} is larger than {limits.member_bytes >> 20:,} MiB: remove or shrink it"
    )


def twice(path: Path, name: str) -> UntrojanError:
    return UntrojanError(f"{path} holds {printable(name)!r} twice: rebuild the archive")


def not_a_file(path: Path, name: str) -> UntrojanError:
    return UntrojanError(
        f"{printable(name)!r} in {path} is a link or a device: rebuild the archive with plain files only"
    )
