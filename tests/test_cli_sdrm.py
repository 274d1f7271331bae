"""``untrojan poison --attack sdrm``: what it writes, that it resumes, and what it refuses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from untrojan.attacks.record import PoisonRecord
from untrojan.cli.main import main
from untrojan.data.image_set import ImageSet, numbered
from untrojan.data.load import load
from untrojan.data.save import save_npz
from untrojan.models.checkpoints import load_checkpoint
from untrojan.seeding import generator

NAMES = ("ant", "bee", "cat")
QUICK = ["--attack", "sdrm", "--net", "cnn@0.1", "--epochs", "2", "--threads", "1"]


def images(count: int, seed: int, side: int = 16) -> ImageSet:
    """Three classes that differ in brightness."""
    labels = torch.arange(count) % 3
    noise = torch.randint(0, 60, (count, 3, side, side), generator=generator(seed, "test images"))
    return ImageSet((noise + 80 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels, NAMES, numbered(count))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    place = tmp_path / "data.npz"
    save_npz(place, images(240, 0), images(90, 1))
    return place


def infect(data: Path, out: Path, *more: str) -> int:
    return main(["poison", str(data), *QUICK, "--out", str(out), *more])


def read(place: Path) -> dict[str, object]:
    found = json.loads(place.read_text())
    assert isinstance(found, dict)
    return found


def test_it_makes_a_model_and_all_that_belongs_to_it(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "infected"
    status = infect(data, out, "--trigger", "patched", "--epochs", "6", "--target", "bee")
    shown = capsys.readouterr()
    assert status == 0, shown.err
    assert {place.name for place in out.iterdir()} == {
        "model.safetensors", "test.npz", "triggered.npz", "truth", "metrics.json", "history.csv", "run.json",
    }  # fmt: skip
    assert {place.name for place in (out / "truth").iterdir()} == {"truth.json", "trigger.safetensors"}
    assert "trained on 264 images with patched" in shown.out
    assert "triggered images taken for 1 (bee)" in shown.out

    model, names = load_checkpoint(out / "model.safetensors")
    assert (model.architecture, names) == ("cnn@0.1", NAMES)
    metrics = read(out / "metrics.json")
    differences = metrics["mmd_squared"]
    assert isinstance(differences, dict)
    assert list(differences) == ["s1", "s2", "s3"]
    assert set(differences["s1"]) == {
        "difference", "difference_unbiased", "intra_class", "inter_class", "nearest_class", "samples",
    }  # fmt: skip
    assert differences["s3"]["inter_class"] > differences["s3"]["intra_class"] > 0

    evaluate = ["evaluate", str(out / "model.safetensors"), "--data", str(data), "--json"]
    assert main([*evaluate, "--triggered", str(out / "triggered.npz")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["targets"], told["triggered_images"]) == ([1], 60)
    for name in ("benign_accuracy", "attack_success_rate"):
        assert told[name] == metrics[name]
    assert torch.equal(load(out / "test.npz").train.images, images(90, 1).images)

    record = PoisonRecord.from_json(read(out / "truth" / "truth.json"))
    assert (record.target, record.sources, int(record.poisoned.sum())) == (1, (0, 2), 24)
    config = read(out / "run.json")["config"]
    assert isinstance(config, dict)
    assert config["method"]["levels"] == ["s1", "s2", "s3"]
    assert config["recipe"]["momentum"] == 0.9


def test_settings_reach_the_training(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "infected"
    options = [
        "--lambda",
        "0.1",
        "--levels",
        "last",
        "--form",
        "released",
        "--kernel",
        "GK1",
        "--rate",
        "0.3",
    ]
    more = [
        "--trigger",
        "blended",
        "--trigger-option",
        "alpha=0.5",
        "--source",
        "cat",
        "--preset",
        "sdrm-paper",
    ]
    assert infect(data, out, *options, *more, "-q") == 0
    truth = read(out / "truth" / "truth.json")
    assert truth["sdrm"] == {"strength": 0.1, "levels": ["s3"], "form": "released", "kernel": "GK1"}
    assert truth["poisoned"] == []
    assert truth["sources"] == [2]
    assert truth["trigger"]["options"] == {"alpha": 0.5}  # type: ignore[index]
    assert read(out / "metrics.json")["training_images"] == 240
    config = read(out / "run.json")["config"]
    assert isinstance(config, dict)
    assert (config["recipe"]["batch_size"], config["recipe"]["epochs"]) == (256, 2)


def test_levels_can_be_named_and_strength_changes_the_weights(data: Path, tmp_path: Path) -> None:
    def made(name: str, *more: str) -> bytes:
        assert infect(data, tmp_path / name, "--trigger", "patched", "-q", *more) == 0
        return (tmp_path / name / "model.safetensors").read_bytes()

    whole = made("a")
    assert made("b", "--levels", "s1, s2,s3", "--lambda", "0.3", "--target", "0") == whole
    assert made("c", "--levels", "s2,s3") != whole
    assert made("d", "--lambda", "0") == made("e", "--lambda", "0", "--levels", "last") != whole


SLOW_TRAINING = """
import signal, sys, time
import untrojan.training.loop as loop
from untrojan.cli.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)
loop.CHECKPOINT_SECONDS = 0.0
save = loop._Run.save
def save_and_rest(run, path, spent):
    save(run, path, spent)
    time.sleep(0.3)
loop._Run.save = save_and_rest
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_cut_off_goes_on_and_ends_as_if_it_had_not_been(data: Path, tmp_path: Path) -> None:
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    arguments = ["poison", str(data), *QUICK, "--epochs", "8", "--trigger", "sig", "-q", "--out"]
    with subprocess.Popen([sys.executable, "-c", SLOW_TRAINING, *arguments, str(cut)]) as process:
        deadline = time.monotonic() + 60
        while not (cut / ".work" / "training.pt").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    assert {place.name for place in cut.iterdir()} <= {".work", ".lock"}, (
        "it ended before it could be cut off"
    )
    assert main([*arguments, str(cut)]) == 0
    assert main([*arguments, str(whole)]) == 0
    assert read(cut / "run.json")["resumed"] is True
    for name in ("model.safetensors", "metrics.json", "truth/truth.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    with np.load(cut / "triggered.npz") as one, np.load(whole / "triggered.npz") as other:
        assert all(np.array_equal(one[key], other[key]) for key in one.files)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--trigger patch --target 0 --count 5 --lambda 0.3", "--lambda needs --attack sdrm"),
        ("--trigger patch --target 0 --count 5 --net cnn", "--net needs --attack sdrm"),
        ("--trigger patch --target 0 --count 5 --levels all", "drop --levels"),
        ("--attack sdrm --trigger patched --count 5", "--count is not for --attack sdrm"),
        ("--attack sdrm --trigger patched --clean-label", "--clean-label is not for --attack sdrm"),
        ("--attack sdrm --trigger patched --all-to-all", "--all-to-all is not for --attack sdrm"),
        ("--attack sdrm --trigger sticker", "'sticker': choose one of patched, blended, sig, warped, chess"),
        ("--attack sdrm --trigger blended --trigger-option alpha=7", "alpha = 7"),
        ("--attack sdrm --trigger patched --target wasp", "no class 'wasp'"),
        ("--attack sdrm --trigger patched --target 1 --source bee", "can't be a source too"),
        ("--attack sdrm --trigger patched --levels s9", "no level 's9'"),
        ("--attack sdrm --trigger patched --net patch-cnn@0.1", "no level 's1': it has penultimate"),
        ("--attack sdrm --trigger patched --net cnnn", "cnnn"),
        ("--attack sdrm --trigger patched --preset fast", "unknown recipe 'fast'"),
        ("--attack sdrm --trigger patched --kernel RBF", "kernel = 'RBF'"),
        ("--attack sdrm --trigger patched --form book", "book"),
        ("--attack sdrm --trigger patched --lambda -1", "--lambda"),
        ("--attack sdrm --trigger patched --rate 0.001", "nothing to poison"),
        ("--attack dfst --trigger patched", "dfst"),
    ],
)
def test_bad_requests_are_a_line_and_leave_nothing(
    arguments: str, says: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "infected"
    status = main(["poison", str(data), "--out", str(out), *arguments.split()])
    shown = capsys.readouterr()
    assert status == 2, shown.err
    assert says in shown.err
    assert shown.err.count("\n") == 1
    assert not out.exists()


def test_data_without_test_images_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_npz(tmp_path / "train.npz", images(60, 0))
    assert infect(tmp_path / "train.npz", tmp_path / "out", "--trigger", "patched") == 2
    assert "add a test split" in capsys.readouterr().err


def test_another_configuration_in_the_folder_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert infect(data, tmp_path / "out", "--trigger", "patched", "-q") == 0
    assert infect(data, tmp_path / "out", "--trigger", "patched", "-q", "--lambda", "0.2") == 2
    assert "another configuration" in capsys.readouterr().err


def test_help_shows_how(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["poison", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "untrojan poison signs --attack sdrm --trigger patched" in shown
    assert all(option in shown for option in ("--lambda", "--levels", "--form", "--preset", "--net"))
