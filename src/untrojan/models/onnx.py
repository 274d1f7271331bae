"""ONNX out, for programs that run models without PyTorch."""

from __future__ import annotations

import contextvars
import importlib.util
import logging
import warnings
from pathlib import Path

import torch

from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier
from untrojan.models.frozen import trainable

_NEEDED = ("onnx", "onnxscript")


def check_exporter() -> None:
    """Raise UntrojanError where the packages that PyTorch's exporter stands on are missing."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UntrojanError(
            f"writing ONNX needs {' and '.join(missing)}, not installed here: pip install {' '.join(_NEEDED)}"
        )


def export_onnx(path: Path, model: Classifier, image_shape: tuple[int, int, int]) -> None:
    """Write ``model`` as ONNX: ``images``, float32 (N, C, H, W) in [0, 1], to ``logits`` (N, K), in float32.

    Normalisation is part of it; ``image_shape`` is (C, H, W). Raises UntrojanError where the exporter is
    missing or does not know how to write this network.
    """
    check_exporter()
    plain = trainable(model).cpu().eval()
    plain.precision = "float32"

    def export() -> None:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter's own deprecations
            torch.onnx.export(
                plain, (torch.zeros(2, *image_shape),), str(path), dynamo=True, external_data=False,
                input_names=["images"], output_names=["logits"], verbose=False,
                dynamic_shapes=({0: torch.export.Dim("n")},),
            )  # fmt: skip

    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # In a context of its own, where no cost is being counted: counting is not part of the model.
        contextvars.Context().run(export)
    except Exception as error:  # Whatever the exporter meets in a user's own forward.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UntrojanError(f"this network cannot be written as ONNX ({reason}): leave out --onnx") from error
    finally:
        logger.setLevel(level)
