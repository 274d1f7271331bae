"""What a federated training needs to go on after it was cut off: one file, replaced after every round."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from untrojan.errors import UntrojanError
from untrojan.runs import json_text, write_bytes_atomically

WEIGHT, DROPPED = "weight/", "dropped/"


def save_state(
    path: Path,
    identity: str,
    weights: Mapping[str, Tensor],
    dropped: Mapping[str, Tensor],
    record: Mapping[str, Any],
) -> None:
    """The whole of it or, where the disk is full, what was there: weights, each client's dropped rows, and
    ``record`` of JSON types. Raises UntrojanError on a full disk."""
    from safetensors.torch import save

    tensors = {WEIGHT + name: tensor for name, tensor in weights.items()}
    tensors |= {DROPPED + name: rows for name, rows in dropped.items()}
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    write_bytes_atomically(path, save(plain, {"identity": identity, "record": json_text(record)}))


def load_state(path: Path, identity: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Weights, dropped rows and record. Raises UntrojanError where the file is another training's."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UntrojanError(f"{path} is damaged ({error}): remove it to start afresh") from None
    if facts.get("identity") != identity:
        raise UntrojanError(f"{path} is the state of another training: remove it, or choose another folder")
    return _under(WEIGHT, tensors), _under(DROPPED, tensors), json.loads(facts["record"])


def rounds_done(path: Path) -> int:
    """How many rounds the file stands for; 0 where there is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return len(json.loads((file.metadata() or {})["record"])["history"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return 0


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): each for key, each in tensors.items() if key.startswith(prefix)}
