"""Which of K(K-1) class pairs are worth full effort: what makes RE's cost grow about as fast as the classes.

Xiang, Miller & Kesidis estimate a pattern for every pair and name that cost as their open problem (section
20). Here every pair gets a glance and 4 K pairs get full effort.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.defenses.cleansing.order_statistics import Floats
from untrojan.inversion.engine import (
    ClassPools,
    Inversion,
    Problem,
    ProportionalStep,
    Schedule,
    all_pairs,
    invert,
)
from untrojan.models.classifier import Classifier, evaluating, to_float
from untrojan.seeding import generator

ALL_PAIRS_UP_TO = 12
"""Classes. Beyond, all K(K-1) patterns would cost more than the training, and most pairs are innocent."""
FULL_EFFORT_LARGEST, FULL_EFFORT_RANDOM = 2, 2
"""Pairs of each target that get full effort beyond that: the most suspicious, for they decide, and random
others, for an unbiased null."""
GLANCE = Schedule(
    ProportionalStep(share=0.15, least=5.4e-4),
    images_a_side=4,
    confirm_images=0,
    most_steps=10,
    stall_steps=10**6,
)
"""Ten coarse steps on four images a side, after which every pair stands in the open."""


def screen(model: Classifier, train: ImageSet, problem: Problem, seed: int = 0) -> tuple[Tensor, Floats]:
    """The pairs worth full effort, int64 (P, 2), and weights (K, K) that make up for the others.

    Each target's most suspicious pairs would decide its p-value: they weigh 1. Of its others some are taken
    at random, each of which stands for its share of them in the null. Weights of pairs left out are 0.
    """
    classes, pairs = train.num_classes, all_pairs(train.num_classes)
    glance = invert(model, train, pairs, problem, GLANCE, seed=seed, description="screening pairs")
    suspicion = _log_probability_of_target(model, train, glance, problem, seed)
    random = generator(seed, "screening")
    weights = np.zeros((classes, classes))
    for target in range(classes):
        into = pairs[:, 1] == target
        order = pairs[into, 0][suspicion[into].argsort(descending=True)]
        rest = order[FULL_EFFORT_LARGEST:]
        chosen = rest[torch.randperm(len(rest), generator=random)[:FULL_EFFORT_RANDOM]]
        weights[order[:FULL_EFFORT_LARGEST].numpy(), target] = 1.0
        weights[chosen.numpy(), target] = len(rest) / len(chosen)
    kept = torch.from_numpy(weights)[pairs[:, 0], pairs[:, 1]] > 0
    return pairs[kept], weights


@torch.no_grad()
def _log_probability_of_target(
    model: Classifier, train: ImageSet, glance: Inversion, problem: Problem, seed: int, images_a_pair: int = 8
) -> Tensor:
    """float (P,): mean ln p_t of source images with each pair's pattern."""
    pools = ClassPools(train, seed)
    suspicion = []
    with evaluating(model):
        for pairs, patterns in zip(glance.pairs.split(128), glance.parameters.split(128), strict=True):
            sources, targets = pairs.unbind(1)
            images = pools.deal(sources, targets, torch.full_like(sources, 1000), images_a_pair)
            views = problem.embed(patterns.to(model.device), to_float(images, model.device))
            scores = model(views.flatten(0, 1)).log_softmax(1).unflatten(0, views.shape[:2]).mean(1).cpu()
            suspicion.append(scores.gather(1, targets[:, None]).squeeze(1))
    return torch.cat(suspicion)
