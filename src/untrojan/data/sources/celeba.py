"""CelebA in eight classes, from the user's own copy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from untrojan.data.image_set import Splits
from untrojan.data.sources.decoding import Encoded, decode_splits
from untrojan.data.sources.files import Files, inner_zips
from untrojan.data.sources.names import base
from untrojan.data.sources.options import ReadOptions, parsing
from untrojan.errors import UntrojanError

BITS = ("Heavy_Makeup", "Mouth_Slightly_Open", "Smiling")
CLASSES = (
    "none of the three",
    "smiling",
    "mouth open",
    "mouth open, smiling",
    "heavy makeup",
    "heavy makeup, smiling",
    "heavy makeup, mouth open",
    "heavy makeup, mouth open, smiling",
)


def is_celeba(names: Sequence[str]) -> bool:
    return any(base(name) == "list_attr_celeba.txt" for name in names)


def read_celeba(files: Files, options: ReadOptions) -> Splits:
    """CelebA in 8 classes, 4 heavy makeup + 2 mouth slightly open + smiling (the split of WaNet's authors).

    Needs ``list_attr_celeba.txt``, ``list_eval_partition.txt`` and ``img_align_celeba`` (folder or zip).
    Partition 0 trains, 2 tests; 1, the validation set, is left out.
    """
    found = {base(name): name for name in files.names}
    if "list_eval_partition.txt" not in found:
        raise UntrojanError(
            f"{files.path} has no list_eval_partition.txt: put it beside list_attr_celeba.txt"
        )
    pictures: dict[str, Encoded] = {}
    for part in (files, *inner_zips(files, re.compile(r"img_align_celeba\.zip$"), options.limits)):
        pictures |= {base(n): Encoded(n, 0, partial(part.read, n)) for n in part.names if n.endswith(".jpg")}
    with parsing("list_attr_celeba.txt"):
        lines = files.read(found["list_attr_celeba.txt"]).decode().splitlines()
        columns = [lines[1].split().index(bit) + 1 for bit in BITS]
        rows = [line.split() for line in lines[2:] if line.strip()]
        labels = {row[0]: sum((row[c] == "1") << (2 - i) for i, c in enumerate(columns)) for row in rows}
    sets: dict[str, list[Encoded]] = {"0": [], "1": [], "2": []}
    with parsing("list_eval_partition.txt"):
        for line in files.read(found["list_eval_partition.txt"]).decode().splitlines():
            name, partition = line.split()
            if name in pictures:
                sets[partition].append(Encoded(pictures[name].id, labels[name], pictures[name].read))
    if not sets["0"]:
        raise UntrojanError(f"{files.path} has none of CelebA's training images: add img_align_celeba.zip")
    splits = decode_splits(sets["0"], sets["2"] or None, CLASSES, options)
    return Splits(splits.train, splits.test, (*splits.notes, f"left out {len(sets['1'])} validation images"))
