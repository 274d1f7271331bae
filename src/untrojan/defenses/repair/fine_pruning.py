"""Fine-pruning: silence the channels that clean images leave idle, then fine-tune.

Liu, Dolan-Gavitt and Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks",
RAID 2018, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Gt, Interval
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from untrojan.data.image_set import ImageSet
from untrojan.defenses.repair.report import RepairReport
from untrojan.defenses.repair.tuning import Tuning
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier, evaluating, predictions_of, to_float
from untrojan.models.frozen import trainable
from untrojan.models.taps import Place, features_of, levels_of

LAST_BLOCK = "s3"

Reader = nn.Linear | nn.Conv2d


def idle_order(activations: Tensor) -> Tensor:
    """Channels by mean activation, the most idle first, int64 (C,), from feature maps (N, C, H, W)."""
    return activations.mean((0, 2, 3)).argsort(stable=True)


def silenced(weight: Tensor, channels: Tensor, of: int) -> Tensor:
    """bool, like ``weight`` (out, in, ...): what reads any of the ``channels`` (n,) among ``of``. A linear
    layer behind a flattened map has a run of inputs a channel."""
    inputs = torch.arange(weight.shape[1], device=weight.device) // (weight.shape[1] // of)
    read = torch.isin(inputs, channels.to(weight.device))
    return read.view(1, -1, *[1] * (weight.ndim - 2)).expand_as(weight)


def reader_of(model: Classifier, images: Tensor) -> Reader:
    """The layer that reads the last convolutional block.

    A channel of the block's output is masked by zeroing this layer's weights for it: the same function, and
    an ordinary network of the same shape. Whether it is the same function is tried on ``images``, uint8
    (N, C, H, W). Raises UntrojanError where the network has no such block or layer.
    """
    batch = to_float(images, model.device)
    place = levels_of(model, batch[:1]).get(LAST_BLOCK)
    if place is None:
        raise UntrojanError("fine-pruning needs a network with a convolutional block: this one has none")
    readers: list[Reader] = []
    width = 0
    with torch.no_grad(), evaluating(model), _watched(model, place, readers) as mask:
        model(batch)
        width = len(mask)
        if readers and not readers[0].weight.shape[1] % width:
            mask[::2] = 0
            expected = model(batch)
            mask[:] = 1
            weight, even = readers[0].weight, torch.arange(0, width, 2)
            kept = weight.detach().clone()
            weight.masked_fill_(silenced(weight, even, width), 0)
            found = model(batch)
            weight.copy_(kept)
            if torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
                return readers[0]
    raise UntrojanError(
        "fine-pruning needs a network in which one layer alone reads the last convolutional block "
        f"({place.path})"
    )


@contextmanager
def _watched(model: Classifier, place: Place, readers: list[Reader]) -> Iterator[Tensor]:
    """Find the first layer with weights that runs after ``place``; multiply the channels there by the tensor
    given, (C,), which takes its length in the first forward."""
    mask = torch.ones(0, device=model.device)
    runs = 0
    passed = False

    def after_place(_: nn.Module, __: object, output: Tensor) -> Tensor | None:
        nonlocal runs, passed
        runs += 1
        if place.run is not None and runs - 1 != place.run:
            return None
        passed = True
        if not len(mask):
            mask.resize_(output.shape[1]).fill_(1)
        return output * mask.to(output.dtype)[:, None, None]

    def before_layer(module: nn.Module, _: object) -> None:
        if passed and not readers and isinstance(module, Reader):
            readers.append(module)

    def before_model(_: nn.Module, __: object) -> None:
        nonlocal runs, passed
        runs, passed = 0, False

    modules = dict(model.named_modules())
    handles: list[RemovableHandle] = [
        modules[place.path].register_forward_hook(after_place),
        model.register_forward_pre_hook(before_model),
        *(m.register_forward_pre_hook(before_layer) for m in modules.values() if isinstance(m, Reader)),
    ]
    try:
        yield mask
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class FinePruning(Tuning):
    """Prune the last convolutional block's channels, the most idle on clean images first, as long as accuracy
    on the clean images falls by 4 points at most (the paper's bound); then fine-tune with what was pruned
    held at zero.

    The learning rate is that of the toolbox of DECK's authors. They prune a fifth of the channels and then
    start the block's batch norm afresh; here nothing but masks is changed, and accuracy says how many.
    """

    learning_rate: Annotated[float, Gt(0)] = 0.01
    step: Annotated[float, Interval(gt=0, le=1)] = 0.02
    """Share of the channels pruned before the next look."""
    most: Annotated[float, Interval(gt=0, lt=1)] = 0.95
    """Share of the channels pruned at most."""
    accuracy_cost: Annotated[float, Interval(ge=0, le=1)] = 0.04
    """Pruning stops before accuracy on the clean images falls by more."""

    def __call__(self, model: Classifier, clean: ImageSet, *, checkpoint: Path | None = None) -> RepairReport:
        """Prune and fine-tune on ``clean``, uint8 images rightly labelled.

        Raises UntrojanError for a network without a convolutional block that one layer reads, and as
        training does.
        """
        repaired = trainable(model)
        reader = reader_of(repaired, clean.images[:64])
        order = idle_order(features_of(repaired, clean.images, LAST_BLOCK))
        looks = self._prune(repaired, reader, clean, order)
        pruned = order[: int(looks[-1]["channels"])]
        gone = silenced(reader.weight, pruned, len(order))
        # A weight at zero without gradient stays there: neither momentum nor weight decay moves it.
        held = reader.weight.register_hook(lambda gradient: gradient.masked_fill(gone, 0))
        try:
            epochs = self.tune(repaired, clean, "fine-tuning", checkpoint=checkpoint)
        finally:
            held.remove()
        history = {"looks": looks, "epochs": epochs, "pruned": sorted(pruned.tolist())}
        return RepairReport(repaired, history)

    def _prune(
        self, model: Classifier, reader: Reader, clean: ImageSet, order: Tensor
    ) -> list[dict[str, float]]:
        """Prune as far as accuracy allows, in place; what was seen at each step."""
        looks = [_look(model, clean, 0, len(order))]
        count = max(1, round(self.step * len(order)))
        for channels in range(count, int(self.most * len(order)) + 1, count):
            kept = reader.weight.detach().clone()
            with torch.no_grad():
                reader.weight.masked_fill_(silenced(reader.weight, order[:channels], len(order)), 0)
            look = _look(model, clean, channels, len(order))
            if look["benign_accuracy"] < looks[0]["benign_accuracy"] - self.accuracy_cost:
                with torch.no_grad():
                    reader.weight.copy_(kept)
                break
            looks.append(look)
        return looks


def _look(model: Classifier, clean: ImageSet, channels: int, of: int) -> dict[str, float]:
    right = predictions_of(model, clean.images) == clean.labels
    return {"channels": channels, "pruned": channels / of, "benign_accuracy": float(right.double().mean())}
