"""DECK's hardening of a ResNet-20 by its defaults, decoder included, against ten minutes; and what half
precision saves of its search, where the processor has it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from common import in_turns, report, report_cost

from untrojan.data.image_set import ImageSet
from untrojan.data.signs import make_signs
from untrojan.defenses.repair.deck import DECK
from untrojan.inversion.generators import FeatureGenerator
from untrojan.memory import keep_freed_memory
from untrojan.models.classifier import Classifier
from untrojan.models.precision import has_bfloat16
from untrojan.models.registry import build_for
from untrojan.training.loop import train
from untrojan.training.presets import preset

FEW = 10
"""Steps after the warm-up for the comparison of precisions."""


@dataclass(frozen=True)
class Exact(DECK):
    """With a search in float32 whatever the model's precision is."""

    def generator(self, model: Classifier, clean: ImageSet) -> FeatureGenerator:
        return replace(super().generator(model, clean), precision="float32")


def main() -> None:
    keep_freed_memory()
    # As many as 5 % of CIFAR-10.
    data = make_signs(train_per_class=250, test_per_class=1).train
    recipe = preset("desk-plain")
    model = build_for(data, "resnet20", precision=recipe.precision)
    train(model, data, replace(recipe, epochs=10))
    start = time.perf_counter()
    DECK()(model, data)
    seconds = {"DECK": time.perf_counter() - start, "ten minutes": 600.0}
    report_cost("hardening", seconds, "DECK", "ten minutes", at_most=1.0)
    if not has_bfloat16("cpu"):
        return
    ways = {
        "float32": lambda: Exact(steps=FEW)(model, data),
        "the model's bfloat16": lambda: DECK(steps=FEW)(model, data),
    }
    report("hardening-precision", in_turns(ways, rounds=1), "float32", "the model's bfloat16", wanted=1.2)


if __name__ == "__main__":
    main()
