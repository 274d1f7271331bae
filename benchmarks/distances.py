"""All K(K-1) class distances batched against a plain loop over pairs: same images and steps a pair."""

from __future__ import annotations

import copy

import torch
from common import in_turns, report
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.data.signs import make_signs
from untrojan.defenses.scanning.class_distance import class_distances, schedule_of
from untrojan.inversion.engine import ClassPools, Schedule, all_pairs
from untrojan.inversion.generators import MaskGenerator
from untrojan.models.classifier import Classifier
from untrojan.models.registry import build_for

STEPS = 5
IMAGES = 100


def plain_loop(model: Classifier, data: ImageSet, pairs: Tensor, schedule: Schedule) -> None:
    """As such loops are usually written: one pair after another, the bare network in float32 and the default
    memory format, weights' gradients left on, the size read off at each step."""
    network = copy.deepcopy(model.network).to(memory_format=torch.contiguous_format)
    pools, problem = ClassPools(data, 0), MaskGenerator().problem(0)
    for pair in pairs:
        source, target = pair[:1], pair[1:]
        parameters = problem.initial(pair[None], data.image_shape).requires_grad_()
        optimizer = torch.optim.Adam([parameters], 0.1, (0.5, 0.9))
        for step in range(STEPS):
            images = pools.deal(source, target, torch.tensor([step]), schedule.images_a_side).float() / 255
            views = problem.embed(parameters, images)
            logits = network((views.flatten(0, 1) - model.mean) / model.std)
            loss = problem.loss(logits[None], parameters, pair[None]) + 1e-3 * problem.size(parameters)
            network.zero_grad()
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            float((logits.argmax(1) == target).float().mean())
            float(problem.size(parameters.detach()))


def main() -> None:
    data = make_signs(train_per_class=IMAGES, test_per_class=1).train
    model = build_for(data, "resnet18-compact").eval()
    generator, pairs = MaskGenerator(), all_pairs(10)
    schedule = schedule_of(generator, STEPS, 0.9, paper=False)

    model.precision = "bfloat16"

    def plain() -> None:
        plain_loop(model, data, pairs, schedule)

    def batched() -> None:
        class_distances(model, data, generator, schedule, images=IMAGES, trials=1)

    seconds = in_turns({"plain loop": plain, "batched": batched}, rounds=3)
    report("distances", seconds, "plain loop", "batched", wanted=4.0)


if __name__ == "__main__":
    main()
