"""Adversarial neuron pruning: a backdoor's neurons are those that perturbed weights excite most.

Wu & Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", NeurIPS 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn
from torch.func import functional_call

from untrojan.data.image_set import ImageSet
from untrojan.defenses.repair.clean_data import epochs_for, held_out, weights_fingerprint
from untrojan.defenses.repair.report import RepairReport
from untrojan.errors import UntrojanError
from untrojan.models.channels import weighted_layers
from untrojan.models.classifier import Classifier, predictions_of, to_float
from untrojan.models.frozen import trainable
from untrojan.training.loop import train
from untrojan.training.recipe import Recipe

THRESHOLDS = tuple(round(0.05 * number, 2) for number in range(19))
"""0 to .9: those the released code looks at."""


def masked_weights(
    layers: dict[str, nn.Module], masks: Sequence[Tensor], noises: Sequence[Tensor], biases: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Each layer's weight times (mask + noise) and its bias times (1 + its noise), by parameter name.

    Masks and noises are (C,), one number an output channel.
    """
    replaced = {}
    for (path, layer), mask, noise, bias_noise in zip(layers.items(), masks, noises, biases, strict=True):
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor)
        shape = (-1, *(1 for _ in weight.shape[1:]))
        replaced[f"{path}.weight"] = weight.detach() * (mask + noise).view(shape)
        if isinstance(bias, Tensor):
            replaced[f"{path}.bias"] = bias.detach() * (1 + bias_noise)
    return replaced


@dataclass(frozen=True)
class ANP:
    """Learn a mask of each neuron that keeps the loss low while an adversary perturbs the neurons' weights,
    and prune the neurons whose masks end low.

    The paper's constants, but for its optimiser's momentum, which is Nesterov's here. The threshold is the
    largest at which accuracy on held-out clean images has not fallen by more than ``tolerance``; the released
    code sweeps it on triggered test images, which no defender has.
    """

    epsilon: Annotated[float, Ge(0)] = 0.4
    """Of the perturbations' start and of their ascent together; the ascent is not projected back, so that
    they reach twice as far, as in the released code."""
    perturbation_steps: Annotated[int, Ge(1)] = 1
    trade_off: Annotated[float, Interval(ge=0, le=1)] = 0.2
    """alpha, the weight of the loss without perturbations."""
    steps: Annotated[int, Ge(1)] = 2000
    batch_size: Annotated[int, Ge(2)] = 128
    learning_rate: Annotated[float, Gt(0)] = 0.2
    batch_statistics: bool = True
    """Batch norm normalises by the batch's statistics while masks are learned, as in the released code."""
    tolerance: Annotated[float, Interval(ge=0, le=1)] = 0.02
    held_out: Annotated[float, Interval(gt=0, lt=1)] = 0.5
    """Share of the clean images that masks are not learned on, for the threshold."""
    seed: int = 0

    def __call__(self, model: Classifier, clean: ImageSet, *, checkpoint: Path | None = None) -> RepairReport:
        """Prune ``model`` by ``clean``.

        Masks lie on the weights of batch norms, or of other affine norms; in a network without any, on those
        of its convolutions and hidden linear layers. A pruned neuron's weight is zero, its bias stays.
        Raises UntrojanError for a network without such layers, too few images, or where training does.
        """
        masked, repaired = trainable(model), trainable(model)
        working, held = held_out(clean, self.held_out, self.seed, "anp")
        layers = neurons(masked, working)
        masked.requires_grad_(False)
        masks = self._learn(masked, layers, working, checkpoint, weights_fingerprint(model))
        chosen, looks = self._threshold(repaired, masks, held)
        pruned = _prune(repaired, masks, chosen)
        return RepairReport(
            repaired,
            {
                "threshold": chosen,
                "looks": looks,
                "pruned": {path: rows for path, rows in pruned.items() if rows},
                "neurons": sum(len(mask) for mask in masks.values()),
                "masks": {path: mask.tolist() for path, mask in masks.items()},
            },
        )

    def _learn(
        self,
        model: Classifier,
        layers: dict[str, nn.Module],
        working: ImageSet,
        checkpoint: Path | None,
        fingerprint: str,
    ) -> dict[str, Tensor]:
        """Masks (C,) by layer. ``model`` is spent: masks hang on it, and its statistics move."""
        masks = [nn.Parameter(torch.ones(_width(layer), device=model.device)) for layer in layers.values()]
        model.masks = nn.ParameterList(masks)
        recipe = Recipe(
            epochs=epochs_for(self.steps, len(working), self.batch_size), batch_size=self.batch_size,
            optimizer="sgd", learning_rate=self.learning_rate, precision=model.precision,
        )  # fmt: skip

        def loss(model: Classifier, images: Tensor, labels: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
            zeros = [torch.zeros_like(mask) for mask in masks]
            logits = functional_call(model, masked_weights(layers, masks, zeros, zeros), (images,))
            value = F.cross_entropy(logits, labels)
            if self.epsilon == 0 or self.trade_off == 1:
                return value, logits
            worst = masked_weights(layers, masks, *self._worst(model, layers, masks, images, labels))
            perturbed = F.cross_entropy(functional_call(model, worst, (images,)), labels)
            return self.trade_off * value + (1 - self.trade_off) * perturbed, logits

        def clip(_: Classifier) -> None:
            with torch.no_grad():
                for mask in masks:
                    mask.clamp_(0, 1)

        train(
            model, working, recipe, seed=self.seed, checkpoint=checkpoint, loss=loss, after_step=clip,
            method=f"{self} {fingerprint}", freeze_statistics=not self.batch_statistics,
            description="learning masks",
        )  # fmt: skip
        return {path: mask.detach().cpu() for path, mask in zip(layers, masks, strict=True)}

    def _worst(
        self,
        model: Classifier,
        layers: dict[str, nn.Module],
        masks: Sequence[Tensor],
        images: Tensor,
        labels: Tensor,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Perturbations of weights and biases, drawn and then moved along the loss gradient's sign."""
        fixed, count = [mask.detach() for mask in masks], len(masks)
        drawn = [(2 * torch.rand(mask.shape) - 1).to(mask) * self.epsilon for mask in (*fixed, *fixed)]
        for _ in range(self.perturbation_steps):
            drawn = [noise.requires_grad_() for noise in drawn]
            weights = masked_weights(layers, fixed, drawn[:count], drawn[count:])
            value = F.cross_entropy(functional_call(model, weights, (images,)), labels)
            # A layer without a bias has no use for that bias's perturbation.
            found = torch.autograd.grad(value, drawn, allow_unused=True, materialize_grads=True)
            length = self.epsilon / self.perturbation_steps
            drawn = [(n + length * g.sign()).detach() for n, g in zip(drawn, found, strict=True)]
        return drawn[:count], drawn[count:]

    def _threshold(
        self, model: Classifier, masks: dict[str, Tensor], held: ImageSet
    ) -> tuple[float | None, list[dict[str, Any]]]:
        """The last of the thresholds before accuracy falls too far; None where the first is too much."""
        before = float((predictions_of(model, held.images) == held.labels).double().mean())
        looks: list[dict[str, Any]] = [{"threshold": None, "pruned": 0, "benign_accuracy": before}]
        chosen = None
        for threshold in THRESHOLDS:
            count = sum(int((mask <= threshold).sum()) for mask in masks.values())
            accuracy = looks[-1]["benign_accuracy"]
            if count > looks[-1]["pruned"]:
                tried = trainable(model)
                _prune(tried, masks, threshold)
                accuracy = float((predictions_of(tried, held.images) == held.labels).double().mean())
            looks.append({"threshold": threshold, "pruned": count, "benign_accuracy": accuracy})
            if accuracy < before - self.tolerance:
                break
            chosen = threshold
        return chosen, looks


def neurons(model: Classifier, data: ImageSet) -> dict[str, nn.Module]:
    """The layers whose output channels are pruned, by path."""
    norms = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
    found: dict[str, nn.Module] = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, norms) and module.weight is not None
    }
    if not found:
        found.update(weighted_layers(model, to_float(data.images[:1], model.device)))
    if not found:
        raise UntrojanError("anp masks norms, convolutions or hidden linear layers: this network has none")
    for path, layer in found.items():
        if "weight" not in layer._parameters:
            raise UntrojanError(
                f"anp cannot mask {path}, which computes its weight anew: make it a plain one"
            )
    return found


def _width(layer: nn.Module) -> int:
    assert isinstance(layer.weight, Tensor)
    return len(layer.weight)


@torch.no_grad()
def _prune(model: Classifier, masks: dict[str, Tensor], threshold: float | None) -> dict[str, list[int]]:
    """Zero the weights of neurons whose mask is ``threshold`` or less; which they are, by layer."""
    pruned = {}
    for path, mask in masks.items():
        chosen = mask <= threshold if threshold is not None else torch.zeros_like(mask, dtype=torch.bool)
        weight = model.get_submodule(path).weight
        assert isinstance(weight, Tensor)
        weight[chosen.to(weight.device)] = 0
        pruned[path] = chosen.nonzero().flatten().tolist()
    return pruned
