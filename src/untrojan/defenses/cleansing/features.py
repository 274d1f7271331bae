"""What a classifier makes of a training set: the ground that all feature-based cleansers stand on.

One pass over the set serves every cleanser and every level. Features too large for memory lie in a
temporary file that is mapped into it.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier, evaluating, to_float
from untrojan.models.taps import tapped
from untrojan.progress import task

IN_MEMORY = 2 * 2**30
"""Bytes of one level's features; more than that goes to a file."""
FUSED = "+"


class Features:
    """Predictions of ``model`` on ``data``, and its features at any level.

    Levels are those of :mod:`untrojan.models.taps`; ``s1+s2+s3`` fuses several: their features side by
    side, each level scaled to a mean squared norm of 1, so that none outweighs another by its size alone.
    """

    def __init__(
        self, model: Classifier, data: ImageSet, trusted: ImageSet | None = None, batch_size: int = 512
    ) -> None:
        """``trusted`` are images of the same classes that the auditor knows to be clean and rightly labelled.

        Raises UntrojanError where model, data and trusted images differ in classes or shape.
        """
        if model.num_classes != data.num_classes:
            raise UntrojanError(
                f"the model has {model.num_classes} outputs and the data have {data.num_classes} classes"
            )
        if trusted is not None and not len(trusted):
            raise UntrojanError("there are no trusted images in the set given for them")
        if trusted is not None and trusted.class_names != data.class_names:
            raise UntrojanError(
                "the trusted images must have the classes of the data, in the same order: "
                f"{_named(trusted)} against {_named(data)}"
            )
        if trusted is not None and trusted.image_shape != data.image_shape:
            raise UntrojanError(
                f"the trusted images are {_shape(trusted)} and the data {_shape(data)}: they must be alike"
            )
        self.model, self.data, self.batch_size = model, data, batch_size
        self.trusted = None if trusted is None else Features(model, trusted, batch_size=batch_size)
        self._levels: dict[str, Tensor] = {}
        self._predictions: Tensor | None = None
        self._folder: Path | None = None

    def extract(self, levels: Iterable[str]) -> None:
        """Find all these levels, fused ones included, in one pass; of the trusted images too.

        Raises UntrojanError for a level the network does not have.
        """
        wanted = dict.fromkeys(part for level in levels for part in level.split(FUSED))
        if self.trusted is not None:
            self.trusted.extract(wanted)
        missing = [level for level in wanted if level not in self._levels]
        if missing or self._predictions is None:
            self._pass(missing)

    def at(self, level: str = "penultimate", rows: Tensor | None = None) -> Tensor:
        """float32 (N, D), or (len(rows), D): features flattened, as they are, neither pooled nor scaled."""
        self.extract([level])
        parts = [self._levels[part] for part in level.split(FUSED)]
        chosen = [part if rows is None else part[rows] for part in parts]
        if len(parts) == 1:
            return chosen[0]
        scales = [part[:: max(1, len(part) // 2000)].square().sum(1).mean().sqrt() for part in parts]
        return torch.cat([c / s.clamp_min(1e-12) for c, s in zip(chosen, scales, strict=True)], 1)

    @property
    def predictions(self) -> Tensor:
        """int64 (N,)."""
        self.extract([])
        assert self._predictions is not None
        return self._predictions

    @torch.no_grad()
    def _pass(self, levels: list[str]) -> None:
        found: dict[str, Tensor] = {}
        predictions = torch.empty(len(self.data), dtype=torch.int64)
        with (
            evaluating(self.model),
            tapped(self.model, levels) as taps,
            task("extracting features", len(self.data), "images") as bar,
        ):
            for rows in torch.arange(len(self.data)).split(self.batch_size):
                logits = self.model(to_float(self.data.images[rows], self.model.device))
                predictions[rows] = logits.argmax(1).cpu()
                for level in levels:
                    batch = taps[level].flatten(1).cpu()
                    if level not in found:
                        found[level] = self._room(level, batch.shape[1])
                    found[level][rows] = batch
                bar.advance(len(rows))
        self._levels |= found
        self._predictions = predictions

    def _room(self, level: str, width: int) -> Tensor:
        size = len(self.data) * width
        if 4 * size <= IN_MEMORY:
            return torch.empty(len(self.data), width)
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="untrojan-features-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        path = self._folder / f"{len(self._levels)}-{level.replace('/', '_')}.bin"
        return torch.from_file(str(path), shared=True, size=size).view(len(self.data), width)


def _named(images: ImageSet) -> str:
    return ", ".join(images.class_names[:5]) + (", ..." if images.num_classes > 5 else "")


def _shape(images: ImageSet) -> str:
    return "x".join(map(str, images.image_shape))
