"""The fast schedule against the paper's: every pair of classes of one model, in seconds of one core.

The paper's takes a core a quarter of an hour, so it is taken once; other work on the machine does not count.
"""

from __future__ import annotations

import sys
import time

import torch
from common import report

from untrojan.data.signs import make_signs
from untrojan.inversion.additive import AdditivePattern
from untrojan.inversion.engine import FAST, PAPER, all_pairs, invert
from untrojan.training.loop import train_new
from untrojan.training.recipe import Recipe

CLASSES = 10


def main(count: int = CLASSES * (CLASSES - 1)) -> None:
    torch.set_num_threads(1)
    data = make_signs(CLASSES, size=16, train_per_class=PAPER.images_a_side, test_per_class=1).train
    recipe = Recipe(epochs=12, batch_size=64, optimizer="sgd", learning_rate=0.05, schedule="one_cycle")
    model, _ = train_new(data, "patch-cnn@0.25", recipe)
    model.precision = "bfloat16"
    every = all_pairs(CLASSES)
    pairs = every[torch.linspace(0, len(every) - 1, count).long()]
    seconds = {}
    for name, schedule in (("fast schedule", FAST), ("paper schedule", PAPER)):
        start = time.process_time()
        found = invert(model, data, pairs, AdditivePattern(), schedule)
        seconds[name] = time.process_time() - start
        print(f"{name}: {int(found.solved.sum())} of {len(pairs)} pairs in {seconds[name]:.1f} s", flush=True)
    report("schedules", seconds, "paper schedule", "fast schedule", wanted=10.0)


if __name__ == "__main__":
    main(*(int(each) for each in sys.argv[1:]))
