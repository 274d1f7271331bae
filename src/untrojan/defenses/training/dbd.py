"""DBD: features are learned without labels, so that wrong labels cannot gather poisoned images in them.

Huang et al., "Backdoor Defense via Decoupling the Training Process", ICLR 2022.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn

from untrojan.data.image_set import ImageSet
from untrojan.data.views import strong_view
from untrojan.defenses.training.report import TrainingReport
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier, logits_of, to_float
from untrojan.models.registry import build_for
from untrojan.models.taps import features_of, levels_of, tapped
from untrojan.seeding import generator
from untrojan.training.loop import Epoch, train
from untrojan.training.recipe import Recipe

PROJECTED = 128
"""Width of the projection that the contrastive loss is taken on (SimCLR, section 2.1)."""


def contrastive_loss(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """SimCLR's NT-Xent (equation 1), a scalar: each view is to find its partner among all others.

    ``first`` and ``second`` are (N, D), two views of each image, of any length.
    """
    both = F.normalize(torch.cat([first, second]), dim=1)
    similarity = both @ both.T / temperature
    similarity.fill_diagonal_(-torch.inf)
    partner = torch.arange(len(both), device=both.device).roll(len(first))
    return F.cross_entropy(similarity, partner)


def symmetric_cross_entropy(logits: Tensor, labels: Tensor, forward: float, reverse: float) -> Tensor:
    """(N,) ``forward`` CE(label, p) + ``reverse`` CE(p, label), with log 0 taken as log 1e-4.

    Wang et al., "Symmetric Cross Entropy for Robust Learning with Noisy Labels", ICCV 2019, section 3.2; the
    constant is that of DBD's code. The reverse term is -log 1e-4 (1 - p_label): bounded, whatever the label.
    """
    wrong = 1 - logits.softmax(1).gather(1, labels[:, None])[:, 0]
    bound = -torch.log(torch.tensor(1e-4)).to(logits)
    return forward * F.cross_entropy(logits, labels, reduction="none") + reverse * bound * wrong


def credible_images(losses: Tensor, labels: Tensor, share: float, by_class: bool) -> Tensor:
    """bool (N,): the ``share`` of images with the least loss, (N,); of each class, or of all together.

    Of all together, a class that would be left without any keeps its own least one.
    """
    chosen = torch.zeros(len(losses), dtype=torch.bool)
    order = losses.argsort(stable=True)
    if not by_class:
        chosen[order[: max(1, round(share * len(losses)))]] = True
    for label in labels.unique():
        own = order[labels[order] == label]
        if by_class or not bool(chosen[own].any()):
            chosen[own[: max(1, round(share * len(own)) if by_class else 1)]] = True
    return chosen


def sharpened(probabilities: Tensor, temperature: float) -> Tensor:
    """(N, K) distributions made more certain: p^(1/T), normalised (MixMatch, equation 7)."""
    powered = probabilities ** (1 / temperature)
    return powered / powered.sum(1, keepdim=True)


class _Progress(nn.Module):
    """What semi-supervised training has come to. Buffers of the model, so that a checkpoint holds them."""

    def __init__(self, credible: Tensor) -> None:
        super().__init__()
        self.credible: Tensor
        self.epoch: Tensor
        self.register_buffer("credible", credible)
        self.register_buffer("epoch", torch.zeros(()))


@dataclass(frozen=True)
class DBD:
    """Decoupling: contrastive features, a head by symmetric cross-entropy, MixMatch on credible labels.

    The defaults of the epochs are small-machine ones; the paper's are ``contrastive_epochs`` 1000 at batches
    of 512 and a recipe of 190 epochs. Nothing here is about backdoors but the split: an image whose label the
    features do not bear out keeps its pixels and loses its label.
    """

    contrastive_epochs: Annotated[int, Ge(1)] = 60
    contrastive_batch: Annotated[int, Gt(1)] = 256
    contrastive_rate: Annotated[float, Gt(0)] = 1e-3
    """Peak of Adam's one-cycle; the code takes SGD from .4 down a cosine, for batches of 512."""
    contrastive_temperature: Annotated[float, Gt(0)] = 0.5
    head_epochs: Annotated[int, Ge(1)] = 10
    forward_weight: Annotated[float, Ge(0)] = 0.1
    reverse_weight: Annotated[float, Ge(0)] = 1.0
    credible: Annotated[float, Interval(gt=0, lt=1)] = 0.5
    """Share of the images whose labels are believed."""
    by_class: bool = True
    """Whether that is of each class. The paper splits all as one, which starves classes that are hard to tell
    where features are learned from few images: training on the split then starves them further."""
    renewed: bool = True
    """Whether the split is made anew after each epoch of fine-tuning, as the code does."""
    learning_rate: Annotated[float, Gt(0)] = 2e-3
    """Adam's, for the head and for fine-tuning."""
    unlabelled_weight: Annotated[float, Ge(0)] = 15.0
    """Reached in equal steps from 0, an epoch each."""
    temperature: Annotated[float, Gt(0)] = 0.5
    mixing: Annotated[float, Gt(0)] = 0.75
    """Both parameters of the Beta distribution that MixUp draws from."""
    seed: int = 0

    def __call__(
        self, data: ImageSet, architecture: str, recipe: Recipe, *, checkpoint: Path | None = None,
        device: str = "cpu",
    ) -> TrainingReport:  # fmt: skip
        """Train a new classifier on ``data``; the recipe's epochs are those of fine-tuning, its augmentation
        that of all but the contrastive stage. ``dropped`` are the images whose label was not believed in the
        end. Raises UntrojanError as training does, and for a network without a classification layer."""
        model = build_for(data, architecture, precision=recipe.precision, seed=self.seed).to(device)
        adam = replace(
            recipe, optimizer="adam", learning_rate=self.learning_rate, weight_decay=0.0, milestones=(),
            schedule="constant",
        )  # fmt: skip
        places = [None] * 3 if checkpoint is None else [_numbered(checkpoint, n) for n in range(3)]
        stages = self._learn_features(model, data, recipe, places[0])
        stages += self._learn_head(model, data, replace(adam, epochs=self.head_epochs), places[1])
        credible = self._split(model, data)
        first = int(credible.sum())
        more, credible = self._fine_tune(model, data, adam, credible, places[2])
        evidence = {
            "credible": int(credible.sum()),
            "credible_at_first": first,
            "credible_by_class": torch.bincount(data.labels[credible], minlength=data.num_classes).tolist(),
        }
        return TrainingReport(model, ~credible, stages + more, evidence)

    def _learn_features(
        self, model: Classifier, data: ImageSet, recipe: Recipe, checkpoint: Path | None
    ) -> list[dict[str, float]]:
        """Stage 1: SimCLR. Labels play no part."""
        width = features_of(model, data.images[:1]).shape[1]
        model.projection = _projection(width, self.seed).to(model.device)
        how = replace(
            recipe, epochs=self.contrastive_epochs, batch_size=self.contrastive_batch, optimizer="adam",
            learning_rate=self.contrastive_rate, schedule="one_cycle", milestones=(), weight_decay=1e-4,
            crop_padding=0, flip=False, rotation=0.0,
        )  # fmt: skip

        def views(
            images: Tensor, labels: Tensor, _: Tensor, random: torch.Generator
        ) -> tuple[Tensor, Tensor]:
            return strong_view(torch.cat([images, images]), random, flip=recipe.flip), labels

        def loss(model: Classifier, images: Tensor, labels: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
            logits = model(images)
            first, second = model.projection(taps["penultimate"]).chunk(2)  # type: ignore[operator]
            return contrastive_loss(first, second, self.contrastive_temperature), logits[: len(labels)]

        with tapped(model, ["penultimate"]) as taps:
            history = train(
                model, data, how, seed=self.seed, checkpoint=checkpoint, loss=loss, augmented_transform=views,
                description="learning features", method=f"{self} features",
            )  # fmt: skip
        del model.projection
        return history.to_json()

    def _learn_head(
        self, model: Classifier, data: ImageSet, recipe: Recipe, checkpoint: Path | None
    ) -> list[dict[str, float]]:
        """Stage 2: the classification layer alone, on frozen features."""
        flags = {weight: weight.requires_grad for weight in model.parameters()}
        head = classification_layer(model, to_float(data.images[:1], model.device))

        def loss(model: Classifier, images: Tensor, labels: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
            logits = model(images)
            return self._head_loss(logits, labels).mean(), logits

        model.requires_grad_(False)
        head.requires_grad_(True)
        history = train(
            model, data, recipe, seed=self.seed + 1, checkpoint=checkpoint, loss=loss, freeze_statistics=True,
            description="learning the head", method=f"{self} head",
        )  # fmt: skip
        for weight, flag in flags.items():
            weight.requires_grad_(flag)
        return history.to_json()

    def _head_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return symmetric_cross_entropy(logits, labels, self.forward_weight, self.reverse_weight)

    def _split(self, model: Classifier, data: ImageSet) -> Tensor:
        losses = self._head_loss(logits_of(model, data.images), data.labels)
        return credible_images(losses, data.labels, self.credible, self.by_class)

    def _fine_tune(
        self, model: Classifier, data: ImageSet, recipe: Recipe, credible: Tensor, checkpoint: Path | None
    ) -> tuple[list[dict[str, float]], Tensor]:
        """Stage 3: MixMatch with the credible images' labels; the split it ended with."""
        progress = _Progress(credible).to(model.device)
        model.progress = progress

        def twice(images: Tensor, labels: Tensor, _: torch.Generator) -> tuple[Tensor, Tensor]:
            return torch.cat([images, images]), labels

        def loss(model: Classifier, images: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            weight = self.unlabelled_weight * float(progress.epoch) / recipe.epochs
            return self.mixmatch_loss(model, images, labels, progress.credible[rows], weight)

        def after_epoch(number: int, _: Epoch) -> None:
            progress.epoch.fill_(number)
            if self.renewed and number < recipe.epochs:
                progress.credible.copy_(self._split(model, data))

        history = train(
            model, data, recipe, seed=self.seed + 2, checkpoint=checkpoint, loss=loss, batch_transform=twice,
            after_epoch=after_epoch, description="fine-tuning", method=f"{self} fine-tuning",
        )  # fmt: skip
        del model.progress
        return history.to_json(), progress.credible.cpu()

    def mixmatch_loss(
        self, model: Classifier, images: Tensor, labels: Tensor, credible: Tensor, weight: float
    ) -> tuple[Tensor, Tensor]:
        """Berthelot et al., "MixMatch", NeurIPS 2019, equations 2 to 5; logits (B, K) of the mixed images.

        ``images`` (2B, C, H, W) are two augmentations of each; ``labels`` (B,) count where ``credible`` (B,).
        """
        views = images.view(2, len(labels), *images.shape[1:])
        known, unknown = credible.nonzero().flatten(), (~credible).nonzero().flatten()
        with torch.no_grad():
            guesses = torch.zeros(0, model.num_classes, device=images.device)
            if len(unknown):
                logits = model(views[:, unknown].flatten(0, 1))
                guesses = sharpened(logits.softmax(1).view(2, len(unknown), -1).mean(0), self.temperature)
        own = F.one_hot(labels[known], model.num_classes).float()
        inputs = torch.cat([views[0, known], views[0, unknown], views[1, unknown]])
        targets = torch.cat([own, guesses, guesses])
        # Drawn on the CPU, whose random state a checkpoint holds.
        share = torch.distributions.Beta(self.mixing, self.mixing).sample((len(inputs), 1)).to(inputs)
        share = torch.maximum(share, 1 - share)
        other = torch.randperm(len(inputs)).to(inputs.device)
        pixels = share[:, :, None, None]
        logits = model(pixels * inputs + (1 - pixels) * inputs[other])
        targets = share * targets + (1 - share) * targets[other]
        cut = len(known)
        # A sum over no image is 0, its mean would be no number.
        labelled = -(targets[:cut] * logits[:cut].log_softmax(1)).sum() / max(cut, 1)
        apart = (logits[cut:].softmax(1) - targets[cut:]).square().sum()
        guessed = apart / max(targets[cut:].numel(), 1)
        in_order = torch.empty_like(logits[: len(labels)])
        in_order[torch.cat([known, unknown])] = logits[: len(labels)]
        return labelled + weight * guessed, in_order


def classification_layer(model: Classifier, image: Tensor) -> nn.Module:
    """The last linear or convolutional layer that runs; ``image`` is float (1, C, H, W) in [0, 1].

    Raises UntrojanError where there is none.
    """
    place = levels_of(model, image).get("penultimate")
    if place is None:
        raise UntrojanError(f"{model.architecture} has no linear or convolutional layer to train as a head")
    return model.get_submodule(place.path)


def _projection(width: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator(seed, "projection").initial_seed())
        return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, PROJECTED))


def _numbered(checkpoint: Path, stage: int) -> Path:
    return checkpoint.with_name(f"{stage}-{checkpoint.name}")
