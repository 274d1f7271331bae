"""How an audit's time grows with the classes, images a class fixed; whether verdicts stay the same."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from untrojan.attacks.poisoning import Poisoning
from untrojan.data.image_set import ImageSet
from untrojan.data.signs import make_signs
from untrojan.defenses.cleansing.reverse_engineering import ReverseEngineering
from untrojan.metrics.accuracy import attack_success_rate
from untrojan.metrics.cleansing import cleansing_rates
from untrojan.models.classifier import Classifier
from untrojan.runs import hardware, versions
from untrojan.training.loop import train_new
from untrojan.training.presets import probe_recipe

NET = "patch-cnn@0.5"
IMAGES_PER_CLASS = 100
ATTACK = Poisoning(
    trigger="chessboard", trigger_options={"amplitude": 3.0}, target=9, sources=(1, 4, 7), count=30
)
CLASSES = (10, 20, 43, 100)
SLOPE_WANTED = 1.3


@dataclass(frozen=True)
class Row:
    """One audit of a probe trained beforehand."""

    classes: int
    poisoned: bool
    attack_success: float | None
    verdict: str
    targets: tuple[int, ...]
    true_positive_rate: float | None
    false_positive_rate: float
    seconds: float
    """Of one core: other work on the machine does not count."""

    @property
    def right(self) -> bool:
        return self.targets == ((ATTACK.target,) if self.poisoned else ())


def measured(classes: int, poisoned: bool) -> Row:
    data = make_signs(classes, train_per_class=IMAGES_PER_CLASS, test_per_class=20)
    made = ATTACK(data, 0) if poisoned else None
    train = made.train if made else data.train
    model = _trained(train)
    start = time.process_time()
    report = ReverseEngineering()(train, model)
    seconds = time.process_time() - start
    rates = cleansing_rates(report.flagged, train.labels, made.record if made else ())
    return Row(
        classes, poisoned, attack_success_rate(model, made.triggered_test) if made else None, report.verdict,
        tuple(report.targets), rates.true_positive_rate if made else None, rates.false_positive_rate, seconds,
    )  # fmt: skip


def _trained(train: ImageSet) -> Classifier:
    recipe = replace(probe_recipe(len(train)), epochs=20)
    return train_new(train, NET, recipe, description=f"{train.num_classes} classes")[0]


def slope(rows: list[Row]) -> float:
    """Of log time against log K, by least squares."""
    points = [(math.log(row.classes), math.log(row.seconds)) for row in rows]
    centre = sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)
    above = sum((x - centre[0]) * (y - centre[1]) for x, y in points)
    return above / sum((x - centre[0]) ** 2 for x, _ in points)


def main(classes: tuple[int, ...] = CLASSES) -> None:
    torch.set_num_threads(1)
    rows = []
    for count in classes:
        for poisoned in (True, False):
            rows.append(measured(count, poisoned))
            print(rows[-1], flush=True)
    slopes = {
        kind: slope([row for row in rows if row.poisoned == poisoned])
        for kind, poisoned in (("poisoned", True), ("clean", False))
    }
    print(f"slopes of log seconds against log classes: {slopes} (at most {SLOPE_WANTED} wanted)")
    found = {
        "name": "classes", "slopes": slopes, "wanted": SLOPE_WANTED, "all_right": all(r.right for r in rows),
        "net": NET, "images_per_class": IMAGES_PER_CLASS, "rows": [asdict(row) for row in rows],
        "hardware": hardware(), "versions": versions(),
    }  # fmt: skip
    place = Path(__file__).parent.parent / "results" / "benchmarks" / "classes.json"
    place.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tuple(int(each) for each in sys.argv[1:]) or CLASSES)
