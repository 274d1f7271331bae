"""The fast schedule against the paper's on one model, on as many pairs as a desk has patience for."""

from __future__ import annotations

import torch
from common import in_turns, report

from untrojan.data.signs import make_signs
from untrojan.inversion.additive import AdditivePattern
from untrojan.inversion.engine import FAST, PAPER, all_pairs, invert
from untrojan.training.loop import train_new
from untrojan.training.recipe import Recipe


def main(count: int = 4) -> None:
    data = make_signs(train_per_class=300, test_per_class=1).train
    recipe = Recipe(epochs=6, batch_size=64, optimizer="sgd", learning_rate=0.05, schedule="one_cycle")
    model, _ = train_new(data, "patch-cnn@0.5", recipe)
    model.precision = "bfloat16"
    every = all_pairs(10)
    pairs = every[torch.linspace(0, len(every) - 1, count).long()]
    seconds = in_turns(
        {
            "paper schedule": lambda: invert(model, data, pairs, AdditivePattern(), PAPER),
            "fast schedule": lambda: invert(model, data, pairs, AdditivePattern(), FAST),
        },
        rounds=1,
    )
    report("schedules", seconds, "paper schedule", "fast schedule", wanted=10.0)


if __name__ == "__main__":
    main()
