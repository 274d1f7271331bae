"""What pruning the neurons that a trigger excites takes from a model, the trigger being known.

Xia et al., "Enhancing Backdoor Attacks with Multi-Level MMD Regularization" (2022), section 6.2.2 and figure
10: neuron pruning as Neural Cleanse has it, with the real trigger in place of an inverted one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from untrojan.data.image_set import ImageSet
from untrojan.defenses.repair.neuron_pruning import NeuronPruning, Stamp
from untrojan.models.classifier import Classifier

BEARABLE = 0.05
"""The accuracy that pruning may cost, a share of all images, where its best is asked for."""


def pruning_curve(
    model: Classifier, clean: ImageSet, trigger: Stamp, target: int, step: float = 0.05
) -> list[dict[str, float]]:
    """For each share of the penultimate neurons pruned, 0 to 1 in steps of ``step``: ``pruned``,
    ``benign_accuracy`` and ``trigger_success`` (on images of other classes), until nothing of the backdoor is
    left.

    Ground truth is looked at: this measures, it does not defend. Raises UntrojanError as
    :class:`NeuronPruning` does.
    """
    to_the_end = NeuronPruning(step=step, most=1.0, goal=0.0, accuracy_cost=1.0)
    looks: list[dict[str, float]] = to_the_end(model, clean, trigger, target).history["looks"]
    return looks


def summary(curve: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """``attack_success``: the least on the curve for at most :data:`BEARABLE` of accuracy; ``pruned`` and
    ``benign_accuracy`` there; ``needed_cost``: the least accuracy lost where attack success is below a tenth,
    None where it never is."""
    before = curve[0]["benign_accuracy"]
    bearable = [look for look in curve if look["benign_accuracy"] >= before - BEARABLE]
    best = min(bearable, key=lambda look: (look["trigger_success"], look["pruned"]))
    costs = [before - look["benign_accuracy"] for look in curve if look["trigger_success"] < 0.1]
    return {
        "attack_success": best["trigger_success"],
        "benign_accuracy": best["benign_accuracy"],
        "pruned": best["pruned"],
        "needed_cost": min(costs, default=None),
    }
