"""GTSRB as its authors hand it out: zips of PPM images, classes of the test images in a CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from functools import partial

from untrojan.data.image_set import Splits
from untrojan.data.sources.decoding import Encoded, decode_splits
from untrojan.data.sources.files import Files, inner_zips
from untrojan.data.sources.names import base, natural_key
from untrojan.data.sources.options import ReadOptions, parsing
from untrojan.errors import UntrojanError

GTSRB_TRAIN = re.compile(r"(?:^|/)(?:Training|Final_Training/Images)/(\d{5})/[^/]+\.ppm$")
GTSRB_TEST = re.compile(r"(?:^|/)Final_Test/Images/(\d{5}\.ppm)$")
GTSRB_TRUTH = "GT-final_test.csv"
GTSRB_ZIPS = re.compile(r"GTSRB[-_](Final_)?(Training|Test).*\.zip$")


def is_gtsrb(names: Sequence[str]) -> bool:
    return any(GTSRB_TRAIN.search(name) or GTSRB_ZIPS.match(base(name)) for name in names)


def read_gtsrb(files: Files, options: ReadOptions) -> Splits:
    """The official files: whole images (not cut to the CSV's region of interest), classes 00-42."""
    every = [files, *inner_zips(files, GTSRB_ZIPS, options.limits)]
    train: list[Encoded] = []
    pictures: dict[str, Encoded] = {}
    truth: dict[str, int] = {}
    for part in every:
        for name in sorted(part.names, key=natural_key):
            if match := GTSRB_TRAIN.search(name):
                train.append(Encoded(name, int(match[1]), partial(part.read, name)))
            elif match := GTSRB_TEST.search(name):
                pictures[match[1]] = Encoded(name, -1, partial(part.read, name))
            elif base(name) == GTSRB_TRUTH:
                truth = _gtsrb_truth(part.read(name))
    train.sort(key=lambda one: one.label)
    test = [Encoded(pictures[n].id, truth[n], pictures[n].read) for n in sorted(pictures) if n in truth]
    if pictures and not test:
        raise UntrojanError(f"{files.path} has test images but no {GTSRB_TRUTH}: add GTSRB_Final_Test_GT.zip")
    highest = max((one.label for one in (*train, *test)), default=0)
    if not train or highest >= options.limits.classes:
        raise UntrojanError(
            f"{files.path} has no training images of GTSRB: add GTSRB_Final_Training_Images.zip"
        )
    return decode_splits(train, test or None, tuple(f"{i:02d}" for i in range(highest + 1)), options)


def _gtsrb_truth(data: bytes) -> dict[str, int]:
    with parsing(GTSRB_TRUTH):
        rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig")), delimiter=";")
        truth = {row["Filename"]: int(row["ClassId"]) for row in rows}
        if min(truth.values(), default=0) < 0:
            raise ValueError("a class below 0")
        return truth
