"""What ``untrojan repair --method auto`` keeps of what it tries, and what of a backdoor each leaves.

It chooses by clean images alone; attack success is looked at when all is done. The models are in no table:
VGG-11s of a quarter of the width on half of CIFAR-10, with a warp and with a patch.

``python benchmarks/auto_repair.py CIFAR10 [warp] [patch]``: CIFAR-10 as ``untrojan.load`` takes it. Writes
``results/benchmarks/auto-repair-warp.json`` and ``-patch.json``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from common import write

import untrojan
from untrojan.attacks.poisoning import Poisoning, poison_many
from untrojan.data.image_set import Splits
from untrojan.data.sampling import some_of_each
from untrojan.defenses.repair.auto import QUICK, choose
from untrojan.memory import keep_freed_memory
from untrojan.metrics.accuracy import attack_success_rate
from untrojan.repair import CleanImages, RepairOptions, run_repair
from untrojan.training.loop import train_new
from untrojan.training.presets import preset

SEED = 78
ATTACKS = {
    "warp": Poisoning("warp", {"strength": 2.0}, target=3, rate=0.1),
    "patch": Poisoning("patch", {"size": 3}, target=3, rate=0.05),
}


def main() -> None:
    keep_freed_memory()
    cifar10, *names = sys.argv[1:]
    whole = untrojan.load(cifar10)
    assert whole.test is not None
    for name in names or ATTACKS:
        train = some_of_each(whole.train, 2500, SEED, "half")
        made = poison_many(Splits(train, whole.test), [ATTACKS[name]], SEED)
        clean = some_of_each(made.train.select(~made.records[0].poisoned), 125, SEED, "repair images")
        model, _ = train_new(made.train, "vgg11@0.25", preset("desk-victim"), seed=SEED)
        options = RepairOptions()
        done = run_repair(model, CleanImages(clean, whole.test, "test"), options)
        assert done.scan_before is not None
        quick = [each for each in done.candidates if each.name in QUICK]
        kept = choose(quick, done.accuracy_before, options.tolerance)
        tried: dict[str, Any] = {
            each.name: {
                "benign_accuracy": round(each.benign_accuracy, 4),
                "smallest_mask": each.smallest_mask,
                "attack_success": round(attack_success_rate(each.report.model, made.triggered_tests[0]), 4),
                "seconds": round(each.cost.seconds),
            }
            for each in done.candidates
            if each.report is not None
        }
        found = {
            "scan": done.scan_before.verdict,
            "benign_accuracy": round(done.accuracy_before, 4),
            "attack_success": round(attack_success_rate(model, made.triggered_tests[0]), 4),
            "kept": done.method,
            "kept_of_the_quick_ones": kept and kept.name,
            "seconds": round(sum(cost.seconds for cost in done.costs.values())),
            "tried": tried,
        }
        print(name, json.dumps(found, indent=1), flush=True)
        write(f"auto-repair-{name}", found)


if __name__ == "__main__":
    main()
