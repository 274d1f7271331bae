"""What DECK's settings leave of four backdoors in one model, and what they cost.

The model is in no table: a VGG-11 with stripes of six cycles, the filters Gotham and Kelvin and a blended
pattern, each into a class of its own. Settings that the paper leaves open can be compared on it.

``python benchmarks/deck_settings.py CIFAR10 [JSON ...]``: CIFAR-10 as ``untrojan.load`` takes it, and for
each run the options that differ from the defaults, such as '{"replayed": 0.1}'; without any, the defaults
alone. Writes ``results/benchmarks/deck-settings.json``.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from common import write

import untrojan
from untrojan.attacks.poisoning import Poisoning, TriggeredTest, poison_many
from untrojan.data.image_set import ImageSet, Splits
from untrojan.data.sampling import some_of_each
from untrojan.defenses.repair.registry import REPAIRS
from untrojan.memory import keep_freed_memory
from untrojan.metrics.accuracy import attack_success_rate, benign_accuracy
from untrojan.models.classifier import Classifier
from untrojan.training.loop import train_new
from untrojan.training.presets import preset

SEED = 77
STRIPES = {"variant": "wrapped_blend", "frequency": 6.0}
BACKDOORS = {
    "stripes": Poisoning("sinusoid", STRIPES, target=2, clean_label=True, rate=0.08),
    "gotham": Poisoning("gotham", target=5, rate=0.08),
    "kelvin": Poisoning("kelvin", target=7, rate=0.08),
    "blend": Poisoning("blend", target=9, rate=0.07),
}
OPTIONS = {"crop_padding": 4, "flip": True}


@dataclass(frozen=True, eq=False)
class Victim:
    model: Classifier
    clean: ImageSet
    """1,250 images that nobody touched."""
    test: ImageSet
    triggered: dict[str, TriggeredTest]

    def look(self, model: Classifier) -> dict[str, Any]:
        success = {name: attack_success_rate(model, images) for name, images in self.triggered.items()}
        return {"benign_accuracy": benign_accuracy(model, self.test), "attack_success": success}


def victim(cifar10: str) -> Victim:
    whole = untrojan.load(cifar10)
    assert whole.test is not None
    train = some_of_each(whole.train, 2500, SEED, "half")
    made = poison_many(Splits(train, whole.test), list(BACKDOORS.values()), SEED)
    touched = torch.stack([record.poisoned for record in made.records]).any(0)
    clean = some_of_each(made.train.select(~touched), 125, SEED, "repair images")
    model, _ = train_new(made.train, "vgg11@0.25", preset("desk-victim"), seed=SEED)
    return Victim(model, clean, whole.test, dict(zip(BACKDOORS, made.triggered_tests, strict=True)))


def main() -> None:
    keep_freed_memory()
    cifar10, *given = sys.argv[1:]
    attacked = victim(cifar10)
    runs = [{"options": None, **attacked.look(attacked.model)}]
    print(json.dumps(runs[0]), flush=True)
    for text in given or ["{}"]:
        options = json.loads(text)
        start = time.perf_counter()
        repaired = REPAIRS.build("deck", {**OPTIONS, **options})(attacked.model, attacked.clean).model
        seconds = time.perf_counter() - start
        runs.append({"options": options, "seconds": round(seconds), **attacked.look(repaired)})
        print(json.dumps(runs[-1]), flush=True)
    write("deck-settings", {"runs": runs})


if __name__ == "__main__":
    main()
