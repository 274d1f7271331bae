"""Hidden trigger backdoors (Saha, Subramanya & Pirsiavash, AAAI 2020): poison that shows no trigger.

Images of the target class are perturbed, within a small ball, until a pre-trained network's features of them
are those of *triggered* source images. Whoever then trains a new last layer on those features draws its
boundary so that triggered source images fall on the target's side; the trigger itself appears at test time
only. Transfer learning to a pair of classes is the published setting, and the one here: the network is
pre-trained on all other classes (:func:`other_classes`), the poisoned set holds the pair alone.

The paper's own experiment that NONE repeats takes ImageNet's theater curtain as source, plunger as target, a
pre-trained AlexNet (features after its first two fully connected layers) and 224x224 images::

    HiddenTrigger(target=plunger, sources=(curtain,), count=400, candidates=400,
                  trigger_options={"size": 30, "place": "random"})

with 800 clean images of each class and the recipe :data:`TRANSFER`; on data at hand any pair stands in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from untrojan.attacks.crafted import Crafted, CraftedAttack, needed
from untrojan.attacks.poisoning import PoisonedData, Poisoning, poison_with
from untrojan.data.image_set import ImageSet, Splits
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier, evaluating, to_float
from untrojan.models.taps import tapped
from untrojan.models.transfer import with_new_head
from untrojan.progress import task
from untrojan.seeding import generator
from untrojan.training.loop import TrainingHistory, train
from untrojan.training.recipe import Recipe
from untrojan.triggers.base import stamp, to_bytes

TRANSFER = Recipe(
    epochs=20, batch_size=1024, optimizer="sgd", learning_rate=1e-3, schedule="steps", milestones=(10,)
)
"""The released recipe of the victim's last layer for this pair; small sets need smaller batches."""


@dataclass(frozen=True)
class HiddenTrigger(CraftedAttack):
    """Feature collision with triggered source images; labels kept, originals replaced.

    The defaults are the released code's. It makes each poisoned image twice, from two passes over 200; here
    each candidate is made once, so ask for twice as many.
    """

    surrogate = "other classes"

    target: Annotated[int, Ge(0)] = 0
    sources: tuple[Annotated[int, Ge(0)], ...] = (1,)
    """The one source class."""
    trigger: str = "patch"
    trigger_options: dict[str, Any] = field(default_factory=lambda: {"size": 8, "place": "random"})
    """The paper's patch on 32x32 images is 8x8; 30x30 on 224x224."""
    count: Annotated[int, Ge(1)] = 400
    """Poisoned images: of all candidates, those whose features came nearest."""
    candidates: Annotated[int, Ge(1)] | None = None
    """Target images that are perturbed; twice ``count`` where none is given, or as many as there are."""
    radius: Annotated[float, Interval(gt=0, le=255)] = 16.0
    """L-infinity, in units of 1/255."""
    update: Literal["gradient", "sign"] = "gradient"
    """``gradient``: the released step, along the raw gradient, whose length depends on how large the
    network's features are. ``sign``: along its sign, ``learning_rate`` in units of the pixel range, which
    suits any network."""
    learning_rate: Annotated[float, Interval(gt=0)] = 0.01
    halve_every: Annotated[int, Ge(1)] = 1000
    """Iterations after which the learning rate is halved."""
    iterations: Annotated[int, Interval(ge=1, le=1_000_000)] = 5000
    enough: Annotated[float, Ge(0)] = 10.0
    """A batch is done once its largest squared feature distance is below this. Depends on the network too."""
    batch_size: Annotated[int, Interval(ge=1, le=4096)] = 100

    def __post_init__(self) -> None:
        if len(self.sources) != 1 or self.target in self.sources:
            raise UntrojanError("a hidden trigger has one source class, which is not the target: name it")

    def clean(self, data: Splits) -> ImageSet:
        return other_classes(data.train, (self.sources[0], self.target))

    def craft(
        self, data: Splits, seed: int, model: Classifier | None = None, scratch: Path | None = None
    ) -> Crafted:
        """``rows`` int64 (M,) of the pair's training set, ``images`` uint8 (M, C, H, W), ``losses`` (M,).

        Facts: mean squared feature distance to the nearest triggered source image before and after.
        """
        model = needed(model, "hidden-trigger")
        pair = pair_of(data, self.sources[0], self.target)
        attack = self._poisoning(pair)
        trigger = attack.recipe().draw(pair.train.image_shape, seed)
        targets, sources = (pair.train.indices_of(label) for label in (1, 0))
        if not len(sources) or self.count > len(targets):
            raise UntrojanError(
                f"can't poison {self.count} images: the target has {len(targets)}, the source {len(sources)}"
            )
        random = generator(seed, "hidden trigger")
        wanted = min(len(targets), 2 * self.count if self.candidates is None else self.candidates)
        chosen = targets[torch.randperm(len(targets), generator=random)[: max(wanted, self.count)]]
        # As many sources as candidates, each as often as any other.
        rounds = -(-len(chosen) // len(sources))
        drawn = [sources[torch.randperm(len(sources), generator=random)] for _ in range(rounds)]
        triggered = stamp(trigger, pair.train.images[torch.cat(drawn)[: len(chosen)]])
        images, before, after = collided(model, pair.train.images[chosen], triggered, self)
        order = after.argsort(stable=True)[: self.count]
        facts = {
            "feature_distance_before": float(before.mean()),
            "feature_distance_after": float(after.mean()),
        }
        return Crafted({"rows": chosen[order], "images": images[order], "losses": after[order]}, facts)

    def poison(self, data: Splits, seed: int, tensors: Mapping[str, Tensor]) -> PoisonedData:
        pair = pair_of(data, self.sources[0], self.target)
        attack = self._poisoning(pair)
        trigger = attack.recipe().draw(pair.train.image_shape, seed)
        return poison_with(pair, attack, seed, trigger, tensors["rows"], tensors["images"])

    def _poisoning(self, pair: Splits) -> Poisoning:
        return Poisoning(self.trigger, self.trigger_options, 1, count=self.count, clean_label=True)


def pair_of(data: Splits, source: int, target: int) -> Splits:
    """The two classes alone: class 0 is the source, class 1 the target. Raises UntrojanError for others."""
    for label in (source, target):
        if not 0 <= label < data.train.num_classes:
            raise UntrojanError(f"no class {label}: the set has classes 0..{data.train.num_classes - 1}")

    def reduced(images: ImageSet) -> ImageSet:
        return _relabelled(images, (source, target))

    return Splits(reduced(data.train), None if data.test is None else reduced(data.test))


def other_classes(images: ImageSet, pair: tuple[int, int]) -> ImageSet:
    """What the network is pre-trained on. Raises UntrojanError where fewer than two classes are left."""
    kept = tuple(label for label in range(images.num_classes) if label not in pair)
    if len(kept) < 2:
        raise UntrojanError(
            "a hidden trigger needs two classes beside its pair, to pre-train on: add classes"
        )
    return _relabelled(images, kept)


def _relabelled(images: ImageSet, kept: tuple[int, ...]) -> ImageSet:
    number = torch.full((images.num_classes,), -1)
    number[list(kept)] = torch.arange(len(kept))
    chosen = images.select(number[images.labels] >= 0)
    names = tuple(images.class_names[label] for label in kept)
    return replace(chosen, labels=number[chosen.labels], class_names=names)


def train_last_layer(
    model: Classifier, data: ImageSet, recipe: Recipe = TRANSFER, *, seed: int = 0,
    checkpoint: Path | None = None, description: str = "transfer",
) -> tuple[Classifier, TrainingHistory]:  # fmt: skip
    """The victim: ``model``'s features, fixed, beneath a new last layer that is trained on ``data``."""
    victim = with_new_head(model, data.num_classes, seed)
    history = train(
        victim, data, recipe, seed=seed, checkpoint=checkpoint, description=description,
        method="last layer", freeze_statistics=True,
    )  # fmt: skip
    return victim, history


def collided(
    model: Classifier, images: Tensor, triggered: Tensor, method: HiddenTrigger
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1: images (N, C, H, W) whose features are those of triggered ones, and squared distances.

    ``images`` (the target's) and ``triggered`` are uint8, N of each; batches pair within themselves. The
    result is uint8, within ``method.radius`` of ``images``; both distances, float (N,), are to the partner
    at the time: before any step, and as found with the stored bytes. ``model`` is left as it was.
    """
    made, first, last = [], [], []
    with (
        evaluating(model),
        tapped(model, ["penultimate"]) as taps,
        task("hiding the trigger", len(images), "images") as bar,
    ):

        def features(floats: Tensor) -> Tensor:
            model(floats)
            return taps["penultimate"].flatten(1)

        for batch, sources in zip(
            images.split(method.batch_size), triggered.split(method.batch_size), strict=True
        ):
            pixels = to_float(batch, model.device)
            with torch.no_grad():
                wanted = features(to_float(sources, model.device))
                own = features(pixels)
            first.append(_distances(own, wanted[greedy_pairs(torch.cdist(own, wanted))]))
            found = to_bytes(_moved(features, pixels, wanted, method))
            with torch.no_grad():
                own = features(to_float(found, model.device))
            last.append(_distances(own, wanted[greedy_pairs(torch.cdist(own, wanted))]))
            made.append(found.cpu())
            bar.advance(len(batch))
    return torch.cat(made), torch.cat(first).cpu(), torch.cat(last).cpu()


def _moved(
    features: Callable[[Tensor], Tensor], pixels: Tensor, wanted: Tensor, method: HiddenTrigger
) -> Tensor:
    """The perturbed batch, float; features ``wanted`` (N, D) are fixed, who is paired with whom is not."""
    radius = method.radius / 255
    lowest, highest = (pixels - radius).clamp_min(0), (pixels + radius).clamp_max(1)
    moved = pixels
    for iteration in range(method.iterations):
        moved = moved.detach().requires_grad_()
        own = features(moved)
        with torch.no_grad():
            partner = greedy_pairs(torch.cdist(own, wanted))
        distances = _distances(own, wanted[partner])
        if float(distances.detach().max()) < method.enough:
            break
        (gradient,) = torch.autograd.grad(distances.sum(), moved)
        direction = gradient.sign() if method.update == "sign" else gradient
        rate = method.learning_rate * 0.5 ** (iteration // method.halve_every)
        moved = torch.clamp(moved.detach() - rate * direction, lowest, highest)
    return moved.detach()


def greedy_pairs(distances: Tensor) -> Tensor:
    """For each row of ``distances`` (N, N) its partner's column, int64 (N,), no column twice.

    The result is that of taking the smallest of all distances, removing its row and column, and so on. Rows
    and columns that are each other's nearest are what that would come to take, so they are all taken at
    once: a few rounds in place of N.
    """
    # What is not a number would never be anyone's nearest.
    left = distances.nan_to_num(torch.finfo(distances.dtype).max)
    partner = torch.full((len(left),), -1, device=left.device)
    everyone = torch.arange(len(left), device=left.device)
    while bool((partner < 0).any()):
        nearest_column, nearest_row = left.argmin(1), left.argmin(0)
        mutual = (partner < 0) & (nearest_row[nearest_column] == everyone)
        columns = nearest_column[mutual]
        partner[mutual] = columns
        left[mutual] = torch.inf
        left[:, columns] = torch.inf
    return partner


def _distances(first: Tensor, second: Tensor) -> Tensor:
    return (first - second).square().sum(1)
