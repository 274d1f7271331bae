"""DECK's pervasive backdoor: encode, transform the features region by region, decode.

Tao et al., "Model Hardening Against Pervasive Backdoors" (DECK), section IV-B.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from untrojan.errors import UntrojanError
from untrojan.inversion.engine import Adam, Schedule, Shrink
from untrojan.metrics.images import structural_similarity
from untrojan.models.decoders import LEAST_PSNR, Decoder
from untrojan.models.encoders import Encoder
from untrojan.models.precision import Precision, autocast, is_mixed
from untrojan.seeding import generator

STATISTICS = 12
"""The first of a pair's parameters: means and deviations, and the usual ones."""
STATISTICS_UNIT = 2550.0
"""Pixel levels to a parameter's one. Adam's steps are alike for all parameters: at a rate of .001 kernels,
near one, move a thousandth and statistics a hundredth of the pixels' range."""

IMAGES_A_FORWARD = 128
"""More outgrow a processor's caches: 512 cost half as much again each. An accelerator wants thousands."""

PAPER = Schedule(
    Adam(1e-3, (0.5, 0.9)),
    images_a_side=100,
    flip_fraction=0.9,
    most_steps=300,
    images_a_forward=IMAGES_A_FORWARD,
    shrink=Shrink(cost=1e-2, look_every=1, patience=10, rise=1.5, fall=1.5**1.5, give_up=300),
)
"""Section V-A: 100 images, 300 steps, 90 % flipped. The paper leaves open how its alpha moves: this is
Neural Cleanse's and MOTH's way, as are Adam's betas."""

FAST = Schedule(
    Adam(1e-3, (0.5, 0.9)),
    images_a_side=16,
    flip_fraction=0.9,
    most_steps=200,
    images_a_forward=IMAGES_A_FORWARD,
    shrink=Shrink(cost=1e-2, look_every=4, patience=2, rise=1.5, fall=1.5**1.5, give_up=20),
)


@dataclass(frozen=True)
class LossWeights:
    """Of equation 11's terms; section IV-B's values."""

    content: float = 1e-3
    """Of the features' mean squared error."""
    similarity: float = 100.0
    """Of 1 - SSIM: equation 7 is printed without the sign that makes images alike."""
    smoothness: float = 0.05
    statistics: float = 1.0
    """Of equation 9, the paper's "norm"."""


PAPER_WEIGHTS = LossWeights()


@dataclass(frozen=True, eq=False)
class Transformation:
    """What the parameters of A pairs stand for."""

    mean: Tensor
    """(A, 3): mu_b, in pixel levels."""
    deviation: Tensor
    """(A, 3): sigma_b, in pixel levels."""
    usual_mean: Tensor
    """(A, 3): the average over the source class's images; never moves."""
    usual_deviation: Tensor
    """(A, 3)."""
    kernels: Tensor
    """(A, z, z, C', C', m, m): of each region, from its last-but-two axis to the one before."""


@dataclass(frozen=True, eq=False)
class FeatureSpacePattern:
    """x' = clip(decode(regional convolution(encode(normalise(x))))): an
    :class:`~untrojan.inversion.engine.ImageProblem`.

    Parameters are (P, 12 + z^2 C'^2 m^2); see :meth:`unpack`. The decoder's random numbers are drawn once,
    from the seed, and each place in a batch has its own, so that the same images give the same result.
    Encoder and decoder follow the images to their device.

    Raises UntrojanError for a decoder of another encoder, one that was not trained, or one that does not
    reach ``least_psnr``.
    """

    encoder: Encoder
    decoder: Decoder
    regions: int = 4
    """z: a map is cut into z x z regions."""
    kernel: int = 3
    """m, odd: the side of a region's kernels, around which the region is padded with zeros."""
    seed: int = 0
    weights: LossWeights = PAPER_WEIGHTS
    least_psnr: float = LEAST_PSNR
    precision: Precision = "float32"
    """Of encoder and decoder in the search; in bfloat16 decoded pixels differ by a fifth of a level. The
    kernels, near one, would lose their small steps, and are always float32, as is :meth:`distance`."""
    relative: bool = False
    """Set out from the images themselves: statistics change by as much in each image, in place of becoming
    the same in all, and the image gets what the transformation changes in its decoding. Ours. The paper's way
    is far from an image before it has changed a feature, by the image's own brightness and contrast and by
    the decoder's error. Costs an encoding and a decoding more, without gradients."""
    both_sides: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.regions < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise UntrojanError(
                f"regions must be 1 or more and the kernel odd, not {self.regions} and {self.kernel}"
            )
        self.decoder.check(self.encoder, self.least_psnr)

    def initial(self, pairs: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
        """As :meth:`initial_on`, from mid grey's statistics, for want of images."""
        grey = torch.tensor([127.5, 64.0]).repeat_interleave(3)
        return self._start(pairs, grey.repeat(len(pairs), 1))

    def initial_on(self, pairs: Tensor, images_of: Callable[[int], Tensor]) -> Tensor:
        """The source class's average statistics, and kernels that change next to nothing."""
        averages = {}
        for source in pairs[:, 0].unique().tolist():
            images = images_of(source).float()
            spread, centre = torch.std_mean(images, (2, 3), correction=0)
            averages[source] = torch.cat([centre.mean(0).expand(3), spread.mean(0).expand(3)])
        return self._start(pairs, torch.stack([averages[source] for source in pairs[:, 0].tolist()]))

    def _start(self, pairs: Tensor, usual: Tensor) -> Tensor:
        channels, z, m = self.encoder.channels, self.regions, self.kernel
        identity = torch.zeros(channels, channels, m, m)
        identity[range(channels), range(channels), m // 2, m // 2] = 1
        drawn = [
            identity
            + 0.01
            * torch.randn(z, z, channels, channels, m, m, generator=generator(self.seed, "kernels", *pair))
            for pair in pairs.tolist()
        ]
        usual = usual / STATISTICS_UNIT
        return torch.cat([usual, usual, torch.stack(drawn).flatten(1)], 1)

    def unpack(self, parameters: Tensor) -> Transformation:
        """Parameters (A, ...) by name, in pixel levels."""
        channels, z, m = self.encoder.channels, self.regions, self.kernel
        mean, deviation, *usual = (
            (parameters[:, :STATISTICS] * STATISTICS_UNIT).unflatten(1, (4, 3)).unbind(1)
        )
        kernels = parameters[:, STATISTICS:].view(-1, z, z, channels, channels, m, m)
        return Transformation(mean, deviation, usual[0].detach(), usual[1].detach(), kernels)

    def views(self, parameters: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
        return self.embed(parameters, sources)

    def loss(self, logits: Tensor, parameters: Tensor, pairs: Tensor) -> Tensor:
        wanted = pairs[:, 1:].expand(-1, logits.shape[1])
        return F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none").mean(1)

    def embed(self, parameters: Tensor, images: Tensor) -> Tensor:
        self.encoder.to(images.device)
        self.decoder.to(images.device)
        found = self.unpack(parameters)
        pixels = 255 * images.expand(-1, -1, 3, -1, -1)
        decoded = self._decoded(self._normalised(pixels, found), found.kernels)
        if self.relative:
            with torch.no_grad():
                unchanged = self._decoded(pixels)
            decoded = pixels + (decoded - unchanged)
        if images.shape[2] == 1:
            decoded = decoded.mean(2, keepdim=True)
        embedded: Tensor = decoded.clamp(0, 255) / 255
        return embedded

    def _normalised(self, pixels: Tensor, found: Transformation) -> Tensor:
        """Equation 1, or as much of a change for each image."""
        mean, deviation = found.mean[:, None], found.deviation[:, None]
        if not self.relative:
            return with_statistics(pixels, mean, deviation)
        centre = pixels.mean((-2, -1), keepdim=True)
        spread = deviation / found.usual_deviation[:, None].clamp_min(1e-5)
        shift = mean - found.usual_mean[:, None]
        return (pixels - centre) * spread[..., None, None] + centre + shift[..., None, None]

    def _decoded(self, pixels: Tensor, kernels: Tensor | None = None) -> Tensor:
        """Of pixels (A, n, 3, H, W), through the kernels where there are any; not clipped."""
        pairs, count, _, height, width = pixels.shape
        with autocast(self.precision, pixels.device):
            encoding = self.encoder.encode(pixels.flatten(0, 1), switches=self.decoder.switched)
        features = encoding.features.float()
        if kernels is not None:
            features = regional_convolution(features.unflatten(0, (pairs, count)), kernels).flatten(0, 1)
        rows, columns = features.shape[2:]
        noise = self.decoder.noise(count, rows, columns, self.seed)
        with autocast(self.precision, pixels.device):
            # What the decoder's first layer would do to a map four times as large.
            given = features.bfloat16() if is_mixed(self.precision, pixels.device) else features
            decoded = self.decoder(given, noise, encoding.switches)[..., :height, :width].float()
        unflattened: Tensor = decoded.unflatten(0, (pairs, count))
        return unflattened

    def size(self, parameters: Tensor) -> Tensor:
        """Equation 9: how far the statistics are from the source class's, in pixel levels."""
        found = self.unpack(parameters)
        means = (found.mean - found.usual_mean).abs().mean(1)
        return means + (found.deviation - found.usual_deviation).abs().mean(1)

    def measure(self, parameters: Tensor, sources: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """What equation 11 multiplies by alpha, (A,), and the content distances (A, n)."""
        shape = sources.shape[:2]
        before, after = 255 * sources.flatten(0, 1), 255 * embedded.flatten(0, 1)
        distances = self._distances(before, after).unflatten(0, shape)
        unlike = (1 - structural_similarity(before, after)).unflatten(0, shape)
        # The pixels that there are, or the edges would count as steps to black.
        smooth = F.avg_pool2d(after, 3, 1, 1, count_include_pad=False)
        rough = (after - smooth).square().flatten(1).mean(1).unflatten(0, shape)
        weights = self.weights
        terms = weights.content * distances + weights.similarity * unlike + weights.smoothness * rough
        return terms.mean(1) + weights.statistics * self.size(parameters), distances.detach()

    @torch.no_grad()
    def distance(self, parameters: Tensor, images: Tensor, flipped: Tensor) -> Tensor:
        """The class distance (A,): the features' mean squared error over the flipped images, in squared pixel
        levels; NaN where none is flipped.

        ``images`` are (A, n, C, H, W) in [0, 1] without the transformation, ``flipped`` bool (A, n) says
        which of them it flips.
        """
        exact = replace(self, precision="float32")
        embedded = exact.embed(parameters, images)
        distances = exact._distances(255 * images.flatten(0, 1), 255 * embedded.flatten(0, 1))
        distances = distances.unflatten(0, images.shape[:2])
        hits = flipped.to(distances)
        mean: Tensor = (distances * hits).sum(1) / hits.sum(1)
        return mean

    def _distances(self, before: Tensor, after: Tensor) -> Tensor:
        with autocast(self.precision, before.device):
            change: Tensor = self.encoder(before).float() - self.encoder(after).float()
        return change.square().flatten(1).mean(1)


def with_statistics(images: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Images (..., C, H, W) on the 0..255 scale with that mean and deviation (..., C) in every channel.

    Equation 1; a channel without contrast is left without.
    """
    spread, centre = torch.std_mean(images, (-2, -1), correction=0, keepdim=True)
    standard = (images - centre) / (spread + 1e-5)
    return standard * deviation[..., None, None] + mean[..., None, None]


def regional_convolution(features: Tensor, kernels: Tensor) -> Tensor:
    """Each region of a map by its own kernels, zero-padded at the region's edges.

    ``features`` (A, n, C, H, W), ``kernels`` (A, z, z, C, C, m, m); same shape out as in (equations 2 and
    3). Where z does not divide a side, the last regions are smaller.
    """
    pairs, count, channels, height, width = features.shape
    z, m = kernels.shape[1], kernels.shape[-1]
    bottom, right = -height % z, -width % z
    padded = F.pad(features, (0, right, 0, bottom)) if bottom or right else features
    tall, wide = padded.shape[3] // z, padded.shape[4] // z
    # A group a pair and region, the images of a pair as the batch: one convolution for all.
    cut = padded.view(pairs, count, channels, z, tall, z, wide).permute(1, 0, 3, 5, 2, 4, 6)
    groups = pairs * z * z
    changed = F.conv2d(
        cut.reshape(count, groups * channels, tall, wide),
        kernels.reshape(groups * channels, channels, m, m),
        padding=m // 2,
        groups=groups,
    )
    stitched = changed.view(count, pairs, z, z, channels, tall, wide).permute(1, 0, 4, 2, 5, 3, 6)
    return stitched.reshape(pairs, count, channels, z * tall, z * wide)[..., :height, :width]
