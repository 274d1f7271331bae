"""The batched engine against a plain loop, same images and steps: RE over pairs, Neural Cleanse over
classes."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace

import torch
from common import in_turns, in_turns_apart, report
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.data.signs import make_signs
from untrojan.defenses.scanning import neural_cleanse
from untrojan.inversion.additive import AdditivePattern
from untrojan.inversion.engine import ANY, FAST, ClassPools, Problem, Schedule, all_pairs, invert
from untrojan.inversion.masked import MaskedPattern
from untrojan.memory import keep_freed_memory
from untrojan.models.classifier import Classifier
from untrojan.models.registry import build_for


def plain_loop(
    model: Classifier, data: ImageSet, pairs: Tensor, problem: Problem, schedule: Schedule, price: float
) -> None:
    """As such loops are usually written: one pair after another, the bare network in float32 and the default
    memory format, weights' gradients left on."""
    network = copy.deepcopy(model.network).to(memory_format=torch.contiguous_format)
    pools, count = ClassPools(data, 0), schedule.images_a_side
    for pair in pairs:
        source, target = pair[:1], pair[1:]
        pattern = problem.initial(pair[None], data.image_shape).requires_grad_()
        memory = torch.zeros(1, schedule.stepper.memories, *pattern.shape[1:])
        for step in range(schedule.most_steps):
            turn = torch.tensor([step])
            sources = pools.deal(source, target, turn, count).float() / 255
            targets = pools.deal(target, source, turn, count).float() / 255 if problem.both_sides else sources
            views = problem.views(pattern, sources, targets)
            logits = network((views.flatten(0, 1) - model.mean) / model.std)
            loss = problem.loss(logits[None], pattern, pair[None]) + price * problem.size(pattern)
            network.zero_grad()
            loss.sum().backward()
            assert pattern.grad is not None
            moved, memory = schedule.stepper(pattern.detach(), pattern.grad, memory, torch.ones(1), turn)
            pattern = moved.requires_grad_()


def problem_of(name: str) -> tuple[Tensor, Problem, Schedule, float]:
    """Pairs, problem, schedule, and the price of the trigger's size."""
    if name == "inversion":
        faint = Schedule(FAST.stepper, FAST.images_a_side, confirm_images=0, most_steps=6)
        return all_pairs(10)[::2], AdditivePattern(), faint, 0.0
    every_class = torch.tensor([[ANY, target] for target in range(10)])
    return every_class, MaskedPattern(), replace(neural_cleanse.FAST, most_steps=16), 1e-3


def seconds_of(way: str, name: str, rounds: int = 2) -> float:
    data = make_signs(train_per_class=60, test_per_class=1).train
    model = build_for(data, "resnet18-compact").eval()
    model.precision = "bfloat16"
    pairs, problem, schedule, price = problem_of(name)
    if way == "plain loop":
        return in_turns({way: lambda: plain_loop(model, data, pairs, problem, schedule, price)}, rounds)[way]
    # As every command does.
    keep_freed_memory()
    return in_turns({way: lambda: invert(model, data, pairs, problem, schedule)}, rounds)[way]


def main() -> None:
    if len(sys.argv) > 1:
        print(seconds_of(*sys.argv[1:]))
        return
    for name in ("inversion", "neural-cleanse"):
        seconds = in_turns_apart(__file__, ("plain loop", "batched engine"), name)
        report(name, seconds, "plain loop", "batched engine", wanted=3.0)


if __name__ == "__main__":
    main()
