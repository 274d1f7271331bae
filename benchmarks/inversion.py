"""The batched engine against a plain loop over pairs: same images a pair and step, same number of steps."""

from __future__ import annotations

import copy

import torch
from common import in_turns, report
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.data.signs import make_signs
from untrojan.inversion.additive import AdditivePattern
from untrojan.inversion.engine import FAST, ClassPools, Schedule, all_pairs, invert
from untrojan.models.classifier import Classifier
from untrojan.models.registry import build_for

STEPS = 6


def plain_loop(model: Classifier, data: ImageSet, pairs: Tensor, schedule: Schedule) -> None:
    """As such loops are usually written: one pair after another, the bare network in float32 and the default
    memory format, weights' gradients left on."""
    network = copy.deepcopy(model.network).to(memory_format=torch.contiguous_format)
    pools, problem = ClassPools(data, 0), AdditivePattern()
    for pair in pairs:
        source, target = pair[:1], pair[1:]
        pattern = torch.zeros(1, *data.image_shape, requires_grad=True)
        velocity = torch.zeros_like(pattern)
        for step in range(STEPS):
            sources = pools.deal(source, target, torch.tensor([step]), schedule.images_a_side).float() / 255
            targets = pools.deal(target, source, torch.tensor([step]), schedule.images_a_side).float() / 255
            views = problem.views(pattern, sources, targets)
            logits = network((views.flatten(0, 1) - model.mean) / model.std)
            loss = problem.loss(logits[None], pattern, pair[None])
            network.zero_grad()
            loss.sum().backward()
            assert pattern.grad is not None
            moved, velocity = schedule.stepper(
                pattern.detach(), pattern.grad, velocity, torch.ones(1), torch.tensor([step])
            )
            pattern = moved.requires_grad_()


def main() -> None:
    data = make_signs(train_per_class=60, test_per_class=1).train
    model = build_for(data, "resnet18-compact").eval()
    pairs = all_pairs(10)[::2]
    schedule = Schedule(FAST.stepper, FAST.images_a_side, confirm_images=0, most_steps=STEPS)

    model.precision = "bfloat16"

    def plain() -> None:
        plain_loop(model, data, pairs, schedule)

    def batched() -> None:
        invert(model, data, pairs, AdditivePattern(), schedule)

    seconds = in_turns({"plain loop": plain, "batched engine": batched}, rounds=3)
    report("inversion", seconds, "plain loop", "batched engine", wanted=3.0)


if __name__ == "__main__":
    main()
