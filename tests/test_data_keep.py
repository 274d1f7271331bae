"""What is written is what is read: saving, caching, and sets known by name."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from untrojan.data import cache as decoded_cache
from untrojan.data import known
from untrojan.data.image_set import ImageSet, Splits
from untrojan.data.load import load
from untrojan.data.save import folder_names, save_folder, save_npz, write_clean
from untrojan.errors import UntrojanError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNTROJAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made(
    seed: int = 0, channels: int = 3, per_class: int = 10, names: tuple[str, ...] = ("a", "b"), side: int = 5
) -> ImageSet:
    draw = torch.Generator().manual_seed(seed)
    count = per_class * len(names)
    return ImageSet(
        torch.randint(0, 256, (count, channels, side, side + 1), generator=draw, dtype=torch.uint8),
        torch.arange(count) % len(names),
        names,
        np.array([f"somewhere/{i}.png" for i in range(count)]),
    )


def assert_same(one: ImageSet | None, other: ImageSet | None) -> None:
    assert one is not None
    assert other is not None
    assert one.fingerprint() == other.fingerprint()
    assert one.ids.tolist() == other.ids.tolist()


# Saving

names = st.text(st.characters(exclude_categories=("C", "Zl", "Zp", "Zs")), min_size=1, max_size=12)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(names, min_size=2, max_size=4, unique=True),
    st.sampled_from([1, 3]),
    st.integers(1, 4),
    st.booleans(),
    st.lists(names, min_size=80, max_size=80),
)
def test_npz_round_trip(
    tmp_path: Path, class_names: list[str], channels: int, side: int, test: bool, ids: list[str]
) -> None:
    train = made(1, channels, names=tuple(class_names), side=side)
    train = replace(train, ids=np.array(ids[: len(train)]))
    held_out = made(2, channels, 1, tuple(class_names), side) if test else None
    save_npz(tmp_path / "d.npz", train, held_out, extra={"trigger": torch.ones(2)})
    back = load(tmp_path / "d.npz")
    assert_same(back.train, train)
    assert (back.test is None) == (held_out is None)
    if held_out is not None:
        assert_same(back.test, held_out)
    assert [each.name for each in tmp_path.iterdir()] == ["d.npz"]


def test_a_test_set_without_some_classes_survives(tmp_path: Path) -> None:
    train = made(names=("a", "b", "c"))
    triggered = train.select(train.labels == 1)
    save_npz(tmp_path / "d.npz", train, triggered)
    assert_same(load(tmp_path / "d.npz").test, triggered)
    save_npz(tmp_path / "t.npz", triggered)
    assert_same(load(tmp_path / "t.npz", minimum_per_class=0).train, triggered)
    with pytest.raises(UntrojanError, match="class 'a' of"):
        load(tmp_path / "t.npz")


@pytest.mark.parametrize("suffix", ["", ".zip", ".tar", ".tar.gz", ".tar.xz", ".npz"])
@pytest.mark.parametrize("channels", [1, 3])
def test_write_clean_in_every_form(tmp_path: Path, suffix: str, channels: int) -> None:
    splits = Splits(made(1, channels), made(2, channels, 2).select(torch.tensor([0, 2])))
    path = tmp_path / f"clean{suffix}"
    write_clean(path, splits)
    back = load(path)
    for before, after in ((splits.train, back.train), (splits.test, back.test)):
        assert before is not None
        assert after is not None
        order = before.labels.argsort(stable=True)  # folders come back class by class
        expected = before.select(order) if suffix != ".npz" else before
        assert torch.equal(after.images, expected.images)
        assert torch.equal(after.labels, expected.labels)
    assert [each.name for each in tmp_path.iterdir() if each.name != "cache"] == [path.name]


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = made()

    def no_room(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", no_room)
        with pytest.raises(UntrojanError, match=r"No space left.*make room"):
            save_folder(tmp_path / "out", data)
        patched.setattr(np, "savez", no_room)
        with pytest.raises(UntrojanError, match="No space left"):
            save_npz(tmp_path / "out.npz", data)
    assert not list(tmp_path.iterdir())
    save_folder(tmp_path / "out", data)
    assert "a/0000.png,somewhere/0.png" in (tmp_path / "out" / "ids.csv").read_text()
    with pytest.raises(UntrojanError, match="already there"):
        save_folder(tmp_path / "out", data)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=130), max_size=6))
def test_folder_names_lead_nowhere_and_differ(class_names: list[str]) -> None:
    folders = folder_names((*class_names, "..", "/etc", "a/../b", "A", "a", ""))
    assert len({each.casefold() for each in folders}) == len(folders)
    for folder in folders:
        assert not re.search(r"[/\\\0]", folder)
        assert folder.strip(" .")
        assert not folder.startswith(".")
        assert len(folder) <= 110


def test_what_can_not_be_saved(tmp_path: Path) -> None:
    data = made()
    for call in (
        lambda: save_npz(tmp_path / "d.txt", data),
        lambda: save_npz(tmp_path / "d.npz", data, made(names=("a", "c"))),
        lambda: save_npz(tmp_path / "d.npz", data, extra={"x_test": torch.ones(1)}),
        lambda: save_npz(tmp_path / "d.npz", data, extra={"odd": np.array([object()])}),
        lambda: write_clean(tmp_path / "d.rar", Splits(data)),
    ):
        with pytest.raises(UntrojanError):
            call()
    assert not list(tmp_path.iterdir())


# Caching


def folder_of(tmp_path: Path, seed: int = 0) -> Path:
    source = tmp_path / f"source{seed}"
    save_folder(source, made(seed))
    return source


def no_decoding(*_: object) -> None:
    raise AssertionError("decoded though it is cached")


def test_a_second_load_decodes_nothing_and_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder_of(tmp_path)
    first = load(source, size=4)
    monkeypatch.setattr("untrojan.data.sources.decoding.decode", no_decoding)
    second = load(source, size=4)
    assert_same(second.train, first.train)
    assert (
        second.notes
        == first.notes
        == ("resized 20 of 20 images to 4x4", "left out what is no image: 1 files")
    )
    second.train.images.zero_()  # a user may write into what was loaded; the cache must not notice
    assert_same(load(source, size=4).train, first.train)
    with pytest.raises(UntrojanError, match="decoded though"):
        load(source, size=3)


def test_a_changed_source_is_read_again(tmp_path: Path) -> None:
    source = folder_of(tmp_path)
    before = load(source)
    Image.fromarray(np.zeros((5, 6, 3), np.uint8)).save(source / "a" / "0000.png")
    after = load(source)
    assert before.train.fingerprint() != after.train.fingerprint()
    assert int(after.train.images[0].sum()) == 0


@pytest.mark.parametrize("file", ["train_images.npy", "train_labels.npy", "train_ids.npy", "entry.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, cache: Path, file: str, how: str) -> None:
    source = folder_of(tmp_path)
    first = load(source)
    (entry,) = (cache / "decoded").iterdir()
    content = bytearray((entry / file).read_bytes())
    content[-5] ^= 255
    (entry / file).unlink()
    if how != "gone":
        (entry / file).write_bytes(content if how == "flipped" else content[:-5])
    assert_same(load(source).train, first.train)
    (again,) = (cache / "decoded").iterdir()
    assert decoded_cache.recall(again.name) is not None


def test_a_full_disk_only_warns(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder_of(tmp_path)

    def no_room(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", no_room)
    with pytest.warns(UserWarning, match="could not be kept"):
        splits = load(source)
    assert len(splits.train) == 20
    assert not list((cache / "decoded").iterdir())
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("UNTROJAN_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="could not be kept"):
        load(source)


def test_cache_can_be_left_alone(tmp_path: Path, cache: Path) -> None:
    load(folder_of(tmp_path), cache=False)
    assert not cache.exists()


# Known names


def test_every_known_set_can_be_put_in_place() -> None:
    for name in known.known_names():
        facts = known.info(name)
        assert facts.name == name
        assert facts.terms
        assert facts.citation
        assert known.is_built_in(name) or facts.downloads or facts.by_hand
        assert not facts.class_names or len(facts.class_names) == facts.classes
        for each in facts.downloads:
            assert re.fullmatch(r"sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}", each.checksum)
    with pytest.raises(UntrojanError, match="known as 'mnits'"):
        known.info("mnits")


def test_digits() -> None:
    splits = load("digits")
    assert splits.test is not None
    assert (len(splits.train), len(splits.test), splits.train.image_shape) == (1437, 360, (1, 8, 8))
    assert int(splits.train.images.max()) == 255
    assert not set(splits.train.ids) & set(splits.test.ids)


def test_signs_by_number_of_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def make(num_classes: int, size: int, train_per_class: int = 400) -> Splits:
        asked.append((num_classes, size, train_per_class))
        return Splits(made())

    monkeypatch.setattr("untrojan.data.signs.make_signs", make)
    load("signs")
    load("signs@7", size=16)
    load("signs@7", size=16)
    load("signs@7x90")
    assert asked == [(10, 32, 400), (7, 16, 400), (7, 32, 90)]
    for wrong in ("signs@many", "signs@7x", "signs@x90", "signs@7x-1"):
        with pytest.raises(UntrojanError, match="number of classes"):
            load(wrong)


def test_a_copy_in_the_cache_folder_is_used(cache: Path) -> None:
    names = tuple(f"n{i}" for i in range(2))
    write_clean(cache / "cifar10.tar.xz", Splits(made(names=names, side=32)))
    splits = load("cifar10")
    assert splits.train.class_names == names
    assert splits.train.image_shape == (3, 32, 32)  # the set's own size, though the copy's images are 32x33
    assert known.fetch("cifar10") == cache / "cifar10.tar.xz"


def test_numbered_classes_get_their_names(cache: Path) -> None:
    write_clean(cache / "fashion-mnist.npz", Splits(made(names=tuple(map(str, range(10))), channels=1)))
    assert load("fashion-mnist").train.class_names[9] == "Ankle boot"
    save_folder(cache / "imagenette", made(names=known.info("imagenette").file_names))
    assert load("imagenette", size=8).train.class_names[0] == "tench"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/", folder
        running.shutdown()
        thread.join()


def offer(monkeypatch: pytest.MonkeyPatch, url: str, content: bytes) -> None:
    checksum = f"sha256:{hashlib.sha256(content).hexdigest()}"
    facts = replace(known.info("cifar10"), downloads=(known.Download(url, checksum),))
    monkeypatch.setitem(known._BY_NAME, "cifar10", facts)


def test_a_download_is_checked_and_used(
    server: tuple[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder = server
    write_clean(folder / "some.tar.gz", Splits(made(side=32)))
    content = (folder / "some.tar.gz").read_bytes()
    offer(monkeypatch, f"{address}some.tar.gz", b"another file")
    with pytest.raises(UntrojanError, match=r"could not be downloaded .*hash"):
        load("cifar10")
    assert known.locate("cifar10") is None
    offer(monkeypatch, f"{address}some.tar.gz", content)
    assert len(load("cifar10").train) == 20
    assert known.fetch("cifar10") == cache / "cifar10" / "some.tar.gz"
    (folder / "some.tar.gz").unlink()
    assert len(load("cifar10").train) == 20


def test_no_network_says_where_to_put_the_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "http://127.0.0.1:1/missing.tar.gz", b"")
    with pytest.raises(UntrojanError, match=re.escape(str(cache / "cifar10"))) as caught:
        load("cifar10")
    assert "missing.tar.gz" in str(caught.value)
    with pytest.raises(UntrojanError, match=r"img_align_celeba.zip.* into"):
        load("celeba8")


def test_saved_images_open_elsewhere(tmp_path: Path) -> None:
    data = made(channels=3)
    save_folder(tmp_path / "out", data)
    shown = np.asarray(Image.open(io.BytesIO((tmp_path / "out/b/0001.png").read_bytes())))
    assert np.array_equal(shown.transpose(2, 0, 1), data.images[1].numpy())
