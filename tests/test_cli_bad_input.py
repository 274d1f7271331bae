"""Bad input: exit status 2, one line that names the thing, and nothing left behind."""

from __future__ import annotations

import errno
import gzip
import io
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from untrojan.cli.main import main
from untrojan.data.image_set import ImageSet, numbered
from untrojan.data.save import save_npz
from untrojan.models.checkpoints import save_checkpoint
from untrojan.models.registry import build_for
from untrojan.runs import RunFolder

NAMES = ("ant", "bee", "cat")


class Payload:
    """What an attacker pickles: reading it with an ordinary unpickler creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


def images(count: int = 36, names: tuple[str, ...] = NAMES, side: int = 16) -> ImageSet:
    labels = torch.arange(count) % len(names)
    return ImageSet(torch.zeros(count, 3, side, side, dtype=torch.uint8), labels, names, numbered(count))


def png(size: tuple[int, int] = (16, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (90, 120, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def bomb() -> bytes:
    """A valid PNG of 60,000 x 60,000 pixels in a few kilobytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    pixels = b"".join(packer.compress(bytes(7501)) for _ in range(600)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def folder(place: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (place / name).mkdir(parents=True)
        for i in range(count):
            (place / name / f"{i}.png").write_bytes(png())
    return place


def missing(place: Path) -> Path:
    return place / "nowhere"


def empty_class(place: Path) -> Path:
    return folder(place, {"ant": 12, "bee": 0})


def one_class(place: Path) -> Path:
    return folder(place, {"ant": 12})


def too_few(place: Path) -> Path:
    return folder(place, {"ant": 12, "bee": 9})


def truncated_image(place: Path) -> Path:
    folder(place, {"ant": 12, "bee": 12})
    (place / "bee" / "3.png").write_bytes(png()[:-30])
    return place


def image_bomb(place: Path) -> Path:
    folder(place, {"ant": 12, "bee": 12})
    (place / "bee" / "3.png").write_bytes(bomb())
    return place


def no_images(place: Path) -> Path:
    place.mkdir()
    (place / "notes.txt").write_text("nothing here")
    return place


def climbing_tar(place: Path) -> Path:
    with tarfile.open(place, "w:gz") as archive:
        for name in ("ant/0.png", "../../evil.png"):
            member = tarfile.TarInfo(name)
            member.size = len(png())
            archive.addfile(member, io.BytesIO(png()))
    return place


def climbing_zip(place: Path) -> Path:
    with zipfile.ZipFile(place, "w") as archive:
        archive.writestr("ant/0.png", png())
        archive.writestr("../evil.png", png())
    return place


def absolute_zip(place: Path) -> Path:
    with zipfile.ZipFile(place, "w") as archive:
        archive.writestr("/evil.png", png())
    return place


def linking_tar(place: Path) -> Path:
    with tarfile.open(place, "w") as archive:
        link = tarfile.TarInfo("ant/0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return place


def truncated_archive(place: Path) -> Path:
    with tarfile.open(place, "w:gz") as archive:
        for i in range(40):
            member = tarfile.TarInfo(f"ant/{i}.png")
            member.size = 4096
            archive.addfile(member, io.BytesIO(os.urandom(4096)))
    place.write_bytes(place.read_bytes()[:60_000])
    return place


def evil_batches(place: Path) -> Path:
    place.mkdir()
    (place / "data_batch_1").write_bytes(pickle.dumps(Payload(place.parent / "executed")))
    return place


def evil_batch_file(place: Path) -> Path:
    place.write_bytes(pickle.dumps(Payload(place.parent / "executed")))
    return place


def evil_npz(place: Path) -> Path:
    objects = np.array([Payload(place.parent / "executed")] * 30, dtype=object)
    np.savez(place.with_suffix(".npz"), x=objects, y=np.arange(30) % 3)
    return place.with_suffix(".npz")


def npz_with(**arrays: np.ndarray) -> Callable[[Path], Path]:  # type: ignore[type-arg]
    def write(place: Path) -> Path:
        content = {"x": np.zeros((36, 16, 16, 3), np.uint8), "y": np.arange(36) % 3, **arrays}
        np.savez(place.with_suffix(".npz"), **content)  # type: ignore[arg-type]
        return place.with_suffix(".npz")

    return write


def nan_pixels() -> np.ndarray:  # type: ignore[type-arg]
    pixels = np.zeros((36, 16, 16, 3), np.float32)
    pixels[7, 3, 3, 0] = np.nan
    return pixels


def not_data(place: Path) -> Path:
    place.write_text("dear diary\n" * 100)
    return place


def truncated_idx(place: Path) -> Path:
    place.mkdir()
    header = struct.pack(">HBBIII", 0, 8, 3, 36, 28, 28)
    (place / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + bytes(100)))
    labels = struct.pack(">HBBI", 0, 8, 1, 36) + bytes(i % 3 for i in range(36))
    (place / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return place


BAD_DATA: list[tuple[str, Callable[[Path], Path], str]] = [
    ("missing path", missing, "nowhere"),
    ("empty class", empty_class, "bee"),
    ("one class only", one_class, "one class"),
    ("too few images", too_few, "9 images"),
    ("truncated image", truncated_image, "3.png"),
    ("image bomb", image_bomb, "60000"),
    ("no images", no_images, "data"),
    ("tar that climbs out", climbing_tar, "evil.png"),
    ("zip that climbs out", climbing_zip, "evil.png"),
    ("zip with an absolute name", absolute_zip, "evil.png"),
    ("tar with a link", linking_tar, "link"),
    ("truncated archive", truncated_archive, "data"),
    ("pickle that is no batch", evil_batches, "data_batch_1"),
    ("pickle file that is no batch", evil_batch_file, "data"),
    ("npz with objects", evil_npz, "object"),
    ("negative label", npz_with(y=np.arange(36) % 3 - 1), "-1"),
    ("label without a name", npz_with(class_names=np.array(["ant", "bee"])), "2"),
    ("labels that are no integers", npz_with(y=(np.arange(36) % 3).astype(np.float64)), "float64"),
    ("fewer labels than images", npz_with(y=np.arange(30) % 3), "36 images"),
    ("NaN", npz_with(x=nan_pixels()), "NaN"),
    ("two channels", npz_with(x=np.zeros((36, 16, 16, 2), np.uint8)), "channels"),
    ("not data at all", not_data, "data"),
    ("truncated IDX", truncated_idx, "idx"),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    place = tmp_path / "good.npz"
    save_npz(place, images(), images())
    return place


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail as a user's mistake does. Returns the line it said."""
    capsys.readouterr()
    status = main(arguments)
    shown = capsys.readouterr()
    assert status == 2, shown
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert shown.err.endswith("\n")
    assert len(shown.err) < 1000
    return shown.err


@pytest.mark.parametrize(("make", "named"), [pytest.param(m, n, id=name) for name, m, n in BAD_DATA])
def test_bad_data(
    make: Callable[[Path], Path], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = make(tmp_path / "data")
    before = sorted(tmp_path.rglob("*"))
    line = refused(["audit", str(place), "--out", str(tmp_path / "deep" / "out")], capsys)
    assert named in line
    assert sorted(tmp_path.rglob("*")) == before, "something was left behind, or code was run"


@pytest.mark.parametrize("command", ["train", "poison", "evaluate", "info"])
def test_every_command_refuses_bad_data_alike(
    command: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, out = str(one_class(tmp_path / "data")), str(tmp_path / "out")
    model = tmp_path / "model.safetensors"
    save_checkpoint(model, build_for(images(), "cnn@0.25"), NAMES)
    arguments = {
        "train": ["train", place, "--out", out],
        "poison": ["poison", place, "--trigger", "patch", "--target", "0", "--count", "1", "--out", out],
        "evaluate": ["evaluate", str(model), "--data", place, "--out", out],
        "info": ["data", "info", place],
    }
    assert "one class" in refused(arguments[command], capsys)
    assert not Path(out).exists()


POISON = "poison {data} --out {out} --trigger patch"
BAD_OPTIONS = [
    ("train {data}", "--out"),
    ("train {data} --out {out} --colour red", "--colour"),
    ("train {data} --out {out} --epochs none", "epochs"),
    ("train {data} --out {out} --epochs 0", "epochs"),
    ("train {data} --out {out} --net vgg17", "vgg17"),
    ("train {data} --out {out} --net vgg16@900", "vgg16@900"),
    ("train {data} --out {out} --net nowhere:net", "nowhere"),
    ("train {data} --out {out} --preset quick", "quick"),
    ("train {data} --out {out} --learning-rate 0", "learning_rate"),
    ("train {data} --out {out} --seed 18446744073709551616", "seed"),
    ("train {data} --out {out} --defense none --defense-option seed=9223372036854775808", "seed"),
    ("train {data} --out {out} --defense none --defense-option learning_rate=Infinity", "finite"),
    ("train {data} --out {out} --defense none --defense-option learning_rate=1e999", "finite"),
    ("scan {data} --data {data} --out {out} --method natural --scan-option sizes=[NaN]", "finite"),
    ("scan nowhere.pt --data {data} --out {out}", "nowhere.pt"),
    ("audit {data} --out {out} --false-alarm-rate 2", "false-alarm-rate"),
    ("audit {data} --out {out} --schedule slow", "schedule"),
    ("audit {data} --out {out} --level s1", "level 's1'"),
    ("scan m.pt --data {data} --out {out} --distance mask --scan-option measure=filter", "given twice"),
    ("audit {data} --out {out} --model nowhere.pt", "nowhere.pt"),
    ("audit {data} --out {out} --write-clean {data}", "--overwrite"),
    ("audit {data} --out {out} --write-clean {out}/clean.docx", "clean.docx"),
    ("audit {data} --out {out} --write-clean {out}/no/clean.npz", "no folder"),
    ("audit {data} --out {data}", "not a folder"),
    ("train {data} --out {out} --write-clean {out}.npz", "needs a defence"),
    ("train {data} --out {out} --defense none --write-clean {data}", "--overwrite"),
    ("poison {data} --out {out} --trigger sticker --target 0 --count 1", "sticker"),
    (f"{POISON} --target dog --count 1", "dog"),
    (f"{POISON} --target 3 --count 1", "0 ant"),
    (f"{POISON} --target 0", "count"),
    (f"{POISON} --target 0 --count 1 --rate 0.1", "count"),
    (f"{POISON} --count 1", "target"),
    (f"{POISON} --target 0 --count 99", "99"),
    (f"{POISON} --target 0 --count 1 --source ant", "target"),
    (f"{POISON} --target 0 --count 1 --trigger-option size", "NAME=VALUE"),
    (f"{POISON} --target 0 --count 1 --trigger-option colour=red", "colour"),
    ("evaluate nowhere.safetensors --data {data} --out {out}", "nowhere.safetensors"),
    ("data fetch imagenet", "imagenet"),
    ("bench run nowhere.toml --out {out}", "nowhere.toml"),
    ("bench run nowhere.toml --out {out} --budget soon", "soon"),
    ("bench list nowhere.toml --out {out}", "nowhere.toml"),
    ("bench table nowhere.toml --out {out}", "nowhere.toml"),
    ("destroy", "destroy"),
]


@pytest.mark.parametrize(("line", "named"), BAD_OPTIONS)
def test_bad_options(
    line: str, named: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = data.read_bytes()
    arguments = [each.format(data=data, out=tmp_path / "out") for each in line.split()]
    assert named in refused(arguments, capsys)
    assert sorted(tmp_path.iterdir()) == [data]
    assert data.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mean", "nan,0,0", "--std", "1,1,1"], "not a list of numbers"),
        (["--mean", "0,0,0", "--std", "1,0,1"], "above zero"),
        (["--mean", "0.5", "--std", "1,1,1"], "--mean has 1 numbers"),
    ],
)
def test_a_normalisation_that_is_none(
    options: list[str], said: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "weights.pt"
    torch.save(build_for(images(), "cnn@0.25").network.state_dict(), model)
    command = ["scan", str(model), "--data", str(data), "--architecture", "cnn@0.25", *options]
    assert said in refused([*command, "--out", str(tmp_path / "out")], capsys)


@pytest.mark.parametrize("command", ["audit", "evaluate"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_checkpoint_with_code_in_it(
    command: str, suffix: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark, model, out = tmp_path / "executed", tmp_path / f"model{suffix}", str(tmp_path / "out")
    torch.save({"weight": torch.zeros(1), "hook": Payload(mark)}, model)
    arguments = {
        "audit": ["audit", str(data), "--model", str(model), "--architecture", "cnn", "--out", out],
        "evaluate": ["evaluate", str(model), "--data", str(data), "--architecture", "cnn", "--out", out],
    }
    line = refused(arguments[command], capsys)
    assert model.name in line
    assert "code" in line
    assert not mark.exists()
    assert not Path(out).exists()


@pytest.mark.parametrize("command", ["audit", "evaluate"])
@pytest.mark.parametrize(
    ("names", "named"),
    [
        (("ant", "bee"), "num_classes"),
        (("bee", "ant", "cat"), "class 0 is 'bee'"),
    ],
)
def test_a_model_that_does_not_fit_the_data(
    command: str, names: tuple[str, ...], named: str, data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model, out = tmp_path / "model.safetensors", str(tmp_path / "out")
    save_checkpoint(model, build_for(images(names=names), "cnn@0.25"), names)
    arguments = {
        "audit": ["audit", str(data), "--model", str(model), "--out", out],
        "evaluate": ["evaluate", str(model), "--data", str(data), "--out", out],
    }
    assert named in refused(arguments[command], capsys)
    assert not Path(out).exists()


def test_triggered_images_that_do_not_fit(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model.safetensors"
    save_checkpoint(model, build_for(images(), "cnn@0.25"), NAMES)
    evaluate = ["evaluate", str(model), "--data", str(data), "--triggered"]
    assert "nowhere.npz" in refused([*evaluate, "nowhere.npz"], capsys)
    assert "wanted_labels" in refused([*evaluate, str(data)], capsys)
    wrong = tmp_path / "wrong.npz"
    for extra, named in (
        ({"wanted_labels": torch.zeros(35, dtype=torch.int64)}, "36 images but 35"),
        ({"wanted_labels": torch.full((36,), 7)}, "up to 7"),
        ({"wanted_labels": torch.full((36,), -1)}, "-1"),
        ({"wanted_labels": torch.zeros(36)}, "float32"),
    ):
        save_npz(wrong, images(), extra=extra)
        assert named in refused([*evaluate, str(wrong)], capsys)
    save_npz(wrong, images(side=20), extra={"wanted_labels": torch.zeros(36, dtype=torch.int64)})
    assert "--size" in refused([*evaluate, str(wrong)], capsys)


def test_two_runs_in_one_folder(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with RunFolder(out, "audit", {}) as first:
        line = refused(["train", str(data), "--out", str(out), "--overwrite"], capsys)
        assert f"process {os.getpid()}" in line
        first.write_text("result.txt", "mine")
    assert (out / "result.txt").read_text() == "mine"


def test_a_folder_with_other_files(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = data.read_bytes()
    assert "good.npz" in refused(["train", str(data), "--out", str(data.parent)], capsys)
    assert list(data.parent.iterdir()) == [data]
    assert data.read_bytes() == before


def test_a_full_disk(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At whichever write it fills up."""
    real = os.fsync
    train = ["train", str(data), "--net", "cnn@0.25", "--epochs", "1"]
    poison = ["poison", str(data), "--trigger", "patch", "--target", "0", "--count", "1"]
    for command in (train, poison):
        out = tmp_path / command[0]
        for room in range(3):
            left = room

            def fsync(handle: int) -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                real(handle)

            monkeypatch.setattr(os, "fsync", fsync)
            line = refused([*command, "--out", str(out)], capsys)
            monkeypatch.setattr(os, "fsync", real)
            assert "space" in line.lower()
            assert not out.exists() or {place.name for place in out.iterdir()} == {".work"}


def test_running_out_of_memory_is_a_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error in (
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
    ):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("untrojan.data.load.load", fail)
        assert "out of memory" in refused(["data", "info", "x"], capsys)


def test_a_bug_is_not_taken_for_bad_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("untrojan.data.load.load", fail)
    assert main(["data", "info", "x"]) == 70
    said = capsys.readouterr().err
    assert "ZeroDivisionError: ours" in said
    assert said.splitlines()[-1] == "error: this is a bug in untrojan: please report it with the lines above"


@pytest.mark.parametrize(
    "line",
    [
        "train {old}/clean.npz",
        "audit {old}/clean.npz",
        "audit {data} --model {old}/model.safetensors",
        "audit {data} --trusted {old}/clean.npz",
        "poison {old}/clean.npz --trigger patch --target 0 --count 1",
        "poison {data} --attack label-consistent --target 0 --surrogate {old}/model.safetensors",
        "scan {old}/model.safetensors --data {data}",
        "scan {old}/model.safetensors --data {old}/clean.npz",
        "evaluate {old}/model.safetensors --data {data}",
        "federated {old}/clean.npz",
    ],
)
def test_a_run_does_not_replace_what_it_was_given(
    line: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if line.startswith("federated"):
        pytest.importorskip("flwr")
    old = tmp_path / "old"
    with RunFolder(old, "train", {}) as folder:
        folder.write_bytes("clean.npz", data.read_bytes())
        save_checkpoint(folder.staged("model.safetensors"), build_for(images(), "cnn@0.25"), NAMES)
    before = {place: place.read_bytes() for place in old.iterdir()}
    command = [*line.format(data=data, old=old).split(), "--out", str(old), "--overwrite"]
    assert f"--out {old} holds the" in refused(command, capsys)
    assert {place: place.read_bytes() for place in old.iterdir()} == before
