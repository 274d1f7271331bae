"""NONE against plain training for as many epochs: its look at every channel and image is all it adds."""

from __future__ import annotations

from dataclasses import replace

from common import in_turns, report_cost

from untrojan.data.signs import make_signs
from untrojan.defenses.training.none import NONE
from untrojan.memory import keep_freed_memory
from untrojan.models.registry import build_for
from untrojan.training.loop import train
from untrojan.training.presets import preset

BEFORE, AFTER = 6, 2
"""Epochs of the first training and of the round after it, three to one where the paper has ten to one: a look
weighs more among fewer epochs."""


def main() -> None:
    keep_freed_memory()
    data = make_signs(train_per_class=300, test_per_class=1).train
    recipe = replace(preset("desk-plain"), epochs=BEFORE)
    defense = NONE(epochs=AFTER, learning_rate=1e-3)

    def plain() -> None:
        train(build_for(data, "resnet18-compact"), data, replace(recipe, epochs=BEFORE + AFTER))

    seconds = in_turns(
        {"plain training": plain, "NONE": lambda: defense(data, "resnet18-compact", recipe)}, rounds=3
    )
    report_cost("none", seconds, "NONE", "plain training", at_most=1.3)


if __name__ == "__main__":
    main()
