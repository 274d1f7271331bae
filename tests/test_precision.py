"""Mixed precision is used where the hardware has it, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from untrojan.data.signs import make_signs
from untrojan.models import precision
from untrojan.models.classifier import to_float
from untrojan.models.registry import build_for
from untrojan.runs import hardware


@pytest.mark.parametrize("available", [True, False])
def test_without_the_hardware_for_it_mixed_precision_is_float32(
    monkeypatch: pytest.MonkeyPatch, available: bool
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda device_type: available)
    data = make_signs(train_per_class=2, test_per_class=0).train
    mixed, exact = (build_for(data, "cnn@0.25", precision=each).eval() for each in ("bfloat16", "float32"))
    with torch.no_grad():
        found, wanted = mixed(to_float(data.images)), exact(to_float(data.images))
    assert torch.equal(found, wanted) is not available
    assert torch.allclose(found, wanted, atol=0.1)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_what_a_device_has_can_be_asked_everywhere(device_type: str) -> None:
    if device_type == "cpu" or torch.cuda.is_available():
        assert precision.has_bfloat16(device_type) in (True, False)


def test_the_record_of_a_run_says_so() -> None:
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    assert hardware()["bfloat16"] is precision.has_bfloat16(device_type)
