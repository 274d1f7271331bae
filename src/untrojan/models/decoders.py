"""Decoders: from an encoder's features back to images, by Gaussian-randomised upsampling and its rivals.

Tao et al., "Model Hardening Against Pervasive Backdoors" (DECK), section IV-A and appendix I.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from untrojan.data.image_set import ImageSet, numbered
from untrojan.errors import UntrojanError
from untrojan.metrics.images import psnr
from untrojan.models.classifier import Classifier
from untrojan.models.encoders import Encoder, cached_file, load_encoder, read_cached, resumable, write_cached
from untrojan.seeding import generator
from untrojan.training.loop import train
from untrojan.training.recipe import Recipe

Upsampling = Literal["gaussian", "nearest", "zero", "swwae"]

RECIPE = Recipe(epochs=10, batch_size=32, learning_rate=3e-3, schedule="one_cycle", flip=True)
"""Adam on the mean squared error; the paper states neither optimiser nor length."""
MOST_IMAGES = 5000
"""A decoder has some ten thousand weights and every image hundreds of places to learn them from."""
LEAST_STEPS = 500
"""Of few images, as many epochs are made as this takes."""
LEAST_IMAGES = 64
LEAST_PSNR = 22.0
"""dB on images the decoder was not trained on, below which it is refused."""
_PATCH = 64
_HELD_OUT = 256
_NOISE_FLOATS = 1 << 24


def upsample(
    features: Tensor, how: Upsampling, noise: Tensor | None = None, switches: Tensor | None = None
) -> Tensor:
    """(N, C, H, W) to (N, C, 2H, 2W): the inverse of a pooling, as far as there is one.

    ``gaussian`` and ``zero`` put each value top left in its 2x2 square. The other three are ``noise``'s
    (n, C, 2H, 2W), whose n maps serve N by turns, or zero. ``nearest`` fills the square; ``swwae`` puts the
    value where ``switches`` say the maximum was.
    """
    if how == "nearest":
        return F.interpolate(features, scale_factor=2, mode="nearest")
    if how == "swwae":
        assert switches is not None
        return F.max_unpool2d(features, switches, [2, 2])
    if how == "zero":
        noise = features.new_zeros(1, features.shape[1], 1, 1)
    assert noise is not None
    filled: Tensor = _TopLeft.apply(features, noise)  # type: ignore[no-untyped-call]
    return filled


class _TopLeft(torch.autograd.Function):
    """Features (N, ...) in every other row and column of backgrounds (n, ...) that serve them by turns.

    Autograd's own way with such an assignment copies the whole map forth and back, for a gradient of the
    background that nobody asks for.
    """

    @staticmethod
    def forward(ctx: object, features: Tensor, background: Tensor) -> Tensor:
        count, channels, height, width = features.shape
        filled = torch.empty(
            (count, channels, 2 * height, 2 * width), dtype=features.dtype, device=features.device,
            memory_format=torch.channels_last,
        )  # fmt: skip
        filled.unflatten(0, (-1, len(background))).copy_(background)
        filled[..., ::2, ::2] = features
        return filled

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][..., ::2, ::2], None


class Decoder(nn.Module):
    """An encoder's mirror: for each of its stages an upsampling and a transposed 3x3 convolution a filter
    bank, with ReLU between.

    It belongs to the encoder whose fingerprint it carries. ``psnr`` is the mean over held-out images of what
    it was trained on, in dB; None until then.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder, upsampling: Upsampling = "gaussian") -> None:
        super().__init__()
        if upsampling not in get_args(Upsampling):
            raise UntrojanError(
                f"unknown upsampling {upsampling!r}: choose one of {', '.join(get_args(Upsampling))}"
            )
        if upsampling == "swwae":
            encoder.encode(torch.zeros(1, 3, 8, 8, device=encoder.mean.device), switches=True)
        self.upsampling: Upsampling = upsampling
        self.encoder_fingerprint = encoder.fingerprint()
        self.psnr: float | None = None
        self._drawn: tuple[tuple[int, int, int], list[Tensor]] | None = None
        below = [3, *(widths[-1] for widths in encoder.filters[:-1])]
        self.stages = nn.ModuleList()
        for depth in reversed(range(len(encoder.filters))):
            widths = [*reversed(encoder.filters[depth]), below[depth]]
            layers: list[nn.Module] = []
            for wide, narrow in pairwise(widths):
                layers += [nn.ConvTranspose2d(wide, narrow, 3, padding=1), nn.ReLU()]
            self.stages.append(nn.Sequential(*(layers if depth else layers[:-1])))
            # Trained from the encoder's activations before any weight is.
            self.register_buffer(f"deviation{depth}", torch.ones(widths[0]))
        self.register_buffer("mean", encoder.mean.clone())
        self.register_buffer("std", encoder.std.clone())
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(
        self, features: Tensor, noise: Sequence[Tensor] | None = None, switches: Sequence[Tensor] = ()
    ) -> Tensor:
        """Images (N, 3, f H, f W) on the 0..255 scale, not clipped, of features (N, C', H, W).

        ``noise`` is :meth:`noise`'s, for each stage (n, C, ...), whose n maps serve N by turns, drawn from
        torch's global generator where it is not given; ``switches`` are the encoder's.
        """
        value = features
        for index, stage in enumerate(self.stages):
            depth = len(self.stages) - 1 - index
            deviation = self.deviation(depth)
            # Features of pixel levels, weights of order one: a channel's deviation lies between.
            unit = deviation.clamp_min(1e-3)
            chosen = None
            if self.upsampling == "gaussian":
                shape = (len(value), len(unit), 2 * value.shape[2], 2 * value.shape[3])
                chosen = torch.randn(shape, device=value.device) if noise is None else noise[index]
                chosen = chosen * (deviation / unit)[:, None, None]
            place = switches[depth] if switches else None
            scaled = (value / unit[:, None, None]).to(value.dtype)
            value = stage(upsample(scaled, self.upsampling, chosen, place))
            value = (
                value * self.deviation(depth - 1)[:, None, None] if depth else value * self.std + self.mean
            )
        return value

    @property
    def switched(self) -> bool:
        """Whether it needs the encoder's switches."""
        return self.upsampling == "swwae"

    def deviation(self, depth: int) -> Tensor:
        """(C,): the deviation of each channel of what the encoder's stage pools, in pixel levels."""
        return self.get_buffer(f"deviation{depth}")

    def noise(self, count: int, height: int, width: int, seed: int = 0) -> list[Tensor] | None:
        """Standard normal numbers for ``count`` maps of ``height`` x ``width``, on the decoder's device.

        Each map's depend on the seed and its number alone. Large maps share theirs, to spare memory. None
        for upsampling without chance.
        """
        if self.upsampling != "gaussian":
            return None
        # Drawing takes as long as decoding, and a search asks for the same numbers at every step.
        if self._drawn is None or self._drawn[0] != (height, width, seed):
            self._drawn = (height, width, seed), self._draw(height, width, seed)
        return [bank.to(self.mean.device)[torch.arange(count) % len(bank)] for bank in self._drawn[1]]

    def _draw(self, height: int, width: int, seed: int) -> list[Tensor]:
        banks = []
        for index in range(len(self.stages)):
            depth = len(self.stages) - 1 - index
            channels, sides = len(self.deviation(depth)), (height << index + 1, width << index + 1)
            several = max(1, min(32, _NOISE_FLOATS // (channels * sides[0] * sides[1])))
            random = generator(seed, "upsampling", index)
            banks.append(torch.randn(several, channels, *sides, generator=random))
        return banks

    def check(self, encoder: Encoder, least_psnr: float = LEAST_PSNR) -> None:
        """Raise UntrojanError unless this decoder was trained, for this encoder, and well enough."""
        again = "train it: untrojan repair --train-decoder IMAGES"
        if self.encoder_fingerprint != encoder.fingerprint():
            raise UntrojanError(f"the decoder was made for another encoder than this {encoder.name}: {again}")
        if self.psnr is None:
            raise UntrojanError(f"the decoder has not been trained: {again}")
        if not self.psnr >= least_psnr:
            raise UntrojanError(
                f"the decoder reconstructs images to {self.psnr:.1f} dB of PSNR where {least_psnr:.1f} are "
                "needed: train it on more images or for more epochs, or choose another encoder"
            )


@torch.no_grad()
def reconstruct(encoder: Encoder, decoder: Decoder, images: Tensor, *, seed: int = 0) -> Tensor:
    """uint8 images (N, C, H, W) through encoder and decoder, uint8 of the same shape; grey stays grey."""
    height, width = images.shape[2:]
    done = []
    for batch in images.split(256):
        encoding = encoder.encode(batch.to(encoder.mean.device).float(), switches=decoder.switched)
        rows, columns = encoding.features.shape[2:]
        noise = decoder.noise(len(batch), rows, columns, seed)
        decoded = decoder(encoding.features, noise, encoding.switches)[..., :height, :width]
        if images.shape[1] == 1:
            decoded = decoded.mean(1, keepdim=True)
        done.append(decoded.round().clamp(0, 255).to(torch.uint8).cpu())
    return torch.cat(done)


def train_decoder(
    encoder: Encoder,
    images: Tensor,
    *,
    upsampling: Upsampling = "gaussian",
    recipe: Recipe = RECIPE,
    seed: int = 0,
    checkpoint: Path | None = None,
) -> Decoder:
    """A decoder for ``encoder``, on its device, trained on uint8 images (N, C, H, W), C 1 or 3.

    The mean squared error of the reconstruction is minimised with the encoder fixed (section IV-A). At
    most :data:`MOST_IMAGES` are used, of larger ones a random patch; a tenth is held out, for ``psnr``.
    ``checkpoint`` is the training loop's. Raises UntrojanError where there are too few images.
    """
    if len(images) < LEAST_IMAGES:
        raise UntrojanError(
            f"{len(images)} images are too few to train a decoder: give {LEAST_IMAGES} at least"
        )
    order = torch.randperm(len(images), generator=generator(seed, "decoder"))[:MOST_IMAGES]
    held_out = order[: max(LEAST_IMAGES // 2, min(_HELD_OUT, len(order) // 10))]
    patches = _patches(images[order[len(held_out) :]], seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator(seed, "initialisation").initial_seed())
        decoder = Decoder(encoder, upsampling).to(encoder.mean.device)
    _measure_deviations(decoder, encoder, patches[:512])
    _fit(decoder, encoder, patches, recipe, seed, checkpoint)
    decoder.psnr = reconstruction_psnr(encoder, decoder, images[held_out])
    return decoder.eval().requires_grad_(False)


def reconstruction_psnr(encoder: Encoder, decoder: Decoder, images: Tensor) -> float:
    """Mean PSNR in dB over uint8 images (N, C, H, W)."""
    return float(psnr(images, reconstruct(encoder, decoder, images)).mean())


def prepare_decoder(
    encoder_name: str,
    images: ImageSet,
    *,
    upsampling: Upsampling = "gaussian",
    recipe: Recipe | None = None,
    least_psnr: float = LEAST_PSNR,
    seed: int = 0,
    retrain: bool = False,
    device: str = "cpu",
) -> tuple[Encoder, Decoder]:
    """The encoder of that name and a decoder for it that is good enough on ``images``.

    The decoder comes from the user's cache, from :func:`decoder_file`; it is trained on ``images`` and kept
    where there is none, where the one there is not good enough on them, and with ``retrain``. An interrupted
    training goes on. ``recipe`` is :data:`RECIPE`, with more epochs for few images, where none is given.
    ``seed`` is the local encoder's: a decoder is made once for whatever is asked of it.

    Raises UntrojanError as :func:`~untrojan.models.encoders.load_encoder` and :func:`train_decoder` do, and
    for a decoder that ``images`` do not train to ``least_psnr``.
    """
    encoder = load_encoder(encoder_name, images, seed=seed).to(device)
    place = decoder_file(encoder, upsampling, recipe or RECIPE)
    decoder = None if retrain else _recall(place, encoder, upsampling)
    if decoder is not None:
        order = torch.randperm(len(images), generator=generator(0, "decoder"))[:_HELD_OUT]
        decoder.psnr = reconstruction_psnr(encoder, decoder, images.images[order])
    if decoder is None or not (decoder.psnr or 0.0) >= least_psnr:
        checkpoint = resumable(place.with_name(f"{place.stem}-{images.fingerprint()[:16]}.training"))
        decoder = train_decoder(
            encoder, images.images, upsampling=upsampling, recipe=recipe or _recipe_for(len(images)),
            checkpoint=checkpoint,
        )  # fmt: skip
        if checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
        decoder.check(encoder, least_psnr)
        write_cached(place, decoder.state_dict(), {"psnr": repr(decoder.psnr)})
    return encoder, decoder


def _recipe_for(images: int) -> Recipe:
    an_epoch = -(-min(images, MOST_IMAGES) // RECIPE.batch_size)
    return replace(RECIPE, epochs=max(RECIPE.epochs, -(-LEAST_STEPS // an_epoch)))


def decoder_file(encoder: Encoder, upsampling: Upsampling = "gaussian", recipe: Recipe = RECIPE) -> Path:
    """Where the user's cache keeps the decoder of that encoder, which the weights name, and settings."""
    identity = {
        "encoder": encoder.fingerprint(), "upsampling": upsampling, "recipe": asdict(recipe),
        "most_images": MOST_IMAGES,
    }  # fmt: skip
    return cached_file("decoders", identity)


def _recall(place: Path, encoder: Encoder, upsampling: Upsampling) -> Decoder | None:
    kept = read_cached(place)
    if kept is None:
        return None
    decoder = Decoder(encoder, upsampling)
    try:
        decoder.load_state_dict(kept[0])
        decoder.psnr = float(kept[1]["psnr"])
    except (RuntimeError, KeyError, ValueError):
        return None
    return decoder.to(encoder.mean.device).eval().requires_grad_(False)


def _patches(images: Tensor, seed: int) -> Tensor:
    """A random window of each image that is larger than :data:`_PATCH` a side."""
    height, width = images.shape[2:]
    tall, wide = min(height, _PATCH), min(width, _PATCH)
    if (tall, wide) == (height, width):
        return images
    random = generator(seed, "patches")
    rows = torch.randint(height - tall + 1, (len(images), 1), generator=random) + torch.arange(tall)
    columns = torch.randint(width - wide + 1, (len(images), 1), generator=random) + torch.arange(wide)
    every = torch.arange(len(images))[:, None, None]
    return images[every, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def _measure_deviations(decoder: Decoder, encoder: Encoder, images: Tensor) -> None:
    encoding = encoder.encode(images.to(encoder.mean.device).float(), before=True)
    for depth, activations in enumerate(encoding.before_pooling):
        decoder.deviation(depth).copy_(activations.std((0, 2, 3)))


def _fit(
    decoder: Decoder, encoder: Encoder, images: Tensor, recipe: Recipe, seed: int, checkpoint: Path | None
) -> None:
    """The one training loop, which trains classifiers, on a network that is none.

    The decoder takes the place of a network of two classes, reconstructed well enough and not, so that the
    loop's accuracy is the share of images above the least PSNR. Every image's label is the first.
    """
    data = ImageSet(
        images, torch.zeros(len(images), dtype=torch.int64), ("reconstructed", "not"), numbered(len(images))
    )
    wanted = 10 ** (-LEAST_PSNR / 10)

    def loss(model: Classifier, batch: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            encoding = encoder.encode(255 * batch, switches=decoder.switched)
        height, width = batch.shape[2:]
        decoded = decoder(encoding.features, None, encoding.switches)[..., :height, :width]
        errors = (decoded / 255 - batch).square().flatten(1).mean(1)
        return errors.mean(), torch.stack([wanted - errors, errors - wanted], 1)

    model = Classifier(decoder, 2, torch.zeros(3), torch.ones(3)).to(encoder.mean.device)
    train(
        model, data, recipe, seed=seed, checkpoint=checkpoint, loss=loss, description="training the decoder",
        method=f"decoder {decoder.upsampling} {decoder.encoder_fingerprint}",
    )  # fmt: skip
