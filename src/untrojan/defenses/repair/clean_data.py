"""What repairs do with the clean images at hand: hold some out, count steps, tell one run from another."""

from __future__ import annotations

import hashlib

import torch

from untrojan.data.image_set import ImageSet
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier
from untrojan.seeding import generator


def held_out(clean: ImageSet, share: float, seed: int, method: str) -> tuple[ImageSet, ImageSet]:
    """The images to work with, and a ``share`` held out, drawn class by class.

    Raises UntrojanError, in the name of ``method``, where either would have fewer than two images.
    """
    shuffled = torch.randperm(len(clean), generator=generator(seed, "held out"))
    ordered = shuffled[clean.labels[shuffled].argsort(stable=True)]
    places = torch.arange(len(clean), dtype=torch.float64)
    # Evenly spaced along the classes: each gives its share to within one image.
    kept_back = ((places + 1) * share).floor() > (places * share).floor()
    working, held = ordered[~kept_back], ordered[kept_back]
    if min(len(working), len(held)) < 2:
        needed = max(4, -(-2 // min(share, 1 - share)))
        raise UntrojanError(f"{method} needs {needed:.0f} clean images or more, not {len(clean)}")
    return clean.select(working.sort().values), clean.select(held.sort().values)


def epochs_for(steps: int, images: int, batch_size: int) -> int:
    """Passes over so many images that hold at least ``steps`` steps of the training loop."""
    an_epoch = -(-images // batch_size) - (images % batch_size == 1)
    return -(-steps // max(an_epoch, 1))


def weights_fingerprint(model: Classifier) -> str:
    """SHA-256 over a model's state: a checkpoint of another model's repair is another run's."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
