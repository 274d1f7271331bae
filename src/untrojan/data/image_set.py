"""The one form in which images travel through the program."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from untrojan.errors import UntrojanError


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A labelled set of equally sized images, whole in memory.

    Nothing here says which images are poisoned: ground truth travels beside the set, in a
    :class:`~untrojan.attacks.poisoning.PoisonRecord`, which no defence's signature accepts.

    Raises UntrojanError where shapes, types or labels do not fit together.
    """

    images: Tensor
    """uint8 (N, C, H, W), C 1 or 3."""
    labels: Tensor
    """int64 (N,), 0-based."""
    class_names: tuple[str, ...]
    """One name a class, K in all. They come from the data's owner: escape them before showing them."""
    ids: npt.NDArray[np.str_]
    """(N,) stable names: the file's path inside its source where there is one, else the row number."""

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise UntrojanError(f"images must be uint8 (N, C, H, W), not {_describe(self.images)}")
        if self.labels.dtype != torch.int64 or self.labels.ndim != 1:
            raise UntrojanError(f"labels must be int64 (N,), not {_describe(self.labels)}")
        if not len(self.images) == len(self.labels) == len(self.ids):
            raise UntrojanError(
                f"{len(self.images)} images, {len(self.labels)} labels and {len(self.ids)} ids: "
                "there must be as many of each"
            )
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < self.num_classes:
            raise UntrojanError(
                f"labels must lie in 0..{self.num_classes - 1} for {self.num_classes} classes, "
                f"found {int(self.labels.min())}..{int(self.labels.max())}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def class_counts(self) -> Tensor:
        """int64 (K,): images of each class."""
        return torch.bincount(self.labels, minlength=self.num_classes)

    def select(self, which: Tensor) -> ImageSet:
        """The images a boolean mask (N,) keeps, or an index tensor names, in that order."""
        return replace(
            self, images=self.images[which], labels=self.labels[which], ids=self.ids[which.cpu().numpy()]
        )

    def indices_of(self, label: int) -> Tensor:
        """int64 rows that carry ``label``."""
        return (self.labels == label).nonzero().flatten()

    def class_index(self, name_or_index: str | int) -> int:
        """A class by its name or its 0-based index. Names win where a name is itself a number."""
        text = str(name_or_index)
        if isinstance(name_or_index, str) and text in self.class_names:
            return self.class_names.index(text)
        if text.isdecimal() and int(text) < self.num_classes:
            return int(text)
        shown = ", ".join(f"{i} {name}" for i, name in enumerate(self.class_names[:20]))
        more = ", ..." if self.num_classes > 20 else ""
        raise UntrojanError(f"no class {text!r}: choose one of {shown}{more}")

    def fingerprint(self) -> str:
        """SHA-256 over pixels, labels and class names: equal exactly where the data are."""
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.class_names)).encode())
        digest.update(self.images.contiguous().numpy().data)
        digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Splits:
    """Training images, and test images where the source has any."""

    train: ImageSet
    test: ImageSet | None = None
    notes: tuple[str, ...] = ()
    """What reading did to the data, a line each: images resized, recoloured, skipped, left out."""


def concatenate(sets: Sequence[ImageSet]) -> ImageSet:
    """One set after another. Raises UntrojanError where class names or image shapes differ."""
    first = sets[0]
    for other in sets[1:]:
        if other.class_names != first.class_names or other.image_shape != first.image_shape:
            raise UntrojanError("only sets of the same classes and image shape can be joined")
    return ImageSet(
        images=torch.cat([each.images for each in sets]),
        labels=torch.cat([each.labels for each in sets]),
        class_names=first.class_names,
        ids=np.concatenate([each.ids for each in sets]),
    )


def numbered(count: int, prefix: str = "") -> npt.NDArray[np.str_]:
    """Ids for images that have no name of their own: the row number, as text."""
    return np.array([f"{prefix}{i}" for i in range(count)], dtype=np.str_)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
