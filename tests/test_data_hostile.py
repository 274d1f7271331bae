"""Sources made to harm: refused in one line, with nothing written, run or filled up."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from untrojan.data.load import load
from untrojan.data.sources.cifar import unpickled
from untrojan.data.sources.names import printable
from untrojan.data.sources.options import Limits
from untrojan.errors import UntrojanError


def refused(source: Path | str, **options: object) -> str:
    with pytest.raises(UntrojanError) as caught:
        load(source, cache=False, **options)  # type: ignore[arg-type]
    assert str(caught.value).isprintable()  # one line, and nothing that could play with a terminal
    return str(caught.value)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).save(buffer, format="PNG")
    return buffer.getvalue()


def honest() -> dict[str, bytes]:
    return {f"{c}/{i}.png": png() for c in "ab" for i in range(10)}


def tar_bytes(files: dict[str, bytes], *extra: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in extra:
            archive.addfile(info)
    return buffer.getvalue()


def zip_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def npz_bytes() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, x=np.zeros((20, 4, 4), np.uint8), y=np.arange(20) % 2, class_names=np.array(["a", "b"]))
    return buffer.getvalue()


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# Names and kinds of members


@pytest.mark.parametrize("name", ["../out.png", "a/../../out.png", "/out.png", "C:\\out.png", "..\\out.png"])
@pytest.mark.parametrize("pack", [tar_bytes, zip_bytes])
def test_names_that_point_outside(
    tmp_path: Path, name: str, pack: Callable[[dict[str, bytes]], bytes]
) -> None:
    source = put(tmp_path / "set.archive", pack(honest() | {name: png()}))
    assert "points outside it" in refused(source)
    assert [each.name for each in tmp_path.iterdir()] == ["set.archive"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_tars(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("a/link.png")
    info.type, info.linkname = kind, "/etc/passwd"
    assert "'a/link.png'" in refused(put(tmp_path / "s.tar", tar_bytes(honest(), info)))


def test_links_in_zips(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("a/link.png")
    info.external_attr = 0o120777 << 16
    buffer = io.BytesIO(zip_bytes(honest()))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(info, "/etc/passwd")
    assert "is a link or a device" in refused(put(tmp_path / "s.zip", buffer.getvalue()))


def test_one_name_twice(tmp_path: Path) -> None:
    assert "twice" in refused(put(tmp_path / "s.tar", tar_bytes(honest() | {"./a/0.png": png()})))


def test_fifos_and_devices_in_folders_are_not_opened(tmp_path: Path) -> None:
    import os

    for name, data in honest().items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        put(tmp_path / name, data)
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "a" / "endless.png").symlink_to("/dev/zero")
    assert len(load(tmp_path, cache=False).train) == 20


@pytest.mark.parametrize("nasty", ["\x1b[31mred", "two\nlines", "left\u202eright", "\udcff"])
def test_control_characters_in_names_come_back_visible(tmp_path: Path, nasty: str) -> None:
    files = {name.replace("b/", f"{nasty}/"): data for name, data in honest().items()}
    splits = load(put(tmp_path / "s.tar", tar_bytes(files)), cache=False)
    assert all(name.isprintable() for name in (*splits.train.class_names, *splits.train.ids.tolist()))
    assert printable(nasty) in splits.train.class_names


def test_class_names_that_look_the_same(tmp_path: Path) -> None:
    files = {f"{c}/{i}.png": png() for c in ("a\n", "a\\n") for i in range(10)}
    assert "look the same" in refused(put(tmp_path / "s.tar", tar_bytes(files)))


# Bombs


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_tar_bombs(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    source = put(tmp_path / "s.tar", compress(tar_bytes(honest() | {"a/big.png": bytes(3 << 20)})))
    assert "unpacks to more than" in refused(source, limits=Limits(total_bytes=1 << 20))
    assert "a/big.png in" in refused(source, limits=Limits(member_bytes=1 << 20))
    assert "more than 5 files" in refused(source, limits=Limits(members=5))


def test_zip_bombs(tmp_path: Path) -> None:
    source = put(tmp_path / "s.zip", zip_bytes(honest() | {"a/big.png": bytes(3 << 20)}))
    assert "unpacks to more than" in refused(source, limits=Limits(total_bytes=1 << 20))
    assert "a/big.png in" in refused(source, limits=Limits(member_bytes=1 << 20))
    assert "more than 5 files" in refused(source, limits=Limits(members=5))


def test_too_good_a_ratio_is_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("untrojan.data.sources.files.RATIO_COUNTS_FROM", 1 << 20)
    data = tar_bytes(honest() | {"a/big.png": bytes(3 << 20)})
    assert "unpacks to more than" in refused(put(tmp_path / "s.tar.xz", lzma.compress(data)))


def test_an_array_that_claims_more_than_its_file(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 20, 64, 64, 3)}
    )
    files = {"x.npy": header.getvalue() + bytes(100), "y.npy": b""}
    assert "cannot be read" in refused(put(tmp_path / "d.npz", zip_bytes(files)))
    assert "claims" in refused(
        put(tmp_path / "d.npz", zip_bytes(files)), limits=Limits(decoded_bytes=1 << 30)
    )


# Pickles


class Runs:
    def __init__(self, call: object, *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", range(6))
def test_no_call_of_a_pickle_is_made(tmp_path: Path, protocol: int) -> None:
    import os

    mark = tmp_path / "made"
    data = pickle.dumps({"data": Runs(os.mkdir, str(mark)), "labels": []}, protocol=protocol)
    source = put(tmp_path / "data_batch_1", data)
    if protocol >= 2:
        assert "is a pickle that is no CIFAR batch" in refused(source)
    (tmp_path / "folder").mkdir()
    put(tmp_path / "folder" / "data_batch_1", data)
    assert "is a pickle that is no CIFAR batch" in refused(tmp_path / "folder")
    assert not mark.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cuntrojan.data.sources.cifar\n_Array\n.",
        b"cnumpy\nload\n.",
        b"\x80\x02" + b"r" + struct.pack("<I", 0x7FFFFFFF) + b".",  # a memo index that would fill memory
        b"\x80\x04" + b"\x8e" + struct.pack("<Q", 1 << 62) + b".",  # bytes longer than any memory
        b"cnumpy\ndtype\n(S'O8'\ntR.",
        b"(lp0\n.",
        b"",
        b"\x80\x02}q\x00(X\x04\x00\x00\x00dataq\x01" + b"X\x06\x00\x00\x00labels]u.",
        pickle.dumps({"data": np.array([None]), "labels": [0]}),
        pickle.dumps({"data": np.zeros((1, 3071), np.uint8), "labels": [0]}),
        pickle.dumps({"data": np.zeros((1, 3072), np.float32), "labels": [0]}),
        pickle.dumps([1, 2]),
    ],
)
def test_pickles_that_are_no_batches(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "s").mkdir()
    put(tmp_path / "s" / "data_batch_1", data)
    assert "data_batch_1 is a pickle that is no CIFAR batch" in refused(tmp_path / "s")


def test_a_pickle_can_not_rebuild_the_classes_that_stand_for_numpys() -> None:
    state_on_the_class = b"cnumpy\nndarray\n(N}Vto_numpy\nI1\nstb."
    with pytest.raises(UntrojanError, match="no CIFAR batch"):
        unpickled(state_on_the_class, "x")
    test_a_pickled_array_comes_back_whole()


def test_a_pickled_array_comes_back_whole() -> None:
    for protocol in range(6):
        for array in (np.arange(6, dtype=np.uint8).reshape(2, 3), np.asfortranarray(np.eye(3, dtype=">i4"))):
            back = unpickled(pickle.dumps({"it": array}, protocol=protocol), "x")["it"].to_numpy("x")
            assert np.array_equal(back, array)


# Anything at all

ARCHIVES = {
    "s.tar": tar_bytes(honest()),
    "s.tar.gz": gzip.compress(tar_bytes(honest()), mtime=0),
    "s.tar.xz": lzma.compress(tar_bytes(honest())),
    "s.zip": zip_bytes(honest()),
    "s.npz": npz_bytes(),
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.parametrize("on_corrupt", ["fail", "skip"])
def test_damage_is_always_one_clear_error(
    tmp_path: Path, name: str, on_corrupt: str, data: st.DataObject
) -> None:
    content = bytearray(ARCHIVES[name])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    source = put(tmp_path / name, bytes(content))
    said = "nothing"
    try:
        splits = load(source, cache=False, on_corrupt=on_corrupt, limits=Limits(total_bytes=1 << 24))  # type: ignore[arg-type]
        assert len(splits.train) >= 20
    except UntrojanError as error:
        said = str(error)
    assert said.isprintable()


@pytest.mark.parametrize("cut", [512, 1024, 5 * 1024 + 100])
def test_a_tar_cut_short_is_not_taken_for_a_smaller_one(tmp_path: Path, cut: int) -> None:
    files = {f"{c}/{i:02d}.png": png() for i in range(40) for c in "ab"}
    whole = tar_bytes(files).rstrip(b"\0")
    whole = whole[: len(whole) // 512 * 512]
    assert "cannot be read" in refused(put(tmp_path / "s.tar", whole[:-cut]))
    middle = bytearray(tar_bytes(files))
    middle[60 * 1024 + 148] ^= 1  # one bit of a header's checksum
    assert "cannot be read" in refused(put(tmp_path / "s.tar", bytes(middle)))
