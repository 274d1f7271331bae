"""The truth about a poisoned set. It travels beside the set: evaluation takes it, defences can't."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from untrojan.errors import UntrojanError
from untrojan.triggers.base import ImageShape, Trigger, json_safe
from untrojan.triggers.registry import draw_trigger


@dataclass(frozen=True, eq=False)
class PoisonRecord:
    """What one attack did to a training set of N images, row by row as the set is delivered."""

    poisoned: Tensor
    """bool (N,)."""
    original_labels: Tensor
    """int64 (N,): labels before the attack."""
    original_ids: npt.NDArray[np.str_]
    """(N,): ids before the attack."""
    permutation: Tensor
    """int64 (N,): the row of the original set from which each row was made."""
    target: int | None
    """None for all-to-all attacks."""
    sources: tuple[int, ...]
    """Classes of which images were poisoned; the target alone for clean-label attacks."""
    trigger_name: str
    trigger_options: dict[str, Any]
    trigger_seed: int
    trigger: Trigger
    image_shape: ImageShape
    clean_label: bool = False
    keep_originals: bool = False
    cover: Tensor | None = None
    """bool (N,): images that the attack added under their true labels; they show no trigger and are not
    ``poisoned``. None where there are none."""

    @property
    def all_to_all(self) -> bool:
        return self.target is None

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The drawn trigger, for a ``.safetensors`` file."""
        return self.trigger.tensors

    def to_json(self) -> dict[str, Any]:
        """Everything but the trigger's tensors, as JSON types."""
        return {
            "trigger": {
                "name": self.trigger_name,
                "options": {key: _plain(value) for key, value in json_safe(self.trigger_options).items()},
                "seed": self.trigger_seed,
                "image_shape": list(self.image_shape),
            },
            "target": self.target,
            "sources": list(self.sources),
            "clean_label": self.clean_label,
            "keep_originals": self.keep_originals,
            "images": len(self.poisoned),
            "poisoned": self.poisoned.nonzero().flatten().tolist(),
            "permutation": self.permutation.tolist(),
            "original_labels": self.original_labels.tolist(),
            "original_ids": self.original_ids.tolist(),
            **({} if self.cover is None else {"cover": self.cover.nonzero().flatten().tolist()}),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any], drawn: Trigger | None = None) -> PoisonRecord:
        """The record that ``to_json`` described; its trigger is drawn again unless given.

        Raises UntrojanError where the description is not one.
        """
        try:
            count, rows = int(record["images"]), torch.tensor(record["poisoned"], dtype=torch.int64)
            columns = [record[key] for key in ("permutation", "original_labels", "original_ids")]
            if any(len(column) != count for column in columns) or not _rows_of(rows, count):
                raise ValueError("rows do not fit the number of images")
            told = record["trigger"]
            channels, height, width = map(int, told["image_shape"])
            name, options, seed = str(told["name"]), dict(told["options"]), int(told["seed"])
            target = record["target"]
            added = None if record.get("cover") is None else torch.tensor(record["cover"], dtype=torch.int64)
            if added is not None and not _rows_of(added, count):
                raise ValueError("rows do not fit the number of images")
            made: dict[str, Any] = {
                "poisoned": _mask(rows, count),
                "permutation": torch.tensor(columns[0], dtype=torch.int64),
                "original_labels": torch.tensor(columns[1], dtype=torch.int64),
                "original_ids": np.array(columns[2], dtype=np.str_),
                "target": None if target is None else int(target),
                "sources": tuple(int(label) for label in record["sources"]),
                "clean_label": bool(record["clean_label"]),
                "keep_originals": bool(record["keep_originals"]),
                "cover": None if added is None else _mask(added, count),
            }
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise UntrojanError(f"this is not the truth of a poisoned set: {error!r}") from None
        shape = (channels, height, width)
        return cls(
            trigger=drawn or draw_trigger(name, options, shape, seed),
            trigger_name=name,
            trigger_options=options,
            trigger_seed=seed,
            image_shape=shape,
            **made,
        )


def _rows_of(rows: Tensor, count: int) -> bool:
    return not len(rows) or 0 <= int(rows.min()) <= int(rows.max()) < count


def _mask(rows: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.bool).index_fill_(0, rows, True)


def _plain(value: Any) -> Any:
    """Numbers, text, None and lists stay; a path becomes text."""
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
