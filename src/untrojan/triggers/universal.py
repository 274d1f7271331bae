"""The DeepFool-adaptive universal pattern (RE section 18, equation 13; DeepFool: Moosavi-Dezfooli 2016).

The attacker trains a surrogate on clean data and accumulates, image by image, the smallest step that carries
a source image over the surrogate's boundary into the target class, within a small l2 ball.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier, evaluating, to_float
from untrojan.progress import task
from untrojan.triggers.additive import Additive
from untrojan.triggers.base import ImageShape

LOOK_AHEAD = 256
"""At most so many images are checked at once for being flipped already."""


@dataclass(frozen=True)
class Universal:
    """A pattern that :func:`universal_pattern` found, read from a file."""

    pattern: Path | None = None
    """A ``.safetensors`` file with one float tensor ``pattern`` (C, H, W), in units of the pixel range."""

    def draw(self, shape: ImageShape, seed: int) -> Additive:
        """Raises UntrojanError where no file is named, or it does not hold a pattern of this shape."""
        from safetensors import SafetensorError, safe_open

        if self.pattern is None:
            raise UntrojanError("the universal trigger needs its pattern: give pattern=FILE.safetensors")
        try:
            with safe_open(self.pattern, framework="pt") as file:
                found = tuple(file.get_slice("pattern").get_shape())
                # The header alone tells the shape: nothing large is read before it fits.
                pattern = file.get_tensor("pattern") if found == tuple(shape) else None
        except (OSError, SafetensorError) as error:
            raise UntrojanError(f"{self.pattern} holds no readable tensor 'pattern': {error}") from None
        if pattern is None:
            raise UntrojanError(f"{self.pattern} has a pattern of shape {found}, the images {tuple(shape)}")
        if not pattern.is_floating_point() or not bool(pattern.isfinite().all()):
            raise UntrojanError(f"{self.pattern}: the pattern must be of finite floats")
        return Additive(pattern.float())


def universal_pattern(
    model: Classifier,
    images: Tensor,
    target: int,
    *,
    radius: float = 0.5,
    overshoot: float = 0.02,
    steps: int = 50,
    passes: int = 10,
    tolerance: float = 0.01,
) -> Tensor:
    """The pattern (C, H, W) that carries ``images`` towards ``target``, ``radius`` its largest l2 norm.

    ``images`` are the source class's, uint8 (N, C, H, W), visited in order; ``radius`` is in units of the
    pixel range. A visit that DeepFool cannot carry over in ``steps`` steps changes nothing. Passes end when
    the share that ``model`` gives to ``target`` changes by less than ``tolerance``, or after ``passes``.
    Raises UntrojanError where there are no images, no such class, or no visit that carries an image over.
    """
    if not len(images):
        raise UntrojanError("a universal pattern needs images of the source class: none were given")
    if not 0 <= target < model.num_classes:
        raise UntrojanError(f"no class {target}: the surrogate has {model.num_classes} classes")
    pattern = torch.zeros(images.shape[1:], device=model.device)
    share = _share_of_target(model, images, pattern, target)
    with evaluating(model), task("universal pattern", passes * len(images), "images") as bar:
        for _ in range(passes):
            position, ahead = 0, 1
            while position < len(images):
                block = to_float(images[position : position + ahead], model.device)
                kept = _predictions(model, block, pattern) == target
                skipped = len(block) if bool(kept.all()) else int(kept.int().argmin())
                # Looking ahead leaves the sequence as it is: the pattern moves only at an unflipped image.
                ahead = min(ahead * 2, LOOK_AHEAD) if skipped == len(block) else max(skipped, 1)
                if skipped < len(block):
                    step = deepfool(model, block[skipped], pattern, target, overshoot, steps)
                    pattern = _projected(pattern + step, radius)
                    skipped += 1
                position += skipped
                bar.advance(skipped)
            previous, share = share, _share_of_target(model, images, pattern, target)
            bar.note(f"{share:.1%} flipped")
            if abs(share - previous) < tolerance:
                break
    if share < 1 and not bool(pattern.any()):
        raise UntrojanError(
            f"no image could be carried to class {target} in {steps} steps: train the surrogate first"
        )
    return pattern.cpu()


def deepfool(
    model: Classifier, image: Tensor, pattern: Tensor, target: int, overshoot: float = 0.02, steps: int = 50
) -> Tensor:
    """The smallest u (C, H, W) found with f(clip(x + v + u)) = target, x float (C, H, W); 0 where none was.

    Each step takes the boundary between the target and the class now on top as flat:
    u <- u + (z_top - z_target) w / |w|^2, w the gradient of z_target - z_top.
    """
    total = torch.zeros_like(image)
    for step in range(steps + 1):
        u = total.detach().requires_grad_()
        logits = model((image + pattern + (1 + overshoot) * u).clamp(0, 1)[None])[0]
        top = int(logits.argmax())
        if top == target:
            return (1 + overshoot) * total
        if step == steps:
            break
        gap = logits[target] - logits[top]
        # The overshoot scales u, so its factor is taken out of the gradient again.
        slope = torch.autograd.grad(gap, u)[0] / (1 + overshoot)
        size = slope.square().sum()
        if not bool(size > 0):
            break
        total = total - gap.detach() * slope / size
    return torch.zeros_like(image)


@torch.no_grad()
def _predictions(model: Classifier, images: Tensor, pattern: Tensor) -> Tensor:
    predictions: Tensor = model((images + pattern).clamp(0, 1)).argmax(1)
    return predictions


def _share_of_target(model: Classifier, images: Tensor, pattern: Tensor, target: int) -> float:
    with evaluating(model):
        flipped = sum(
            int((_predictions(model, to_float(batch, model.device), pattern) == target).sum())
            for batch in images.split(LOOK_AHEAD)
        )
    return flipped / len(images)


def _projected(pattern: Tensor, radius: float) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(pattern)
    return pattern * (radius / size.clamp_min(radius))
