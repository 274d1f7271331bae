"""``untrojan poison --attack`` of attacks that compute before they poison: what it writes and refuses."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from crafted_data import coloured_splits
from untrojan.attacks.crafted import CRAFTED_ATTACKS
from untrojan.attacks.files import load_triggered
from untrojan.attacks.record import PoisonRecord
from untrojan.cli.main import main
from untrojan.data.load import load
from untrojan.data.save import save_npz
from untrojan.defenses.repair import hardening
from untrojan.defenses.repair.deck import DECK
from untrojan.inversion.generators import MaskGenerator
from untrojan.models.checkpoints import load_checkpoint
from untrojan.triggers.base import stamp
from untrojan.triggers.registry import draw_trigger

NET = ["--net", "cnn@0.1", "--epochs", "1", "--threads", "1"]
SETTINGS = {
    "label-consistent": ["--target", "c", "--attack-option", "steps=2", "--attack-option", "share=0.2", *NET],
    "hidden-trigger": [
        "--target", "c", "--source", "a", "--count", "5", "--attack-option", "iterations=3",
        "--trigger-option", "size=4", "--trigger-option", "place=random", *NET,
    ],
    "invisible": [
        "--target", "c", "--rate", "0.1", "--attack-option", "bits=4", "--attack-option", "epochs=2",
        "--attack-option", "secret_only=1", "--attack-option", "filters=4", "--threads", "1",
    ],
    "dfst-style": [
        "--target", "c", "--rate", "0.1", "--attack-option", "rounds=1", "--attack-option", "epochs=1",
        "--attack-option", "injector_epochs=1", "--attack-option", "excess=0.0001", *NET,
    ],
    "deck-adaptive": ["--target", "c", "--rate", "0.1", "--attack-option", "harden_every=2", *NET],
}  # fmt: skip
INFECT = ("dfst-style", "deck-adaptive")
"""The attacks that deliver a model, too."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("data") / "data.npz"
    splits = coloured_splits(train=20, test=6)
    save_npz(place, splits.train, splits.test)
    return place


@pytest.mark.parametrize("attack", SETTINGS)
def test_it_writes_the_set_its_truth_and_what_was_computed(data, tmp_path, attack, capsys, monkeypatch):
    # No decoder is to be had of 100 images.
    monkeypatch.setattr(DECK, "generator", lambda *_: MaskGenerator())
    monkeypatch.setattr(DECK, "by_turns", hardening.Hardening.by_turns)
    out = tmp_path / "attack"
    command = ["poison", str(data), "--attack", attack, *SETTINGS[attack], "--out", str(out)]
    assert main(command) == 0, capsys.readouterr().err
    written = {place.name for place in out.iterdir()}
    files = {"train.npz", "test.npz", "triggered.npz", "truth", "metrics.json", "run.json"}
    models = {"surrogate.safetensors"} if attack != "invisible" else set()
    assert written == files | models | ({"model.safetensors"} if attack in INFECT else set())
    told = json.loads((out / "truth/truth.json").read_text())
    tensors = load_file(out / "truth/crafted.safetensors")
    # The stored tensors make the very set again.
    options = dict(told["attack"])
    again = CRAFTED_ATTACKS.build(options.pop("name"), options).poison(load(str(data)), 0, tensors)
    train = load(str(out / "train.npz")).train
    assert torch.equal(train.images, again.train.images)
    assert torch.equal(train.labels, again.train.labels)
    record = PoisonRecord.from_json(told, drawn=again.record.trigger)
    assert torch.equal(record.poisoned, again.record.poisoned)
    assert int(record.poisoned.sum()) == len(told["poisoned"]) > 0
    triggered = load_triggered(out / "triggered.npz", train)
    assert train.class_names[int(triggered.wanted_labels[0])] == "c"
    assert not bool((triggered.true_labels == triggered.wanted_labels).any())
    assert f"poisoned by {attack} -> " in capsys.readouterr().out
    if attack == "invisible":
        file = out / "truth/trigger.safetensors"
        trigger = draw_trigger("invisible", {"encoder": str(file)}, train.image_shape, 0)
        clean = load(str(data)).train.images[again.record.permutation]
        assert torch.equal(stamp(trigger, clean)[record.poisoned], train.images[record.poisoned])


def test_a_surrogate_of_ones_own_is_taken_and_left_alone(data, tmp_path):
    trained = tmp_path / "first"
    quick = SETTINGS["label-consistent"]
    command = ["poison", str(data), "--attack", "label-consistent", *quick, "-q", "--out"]
    assert main([*command, str(trained)]) == 0
    file = trained / "surrogate.safetensors"
    before = file.read_bytes()
    assert load_checkpoint(file)[1] == tuple("abcde")
    command = ["poison", str(data), "--attack", "label-consistent", *quick[:-6], "-q", "--threads", "1"]
    assert main([*command, "--surrogate", str(file), "--out", str(tmp_path / "second")]) == 0
    first, second = (load(str(tmp_path / name / "train.npz")).train for name in ("first", "second"))
    assert first.fingerprint() == second.fingerprint()
    assert file.read_bytes() == before
    assert not (tmp_path / "second/surrogate.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--target 0 --count 3", "--trigger is missing"),
        ("--trigger patch --target 0 --count 3 --attack-option a=1", "--attack-option needs --attack"),
        ("--attack sdrm --trigger patched --attack-option a=1", "--attack-option is not for --attack sdrm"),
        ("--attack invisible --lambda 0.3", "--lambda is not for --attack invisible"),
        ("--attack invisible --clean-label", "--clean-label is not for --attack invisible"),
        ("--attack invisible --trigger patch", "has no option 'trigger'"),
        ("--attack invisible --attack-option bits=0", "bits = 0"),
        ("--attack invisible --target 1 --source b", "can't be a source too"),
        ("--attack invisible --surrogate {data}", "needs no --surrogate"),
        ("--attack label-consistent --source b", "takes no --source"),
        ("--attack label-consistent --trigger sticker", "sticker"),
        ("--attack label-consistent --target z", "no class 'z'"),
        ("--attack label-consistent --surrogate {data}", "data.npz"),
        ("--attack label-consistent --net cnnn", "cnnn"),
        ("--attack hidden-trigger --target 0 --source b,c", "one source class"),
        ("--attack hidden-trigger --target 0 --source b --net cnn@0.1 --epochs 1", "can't poison 400 images"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(data, tmp_path, arguments, message, capsys):
    words = arguments.format(data=data).split()
    assert main(["poison", str(data), *words, "-q", "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert not (tmp_path / "out/train.npz").exists()
