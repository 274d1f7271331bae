"""Data sets known by name: where they are found, where they come from, and under what terms.

A set is looked for in the cache folder first, as ``NAME.tar.xz``, ``.tar.gz``, ``.zip``, ``.npz`` and so on
or a folder ``NAME``, so that a copy put there is used. Only then is it downloaded, and only where the
file's published checksum is known.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from untrojan.data.cache import cache_folder
from untrojan.data.image_set import ImageSet, Splits
from untrojan.data.sources.options import one_line
from untrojan.errors import UntrojanError
from untrojan.progress import Task, task

SUFFIXES = (".tar.xz", ".tar.gz", ".tgz", ".tar.bz2", ".tar", ".zip", ".npz", ".parquet", "")
SYSTEM_PLACES = {"fashion-mnist": Path("/usr/share/datasets/fashion-mnist")}
DIGITS = tuple(map(str, range(10)))


@dataclass(frozen=True)
class Download:
    """One file: its address and its published checksum (``sha256:`` or ``md5:`` and hexadecimal digits)."""

    url: str
    checksum: str

    @property
    def file_name(self) -> str:
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class KnownSet:
    """What is known of a data set. Counts are those of the original."""

    name: str
    title: str
    classes: int
    image_size: int
    channels: int
    train_images: int
    test_images: int
    terms: str
    citation: str
    downloads: tuple[Download, ...] = ()
    class_names: tuple[str, ...] = ()
    """Used where the files themselves only number their classes, or name them by ``file_names``."""
    file_names: tuple[str, ...] = ()
    by_hand: str = ""
    """How to put the set in place where it can't be downloaded from here."""


def _idx(address: str, *sums: str) -> tuple[Download, ...]:
    files = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return tuple(
        Download(f"{address}{file}-ubyte.gz", f"sha256:{checksum}")
        for file, checksum in zip(files, sums, strict=True)
    )


_GTSRB = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/"

_SETS = (
    KnownSet(
        "signs", "Procedural signs on varied backgrounds", 10, 32, 3, 4000, 1000,
        terms="made on the spot by this program; Apache-2.0",
        citation="after TrojAI's synthetic traffic signs (NIST, 2020)",
    ),
    KnownSet(
        "digits", "Handwritten digits, 8x8", 10, 8, 1, 1437, 360,
        terms="comes with scikit-learn; CC BY 4.0 (UCI)",
        citation="Alpaydin & Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998",
        class_names=DIGITS,
    ),
    KnownSet(
        "fashion-mnist", "Fashion-MNIST", 10, 28, 1, 60_000, 10_000,
        terms="MIT",
        citation="Xiao, Rasul & Vollgraf, Fashion-MNIST, 2017, arXiv:1708.07747",
        downloads=_idx(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
        class_names=(
            "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
            "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
        ),
    ),
    KnownSet(
        "mnist", "MNIST", 10, 28, 1, 60_000, 10_000,
        terms="CC BY-SA 3.0",
        citation="LeCun, Bottou, Bengio & Haffner, Gradient-based Learning, 1998",
        downloads=_idx(
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
        class_names=DIGITS,
    ),
    KnownSet(
        "cifar10", "CIFAR-10", 10, 32, 3, 50_000, 10_000,
        terms="none stated; research use customary",
        citation="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        downloads=(
            Download(
                "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                "sha256:6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
            ),
        ),
    ),
    KnownSet(
        "cifar100", "CIFAR-100 (fine labels)", 100, 32, 3, 50_000, 10_000,
        terms="none stated; research use customary",
        citation="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        downloads=(
            Download(
                "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
                "sha256:85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
            ),
        ),
    ),
    KnownSet(
        "svhn", "Street View House Numbers, cropped digits", 10, 32, 3, 73_257, 26_032,
        terms="non-commercial use only",
        citation="Netzer et al., Reading Digits in Natural Images with Unsupervised Feature Learning, 2011",
        downloads=(
            Download(
                "http://ufldl.stanford.edu/housenumbers/train_32x32.mat",
                "sha256:435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
            ),
            Download(
                "http://ufldl.stanford.edu/housenumbers/test_32x32.mat",
                "sha256:cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
            ),
        ),
        class_names=DIGITS,
    ),
    KnownSet(
        "gtsrb", "German Traffic Sign Recognition Benchmark", 43, 32, 3, 39_209, 12_630,
        terms="none stated; research use customary",
        citation="Stallkamp, Schlipsing, Salmen & Igel, Man vs. computer, Neural Networks, 2012",
        # Not "GTSRB-Training_fixed.zip", which holds only the competition's 26,640 training images.
        downloads=(
            Download(f"{_GTSRB}GTSRB_Final_Training_Images.zip", "md5:f33fd80ac59bff73c82d25ab499e03a3"),
            Download(f"{_GTSRB}GTSRB_Final_Test_Images.zip", "md5:c7e4e6327067d32654124b0fe9e82185"),
            Download(f"{_GTSRB}GTSRB_Final_Test_GT.zip", "md5:fe31e9c9270bbcd7b84b7f21a9d9d9e5"),
        ),
    ),
    KnownSet(
        "stl10", "STL-10", 10, 96, 3, 5_000, 8_000,
        terms="none stated; images from ImageNet",
        citation="Coates, Lee & Ng, Single-Layer Networks in Unsupervised Feature Learning, 2011",
        downloads=(
            Download(
                "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
                "sha256:f31fd99273a1acb8609c8db427cebb1de3f71de77758cdc0e22956e1289b9866",
            ),
        ),
    ),
    KnownSet(
        "celeba8", "CelebA in 8 classes: heavy makeup, mouth open, smiling", 8, 64, 3, 162_770, 19_962,
        terms="non-commercial research only; to be got from its authors",
        citation="Liu, Luo, Wang & Tang, Deep Learning Face Attributes in the Wild, 2015",
        by_hand="img_align_celeba.zip, list_attr_celeba.txt and list_eval_partition.txt of CelebA",
    ),
    KnownSet(
        "imagenette", "Imagenette, shorter side 160 pixels", 10, 160, 3, 9_469, 3_925,
        terms="Apache-2.0; images from ImageNet",
        citation="Howard, Imagenette, fast.ai, 2019",
        downloads=(
            Download(
                "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz",
                "md5:e793b78cc4c9e9a4ccc0c1155377a412",
            ),
        ),
        class_names=(
            "tench", "English springer", "cassette player", "chain saw", "church",
            "French horn", "garbage truck", "gas pump", "golf ball", "parachute",
        ),
        file_names=(
            "n01440764", "n02102040", "n02979186", "n03000684", "n03028079",
            "n03394916", "n03417042", "n03425413", "n03445777", "n03888257",
        ),
    ),
)  # fmt: skip
_BY_NAME = {each.name: each for each in _SETS}


def known_names() -> tuple[str, ...]:
    """The names that :func:`untrojan.data.load.load` takes."""
    return tuple(_BY_NAME)


def info(name: str) -> KnownSet:
    """Facts about a known set. Raises UntrojanError for other names."""
    if name not in _BY_NAME:
        raise UntrojanError(f"no data set is known as {name!r}: choose one of {', '.join(_BY_NAME)}")
    return _BY_NAME[name]


def is_built_in(name: str) -> bool:
    """True where the set needs no file: it is made on the spot or comes with scikit-learn."""
    return name in ("signs", "digits")


def locate(name: str) -> Path | None:
    """The set's file or folder on this machine, the user's own copy first; None where there is none."""
    facts = info(name)
    for suffix in SUFFIXES:
        place = cache_folder() / f"{name}{suffix}"
        if suffix and place.is_file():
            return place
        if not suffix and place.is_dir():
            if len(facts.downloads) == 1 and (place / facts.downloads[0].file_name).is_file():
                return place / facts.downloads[0].file_name
            missing = [each for each in facts.downloads if not (place / each.file_name).is_file()]
            half_way = facts.downloads and 0 < len(missing) < len(facts.downloads)
            if not half_way and any(place.iterdir()):
                return place
    system = SYSTEM_PLACES.get(name)
    return system if system is not None and system.is_dir() else None


def fetch(name: str) -> Path:
    """Put a set in place: found, else downloaded into the cache folder and checked.

    Raises UntrojanError where the set needs no file, and where it can't be downloaded, saying which files
    to put where.
    """
    facts = info(name)
    if is_built_in(name):
        raise UntrojanError(f"{name} needs no download: it is made on the spot")
    if (found := locate(name)) is not None:
        return found
    folder = cache_folder() / name
    if not facts.downloads:
        raise UntrojanError(f"{name} can't be downloaded from here: put {facts.by_hand} into {folder}")
    for each in facts.downloads:
        _download(each, folder, name)
    return folder / facts.downloads[0].file_name if len(facts.downloads) == 1 else folder


def _download(file: Download, folder: Path, name: str) -> None:
    import pooch

    with task(f"downloading {file.file_name}", total=None, unit="bytes") as bar:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            pooch.get_logger().setLevel("ERROR")
            pooch.retrieve(
                file.url,
                known_hash=file.checksum,
                fname=file.file_name,
                path=folder,
                downloader=pooch.HTTPDownloader(progressbar=_Bar(bar), timeout=60),
            )
        except (OSError, ValueError) as error:  # requests' are OSErrors, a wrong checksum a ValueError
            raise UntrojanError(
                f"{name} could not be downloaded ({one_line(error)}): put {file.url} into {folder}, or an "
                f"archive of class folders at {folder}.tar.xz"
            ) from error


class _Bar:
    """What pooch asks of a progress bar."""

    total = 0

    def __init__(self, bar: Task) -> None:
        self._bar = bar

    def update(self, amount: int) -> None:
        self._bar.advance(amount)

    def reset(self) -> None:
        pass

    def close(self) -> None:
        pass


def with_known_names(facts: KnownSet, splits: Splits) -> Splits:
    """The registry's class names where the files only number the classes."""
    if not facts.class_names or splits.train.class_names not in (
        facts.file_names,
        tuple(map(str, range(len(facts.class_names)))),
    ):
        return splits

    def named(data: ImageSet) -> ImageSet:
        return replace(data, class_names=facts.class_names)

    return replace(splits, train=named(splits.train), test=splits.test and named(splits.test))
