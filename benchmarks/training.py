"""The training loop against an ordinary DataLoader with transforms image by image; one epoch each."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from common import in_turns, in_turns_apart, report
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from untrojan.data.image_set import ImageSet
from untrojan.data.signs import make_signs
from untrojan.memory import keep_freed_memory
from untrojan.models.registry import build_for
from untrojan.training.loop import train
from untrojan.training.recipe import Recipe

RECIPE = Recipe(
    epochs=1, batch_size=128, optimizer="sgd", learning_rate=0.01, crop_padding=4, flip=True,
    precision="bfloat16",
)  # fmt: skip


class Images(Dataset[tuple[Tensor, int]]):
    """Crop and flip with Pillow, as in countless training scripts."""

    def __init__(self, data: ImageSet) -> None:
        self.pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in data.images]
        self.labels = data.labels.tolist()

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = ImageOps.expand(self.pictures[index], 4)
        left, top, mirrored = np.random.randint(9), np.random.randint(9), np.random.rand() < 0.5
        picture = picture.crop((left, top, left + 32, top + 32))
        if mirrored:
            picture = ImageOps.mirror(picture)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255, self.labels[index]


def ordinary(architecture: str, data: ImageSet) -> Callable[[], None]:
    images = Images(data)

    def epoch() -> None:
        model = build_for(data, architecture).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True)
        # The wrapper would switch to channels-last; an ordinary script runs the bare network.
        network = model.network.to(memory_format=torch.contiguous_format)
        for batch, labels in DataLoader(images, 128, shuffle=True):
            loss = F.cross_entropy(network((batch - model.mean) / model.std), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def ours(architecture: str, data: ImageSet) -> Callable[[], object]:
    # As every command does.
    keep_freed_memory()
    return lambda: train(build_for(data, architecture), data, RECIPE)


WAYS = {"ordinary loop": ordinary, "our loop": ours}


def seconds_of(way: str, architecture: str, epochs: int = 3) -> float:
    """The median epoch, after an unmeasured one."""
    epoch = WAYS[way](architecture, make_signs(train_per_class=300, test_per_class=1).train)
    return in_turns({way: epoch}, epochs)[way]


def main() -> None:
    if len(sys.argv) > 1:
        print(seconds_of(*sys.argv[1:]))
        return
    for architecture in ("cnn", "resnet18-compact"):
        seconds = in_turns_apart(__file__, WAYS, architecture)
        report(f"training-{architecture}", seconds, "ordinary loop", "our loop", wanted=2.0)


if __name__ == "__main__":
    main()
