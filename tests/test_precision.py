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


def test_float32_is_never_mixed_and_other_devices_are_taken_at_their_word() -> None:
    device = torch.device("meta")
    assert precision.is_mixed("bfloat16", device)
    assert not precision.is_mixed("float32", device)


def test_the_record_of_a_run_says_so() -> None:
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    assert hardware()["bfloat16"] is precision.has_bfloat16(device_type)
