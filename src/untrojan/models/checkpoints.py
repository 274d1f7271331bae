"""Checkpoints that can only ever be data.

Ours are safetensors with JSON beside the tensors. PyTorch's own files are read through
``torch.load(weights_only=True)``; one that holds anything but tensors and plain containers is refused.
Nothing in a file can choose what code runs: a ``module:factory`` architecture is honoured only where the
caller names it.
"""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier, evaluating
from untrojan.models.precision import Precision
from untrojan.models.registry import build, is_user_code

FORMAT_VERSION = 1
_KEY = "untrojan"
_CONVERT = "convert it where you trust it: torch.save(model.state_dict(), 'weights.pt')"
_LARGEST_SIDE = 8192
_WAYS_OUT = {
    "architecture": "leave it out, the file knows it",
    "num_classes": "images of exactly the classes it was trained on are needed",
    "image_shape": "bring the images to its size (--size) and channels",
}


def save_checkpoint(path: str | Path, model: Classifier, class_names: Sequence[str]) -> None:
    """Write weights and what is needed to build the model again, whole or not at all.

    Raises UntrojanError where the class names do not fit the model or the file cannot be written.
    """
    from safetensors.torch import save

    if len(class_names) != model.num_classes:
        raise UntrojanError(f"{len(class_names)} class names for a model of {model.num_classes} classes")
    description = {
        "format_version": FORMAT_VERSION,
        "architecture": model.architecture,
        "num_classes": model.num_classes,
        "image_shape": model.image_shape,
        "precision": model.precision,
        "class_names": list(class_names),
    }
    # Plain strides, and a copy each, because the format knows neither channels-last nor shared storage.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    _write_atomically(Path(path), save(tensors, {_KEY: json.dumps(description)}))


def load_checkpoint(
    path: str | Path,
    architecture: str | None = None,
    num_classes: int | None = None,
    image_shape: tuple[int, int, int] | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    precision: Precision | None = None,
) -> tuple[Classifier, tuple[str, ...]]:
    """A classifier in evaluation mode, on the CPU, and its class names.

    Ours need the path alone; what is given must then agree with the file. A PyTorch state dict carries no
    description: ``architecture``, ``num_classes`` and ``image_shape`` (C, H, W) must be given, and unless it
    is a :class:`Classifier`'s own, ``mean`` and ``std`` (C,) of the normalisation it was trained with, over
    pixels in [0, 1]. Its classes are then named by number. Key prefixes ``module.`` and containers such as
    ``{"state_dict": ...}`` are seen through.

    Raises UntrojanError for a missing, truncated or foreign file, one that holds code, one whose tensors do
    not fit the architecture or are not finite, and for a description that is not what it should be.
    """
    path = Path(path)
    tensors, description = _read(path)
    given = {"architecture": architecture, "num_classes": num_classes, "image_shape": image_shape}
    if description is not None:
        settings = _agreed(path, _validated_description(path, description), given)
    else:
        settings = {**given, "precision": "float32", "class_names": None}
        tensors = _as_classifier_state(path, tensors, mean, std)
    for name in ("architecture", "num_classes", "image_shape"):
        if settings[name] is None:
            raise UntrojanError(f"{path}: the file does not say its {name}: give it")
    model = build(
        settings["architecture"],
        num_classes=settings["num_classes"],
        image_shape=settings["image_shape"],
        mean=torch.zeros(settings["image_shape"][0]),
        std=torch.ones(settings["image_shape"][0]),
        precision=precision or settings["precision"],
    )
    _check_tensors(path, settings["architecture"], model.state_dict(), tensors)
    model.load_state_dict(tensors)
    model.eval()
    _check_outputs(path, model)
    class_names = settings["class_names"] or tuple(str(label) for label in range(model.num_classes))
    return model, class_names


def _read(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Tensors, and the description where the file is ours."""
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise UntrojanError(f"cannot read checkpoint {path}: {error.strerror}") from None
    if head[8:9] == b"{":
        return _read_safetensors(path)
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return _read_torch(path), None
    raise UntrojanError(f"{path} is neither safetensors nor a PyTorch state dict: {_CONVERT}")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, (file.metadata() or {}).get(_KEY)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UntrojanError(f"{path} is truncated or damaged: {_first_line(error)}") from None


def _read_torch(path: Path) -> dict[str, Tensor]:
    import pickle

    _refuse_zip_bomb(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickle protocols; what matters is raised
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UntrojanError(
            f"{path} holds Python objects beside its tensors, which could run code: {_CONVERT}"
        ) from None
    # The parser meets hostile bytes here; whatever it stumbles over, the file is at fault.
    except Exception as error:
        raise UntrojanError(
            f"{path} is damaged or no state dict ({_first_line(error)}): {_CONVERT}"
        ) from None
    return _state_dict(path, content)


def _refuse_zip_bomb(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        return
    with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > 2 * path.stat().st_size + 2**20:
            raise UntrojanError(f"{path} unpacks to more than it holds; PyTorch never compresses: refused")


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    """The mapping of names to tensors, at the top or one level down."""
    candidates = [content, *content.values()] if isinstance(content, dict) else []
    for candidate in candidates:
        if isinstance(candidate, dict) and candidate and all(map(_is_plain, candidate.values())):
            return {str(name).removeprefix("module."): tensor for name, tensor in candidate.items()}
    raise UntrojanError(f"{path} holds no state dict: {_CONVERT}")


def _is_plain(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def _as_classifier_state(
    path: Path, tensors: dict[str, Tensor], mean: Tensor | None, std: Tensor | None
) -> dict[str, Tensor]:
    """A bare network's tensors under the names the classifier gives them, with its normalisation."""
    if any(name.startswith("network.") for name in tensors) and {"mean", "std"} <= tensors.keys():
        return tensors
    if mean is None or std is None:
        raise UntrojanError(
            f"{path} does not say how its inputs were normalised: give mean and std over pixels in [0, 1] "
            "(0 and 1 where they were not)"
        )
    state = {f"network.{name}": tensor for name, tensor in tensors.items()}
    return {**state, "mean": mean.float().view(1, -1, 1, 1), "std": std.float().view(1, -1, 1, 1)}


def _validated_description(path: Path, text: str) -> dict[str, Any]:
    """The description, every field checked for type and range: it comes from whoever made the file."""
    try:
        description = json.loads(text)
        version = description["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UntrojanError(f"{path}: the description beside the tensors cannot be read") from None
    if version != FORMAT_VERSION:
        raise UntrojanError(f"{path} is not of format version {FORMAT_VERSION}, the one this program reads")
    names, shape = description.get("class_names"), description.get("image_shape")
    sound = {
        "architecture": isinstance(description.get("architecture"), str)
        and len(description["architecture"]) <= 200,
        "precision": description.get("precision") in ("float32", "bfloat16"),
        "class_names": isinstance(names, list) and all(isinstance(name, str) for name in names),
        "num_classes": _is_count(description.get("num_classes"), 10**6)
        and isinstance(names, list)
        and description["num_classes"] == len(names),
        "image_shape": shape is None
        or (
            isinstance(shape, list)
            and len(shape) == 3
            and all(_is_count(extent, _LARGEST_SIDE) for extent in shape)
        ),
    }
    for field, is_sound in sound.items():
        if not is_sound:
            raise UntrojanError(f"{path}: {field} in the description is not valid")
    return {
        "architecture": description["architecture"],
        "num_classes": description["num_classes"],
        "image_shape": tuple(shape) if shape else None,
        "precision": description["precision"],
        "class_names": tuple(names),
    }


def _is_count(value: object, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest


def _agreed(path: Path, settings: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The file's settings, with what only the caller knows; a contradiction is an error."""
    architecture = settings["architecture"]
    if architecture == "custom":
        settings = {**settings, "architecture": given["architecture"]}
    elif is_user_code(architecture) and given["architecture"] is None:
        raise UntrojanError(
            f"{path} would import {architecture!r}: if you trust that module, give it as the architecture"
        )
    for name, value in given.items():
        if value is not None and settings[name] is not None and value != settings[name]:
            raise UntrojanError(f"{path} has {name} {settings[name]!r}, not {value!r}: {_WAYS_OUT[name]}")
    return {**settings, **{name: value for name, value in given.items() if settings[name] is None}}


def _check_tensors(
    path: Path, architecture: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> None:
    missing, surplus = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing or surplus:
        which = f"lacks {min(missing)!r}" if missing else f"has {min(surplus)[:80]!r} too much"
        raise UntrojanError(
            f"{path} does not fit {architecture}: it {which} ({len(missing)} missing, {len(surplus)} surplus)"
        )
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise UntrojanError(
                f"{path} does not fit {architecture}: {name} is {tuple(found[name].shape)}, "
                f"not {tuple(tensor.shape)}"
            )
        if found[name].is_floating_point() != tensor.is_floating_point():
            raise UntrojanError(f"{path}: {name} is {found[name].dtype}, not {tensor.dtype}")
        if not found[name].isfinite().all():
            raise UntrojanError(f"{path}: {name} is not finite everywhere; the model is broken")
    if not (found["std"] > 0).all():
        raise UntrojanError(f"{path}: the normalisation divides by {float(found['std'].min()):g}")


def _check_outputs(path: Path, model: Classifier) -> None:
    """Finite weights can still give NaN: a negative running variance does."""
    if model.image_shape is None:
        return
    with torch.no_grad(), evaluating(model):
        if not model(torch.full((1, *model.image_shape), 0.5)).isfinite().all():
            raise UntrojanError(f"{path}: the model's outputs are not finite")


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UntrojanError(f"cannot write checkpoint {path}: {error.strerror}") from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
