"""``untrojan repair``: what it writes, what it keeps, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Backdoored
from untrojan.cli.main import main
from untrojan.cost import Cost
from untrojan.data.image_set import ImageSet, Splits, numbered
from untrojan.data.save import save_npz
from untrojan.defenses.repair.auto import QUICK as QUICK_ONES
from untrojan.defenses.repair.auto import Candidate, choose, fitting, worth_scanning
from untrojan.defenses.repair.report import RepairReport
from untrojan.defenses.scanning.neural_cleanse import NeuralCleanse
from untrojan.defenses.scanning.report import InvertedTrigger, ScanReport
from untrojan.errors import UntrojanError
from untrojan.metrics.accuracy import attack_success_rate, benign_accuracy
from untrojan.models.checkpoints import load_checkpoint, save_checkpoint
from untrojan.models.registry import build_for
from untrojan.repair import CleanImages, RepairOptions, clean_images, run_repair
from untrojan.report.audit_page import RunFacts
from untrojan.report.repair_page import Look, RepairPage, Tried, render_repair

QUICK = ["--method", "finetune", "--method-option", "epochs=2", "-q"]


@pytest.fixture(scope="module")
def given(backdoored: Backdoored, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, bytes]:
    """The model's file, its clean images, and the file's bytes."""
    folder = tmp_path_factory.mktemp("given")
    save_checkpoint(folder / "model.safetensors", backdoored.model, backdoored.clean.class_names)
    save_npz(folder / "clean.npz", backdoored.clean, backdoored.test)
    return folder / "model.safetensors", folder / "clean.npz", (folder / "model.safetensors").read_bytes()


def call(model: Path, data: Path | str, out: Path, *more: str) -> int:
    return main(["repair", str(model), "--data", str(data), "--out", str(out), *more])


def test_a_repair_from_end_to_end(
    given: tuple[Path, Path, bytes],
    backdoored: Backdoored,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, data, content = given
    out = tmp_path / "out"
    options = ["--method", "fine-pruning", "--method-option", "step=0.05", "--json"]
    assert call(model, data, out, *options) == 0
    shown = capsys.readouterr()
    assert model.read_bytes() == content
    metrics = json.loads(shown.out)
    assert metrics == json.loads((out / "metrics.json").read_text())
    mended, names = load_checkpoint(out / "model.safetensors")
    assert names == backdoored.clean.class_names
    assert metrics["method"] == "fine-pruning"
    assert metrics["benign_accuracy"]["after"] == pytest.approx(benign_accuracy(mended, backdoored.test))
    assert metrics["benign_accuracy"]["before"] == pytest.approx(
        benign_accuracy(backdoored.model, backdoored.test)
    )
    assert metrics["images"] == {"repair": 240, "held_out": 200, "held_out_from": "test"}
    assert metrics["cost"]["total"]["backwards"] == 10 * 15
    assert len(metrics["details"]["pruned"]) > 0
    assert attack_success_rate(mended, backdoored.triggered) < 0.5
    table = (out / "history.csv").read_text().splitlines()
    assert table[0].startswith("table,step,")
    assert sum(line.startswith("epochs,") for line in table) == 10
    page = (out / "report.html").read_text()
    assert "repaired by fine-pruning" in page
    assert "<svg" in page
    assert {place.name for place in out.iterdir()} == {
        "model.safetensors", "metrics.json", "history.csv", "report.html", "run.json",
    }  # fmt: skip
    record = json.loads((out / "run.json").read_text())
    assert record["config"]["methods"]["fine-pruning"]["step"] == 0.05


def test_a_run_that_was_cut_off_goes_on(
    given: tuple[Path, Path, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data, _ = given
    assert call(model, data, tmp_path / "whole", *QUICK) == 0
    monkeypatch.setattr("untrojan.repair.metrics_of", lambda _: 1 / 0)
    assert call(model, data, tmp_path / "cut", *QUICK) == 70
    assert [place.name for place in (tmp_path / "cut").iterdir()] == [".work"]
    assert (tmp_path / "cut" / ".work" / "finetune-fine-tuning.pt").exists()
    monkeypatch.undo()

    def refuse(*_: object) -> None:
        raise AssertionError("a step was taken twice")

    monkeypatch.setattr("untrojan.training.loop._Run.advance", refuse)
    assert call(model, data, tmp_path / "cut", *QUICK) == 0
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["resumed"]
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert same[0] == same[1]


def faked_scan(pixels: Sequence[float]) -> Any:
    """A scan that finds ever other sizes: those given, in turn."""
    sizes = iter(pixels)

    def answer(self: NeuralCleanse, model: object, clean: ImageSet, **_: object) -> ScanReport:
        size = next(sizes)
        mask = torch.zeros(1, 16, 16)
        mask[0, 13:, 13:] = 1
        return ScanReport(
            "poisoned" if size < 5 else "clean",
            (1,) if size < 5 else (),
            {label: {"mask_size": size + label} for label in range(4)},
            {label: InvertedTrigger(mask, torch.zeros(3, 16, 16)) for label in range(4)},
            reason="for a test",
        )

    return answer


def test_auto_keeps_what_leaves_the_longest_way_and_says_so(
    given: tuple[Path, Path, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model, data, content = given
    monkeypatch.setattr(NeuralCleanse, "__call__", faked_scan([2.0, 7.0, 6.0]))
    tried = ["--try", "finetune", "--try", "fine-pruning"]
    assert call(model, data, tmp_path / "out", "--tolerance", "0.2", *tried) == 0
    shown = capsys.readouterr().out
    assert "repaired by finetune" in shown
    assert "smallest trigger before: 2.0 pixels (poisoned)" in shown
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [each["smallest_mask"] for each in metrics["candidates"]] == [7.0, 6.0]
    assert all(each["scanned"] for each in metrics["candidates"])
    assert metrics["within_tolerance"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The backdoor that a scan found before is not found any more" in page
    assert "a smaller trigger is left" in page
    assert page.count("data:image/png") == 2
    assert model.read_bytes() == content


def test_auto_hardens_against_what_the_scan_found(
    backdoored: Backdoored, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = CleanImages(backdoored.clean, backdoored.test, "test")
    asked: list[ScanReport | None] = []

    def watching(found: ScanReport | None) -> tuple[str, ...]:
        asked.append(found)
        return ("clp",)

    monkeypatch.setattr("untrojan.repair.fitting", watching)
    for size, hardening in ((2.0, "moth"), (7.0, "deck")):
        monkeypatch.setattr(NeuralCleanse, "__call__", faked_scan([size, 9.0]))
        done = run_repair(backdoored.model, images, RepairOptions())
        assert [each.name for each in done.candidates] == ["clp"]
        assert asked[-1] is done.scan_before
        assert set(fitting(asked[-1])) - set(QUICK_ONES) == {hardening}
    assert {"moth", "deck", *QUICK_ONES} == set(fitting(None))


def test_auto_looks_for_triggers_only_in_what_it_may_keep() -> None:
    tried = [candidate("a", 0.9), candidate("b", 0.5), candidate("c", 0.88), candidate("d", 0.99, error="no")]
    assert [each.name for each in worth_scanning(tried, 0.9, 0.03)] == ["a", "c"]
    assert [each.name for each in worth_scanning(tried, 0.99, 0.03)] == ["a"]
    assert worth_scanning(tried[3:], 0.9, 0.03) == []


def candidate(name: str, accuracy: float, mask: float | None = 5.0, error: str = "") -> Candidate:
    report = None if error else RepairReport(None)  # type: ignore[arg-type]
    return Candidate(name, Cost(), report, error, accuracy, mask)


def test_the_choice_is_by_accuracy_kept_and_then_by_the_smallest_trigger() -> None:
    tried = [candidate("a", 0.90, 9), candidate("b", 0.95, 6), candidate("c", 0.97, 4)]
    assert choose(tried, 0.97, 0.03).name == "b"  # type: ignore[union-attr]
    assert choose(tried, 0.97, 0.10).name == "a"  # type: ignore[union-attr]
    assert choose(tried, 0.99, 0.00).name == "c"  # type: ignore[union-attr]
    nothing_works = [*tried, candidate("d", 0.96, None)]
    assert choose(nothing_works, 0.97, 0.03).name == "d"  # type: ignore[union-attr]
    assert choose([candidate("e", 0.0, error="no layer")], 0.97, 0.03) is None


def test_what_a_method_cannot_do_is_said(backdoored: Backdoored, monkeypatch: pytest.MonkeyPatch) -> None:
    images = CleanImages(backdoored.clean, backdoored.test, "test")
    monkeypatch.setattr(NeuralCleanse, "__call__", faked_scan([2.0, 3.0, 2.0]))

    def refuse(*_: object, **__: object) -> None:
        raise UntrojanError("not on this net")

    monkeypatch.setattr("untrojan.defenses.repair.nad.NAD.__call__", refuse)
    done = run_repair(backdoored.model, images, RepairOptions(tried=("nad", "finetune"), tolerance=0.5))
    assert done.method == "finetune"
    assert done.candidates[0].error == "not on this net"
    with pytest.raises(UntrojanError, match="not on this net"):
        run_repair(backdoored.model, images, RepairOptions(method="nad"))
    with pytest.raises(UntrojanError, match="no method could repair this model"):
        run_repair(backdoored.model, images, RepairOptions(tried=("nad",)))


def test_the_images_for_a_repair(backdoored: Backdoored) -> None:
    many = ImageSet(
        torch.zeros(2000, 1, 16, 16, dtype=torch.uint8), torch.arange(2000) % 4, tuple("abcd"), numbered(2000)
    )
    drawn = clean_images(Splits(many, many), RepairOptions())
    assert drawn.repair.class_counts.tolist() == [25] * 4
    assert drawn.split == "test"
    apart = clean_images(Splits(many), RepairOptions(share=0.1, hold_out=0.25))
    assert apart.held_out.class_counts.tolist() == [125] * 4
    assert apart.repair.class_counts.tolist() == [38] * 4
    assert not set(apart.repair.ids) & set(apart.held_out.ids)
    small = many.select(torch.arange(80))
    assert len(clean_images(Splits(small), RepairOptions()).repair) == 64
    with pytest.raises(UntrojanError, match=r"share of 0.05 of \d+ .* is 4 of each class.*--share 0.1"):
        clean_images(
            Splits(replace(many, class_names=tuple("abcdefghij" * 3)[:23], labels=torch.arange(2000) % 23)),
            RepairOptions(share=0.05, hold_out=0.001),
        )


def test_a_page_is_harmless_whatever_the_names() -> None:
    bad = "<script>alert(1)</script>"
    look = Look("poisoned", bad, 0, 3.0, torch.ones(1, 4, 4), torch.zeros(3, 4, 4))
    page = RepairPage(
        subject=bad, method=bad, class_names=(bad, bad), accuracy_before=0.9, accuracy_after=0.5,
        held_out=10, held_out_split="train", repair_images=5, tolerance=0.03,
        history={"epochs": [{"stage": bad, "loss": 1.0, "accuracy": 0.5}] * 2},
        before=look, after=look, tried=(Tried(bad, None, None, 1.0, False, False, bad),),
        run=RunFacts(command=bad, settings={bad: bad}),
    )  # fmt: skip
    html = render_repair(page)
    assert "<script" not in html
    assert "still finds a backdoor" in html
    assert "at a price" in html
    assert html == render_repair(page)
    bare = replace(page, history={}, before=None, after=None, tried=(), run=None, accuracy_after=0.9)
    assert "accuracy does not show" in render_repair(bare)


def refused(capsys: pytest.CaptureFixture[str], status: int, out: Path) -> str:
    """The one line of a refusal that left nothing behind."""
    shown = capsys.readouterr().err
    assert status == 2, shown
    assert not out.exists()
    assert len(shown.splitlines()) == 1
    return shown


def test_bad_input_is_refused_in_a_line_and_leaves_nothing(
    given: tuple[Path, Path, bytes],
    backdoored: Backdoored,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, data, content = given
    clean, out = backdoored.clean, tmp_path / "out"

    def data_of(images: ImageSet, test: ImageSet | None = None) -> Path:
        save_npz(tmp_path / "bad.npz", images, test)
        return tmp_path / "bad.npz"

    few = clean.select(torch.arange(240) % 60 < 5)
    line = refused(capsys, call(model, data_of(few), out, *QUICK), out)
    assert "has 5, and 10 are needed of each class (40 in all)" in line
    missing = clean.select(clean.labels != 2)
    line = refused(capsys, call(model, data_of(missing, backdoored.test), out, *QUICK), out)
    assert f"class {clean.class_names[2]!r} has 0, and 8 are needed of each class (32 in all)" in line
    other = replace(missing, labels=missing.labels.clamp(max=2), class_names=clean.class_names[:3])
    line = refused(capsys, call(model, data_of(other), out, *QUICK), out)
    assert "exactly the classes it was trained on" in line
    line = refused(capsys, call(model, data, out, *QUICK, "--size", "20"), out)
    assert "image_shape (3, 16, 16), not (3, 20, 20): bring the images to its size" in line
    shuffled = replace(clean, labels=(clean.labels + 1) % 4)
    line = refused(capsys, call(model, data_of(shuffled), out, *QUICK), out)
    assert "no better than chance (25%)" in line
    line = refused(capsys, call(model, data, out, "--method", "wash"), out)
    assert "unknown repair 'wash': choose one of finetune, fine-pruning" in line
    line = refused(capsys, call(model, data, out, *QUICK, "--method-option", "epoch=2"), out)
    assert "has no option 'epoch'" in line
    line = refused(capsys, call(model, data, out, "--method-option", "epochs=2"), out)
    assert "belong to one method" in line
    line = refused(capsys, call(model, data, out, *QUICK, "--try", "nad"), out)
    assert "--try is for auto" in line
    line = refused(capsys, call(tmp_path / "none.safetensors", data, out, *QUICK), out)
    assert "cannot read checkpoint" in line
    line = refused(capsys, call(model, data, out, *QUICK, "--share", "0.01"), out)
    assert "pass --share 0.14 or more" in line
    assert model.read_bytes() == content


def test_a_network_without_the_needed_layer_is_refused(
    backdoored: Backdoored,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "flat_net_of_a_user.py").write_text(
        "from torch import nn\n"
        "def flat(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    from untrojan.training.loop import train
    from untrojan.training.recipe import Recipe

    model = build_for(backdoored.clean, "flat_net_of_a_user:flat")
    train(model, backdoored.clean, Recipe(epochs=5))
    save_checkpoint("flat.safetensors", model, backdoored.clean.class_names)
    save_npz("clean.npz", backdoored.clean)
    out = tmp_path / "out"
    options = ["--architecture", "flat_net_of_a_user:flat", "--method"]
    line = refused(capsys, call(Path("flat.safetensors"), "clean.npz", out, *options, "nad"), out)
    assert "NAD needs a network with feature maps" in line
    line = refused(capsys, call(Path("flat.safetensors"), "clean.npz", out, *options, "fine-pruning"), out)
    assert "fine-pruning needs a network with a convolutional block" in line


def test_the_given_files_cannot_be_written_over(
    given: tuple[Path, Path, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    model, data, content = given
    assert call(model, data, model.parent, *QUICK, "--overwrite") == 2
    assert "holds the model to be repaired" in capsys.readouterr().err
    assert model.read_bytes() == content


def test_onnx(given: tuple[Path, Path, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data, _ = given
    status = call(model, data, tmp_path / "out", *QUICK, "--onnx")
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript")):
        assert status == 0
        import onnx  # type: ignore[import-not-found, unused-ignore]

        onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"))
    else:
        assert "pip install onnx onnxscript" in refused(capsys, status, tmp_path / "out")
