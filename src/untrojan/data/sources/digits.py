"""scikit-learn's 1,797 handwritten digits, 8x8."""

from __future__ import annotations

import numpy as np

from untrojan.data.image_set import Splits
from untrojan.data.sources.arrays import image_set
from untrojan.data.sources.options import ReadOptions

CLASSES = tuple(map(str, range(10)))


def read_digits(options: ReadOptions) -> Splits:
    """Every fifth image is the test set. Grey levels 0..16 are stretched to 0..255."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    rows = np.arange(len(images))
    ids = rows.astype(np.str_)
    test = rows % 5 == 0
    sets = [
        image_set(images[part], labels[part].astype(np.int64), CLASSES, options, name="digits", ids=ids[part])
        for part in (~test, test)
    ]
    return Splits(sets[0], sets[1])
