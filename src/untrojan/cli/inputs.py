"""What commands are given, checked before anything runs."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from untrojan.errors import UntrojanError

if TYPE_CHECKING:
    from torch import Tensor

    from untrojan.data.image_set import ImageSet
    from untrojan.models.classifier import Classifier

WRITABLE = (".npz", ".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz")


def key_values(pairs: Sequence[str] | None, option: str) -> dict[str, Any]:
    """``["alpha=0.2", "place=[1, 2]"]`` as a dictionary: JSON where it parses, else the text itself."""
    found: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise UntrojanError(f"{option} {pair!r} is not NAME=VALUE")
        try:
            setting = json.loads(value, parse_constant=_finite, parse_float=_finite, parse_int=_integer)
        except OverflowError:
            raise UntrojanError(f"{option} {pair!r}: give a number, finite and of at most 64 bits") from None
        except (ValueError, RecursionError):
            setting = value
        found[key.replace("-", "_")] = setting
    return found


def _finite(text: str) -> float:
    """A number as JSON writes it. NaN and infinity, which Python's reader takes too, are in no range."""
    value = float(text)
    if not math.isfinite(value):
        raise OverflowError(text)
    return value


def _integer(text: str) -> int:
    # The length first: Python refuses to read thousands of digits with an error of its own.
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise OverflowError(text)
    return int(text)


def classes(text: str, data: ImageSet) -> tuple[int, ...]:
    """A list with commas of class names or 0-based indices. A name that has a comma in it stands alone."""
    parts = [text] if text in data.class_names else [part.strip() for part in text.split(",") if part.strip()]
    return tuple(dict.fromkeys(data.class_index(part) for part in parts))


def new_data(path: Path, overwrite: bool, option: str) -> None:
    """Refuse a place where a data set could not be written in the end, before an hour is spent on it."""
    if path.suffix and not path.name.lower().endswith(WRITABLE):
        raise UntrojanError(f"{option} {path}: give one of {', '.join(WRITABLE)}, or a folder")
    if path.is_dir() and any(path.iterdir()):
        raise UntrojanError(f"{option} {path} is a folder with files in it: give another name")
    if path.is_file() and not (overwrite and path.suffix):
        raise UntrojanError(f"{option} {path} exists: give another name, or pass --overwrite")
    if not path.absolute().parent.is_dir():
        raise UntrojanError(f"{option} {path}: there is no folder {path.parent}, create it first")


def keep_apart(out: Path, given: Mapping[str, str | Path | None]) -> None:
    """Refuse a folder whose old results, which a run replaces, are what this run is given.

    ``given`` is by what it is: the model, the images.
    """
    folder = out.resolve()
    for what, place in given.items():
        # A place that is a file is refused for that, elsewhere.
        if place is None or not folder.is_dir() or not Path(place).exists():
            continue
        if Path(place).resolve().is_relative_to(folder):
            raise UntrojanError(f"--out {out} holds {what}, {place}, which stays: choose another folder")


def sha256(path: Path) -> str:
    """Of a checkpoint's bytes, so that a run is not resumed on another model of the same name."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UntrojanError(f"cannot read checkpoint {path}: {error.strerror}") from None


def numbers(text: str | None, option: str) -> Tensor | None:
    """``"0.49,0.48,0.45"`` as a tensor."""
    import torch

    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise UntrojanError(f"{option} {text!r} is not a list of numbers such as 0.49,0.48,0.45")
    return torch.tensor(values)


def load_model(
    path: Path, data: ImageSet, architecture: str | None, mean: str | None, std: str | None
) -> Classifier:
    """A checkpoint that fits the data: as many classes, in the same order, and the same image shape."""
    from untrojan.models.checkpoints import load_checkpoint

    means, stds = numbers(mean, "--mean"), numbers(std, "--std")
    if stds is not None and not bool((stds > 0).all()):
        raise UntrojanError(f"--std {std!r}: a standard deviation is above zero")
    channels = data.image_shape[0]
    for option, values in (("--mean", means), ("--std", stds)):
        if values is not None and len(values) != channels:
            raise UntrojanError(f"{option} has {len(values)} numbers, the images have {channels} channels")
    model, names = load_checkpoint(
        path, architecture, data.num_classes, data.image_shape, mean=means, std=stds
    )
    # A state dict from elsewhere names its classes by number: nothing to compare then.
    if names != data.class_names and not all(name.isdecimal() for name in names):
        first = next(i for i, name in enumerate(names) if name != data.class_names[i])
        raise UntrojanError(
            f"{path}: its class {first} is {names[first]!r}, the data's is {data.class_names[first]!r}: "
            "use the data the model was trained on, or rename the class folders"
        )
    return model
