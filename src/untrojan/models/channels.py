"""The strongest activation of every channel, image by image, of any network, in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from untrojan.models.classifier import Classifier, evaluating, to_float
from untrojan.models.taps import levels_of
from untrojan.progress import task

Reduction = Literal["max", "mean"]


def weighted_layers(model: Classifier, image: Tensor) -> dict[str, nn.Conv2d | nn.Linear]:
    """Convolutional and linear layers by path, but for the classification layer and those whose weights are
    not trained. ``image`` is float (1, C, H, W)."""
    last = levels_of(model, image).get("penultimate")
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        and module.weight.requires_grad
        and (last is None or path != last.path)
    }


def channel_activations(
    model: Classifier, images: Tensor, reduction: Reduction = "max", batch_size: int = 512
) -> tuple[dict[str, Tensor], Tensor]:
    """For each layer of :func:`weighted_layers` the raw outputs (N, C), and the model's logits (N, K).

    ``images`` are uint8 (N, C, H, W). Outputs are taken before batch norm and activation; of a convolution,
    the ``max`` or ``mean`` over places, reduced while the batch goes through: memory does not depend on the
    size of feature maps. A layer that runs more than once counts with its last run. In evaluation mode; the
    mode is restored.
    """
    layers = weighted_layers(model, to_float(images[:1], model.device))
    found = {path: torch.empty(len(images), _width(layer)) for path, layer in layers.items()}
    logits = torch.empty(len(images), model.num_classes)
    latest: dict[str, Tensor] = {}
    with (
        torch.no_grad(),
        evaluating(model),
        _watched(layers, latest, reduction),
        task("reading activations", len(images), "images") as bar,
    ):
        for rows in torch.arange(len(images)).split(batch_size):
            logits[rows] = model(to_float(images[rows], model.device)).cpu()
            for path, values in latest.items():
                found[path][rows] = values.cpu()
            bar.advance(len(rows))
    return found, logits


def _width(layer: nn.Conv2d | nn.Linear) -> int:
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features


@contextmanager
def _watched(
    layers: dict[str, nn.Conv2d | nn.Linear], latest: dict[str, Tensor], reduction: Reduction
) -> Iterator[None]:
    def watch(path: str, layer: nn.Module) -> RemovableHandle:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            places = output.flatten(2) if output.ndim == 4 else output.unsqueeze(2)
            latest[path] = (places.amax(2) if reduction == "max" else places.mean(2)).float()

        return layer.register_forward_hook(hook)

    handles = [watch(path, layer) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def norms_after(model: Classifier, image: Tensor) -> dict[str, nn.BatchNorm2d | nn.GroupNorm]:
    """For each layer's path, the norm that takes the layer's output, where there is one."""
    outputs: dict[int, str] = {}
    found: dict[str, nn.BatchNorm2d | nn.GroupNorm] = {}
    alive: list[Tensor] = []

    def watch(path: str, module: nn.Module) -> RemovableHandle:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(module, nn.Conv2d | nn.Linear):
                outputs[id(output)] = path
                # Kept, or another tensor might get the same identity.
                alive.append(output)
            elif id(arguments[0]) in outputs:
                found[outputs[id(arguments[0])]] = module  # type: ignore[assignment]

        return module.register_forward_hook(hook)

    watched = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.GroupNorm)
    handles = [watch(path, m) for path, m in model.named_modules() if isinstance(m, watched)]
    try:
        with torch.no_grad(), evaluating(model):
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return found
