"""Checkpoints: bit for bit there and back, and no file, however made, runs code or passes for whole."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from untrojan.errors import UntrojanError
from untrojan.models import registry
from untrojan.models.checkpoints import load_checkpoint, save_checkpoint
from untrojan.models.classifier import Classifier, logits_of
from untrojan.models.precision import Precision

NAMES = ("plane", "<b>ship</b>", "Lärm 船")
SHAPE = (3, 20, 20)
TOLD = {"architecture": "cnn@0.25", "num_classes": 3, "image_shape": SHAPE}


def model_of(architecture: str = "cnn@0.25", precision: Precision = "float32", seed: int = 3) -> Classifier:
    mean, std = torch.tensor([0.1, 0.5, 0.3]), torch.tensor([0.2, 0.3, 0.25])
    return registry.build(
        architecture, num_classes=3, image_shape=SHAPE, mean=mean, std=std, precision=precision, seed=seed
    )


def description(**changes: Any) -> dict[str, Any]:
    whole = {
        "format_version": 1,
        "architecture": "cnn@0.25",
        "num_classes": 3,
        "image_shape": list(SHAPE),
        "precision": "float32",
        "class_names": list(NAMES),
    }
    return {**whole, **changes}


def contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


def write(path: Path, state: dict[str, Tensor], about: object) -> Path:
    save_file(contiguous(state), path, {"untrojan": json.dumps(about)})
    return path


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(UntrojanError) as error:
        load_checkpoint(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["cnn@0.25", "resnet18-compact@0.5", "gtsrb-cnn@0.25"])
def test_there_and_back_bit_for_bit(tmp_path: Path, architecture: str, precision: Precision) -> None:
    model = model_of(architecture, precision)
    model(torch.rand(8, *SHAPE))  # so that running statistics are not the initial ones
    save_checkpoint(tmp_path / "m.safetensors", model, NAMES)
    loaded, names = load_checkpoint(tmp_path / "m.safetensors")
    assert names == NAMES
    assert (loaded.architecture, loaded.precision, loaded.image_shape) == (architecture, precision, SHAPE)
    assert not loaded.training
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    images = torch.randint(0, 256, (5, *SHAPE), dtype=torch.uint8)
    assert torch.equal(logits_of(loaded, images), logits_of(model, images))
    assert [each.name for each in tmp_path.iterdir()] == ["m.safetensors"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, model_of(), NAMES)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UntrojanError, match="No space left"):
        save_checkpoint(path, model_of(seed=4), NAMES)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["m.safetensors"]


def test_class_names_must_fit(tmp_path: Path) -> None:
    with pytest.raises(UntrojanError, match="2 class names for a model of 3 classes"):
        save_checkpoint(tmp_path / "m.safetensors", model_of(), NAMES[:2])


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
def test_a_pickle_payload_does_not_run(tmp_path: Path, form: str) -> None:
    marker, path = tmp_path / "ran", tmp_path / "weights.pt"
    content = {"state_dict": {"conv.weight": torch.zeros(2)}, "extra": Payload(marker)}
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(Payload(marker)))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    options = {"architecture": "cnn", "num_classes": 3, "image_shape": SHAPE}
    assert "could run code: convert it" in refusal(path, **options)
    assert not marker.exists()
    # The payload is live: a loader that trusts the file does run it.
    if form == "bare pickle":
        pickle.loads(path.read_bytes())  # noqa: S301
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()


def test_a_file_cannot_choose_code_to_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker, module = tmp_path / "ran", "module_a_checkpoint_names"
    (tmp_path / f"{module}.py").write_text(
        f"import os; os.mkdir({str(marker)!r})\n"
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    state = {"network.2.weight": torch.ones(3, 3), "network.2.bias": torch.zeros(3)}
    state |= {"mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 3, 1, 1)}
    path = write(tmp_path / "m.safetensors", state, description(architecture=f"{module}:net"))
    assert f"would import '{module}:net'" in refusal(path)
    assert not marker.exists()
    try:
        loaded, _ = load_checkpoint(path, architecture=f"{module}:net")
    finally:
        sys.modules.pop(module, None)
    assert marker.exists()
    assert loaded.architecture == f"{module}:net"


@pytest.mark.parametrize("keep", [0, 5, 30, 2000, -1])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_truncated_files(tmp_path: Path, suffix: str, keep: int) -> None:
    path = tmp_path / f"m.{suffix}"
    if suffix == "pt":
        torch.save(model_of().state_dict(), path)
    else:
        save_checkpoint(path, model_of(), NAMES)
    path.write_bytes(path.read_bytes()[:keep])
    assert str(path) in refusal(path, **(TOLD if suffix == "pt" else {}))


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": 2},
        {"format_version": None},
        {"architecture": 7},
        {"architecture": "resnet99"},
        {"architecture": "cnn@1e6"},
        {"architecture": "cnn@0.5"},
        {"num_classes": "3"},
        {"num_classes": True},
        {"num_classes": 4},
        {"num_classes": 10**12},
        {"class_names": "abc"},
        {"class_names": [1, 2, 3]},
        {"class_names": ["one", "two"]},
        {"image_shape": [3, 20]},
        {"image_shape": [3, 20, "20"]},
        {"image_shape": [3, 20, 10**9]},
        {"image_shape": [3, -20, 20]},
        {"image_shape": [1, 20, 20]},
        {"image_shape": None},
        {"precision": "int8"},
    ],
)
def test_wrong_descriptions(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = write(tmp_path / "m.safetensors", model_of().state_dict(), description(**changes))
    refusal(path)


@pytest.mark.parametrize("about", [[], "text", None, 5, {}, {"format_version": [1]}])
def test_descriptions_that_are_none(tmp_path: Path, about: object) -> None:
    refusal(write(tmp_path / "m.safetensors", model_of().state_dict(), about))


def test_tensors_that_do_not_fit_or_are_broken(tmp_path: Path) -> None:
    def refused(change: Tensor | None, name: str) -> str:
        state = model_of().state_dict()
        if change is None:
            del state[name]
        else:
            state[name] = change
        return refusal(write(tmp_path / "m.safetensors", state, description()))

    weight = "network.linear.weight"
    shape = model_of().state_dict()[weight].shape
    assert "lacks 'network.linear.weight' (1 missing, 0 surplus)" in refused(None, weight)
    assert "has 'network.more' too much" in refused(torch.zeros(1), "network.more")
    assert f"{weight} is (2, 2), not {tuple(shape)}" in refused(torch.zeros(2, 2), weight)
    assert "is not finite everywhere" in refused(torch.full(shape, float("nan")), weight)
    assert "torch.int64, not torch.float32" in refused(torch.zeros(shape, dtype=torch.int64), weight)
    assert "divides by 0" in refused(torch.zeros(1, 3, 1, 1), "std")
    assert "outputs are not finite" in refused(torch.full((8,), -9.0), "network.features.1.running_var")


def test_what_is_given_must_agree_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, model_of(), NAMES)
    assert "has architecture 'cnn@0.25', not 'vgg16'" in refusal(path, architecture="vgg16")
    assert "has num_classes 3, not 10" in refusal(path, num_classes=10)
    assert load_checkpoint(path, precision="bfloat16")[0].precision == "bfloat16"


@pytest.mark.parametrize("form", ["bare", "parallel", "nested", "classifier"])
def test_pytorch_state_dicts(tmp_path: Path, form: str) -> None:
    model, path = model_of("resnet18-compact@0.5"), tmp_path / "weights.pth"
    state: dict[str, Any] = dict(model.network.state_dict())
    if form == "parallel":
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    if form == "nested":
        state = {"epoch": 100, "accuracy": 0.93, "state_dict": state, "optimizer": {"lr": 0.1}}
    if form == "classifier":
        state = dict(model.state_dict())
    torch.save(state, path)
    options = {"architecture": "resnet18-compact@0.5", "num_classes": 3, "image_shape": SHAPE}
    if form != "classifier":
        assert "give mean and std" in refusal(path, **options)
        options |= {"mean": model.mean.flatten(), "std": model.std.flatten()}
    loaded, names = load_checkpoint(path, **options)  # type: ignore[arg-type]
    images = torch.randint(0, 256, (4, *SHAPE), dtype=torch.uint8)
    assert torch.equal(logits_of(loaded, images), logits_of(model, images))
    assert names == ("0", "1", "2")


def test_a_state_dict_needs_to_be_told_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(model_of().state_dict(), path)
    assert "does not say its architecture: give it" in refusal(path)
    torch.save([torch.zeros(3)], path)
    assert "holds no state dict" in refusal(path, architecture="cnn")
    torch.save({"weight": torch.zeros(3).to_sparse()}, path)
    assert "holds no state dict" in refusal(path, architecture="cnn")


def test_foreign_missing_and_swollen_files(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "absent.pt")
    assert "cannot read" in refusal(tmp_path)
    keras = tmp_path / "model.h5"
    keras.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    assert "neither safetensors nor a PyTorch state dict" in refusal(keras)
    bomb, target = io.BytesIO(), tmp_path / "bomb.pt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(30_000_000))
    target.write_bytes(bomb.getvalue())
    assert "unpacks to more than it holds" in refusal(target)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_damaged_bytes_are_refused_or_load_whole(
    tmp_path_factory: pytest.TempPathFactory, suffix: str
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    path, sound = folder / f"m.{suffix}", model_of()
    if suffix == "pt":
        torch.save(sound.state_dict(), path)
    else:
        save_checkpoint(path, sound, NAMES)
    whole = path.read_bytes()

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(st.integers(0, 2500), st.integers(0, 255)), min_size=1, max_size=3))
    @example([(0, 255), (7, 255)])
    def check(changes: list[tuple[int, int]]) -> None:
        damaged = bytearray(whole)
        for place, value in changes:
            damaged[place] = value
        path.write_bytes(damaged)
        message = ""
        try:
            options: dict[str, Any] = {} if suffix == "safetensors" else TOLD
            loaded, _ = load_checkpoint(path, **options)
        except UntrojanError as error:
            message = str(error)
        else:
            assert loaded.state_dict().keys() == sound.state_dict().keys()
        assert "\n" not in message

    check()


def test_a_model_built_by_hand_comes_back_where_its_architecture_is_given(tmp_path: Path) -> None:
    source, path = model_of(), tmp_path / "m.safetensors"
    by_hand = Classifier(source.network, 3, source.mean.flatten(), source.std.flatten())
    save_checkpoint(path, by_hand, NAMES)
    assert "does not say its architecture" in refusal(path)
    loaded, names = load_checkpoint(path, architecture="cnn@0.25", image_shape=SHAPE)
    images = torch.randint(0, 256, (4, *SHAPE), dtype=torch.uint8)
    assert torch.equal(logits_of(loaded, images), logits_of(source, images))
    assert names == NAMES
