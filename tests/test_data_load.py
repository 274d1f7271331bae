"""What load makes of honest sources, and what it says of mistaken ones."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from untrojan.data.image_set import Splits
from untrojan.data.load import load
from untrojan.data.sources.names import natural_key
from untrojan.data.sources.options import Limits
from untrojan.errors import UntrojanError

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNTROJAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def png(array: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", **options)
    return buffer.getvalue()


def tree(classes: tuple[str, ...] = ("a", "b"), count: int = 10, prefix: str = "") -> dict[str, bytes]:
    return {f"{prefix}{c}/{i}.png": png(pixels(6, 6, 3)) for c in classes for i in range(count)}


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_tar(path: Path, files: dict[str, bytes], mode: str) -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def same(one: Splits, other: Splits) -> bool:
    return all(
        a.fingerprint() == b.fingerprint() and a.ids.tolist() == b.ids.tolist()
        for a, b in ((one.train, other.train), (one.test, other.test))
        if a is not None and b is not None
    ) and (one.test is None) == (other.test is None)


def refused(source: Path | str, **options: object) -> str:
    with pytest.raises(UntrojanError) as caught:
        load(source, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Folders and archives


def test_folder_tars_and_zip_of_one_tree_are_one_set(tmp_path: Path) -> None:
    names = ("9", "10", "2")
    files = tree(names, 11, "set/train/") | tree(names, 3, "set/test/")
    files |= {"set/README.md": b"-", "set/train/9/._0.png": b"junk", "__MACOSX/set/train/9/0.png": b"junk"}
    folder = load(write_folder(tmp_path / "folder", files))
    assert folder.train.class_names == ("2", "9", "10")
    assert folder.train.ids[:11].tolist() == [f"set/train/2/{i}.png" for i in range(11)]
    assert folder.train.class_counts.tolist() == [11, 11, 11]
    assert folder.test is not None
    assert len(folder.test) == 9
    row = folder.train.ids.tolist().index("set/train/10/7.png")
    exact = np.asarray(Image.open(io.BytesIO(files["set/train/10/7.png"]))).transpose(2, 0, 1)
    assert np.array_equal(folder.train.images[row].numpy(), exact)
    for suffix in ("", ":gz", ":xz", ":bz2"):
        assert same(folder, load(write_tar(tmp_path / f"set.tar{suffix[1:]}", files, f"w{suffix}")))
    assert same(folder, load(write_zip(tmp_path / "set.zip", files)))


def test_split_folders_may_have_other_usual_names(tmp_path: Path) -> None:
    splits = load(write_folder(tmp_path / "s", tree(prefix="Training/") | tree(prefix="val/", count=1)))
    assert splits.test is not None
    assert len(splits.test) == 2


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert load(write_folder(tmp_path / "s", tree(("train", "bus")))).train.class_names == ("bus", "train")


def test_folders_beside_train_are_left_out_and_said_so(tmp_path: Path) -> None:
    splits = load(write_folder(tmp_path / "s", tree(prefix="train/") | tree(prefix="extra/")))
    assert splits.train.class_names == ("a", "b")
    assert splits.notes == ("left out the folders extra",)


def test_a_tar_made_of_a_folder_itself(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "s", tree())
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        archive.add(source, arcname=".")
    assert same(load(tmp_path / "s.tar"), load(source))


def test_a_linked_class_folder_is_followed_and_a_loop_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "elsewhere", tree())
    source = write_folder(tmp_path / "s", tree(("c",)))
    (source / "a").symlink_to(tmp_path / "elsewhere" / "a")
    assert load(source).train.class_names == ("a", "c")
    (source / "c" / "up").symlink_to(source)
    assert "links to a folder above it" in refused(source)


def test_natural_order() -> None:
    assert sorted(["b10", "b9", "1", "01", "a", "9" * 5000], key=natural_key) == [
        "01", "1", "9" * 5000, "a", "b9", "b10",
    ]  # fmt: skip


# One size, one number of channels


def test_mixed_sizes_go_to_the_most_common_one(tmp_path: Path) -> None:
    files = tree()
    wide = np.zeros((12, 36, 3), np.uint8)
    wide[:, 12:24] = 200  # the middle third, which is what a centred crop of a square keeps
    files["a/99.png"] = png(wide)
    splits = load(write_folder(tmp_path / "s", files))
    assert splits.train.image_shape == (3, 6, 6)
    assert splits.notes == ("resized 1 of 21 images to 6x6",)
    cropped = splits.train.images[splits.train.ids.tolist().index("a/99.png")]
    assert bool((cropped == 200).all())


def test_shrinking_is_antialiased(tmp_path: Path) -> None:
    board = np.indices((32, 32)).sum(0) % 2 * 254  # at half the size a chessboard is flat grey
    files = {f"{c}/{i}.png": png(board.astype(np.uint8)) for c in "ab" for i in range(10)}
    for splits in (
        load(write_folder(tmp_path / "s", files), size=16),
        load(save(tmp_path, x=np.repeat(board[None].astype(np.uint8), 20, 0), y=np.arange(20) % 2), size=16),
    ):
        assert splits.train.image_shape == (1, 16, 16)
        inner = splits.train.images[:, :, 2:-2, 2:-2].float()
        assert (inner - 127).abs().max() <= 3


def test_modes_alpha_and_orientation(tmp_path: Path) -> None:
    files = tree(count=10)
    grey16 = np.full((6, 6), 0x80FF, np.uint16)
    see_through = np.zeros((6, 6, 4), np.uint8)
    see_through[..., 3] = 0
    turned = np.zeros((6, 6, 3), np.uint8)
    turned[0] = 255  # a bright top row; EXIF 6 asks for a quarter turn clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    files |= {
        "b/grey16.png": png(grey16),
        "b/clear.png": png(see_through),
        "b/turned.png": png(turned, exif=exif),
        "b/bits.png": png(np.eye(6, dtype=bool)),
    }
    splits = load(write_folder(tmp_path / "s", files))
    by_id = dict(zip(splits.train.ids.tolist(), splits.train.images, strict=True))
    assert bool((by_id["b/grey16.png"] == 0x80).all())
    assert bool((by_id["b/clear.png"] == 255).all())
    assert bool((by_id["b/turned.png"][:, :, -1] == 255).all())
    assert int(by_id["b/turned.png"].sum()) == 3 * 6 * 255
    assert torch.equal(by_id["b/bits.png"][0], torch.eye(6, dtype=torch.uint8) * 255)
    assert splits.notes == ("turned 2 grey images into colour",)


def test_all_grey_stays_grey(tmp_path: Path) -> None:
    files = {f"{c}/{i}.png": png(pixels(5, 5)) for c in "ab" for i in range(10)}
    assert load(write_folder(tmp_path / "s", files)).train.image_shape == (1, 5, 5)


# Arrays


def save(tmp_path: Path, **arrays: object) -> Path:
    np.savez(tmp_path / "d.npz", **arrays)  # type: ignore[arg-type]
    return tmp_path / "d.npz"


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW"])
@pytest.mark.parametrize("kind", ["uint8", "float16 01", "float64 01", "float32 255", "int64"])
def test_npz_layouts_and_ranges(tmp_path: Path, layout: str, kind: str) -> None:
    x = pixels(20, 5, 4, 1 if layout == "NHW" else 3)
    x[0, 0, 0], x[1, 0, 0] = 0, 255
    expected = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    given = {"NHWC": x, "NCHW": x.transpose(0, 3, 1, 2), "NHW": x[..., 0]}[layout]
    dtype, _, scale = kind.partition(" ")
    given = (given / 255 if scale == "01" else given).astype(dtype)
    splits = load(save(tmp_path, x=given, y=(np.arange(20) % 2)[:, None]))
    assert torch.equal(splits.train.images, expected)
    assert splits.train.class_names == ("0", "1")
    assert splits.train.ids[3] == "3"


def test_keras_keys_have_a_test_set(tmp_path: Path) -> None:
    y = np.arange(20, dtype=np.uint8) % 2
    arrays = {"x_train": pixels(20, 4, 4, 3), "y_train": y, "x_test": pixels(1, 4, 4, 3), "y_test": y[:1]}
    splits = load(save(tmp_path, **arrays))
    assert splits.test is not None
    assert len(splits.test) == 1


GOOD = {"x": np.zeros((20, 4, 4), np.uint8), "y": np.arange(20) % 2}
NAN = np.zeros((20, 4, 4), np.float32)
NAN[7, 1, 1] = np.nan


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": NAN}, "image 7 of x in"),
        ({"x": NAN + np.inf}, "NaN or infinity"),
        ({"x": np.full((20, 4, 4), -0.5)}, "undo the normalisation"),
        ({"x": np.full((20, 4, 4), 300)}, "range over 300..300"),
        ({"x": np.zeros((20, 4, 4, 2), np.uint8)}, "give 1 or 3 channels"),
        ({"x": np.zeros((20, 16), np.uint8)}, "have shape (20, 16)"),
        ({"x": np.array([["a"]] * 20)}, "have shape"),
        ({"x": np.zeros((19, 4, 4), np.uint8)}, "19 images but 20 labels"),
        ({"x": np.array([object()] * 20)}, "object array"),
        ({"y": np.arange(20) % 2 - 1}, "-1..0"),
        ({"y": np.arange(20) * 10**9}, "must lie in 0.."),
        ({"y": np.arange(20) % 2 * 1.0}, "whole numbers"),
        ({"y": np.eye(20)}, "argmax"),
        ({"y": np.arange(20) % 2 * 2}, "class '1' of"),
        ({"y": np.zeros(20, int)}, "one class only"),
        ({"y": np.r_[np.zeros(11, int), np.ones(9, int)]}, "has 9 images, and 10 are needed"),
        ({"class_names": np.array(["only"])}, "classes have names"),
        ({"class_names": np.array(["a", None])}, "object array"),
        ({"ids_train": np.array(["a"])}, "1 ids"),
        ({"y": None}, "needs x and y"),
    ],
)
def test_bad_npz(tmp_path: Path, change: dict[str, object], says: str) -> None:
    arrays = {key: value for key, value in (GOOD | change).items() if value is not None}
    assert says in refused(save(tmp_path, **arrays))


# Formats of their own


def idx_bytes(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return head + array.astype(np.uint8).tobytes()


@pytest.mark.parametrize("zipped", [True, False])
def test_idx(tmp_path: Path, zipped: bool) -> None:
    x, y = pixels(24, 5, 4), np.arange(24) % 2
    files = {
        "train-images-idx3-ubyte": x[:20], "train-labels-idx1-ubyte": y[:20],
        "t10k-images-idx3-ubyte": x[20:], "t10k-labels-idx1-ubyte": y[20:],
    }  # fmt: skip
    pack = gzip.compress if zipped else bytes
    packed = {name + ".gz" * zipped: pack(idx_bytes(array)) for name, array in files.items()}
    source = write_folder(tmp_path / "s", packed)
    (source / "notes.txt").write_text("beside the set")
    splits = load(source)
    assert torch.equal(splits.train.images[:, 0], torch.from_numpy(x[:20]))
    assert splits.test is not None
    assert splits.test.labels.tolist() == [0, 1, 0, 1]
    assert same(splits, load(source / ("train-images-idx3-ubyte" + ".gz" * zipped)))
    (source / ("t10k-labels-idx1-ubyte" + ".gz" * zipped)).unlink()
    assert "has no t10k-labels-idx1-ubyte" in refused(source)
    source = write_folder(tmp_path / "s", {name: data[:-3] for name, data in packed.items()})
    assert "cannot be read" in refused(source)


def cifar_batch(x: np.ndarray, y: list[int], protocol: int = 2) -> bytes:
    rows = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
    names = [f"{i}.png" for i in range(len(x))]
    return pickle.dumps({b"data": rows, b"labels": y, b"filenames": names}, protocol=protocol)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_cifar_batches_as_folder_and_tar(tmp_path: Path, protocol: int) -> None:
    x, y = pixels(24, 32, 32, 3), [0, 1] * 12
    files = {
        "c/data_batch_1": cifar_batch(x[:10], y[:10], protocol),
        "c/data_batch_2": cifar_batch(x[10:20], y[10:20], protocol),
        "c/test_batch": cifar_batch(x[20:], y[20:], protocol),
        "c/batches.meta": pickle.dumps({b"label_names": [b"cat", b"dog"]}, protocol=protocol),
        "c/readme.html": b"<p>",
    }
    splits = load(write_folder(tmp_path / "s", files))
    assert torch.equal(splits.train.images, torch.from_numpy(x[:20].transpose(0, 3, 1, 2).copy()))
    assert splits.train.class_names == ("cat", "dog")
    assert splits.train.ids[11] == "c/data_batch_2#1"
    assert same(splits, load(write_tar(tmp_path / "c.tar.gz", files, "w:gz")))


def test_cifar100_uses_fine_labels(tmp_path: Path) -> None:
    rows = pixels(20, 3072)
    batch = pickle.dumps({"data": rows, "coarse_labels": [5] * 20, "fine_labels": [0, 1] * 10}, protocol=4)
    meta = pickle.dumps({"fine_label_names": ["apple", "bear"]}, protocol=4)
    splits = load(write_folder(tmp_path / "s", {"train": batch, "test": batch, "meta": meta}))
    assert splits.train.class_names == ("apple", "bear")
    assert splits.train.labels.tolist() == [0, 1] * 10


def test_parquet_in_hugging_faces_layout(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    x = pixels(20, 6, 6, 3)
    names = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = pa.table(
        {"image": [{"bytes": png(one), "path": None} for one in x], "label": [0, 1] * 10}
    ).replace_schema_metadata({b"huggingface": json.dumps(names).encode()})
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data/train-00000-of-00001.parquet")
    pq.write_table(table.slice(0, 3), tmp_path / "data/test-00000-of-00001.parquet")
    splits = load(tmp_path / "data")
    assert torch.equal(splits.train.images, torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    assert splits.train.class_names == ("cat", "dog")
    assert splits.test is not None
    assert splits.test.ids.tolist() == [f"test-00000-of-00001.parquet#{i}" for i in range(3)]
    assert len(load(tmp_path / "data/train-00000-of-00001.parquet").train) == 20
    pq.write_table(table.rename_columns(["image", "colour"]), tmp_path / "odd.parquet")
    assert "no label" in refused(tmp_path / "odd.parquet")


def test_svhn(tmp_path: Path) -> None:
    io_mat = pytest.importorskip("scipy.io")
    x, y = pixels(32, 32, 3, 100), (np.arange(100) % 10 + 1).astype(np.uint8)
    io_mat.savemat(tmp_path / "train_32x32.mat", {"X": x, "y": y[:, None]})
    splits = load(tmp_path)
    assert torch.equal(splits.train.images, torch.from_numpy(x.transpose(3, 2, 0, 1).copy()))
    assert splits.train.labels[:10].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]


def test_stl10_is_stored_by_columns(tmp_path: Path) -> None:
    x = pixels(20, 3, 96, 96)
    files = {
        "train_X.bin": x.transpose(0, 1, 3, 2).tobytes(), "train_y.bin": bytes([1, 2] * 10),
        "class_names.txt": b"airplane\nbird\n", "unlabeled_X.bin": b"never read",
    }  # fmt: skip
    splits = load(write_folder(tmp_path / "s", files))
    assert torch.equal(splits.train.images, torch.from_numpy(x))
    assert splits.train.class_names == ("airplane", "bird")


def ppm(array: np.ndarray) -> bytes:
    return b"P6 %d %d 255\n" % (array.shape[1], array.shape[0]) + array.tobytes()


def test_gtsrb_zips(tmp_path: Path) -> None:
    train = {
        f"GTSRB/Final_Training/Images/{c:05d}/00000_{i:05d}.ppm": ppm(pixels(8, 8, 3))
        for c in range(2)
        for i in range(10)
    }
    picture = pixels(8, 8, 3)
    truth = b"Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\r\n00000.ppm;8;8;1;1;7;7;1\r\n"
    write_zip(tmp_path / "GTSRB_Final_Training_Images.zip", train)
    write_zip(tmp_path / "GTSRB_Final_Test_Images.zip", {"GTSRB/Final_Test/Images/00000.ppm": ppm(picture)})
    assert "GTSRB_Final_Test_GT.zip" in refused(tmp_path)
    write_zip(tmp_path / "GTSRB_Final_Test_GT.zip", {"GT-final_test.csv": truth})
    splits = load(tmp_path)
    assert splits.train.class_names == ("00", "01")
    assert splits.test is not None
    assert splits.test.labels.tolist() == [1]
    assert np.array_equal(splits.test.images[0].numpy(), picture.transpose(2, 0, 1))


def test_celeba_in_eight_classes(tmp_path: Path) -> None:
    columns = ["Bald", "Heavy_Makeup", "Mouth_Slightly_Open", "Smiling"]
    rows, parts, files = [], [], {}
    for i in range(88):
        bits = f"{i % 8:03b}"
        name = f"{i:06d}.jpg"
        rows.append(f"{name} -1 " + " ".join("1" if bit == "1" else "-1" for bit in bits))
        parts.append(f"{name} {0 if i < 80 else 2}")
        files[f"img_align_celeba/{name}"] = png(pixels(8, 6, 3))
    text = "\n".join([str(len(rows)), " ".join(columns), *rows])
    files |= {"list_attr_celeba.txt": text.encode(), "list_eval_partition.txt": "\n".join(parts).encode()}
    splits = load(write_folder(tmp_path / "s", files))
    assert splits.train.labels.tolist() == [*range(8)] * 10
    assert splits.train.class_names[0b101] == "heavy makeup, smiling"
    assert splits.test is not None
    assert len(splits.test) == 8


# Mistakes


def test_a_missing_source_suggests_a_known_name(tmp_path: Path) -> None:
    assert "did you mean cifar10" in refused("cifa10")
    assert "does not exist" in refused(tmp_path / "nothing")


def test_mistaken_folders(tmp_path: Path) -> None:
    files = tree()
    source = write_folder(tmp_path / "s", files)
    (source / "empty").mkdir()
    assert "class 'empty' of" in refused(source)
    (source / "empty").rmdir()
    (source / "loose.png").write_bytes(files["a/0.png"])
    assert "loose.png" in refused(source)
    (source / "loose.png").unlink()
    (source / "a" / "0.png").unlink()
    assert "class 'a' of" in refused(source)
    assert "9 images" in refused(source)
    assert len(load(source, minimum_per_class=0).train) == 19
    assert "one class only" in refused(write_folder(tmp_path / "one", tree(("a",))))
    both = write_folder(tmp_path / "both", tree(prefix="train/") | tree(("a", "x"), prefix="test/"))
    assert "class 'b'" in refused(both)
    assert "holds no images" in refused(write_folder(tmp_path / "texts", {"a/x.txt": b"-"}))
    (tmp_path / "notes.doc").write_text("hello")
    assert "no type known here" in refused(tmp_path / "notes.doc")
    assert "size 0" in refused(source, size=0)


def test_a_truncated_image_is_named_or_skipped(tmp_path: Path) -> None:
    files = tree(count=11)
    files["b/3.png"] = files["b/3.png"][:60]
    files["b/4.png"] = b"\x89PNG no more"
    source = write_folder(tmp_path / "s", files | {"b/more.png": png(pixels(6, 6, 3))})
    assert "b/4.png is no image" in refused(source)
    splits = load(source, on_corrupt="skip")
    assert splits.train.class_counts.tolist() == [11, 10]
    assert "b/3.png" not in splits.train.ids
    assert splits.notes == ("skipped 2 unreadable images: b/4.png, b/3.png",)
    (source / "b/4.png").unlink()
    assert "b/3.png cannot be decoded (image file is truncated" in refused(source)


def test_image_bombs(tmp_path: Path) -> None:
    files = tree()
    files["a/0.png"] = png(np.zeros((300, 300), np.uint8))
    source = write_folder(tmp_path / "s", files)
    assert "a/0.png claims 300x300" in refused(source, limits=Limits(image_pixels=80_000))
    assert "need" in refused(source, limits=Limits(decoded_bytes=1000))
    files["a/0.png"] = b"P6 40000 40000 255\n"
    assert "a/0.png" in refused(write_folder(source, files))
