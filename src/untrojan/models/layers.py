"""Building blocks shared by the families.

Every activation is its own, out-of-place module: a feature tap can then name it, and what a hook recorded
is never overwritten by the next layer.
"""

from __future__ import annotations

from torch import Tensor, nn

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm)


def bearable_rate(rate: float, network: nn.Module) -> float:
    """SGD's learning rate ``rate``, as published for networks with batch norm; a tenth of it, which is ours,
    for one without norm layers."""
    normalised = any(isinstance(each, _NORMS) for each in network.modules())
    return rate if normalised else 0.1 * rate


def scaled(filters: int, width: float) -> int:
    """``filters`` times the width multiplier, rounded, never below 4."""
    return max(4, round(filters * width))


def conv_bn_relu(in_channels: int, filters: int, stride: int = 1, bias: bool = False) -> list[nn.Module]:
    """A padded 3x3 convolution, batch norm and ReLU."""
    convolution = nn.Conv2d(in_channels, filters, 3, stride, padding=1, bias=bias)
    return [convolution, nn.BatchNorm2d(filters), nn.ReLU()]


class GlobalAveragePool(nn.Module):
    """(N, C, H, W) to (N, C): the mean over places."""

    def forward(self, features: Tensor) -> Tensor:
        return features.mean((2, 3))


def with_group_norm(network: nn.Module) -> nn.Module:
    """The network with group norm where it had batch norm, which mixes the images of a batch.

    Wu & He, "Group Normalization" (2018): up to 32 groups, here of four channels at least where there are as
    many, for a group of one channel and one place would normalise everything to zero. Weights and biases of
    the norms are kept, statistics are not.
    """
    made: dict[nn.Module, nn.GroupNorm] = {}
    for parent in list(network.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                made.setdefault(child, _group_norm(child))
                setattr(parent, name, made[child])
    return network


def _group_norm(norm: nn.modules.batchnorm._BatchNorm) -> nn.GroupNorm:
    channels = norm.num_features
    most = max(1, min(32, channels // 4))
    groups = next(count for count in range(most, 0, -1) if channels % count == 0)
    made = nn.GroupNorm(groups, channels, eps=norm.eps, affine=norm.affine)
    if norm.affine:
        made.load_state_dict({"weight": norm.weight, "bias": norm.bias})
    return made


def he_initialise(network: nn.Module) -> nn.Module:
    """He-normal weights and zero biases, for networks without batch norm, which would else fade out.

    He et al., "Delving Deep into Rectifiers" (2015), section 2.2.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network
