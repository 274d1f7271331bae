"""A secret written into every image by a trained steganographic encoder: each image its own residual.

Tancik, Mildenhall & Ng, "StegaStamp" (2020), as an attack: Li et al., "Invisible Backdoor Attack with
Sample-Specific Triggers" (2021). The encoder works at the images' own size; one secret is written into all of
them. :mod:`untrojan.attacks.invisible` trains it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from untrojan.errors import UntrojanError
from untrojan.triggers.base import ImageShape

SECRET_SIDE = 8
"""The secret is laid out as a map of this side and enlarged to the image's."""
MOST_BITS = 1024
MOST_FILTERS = 256


class Encoder(nn.Module):
    """Image and secret to the residual that hides the one in the other."""

    def __init__(self, channels: int, bits: int, filters: int = 32) -> None:
        super().__init__()
        self.channels, self.bits = channels, bits
        self.secret = nn.Linear(bits, channels * SECRET_SIDE * SECRET_SIDE)
        self.first = nn.Conv2d(2 * channels, filters, 3, padding=1)
        self.down = nn.Conv2d(filters, filters, 3, stride=2, padding=1)
        self.low = nn.Conv2d(filters, filters, 3, padding=1)
        self.up = nn.Conv2d(filters, filters, 3, padding=1)
        self.last = nn.Conv2d(2 * filters + 2 * channels, filters, 3, padding=1)
        self.residual = nn.Conv2d(filters, channels, 1)

    def forward(self, images: Tensor, secrets: Tensor) -> Tensor:
        """float (N, C, H, W) in [0, 1] and bits (N, B) of 0 and 1 to residuals (N, C, H, W), unbounded."""
        size = images.shape[2:]
        written = F.relu(self.secret(secrets - 0.5)).view(-1, self.channels, SECRET_SIDE, SECRET_SIDE)
        both = torch.cat([images - 0.5, F.interpolate(written, size)], 1)
        fine = F.relu(self.first(both))
        coarse = F.relu(self.low(F.relu(self.down(fine))))
        raised = F.relu(self.up(F.interpolate(coarse, size)))
        residual: Tensor = self.residual(F.relu(self.last(torch.cat([both, fine, raised], 1))))
        return residual


class Decoder(nn.Module):
    """Image to the secret it holds."""

    def __init__(self, channels: int, bits: int, filters: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = [channels, filters, filters, 2 * filters, 2 * filters]
        for index, (before, after) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(before, after, 3, stride=1 + index % 2, padding=1), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.bits = nn.Linear(2 * filters * 16, bits)

    def forward(self, images: Tensor) -> Tensor:
        """float (N, C, H, W) in [0, 1] to a logit for each bit (N, B)."""
        logits: Tensor = self.bits(self.features(images - 0.5))
        return logits


@dataclass(frozen=True, eq=False)
class SecretWritten:
    """Images with one secret written into them; differentiable in the images."""

    encoder: Encoder
    secret: Tensor
    """float (B,) of 0 and 1."""

    def __call__(self, images: Tensor) -> Tensor:
        if not len(images):
            return images.clone()
        encoder = self.encoder.to(images.device)
        secrets = self.secret.to(images).expand(len(images), -1)
        written: Tensor = (images + encoder(images, secrets)).clamp(0, 1)
        return written

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The secret, and the encoder's weights as ``encoder.NAME``."""
        weights = {f"encoder.{name}": value.detach() for name, value in self.encoder.state_dict().items()}
        return {"secret": self.secret, **weights}


@dataclass(frozen=True)
class Invisible:
    """A trained encoder and its secret, read from a file."""

    encoder: Path | None = None
    """A ``.safetensors`` file with the tensors of a :class:`SecretWritten`, as ``untrojan poison --attack
    invisible`` writes to ``truth/trigger.safetensors``."""

    def draw(self, shape: ImageShape, seed: int) -> SecretWritten:
        """Raises UntrojanError where no file is named or it holds no encoder for images of this shape."""
        from safetensors import SafetensorError, safe_open

        if self.encoder is None:
            raise UntrojanError("the invisible trigger needs its encoder: give encoder=FILE.safetensors")
        try:
            with safe_open(self.encoder, framework="pt") as file:
                # The header alone tells shapes: nothing large is read before it fits.
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                sizes = _sizes(shapes)
                if sizes is None or sizes[0] != shape[0]:
                    raise UntrojanError(
                        f"{self.encoder} holds no encoder for images of {shape[0]} channels: train one"
                    )
                return from_tensors({name: file.get_tensor(name) for name in shapes})
        except (OSError, SafetensorError) as error:
            raise UntrojanError(f"{self.encoder} holds no readable encoder: {error}") from None


def from_tensors(tensors: Mapping[str, Tensor]) -> SecretWritten:
    """The trigger whose ``tensors`` these are. Raises UntrojanError where they are none's."""
    sizes = _sizes({name: tuple(value.shape) for name, value in tensors.items()})
    if sizes is None or not all(bool(value.float().isfinite().all()) for value in tensors.values()):
        raise UntrojanError("these tensors are no steganographic encoder and its secret")
    encoder = Encoder(*sizes)
    weights = {name.removeprefix("encoder."): tensors[name] for name in tensors if name != "secret"}
    encoder.load_state_dict(weights)
    return SecretWritten(encoder.eval().requires_grad_(False), tensors["secret"].float())


def _sizes(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int] | None:
    """(channels, bits, filters) of an encoder all of whose shapes are these; None where there is none."""
    residual, secret = shapes.get("encoder.residual.weight", ()), shapes.get("secret", ())
    if len(residual) != 4 or len(secret) != 1:
        return None
    channels, filters, bits = residual[0], residual[1], secret[0]
    if not (channels in (1, 3) and 0 < filters <= MOST_FILTERS and 0 < bits <= MOST_BITS):
        return None
    with torch.device("meta"):
        expected = Encoder(channels, bits, filters).state_dict()
    wanted = {f"encoder.{name}": tuple(value.shape) for name, value in expected.items()}
    return (channels, bits, filters) if dict(shapes) == {**wanted, "secret": (bits,)} else None
