"""The page of a training: what it shows, that names stay text, and that nothing is fetched."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from untrojan.cli.main import main
from untrojan.data.save import save_npz
from untrojan.data.signs import make_signs
from untrojan.defenses.training.registry import TRAINING_DEFENSES
from untrojan.report.training_page import ABOUT, render_training, training_page

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=1>'
HISTORY = [{"loss": 1.0, "accuracy": 0.5}, {"loss": float("nan"), "accuracy": 0.75}]


def test_names_stay_text_and_what_was_found_is_there() -> None:
    data = make_signs(num_classes=3, size=16, train_per_class=20, test_per_class=1, seed=0).train
    names = (HOSTILE, "b", "c")
    hostile = replace(data, class_names=names, ids=data.ids.astype("<U80"))
    hostile.ids[0] = HOSTILE
    dropped = torch.zeros(len(data), dtype=torch.bool)
    dropped[:7] = True
    evidence = {
        "rounds": [
            {"compromised": {"network." + HOSTILE: list(range(40))}, "dropped": 7, "notes": [HOSTILE]}
        ],
        "epsilon": None,
        "cleansing": {"verdict": HOSTILE, "cost": {"seconds": 1}},
    }
    page = training_page(
        hostile, defense="none", subject=HOSTILE, architecture=HOSTILE, dropped=dropped, evidence=evidence,
        widths={"network." + HOSTILE: 64}, history=HISTORY, benign_accuracy=0.9, listing="dropped.csv",
    )  # fmt: skip
    html = render_training(page)
    assert "<script" not in html
    assert "<img src=x" not in html
    assert html.count("data:image/png") == 7
    assert not re.search(r'(src|href)="(?!data:|#)', html)
    assert "7 of 60 images were not trusted" in html
    assert ">64<" in html
    assert ", …" in html
    assert "unbounded" in html
    assert sum(lost for _, lost, _ in page.dropped_by_class) == 7
    assert html == render_training(page)


def test_a_page_of_next_to_nothing() -> None:
    data = make_signs(num_classes=3, size=16, train_per_class=5, test_per_class=1, seed=0).train
    bare = render_training(training_page(data, defense="plain", subject="x", architecture="cnn"))
    assert "trained on all 15 images" in bare
    none = torch.zeros(15, dtype=torch.bool)
    kept = render_training(training_page(data, defense="abl", subject="x", architecture="cnn", dropped=none))
    assert "no image was left out" in kept
    assert "<section" not in kept.split("</style>")[1]
    assert set(ABOUT) == {"plain", *TRAINING_DEFENSES.names()}


@pytest.mark.parametrize(
    ("defense", "options"),
    [
        ("plain", []),
        ("cleanse-none", ['none_options={"epochs":1}', "cleanser=strip", "probe_recipe=desk-plain"]),
        ("dbd", ["contrastive_epochs=1", "head_epochs=1", "contrastive_batch=32"]),
    ],
)  # fmt: skip
def test_the_command_writes_it(tmp_path: Path, defense: str, options: list[str]) -> None:
    made = make_signs(num_classes=3, size=16, train_per_class=20, test_per_class=5, seed=0)
    save_npz(tmp_path / "signs.npz", made.train, made.test)
    chosen = [part for option in options for part in ("--defense-option", option)]
    command = [
        "train",
        str(tmp_path / "signs.npz"),
        "--net",
        "cnn@0.25",
        "--epochs",
        "1",
        "--defense",
        defense,
    ]
    assert main([*command, *chosen, "--out", str(tmp_path / "out"), "-q"]) == 0
    html = (tmp_path / "out" / "report.html").read_text()
    assert ABOUT[defense][0] in html
    assert "Time in all" in html
    assert (tmp_path / "out" / "dropped.csv").exists() == (defense != "plain")
