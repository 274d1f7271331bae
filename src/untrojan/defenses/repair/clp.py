"""Channel Lipschitz pruning: a backdoor's channels answer more strongly than the rest of their layer.

Zheng et al., "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Gt
from torch import Tensor, nn

from untrojan.data.image_set import ImageSet
from untrojan.defenses.repair.report import RepairReport
from untrojan.errors import UntrojanError
from untrojan.models.channels import norms_after, weighted_layers
from untrojan.models.classifier import Classifier, to_float
from untrojan.models.frozen import trainable

Bound = Literal["kernel", "operator"]


def channel_norms(
    weight: Tensor, scale: Tensor | None = None, bound: Bound = "kernel", side: int = 32
) -> Tensor:
    """How far each output channel of a convolution can amplify its input, (C_out,) in float64.

    ``weight`` is (C_out, C_in, H, W); ``scale`` (C_out,) is what the batch norm behind it multiplies each
    channel by. ``kernel`` is the paper's: the spectral norm of the filter as a C_in by H*W
    matrix. ``operator`` is the norm of the channel as the linear map it is on images, stride 1: the largest
    over frequencies w of ||K(w)||, K the filter's Fourier transform; exact for periodic images of ``side``
    pixels a side. It is larger than the former by a factor between 1 and sqrt(H*W), not the same for each.
    """
    filters = weight.detach().double().flatten(2)
    # Both norms are of the filter's places among themselves, whatever the number of input channels.
    gram = filters.transpose(1, 2) @ filters
    if bound == "kernel":
        squares: Tensor = torch.linalg.eigvalsh(gram)[:, -1]
    else:
        rows, columns = torch.meshgrid(*(torch.arange(n) for n in weight.shape[2:]), indexing="ij")
        angles = 2 * torch.pi * torch.arange(side, dtype=torch.float64, device=gram.device) / side
        across = torch.outer(angles, columns.flatten().to(angles))
        down = torch.outer(angles, rows.flatten().to(angles))
        phases = torch.exp(1j * (down[:, None] + across[None]).flatten(0, 1))
        squares = torch.einsum("wp,cpq,wq->cw", phases.conj(), gram.to(phases.dtype), phases).real.amax(1)
    norms: Tensor = squares.clamp_min(0).sqrt()
    return norms if scale is None else norms * scale.detach().double().abs()


def outlying(norms: Tensor, deviations: float) -> Tensor:
    """bool (C,): above the mean by more than so many standard deviations."""
    if len(norms) < 2:
        return torch.zeros_like(norms, dtype=torch.bool)
    return norms > norms.mean() + deviations * norms.std()


@dataclass(frozen=True)
class CLP:
    """Set to zero every channel whose norm lies far above its layer's others. No data are needed.

    Of n channels none can lie (n - 1) / sqrt(n) deviations above the mean: with the paper's three, layers of
    ten channels or fewer are never pruned.
    """

    deviations: Annotated[float, Gt(0)] = 3.0
    """u: 3 for CIFAR-10 in the paper, 5 for Tiny ImageNet."""
    bound: Bound = "kernel"

    def __call__(self, model: Classifier, clean: ImageSet, *, checkpoint: Path | None = None) -> RepairReport:
        """Prune ``model``'s convolutions, but for one that classifies. Of ``clean`` only the shape counts.

        A batch norm (or group norm) that takes a convolution's output is folded into it, a channel is then
        pruned there, its weight and bias set to zero as in the released code; else in the convolution. A
        group norm's own division depends on the image and is left out of the fold.
        Raises UntrojanError for a network without convolutions, or without an image to tell the shape.
        """
        if not len(clean):
            raise UntrojanError("clp needs one image to tell how the network is connected: none was given")
        repaired = trainable(model)
        image = to_float(clean.images[:1], model.device)
        layers, norms = weighted_layers(repaired, image), norms_after(repaired, image)
        pruned: dict[str, list[int]] = {}
        seen = 0
        for path, layer in layers.items():
            if not isinstance(layer, nn.Conv2d):
                continue
            norm = norms.get(path)
            chosen = outlying(channel_norms(layer.weight, _scale(norm), self.bound), self.deviations)
            seen += len(chosen)
            if bool(chosen.any()):
                _silence(layer, norm, chosen)
                pruned[path] = chosen.nonzero().flatten().tolist()
        if not seen:
            raise UntrojanError("clp prunes convolutions and this network has none before its last layer")
        return RepairReport(repaired, {"pruned": pruned, "channels": seen})


def _scale(norm: nn.BatchNorm2d | nn.GroupNorm | None) -> Tensor | None:
    """What a norm multiplies each channel by, (C,)."""
    if norm is None:
        return None
    variance = getattr(norm, "running_var", None)
    if variance is None:
        return norm.weight
    spread: Tensor = (variance + norm.eps).sqrt()
    return 1 / spread if norm.weight is None else norm.weight / spread


@torch.no_grad()
def _silence(layer: nn.Conv2d, norm: nn.BatchNorm2d | nn.GroupNorm | None, channels: Tensor) -> None:
    affine = norm is not None and norm.weight is not None
    target = norm if affine and norm is not None else layer
    target.weight[channels] = 0
    if target.bias is not None:
        target.bias[channels] = 0
