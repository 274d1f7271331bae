"""``untrojan scan``: exit status, files and words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from untrojan.attacks.poisoning import Poisoning
from untrojan.cli.main import main
from untrojan.data.image_set import ImageSet, numbered
from untrojan.data.save import save_npz
from untrojan.data.signs import make_signs
from untrojan.defenses.scanning.neural_cleanse import NeuralCleanse
from untrojan.defenses.scanning.registry import SCANNERS, method_names
from untrojan.defenses.scanning.report import InvertedTrigger, ScanReport
from untrojan.errors import UntrojanError
from untrojan.models.checkpoints import save_checkpoint
from untrojan.models.registry import build_for
from untrojan.scan import joint
from untrojan.training.loop import train_new
from untrojan.training.recipe import Recipe

NAMES = ("ant", "bee", "d o g")


def noise(names: tuple[str, ...] = NAMES) -> ImageSet:
    images = torch.randint(0, 256, (30, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    return ImageSet(images.to(torch.uint8), torch.arange(30) % 3, names, numbered(30))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model and images of its classes."""
    folder = tmp_path_factory.mktemp("scan")
    save_checkpoint(folder / "model.safetensors", build_for(noise(), "cnn@0.25"), NAMES)
    save_npz(folder / "images.npz", noise())
    return str(folder / "model.safetensors"), str(folder / "images.npz")


def found(verdict: str) -> ScanReport:
    mask, pattern = torch.zeros(1, 16, 16), torch.zeros(3, 16, 16)
    mask[0, 14:, 14:] = 1
    pattern[0] = 1
    hit = verdict == "poisoned"
    return ScanReport(
        verdict=verdict,  # type: ignore[arg-type]
        targets=(2,) if hit else (),
        statistics={label: {"mask_size": 9.0 - label, "flip_fraction": 1.0} for label in range(3)},
        triggers={2: InvertedTrigger(mask, pattern)},
        failed=(1,),
        reason="for a test",
        evidence={"steps": [1, 2, 3]},
    )


@pytest.mark.parametrize(("verdict", "status"), [("clean", 0), ("poisoned", 1), ("undecided", 3)])
def test_the_answer_is_a_status_words_and_files(
    verdict: str, status: int, case: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def scanned(self: NeuralCleanse, model: object, clean: ImageSet, **_: Any) -> ScanReport:
        assert (len(clean), self.seed, self.schedule) == (30, 4, "paper")
        return found(verdict)

    monkeypatch.setattr(NeuralCleanse, "__call__", scanned)
    model, images = case
    out = tmp_path / "out"
    arguments = ["scan", model, "--data", images, "--out", str(out), "--seed", "4", "--schedule", "paper"]
    assert main([*arguments, "--json"]) == status
    metrics = json.loads(capsys.readouterr().out)
    assert metrics == json.loads((out / "metrics.json").read_text())
    assert metrics["verdict"] == verdict
    assert metrics["classes"][2] == {"class": 2, "name": "d o g", "mask_size": 7.0, "flip_fraction": 1.0}
    assert float(load_file(out / "triggers.safetensors")["mask_2"].sum()) == 4
    assert main([*arguments, "--overwrite"]) == status
    shown = capsys.readouterr().out
    assert "no working trigger was found for 1 (bee)" in shown
    if verdict == "poisoned":
        assert metrics["target_names"] == ["d o g"]
        assert "BACKDOOR FOUND: for a test" in shown
        assert "into class 2 (d o g)" in shown
        picture = Image.open(out / "trigger_2.png")
        assert picture.size == (256, 256)
        assert picture.getpixel((255, 255)) == (255, 0, 0)
        assert picture.getpixel((0, 0)) == (128, 128, 128)
    else:
        assert not list(out.glob("trigger_*.png"))


def test_images_of_other_classes_are_refused(
    case: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_npz(tmp_path / "other.npz", noise(("a", "b", "c")))
    command = ["scan", case[0], "--data", str(tmp_path / "other.npz"), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "its class 0 is 'ant', the data's is 'a'" in capsys.readouterr().err


def test_a_model_of_ones_own_leaves_no_room_for_a_second_probe(
    case: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["audit", case[1], "--model", case[0], "--second-preset", "desk-victim"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "give one of them" in capsys.readouterr().err


@pytest.fixture(scope="module")
def backdoored(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A small model that takes any sign with a patch for class 2, and clean signs."""
    folder = tmp_path_factory.mktemp("backdoored")
    signs = make_signs(num_classes=4, size=16, train_per_class=60, test_per_class=12, seed=0)
    poisoned = Poisoning(target=2, trigger="patch", rate=0.15)(signs, 0)
    recipe = Recipe(epochs=8, batch_size=32, learning_rate=0.004)
    model, _ = train_new(poisoned.train, "cnn@0.25", recipe, seed=0)
    assert signs.test is not None
    save_checkpoint(folder / "model.safetensors", model, signs.test.class_names)
    save_npz(folder / "images.npz", signs.test)
    return str(folder / "model.safetensors"), str(folder / "images.npz")


def test_several_methods_one_verdict_and_one_page(
    backdoored: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, images = backdoored
    out = tmp_path / "out"
    command = [
        "scan",
        model,
        "--data",
        images,
        "--out",
        str(out),
        "--method",
        "abs",
        "--natural",
        "--linearity",
    ]
    settings = [
        "--scan-option",
        "sizes=[0.02]",
        "--scan-option",
        "size=0.05",
        "--scan-option",
        'levels=["s3"]',
    ]
    status = main([*command, *settings, "--json"])
    metrics = json.loads(capsys.readouterr().out)
    assert status == {"clean": 0, "poisoned": 1, "undecided": 3}[metrics["verdict"]]
    assert list(metrics["methods"]) == ["abs", "natural"]
    # Natural has no vote.
    assert metrics["verdict"] == metrics["methods"]["abs"]["verdict"] != "undecided"
    assert metrics["methods"]["natural"]["evidence"]["sizes"] == [0.02]
    candidates = metrics["methods"]["abs"]["evidence"]["candidates"]
    assert candidates
    assert all(each["pixels"] <= each["bound"] == int(0.05 * 256) for each in candidates)
    for histogram in metrics["linearity"]:
        assert len(histogram["edges"]) == len(histogram["strong"]) + 1
        assert sum(histogram["strong"]) + sum(histogram["weak"]) <= 48
    page = (out / "report.html").read_text()
    assert "What each method says" in page
    assert "The most linear channels" in page
    stored = load_file(out / "triggers.safetensors")
    assert all(name.startswith(("abs_", "natural_")) for name in stored)
    assert json.loads((out / "run.json").read_text())["config"]["methods"][1]["name"] == "natural"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "abs,nonsense"], "no method 'nonsense'"),
        (["--method", ","], "no method named"),
        (["--scan-option", "sizes=[0.1]"], "neural-cleanse has no option 'sizes'"),
        (["--method", "abs", "--scan-option", "size=2"], "size = 2 is not valid"),
        (["--method", "natural", "--scan-option", "sizes=[]"], "sizes = [] is not valid"),
        (["--method", "abs", "--scan-option", 'levels=["nowhere"]'], "no level 'nowhere'"),
    ],
)
def test_wrong_choices_are_named_and_nothing_is_left(
    arguments: list[str], said: str, case: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["scan", case[0], "--data", case[1], "--out", str(out), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (out / "metrics.json").exists()


def test_a_scan_is_not_resumed_on_another_model(
    case: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tmp_path / "model.safetensors", tmp_path / "out"
    save_checkpoint(model, build_for(noise(), "cnn@0.25"), NAMES)

    def interrupted(_self: NeuralCleanse, _model: object, _clean: ImageSet, *, checkpoint: Path) -> None:
        checkpoint.write_bytes(b"patterns so far")
        raise KeyboardInterrupt

    monkeypatch.setattr(NeuralCleanse, "__call__", interrupted)
    command = ["scan", str(model), "--data", case[1], "--out", str(out)]
    assert main(command) == 130
    assert main(command) == 130
    save_checkpoint(model, build_for(noise(), "cnn@0.25", seed=1), NAMES)
    assert main(command) == 2
    assert "model_sha256" in capsys.readouterr().err


def test_all_is_every_method() -> None:
    assert method_names(["all", "class-distance"]) == method_names(["all"]) == SCANNERS.names()
    with pytest.raises(UntrojanError, match="'nonsense'"):
        method_names(["all,nonsense"])


@pytest.mark.parametrize(
    ("verdicts", "together"),
    [
        ({"neural-cleanse": "clean", "abs": "poisoned"}, "poisoned"),
        ({"neural-cleanse": "clean", "abs": "undecided"}, "undecided"),
        ({"neural-cleanse": "undecided", "abs": "poisoned"}, "poisoned"),
        ({"neural-cleanse": "clean", "natural": "poisoned"}, "clean"),
        ({"natural": "poisoned"}, "poisoned"),
    ],
)
def test_the_joint_verdict(verdicts: dict[str, str], together: str) -> None:
    verdict, _, targets = joint({name: found(each) for name, each in verdicts.items()})
    assert verdict == together
    assert targets == ((2,) if together == "poisoned" else ())


def test_distances_are_a_matrix_in_the_metrics_and_a_map_on_the_page(
    case: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, images = case
    out = tmp_path / "out"
    quickly = [part for each in ("steps=10", "trials=1", "images=5") for part in ("--scan-option", each)]
    # An untrained model: no verdict, but the distances are told.
    assert main(["scan", model, "--data", images, "--out", str(out), "--distance", "mask", *quickly]) == 3
    metrics = json.loads((out / "metrics.json").read_text())
    matrix = metrics["evidence"]["distances"]
    assert [len(row) for row in matrix] == [3, 3, 3]
    assert all(matrix[label][label] is None for label in range(3))
    config = json.loads((out / "run.json").read_text())["config"]
    assert (config["name"], config["measure"]) == ("class-distance", "mask")
    assert "class pairs" in (out / "report.html").read_text()
    assert "Traceback" not in capsys.readouterr().err
