"""``untrojan repair`` with hardening: decoders, class distances before and after, and what can't be done."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import Backdoored
from untrojan.cli.main import main
from untrojan.data.save import save_npz
from untrojan.data.signs import make_signs
from untrojan.defenses.repair.auto import QUICK
from untrojan.defenses.repair.moth import MOTH
from untrojan.defenses.repair.registry import REPAIRS
from untrojan.distance_change import DistanceProbe, few_pairs
from untrojan.errors import UntrojanError
from untrojan.metrics.accuracy import attack_success_rate, benign_accuracy
from untrojan.models.checkpoints import load_checkpoint, save_checkpoint
from untrojan.models.classifier import predictions_of
from untrojan.models.encoders import load_encoder
from untrojan.repair import RepairOptions
from untrojan.report.repair_page import METHODS


@pytest.fixture(scope="module")
def given(backdoored: Backdoored, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model and its clean images."""
    folder = tmp_path_factory.mktemp("given")
    save_checkpoint(folder / "model.safetensors", backdoored.model, backdoored.clean.class_names)
    save_npz(folder / "clean.npz", backdoored.clean, backdoored.test)
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of its own, and fewer steps for distances."""
    monkeypatch.setenv("UNTROJAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("untrojan.distance_change.STEPS", 20)
    monkeypatch.setattr("untrojan.distance_change.IMAGES", 10)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["repair", *arguments]) == 2
    line = capsys.readouterr().err
    assert len(line.splitlines()) == 1
    return line


@pytest.mark.usefixtures("quick")
def test_a_decoder_is_trained_once_and_deck_repairs_with_it(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["repair", "--train-decoder", str(given / "clean.npz"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["encoder"].startswith("local-")
    assert 22 < told["psnr"] < 60
    assert Path(told["decoder"]).is_relative_to(tmp_path / "cache")
    assert load_encoder(told["encoder"]).fingerprint() == told["encoder_sha256"]
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    out, content = tmp_path / "out", (given / "model.safetensors").read_bytes()
    status = main(
        ["repair", str(given / "model.safetensors"), "--data", str(given / "clean.npz"), "--out", str(out),
         "--method", "deck", "--encoder", told["encoder"], "-q", "--method-option", "steps=2",
         "--method-option", "flip_fraction=0.02", "--method-option", "batch_size=60"]
    )  # fmt: skip
    assert status == 0, capsys.readouterr().err
    assert (given / "model.safetensors").read_bytes() == content
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["details"]["encoder"] == told["encoder"]
    assert metrics["details"]["encoder_sha256"] == told["encoder_sha256"]
    assert metrics["details"]["searches"]["made"] >= 2
    assert metrics["class_distance"]["measure"] == "feature"
    assert metrics["class_distance"]["relative"]
    assert len(metrics["class_distance"]["by_pair"]) == metrics["class_distance"]["pairs"] == 12
    assert {"class distances before", "class distances after"} <= set(metrics["cost"])
    page = (out / "report.html").read_text()
    assert "How far apart the classes are" in page
    assert METHODS["deck"][1] in page
    load_checkpoint(out / "model.safetensors")


def test_what_is_shown_is_what_was_measured(backdoored: Backdoored) -> None:
    asked = replace(few_pairs("mask", 0), steps=60, images=12, pairs=6)
    probe = DistanceProbe.of(backdoored.model, backdoored.clean, backdoored.test, asked)
    same = probe.compare(backdoored.model)
    # The search is the same with the same seed: so are the distances, to the last bit.
    assert torch.equal(same.before.nan_to_num(-1), same.after.nan_to_num(-1))
    assert same.increase == 0
    assert same.works_before == same.works_after >= 0.5
    assert same.images
    for image in same.images:
        both = torch.stack([image.clean, image.generated])
        answers = predictions_of(backdoored.model, both).tolist()
        assert answers == [image.read_clean, image.read_before]
        assert image.read_after == image.read_before
    told = same.to_json()
    assert told["pairs"] == 6 == len(told["by_pair"])
    assert json.loads(json.dumps(told, allow_nan=False)) == told


def test_every_registered_repair_is_told_of_on_the_page() -> None:
    assert set(METHODS) == set(REPAIRS.names())
    assert all(title and what.endswith(".") for title, what in METHODS.values())
    assert set(QUICK) <= set(REPAIRS.names())


def test_an_encoder_or_a_decoder_that_nothing_would_use_is_refused(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data, out = str(given / "model.safetensors"), str(given / "clean.npz"), str(tmp_path / "out")
    base = [model, "--data", data, "--out", out]
    assert "give a MODEL" in refused(capsys)
    assert "--data CLEAN is missing" in refused(capsys, model)
    assert "--out DIR is missing" in refused(capsys, model, "--data", data)
    assert "is for --method deck" in refused(capsys, *base, "--method", "nad", "--train-decoder", data)
    assert "an encoder is for --method deck" in refused(capsys, *base, "--method", "nad", "--encoder", "vgg")
    assert "drop the other options" in refused(capsys, "--train-decoder", data, "--out", out)
    twice = ["--method", "deck", "--encoder", "local", "--method-option", "encoder=vgg"]
    assert "given twice" in refused(capsys, *base, *twice)
    wrong = ["--method", "deck", "--encoder"]
    assert "unknown encoder 'vgg99'" in refused(capsys, *base, *wrong, "vgg99")
    assert "no encoder 'local-0123456789ab' in the cache" in refused(
        capsys, *base, *wrong, "local-0123456789ab"
    )
    assert "does not exist" in refused(capsys, "--train-decoder", str(tmp_path / "none"))
    assert not (tmp_path / "out").exists()


def test_a_decoder_of_few_images_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNTROJAN_CACHE", str(tmp_path / "cache"))
    save_npz(tmp_path / "few.npz", make_signs(2, 16, 20, 1).train)
    assert "40 images are too few to train a decoder" in refused(
        capsys, "--train-decoder", str(tmp_path / "few.npz")
    )


def test_a_model_at_chance_is_not_hardened(
    given: Path, backdoored: Backdoored, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shuffled = replace(backdoored.clean, labels=(backdoored.clean.labels + 1) % 4)
    save_npz(tmp_path / "wrong.npz", shuffled)
    line = refused(
        capsys, str(given / "model.safetensors"), "--data", str(tmp_path / "wrong.npz"), "--out",
        str(tmp_path / "out"), "--method", "moth",
    )  # fmt: skip
    assert "no better than chance" in line


def test_hardening_that_finds_no_way_is_none(backdoored: Backdoored) -> None:
    before = {name: value.clone() for name, value in backdoored.model.state_dict().items()}
    few = backdoored.clean.select(torch.arange(240) % 60 < 12)

    class Blind(MOTH):
        def schedules(self, generator):  # type: ignore[no-untyped-def]
            return tuple(replace(each, most_steps=1) for each in super().schedules(generator))

    with pytest.raises(UntrojanError, match=r"nothing was hardened: none of \d+ searches .*schedule=paper"):
        Blind(steps=6, batch_size=24, flip_fraction=1.0)(backdoored.model, few)
    assert all(torch.equal(value, before[name]) for name, value in backdoored.model.state_dict().items())


def test_moth_weakens_a_patch_in_few_steps_of_few_images(backdoored: Backdoored) -> None:
    # With a tenth of a class stamped, a single image of a batch, 99 % of it was left.
    repaired = MOTH(steps=100)(backdoored.model, backdoored.clean).model
    assert attack_success_rate(backdoored.model, backdoored.triggered) > 0.95
    assert attack_success_rate(repaired, backdoored.triggered) < 0.6
    assert benign_accuracy(repaired, backdoored.test) > 0.85


def test_all_repairs_can_be_asked_of_auto() -> None:
    from untrojan.cli.repair import _tried

    tried = _tried(["all"], "auto")["tried"]
    assert set(RepairOptions(tried=tuple(tried)).repairs()) == set(REPAIRS.names())
