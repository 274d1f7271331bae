"""Training the steganographic encoder of :mod:`untrojan.triggers.invisible`, and poisoning with it.

Encoder and decoder learn together, on the clean training images: the one to write any secret into any image
with little change, the other to read it. They are trained through the one training loop, as a classifier of
two classes whose labels are each batch's first bits, so that the loop's accuracy is that bit's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import Tensor, nn

from untrojan.attacks.crafted import Crafted, CraftedAttack
from untrojan.attacks.poisoning import PoisonedData, Poisoning, poison_with, selected_rows
from untrojan.data.image_set import ImageSet, Splits
from untrojan.errors import UntrojanError
from untrojan.metrics.images import psnr, structural_similarity
from untrojan.models.classifier import Classifier, to_float
from untrojan.seeding import generator
from untrojan.training.loop import train
from untrojan.training.recipe import Recipe
from untrojan.triggers.base import stamp
from untrojan.triggers.invisible import MOST_BITS, MOST_FILTERS, Decoder, Encoder, SecretWritten, from_tensors

MEASURED = 1000
"""Test images on which bit accuracy and PSNR are measured."""


@dataclass(frozen=True)
class InvisibleAttack(CraftedAttack):
    """One secret in 10 % of the images; every image has its own residual.

    Loss: ``2 |r|^2 + 1.5 (1 - SSIM) + 1.5 BCE``, |r|^2 the mean square of the residual over pixels; where
    the re-implementation at 32x32 that these constants come from has LPIPS, whose weights are a download,
    there is 1 - SSIM. In the first ``secret_only`` epochs the binary cross-entropy stands alone.
    """

    surrogate = "none"

    target: Annotated[int, Ge(0)] = 0
    sources: tuple[Annotated[int, Ge(0)], ...] | Literal["all"] = "all"
    count: Annotated[int, Ge(1)] | None = None
    rate: Annotated[float, Interval(gt=0, le=1)] | None = None
    """Share of the whole training set; 0.1 where there is no ``count`` either."""
    keep_originals: bool = False
    bits: Annotated[int, Interval(ge=1, le=MOST_BITS)] = 20
    filters: Annotated[int, Interval(ge=1, le=MOST_FILTERS)] = 32
    epochs: Annotated[int, Ge(1)] = 20
    secret_only: Annotated[int, Ge(0)] = 2
    images: Annotated[int, Ge(2)] | None = None
    """Training images that the encoder learns from, drawn once; all where none is given."""
    batch_size: Annotated[int, Ge(2)] = 32
    learning_rate: Annotated[float, Interval(gt=0)] = 1e-3
    residual_weight: Annotated[float, Ge(0)] = 2.0
    similarity_weight: Annotated[float, Ge(0)] = 1.5
    secret_weight: Annotated[float, Ge(0)] = 1.5

    def craft(
        self, data: Splits, seed: int, model: Classifier | None = None, scratch: Path | None = None
    ) -> Crafted:
        """The trigger's tensors. Facts: bit accuracy and mean PSNR in dB, on stored bytes of test images."""
        selected_rows(data.train, self._poisoning(), seed)
        if data.test is None or not len(data.test):
            raise UntrojanError(
                "an encoder is measured on test images and the data have none: add a test split"
            )
        encoder, decoder = trained_encoder(data.train, self, seed, scratch)
        secret = torch.randint(2, (self.bits,), generator=generator(seed, "secret")).float()
        trigger = SecretWritten(encoder, secret)
        clean = data.test.images[
            torch.randperm(len(data.test), generator=generator(seed, "measured"))[:MEASURED]
        ]
        facts = quality(trigger, decoder, clean)
        return Crafted(dict(trigger.tensors), facts)

    def poison(self, data: Splits, seed: int, tensors: Mapping[str, Tensor]) -> PoisonedData:
        trigger = from_tensors(tensors)
        attack = self._poisoning()
        rows = selected_rows(data.train, attack, seed)
        return poison_with(data, attack, seed, trigger, rows, stamp(trigger, data.train.images[rows]))

    def _poisoning(self) -> Poisoning:
        rate = 0.1 if self.count is None and self.rate is None else self.rate
        return Poisoning(
            "invisible", {}, self.target, self.sources, self.count, rate, keep_originals=self.keep_originals
        )


class _Steganography(nn.Module):
    """Encoder and decoder as the network that the training loop trains."""

    def __init__(self, channels: int, bits: int, filters: int) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(channels, bits, filters), Decoder(channels, bits, filters)


def trained_encoder(
    images: ImageSet, method: InvisibleAttack, seed: int = 0, scratch: Path | None = None
) -> tuple[Encoder, Decoder]:
    """Train both on ``images``; where ``scratch`` is a folder, a run that was cut off goes on from there."""
    if method.images is not None:
        order = torch.randperm(len(images), generator=generator(seed, "encoder's images"))
        images = images.select(order[: method.images])
    channels = images.image_shape[0]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator(seed, "encoder").initial_seed())
        network = _Steganography(channels, method.bits, method.filters)
    model = Classifier(network, 2, torch.zeros(channels), torch.ones(channels))

    def first_bits(batch: Tensor, labels: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        return batch, torch.randint(2, labels.shape, generator=random).to(labels)

    def trained(epochs: int, secret_only: bool) -> None:
        def loss(_: Classifier, batch: Tensor, labels: Tensor, __: Tensor) -> tuple[Tensor, Tensor]:
            # The first bit is the label; the others come from the random state that the loop keeps.
            others = torch.randint(2, (len(batch), method.bits - 1)).to(batch)
            secrets = torch.cat([labels[:, None].to(batch), others], 1)
            both = network.encoder, network.decoder
            value, logits = steganographic_loss(*both, batch, secrets, method, secret_only)
            return value, torch.stack([torch.zeros_like(logits[:, 0]), logits[:, 0]], 1)

        name = "secret" if secret_only else "encoder"
        train(
            model, two_classes, replace(recipe, epochs=epochs), seed=seed, loss=loss,
            batch_transform=first_bits, method=f"{method} {name}", description=name,
            checkpoint=None if scratch is None else scratch / f"{name}.pt",
        )  # fmt: skip

    recipe = Recipe(batch_size=method.batch_size, learning_rate=method.learning_rate)
    two_classes = ImageSet(images.images, torch.zeros_like(images.labels), ("0", "1"), images.ids)
    early = min(method.secret_only, method.epochs - 1)
    if early:
        trained(early, True)
    trained(method.epochs - early, False)
    network.eval().requires_grad_(False)
    return network.encoder, network.decoder


def steganographic_loss(
    encoder: Encoder,
    decoder: Decoder,
    images: Tensor,
    secrets: Tensor,
    method: InvisibleAttack,
    secret_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """The loss () of images (N, C, H, W) in [0, 1] and their bits (N, B); the decoder's logits (N, B)."""
    residual = encoder(images, secrets)
    written = (images + residual).clamp(0, 1)
    # Read as stored, in 8 bits; the gradient passes by the rounding.
    stored = written + (written.mul(255).round().div(255) - written).detach()
    logits = decoder(stored)
    unread = F.binary_cross_entropy_with_logits(logits, secrets)
    if secret_only:
        return unread, logits
    unlike = 1 - structural_similarity(images, written, 1.0).mean()
    change = residual.square().mean()
    value = method.residual_weight * change + method.similarity_weight * unlike
    return value + method.secret_weight * unread, logits


@torch.no_grad()
def quality(trigger: SecretWritten, decoder: Decoder, clean: Tensor) -> dict[str, float]:
    """On stored bytes, of uint8 images (N, C, H, W): how well the secret is read, how little it is seen."""
    written = stamp(trigger, clean)
    logits = torch.cat([decoder(to_float(batch)) for batch in written.split(256)])
    read = (logits > 0).float() == trigger.secret
    noise = psnr(clean, written)
    return {
        "bit_accuracy": float(read.double().mean()),
        "psnr": float(noise[noise.isfinite()].mean()) if bool(noise.isfinite().any()) else float("inf"),
        "images_changed": float((written != clean).flatten(1).any(1).double().mean()),
    }
