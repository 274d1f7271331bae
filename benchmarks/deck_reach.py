"""How far triggers move an encoder's features, and how far DECK's search is from an image when it begins.

What begins farther away than a trigger makes no change as small as that before it has come back.

``python benchmarks/deck_reach.py CIFAR10``: CIFAR-10 as ``untrojan.load`` takes it. Writes
``results/benchmarks/deck-reach.json``.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import replace
from typing import Any

import torch
from common import write
from torch import Tensor

import untrojan
from untrojan.data.sampling import some_of_each
from untrojan.inversion.feature_space import FeatureSpacePattern
from untrojan.inversion.generators import FeatureGenerator
from untrojan.models.classifier import to_float
from untrojan.models.decoders import prepare_decoder
from untrojan.triggers.base import stamp
from untrojan.triggers.registry import TRIGGERS

SHOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "blend": ("blend", {}),
    "SIG": ("sinusoid", {"variant": "wrapped_blend"}),
    "WaNet": ("warp", {}),
    "WaNet of strength 2": ("warp", {"strength": 2.0}),
    "Nashville": ("nashville", {}),
    "2x2 grid": ("patch", {"size": 2, "place": "top-left"}),
}


def main() -> None:
    whole = untrojan.load(sys.argv[1])
    assert whole.test is not None
    clean = some_of_each(whole.train, 125, 0, "repair images")
    encoder, decoder = prepare_decoder("local", clean, seed=0, device="cpu")
    problem = FeatureGenerator(encoder, decoder).problem(0)
    seen = some_of_each(whole.test, 25, 0, "looked at")
    images = to_float(seen.images, "cpu")[None]
    found = {}
    for name, (trigger, options) in SHOWN.items():
        drawn = TRIGGERS.build(trigger, options).draw(seen.image_shape, 0)
        found[name] = moved(problem, images, to_float(stamp(drawn, seen.images), "cpu")[None])
    for name, start in {"start": problem, "start, relative": replace(problem, relative=True)}.items():
        by_class = []
        for label in range(seen.num_classes):
            of_class = seen.images[seen.labels == label]
            parameters = start.initial_on(torch.tensor([[label, 0]]), lambda _, own=of_class: own)
            given = to_float(of_class, "cpu")[None]
            by_class.append(moved(problem, given, start.embed(parameters, given)))
        found[name] = {key: round(statistics.fmean(each[key] for each in by_class), 1) for key in by_class[0]}
    for name, figures in found.items():
        print(name, json.dumps(figures))
    write("deck-reach", {"decoder_psnr": decoder.psnr, "moved": found})


@torch.no_grad()
def moved(problem: FeatureSpacePattern, before: Tensor, after: Tensor) -> dict[str, float]:
    """Features' mean squared change, in squared pixel levels, and pixels' root mean square, in levels."""
    _, distances = problem.measure(problem.initial(torch.tensor([[0, 1]]), (3, 32, 32)), before, after)
    levels = (255 * (before - after)).square().mean().sqrt()
    return {"features": round(float(distances.mean()), 1), "levels": round(float(levels), 1)}


if __name__ == "__main__":
    main()
