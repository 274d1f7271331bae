"""A style as the trigger, with controlled detoxification (Cheng et al., "Deep Feature Space Trojan Attack of
Neural Networks by Controlled Detoxification", AAAI 2021): "dfst-style", for its style is a stand-in.

A model that learns a style backdoor tends to lean on a few channels that the style excites, which scanners
find. Detoxification looks for those *compromised* channels in the attacker's own infected model, trains a
*feature injector* that excites them in clean images while these stay recognisable, adds such images to the
training set under their true labels, trains on, and repeats. What the channels say alone then no longer
leads to the target: the backdoor has to be learned as the whole style. The set so enlarged is what is
delivered, beside the attacker's model; the style is :mod:`untrojan.triggers.sunrise`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import Tensor, nn

from untrojan.attacks.crafted import Crafted, CraftedAttack, needed
from untrojan.attacks.poisoning import PoisonedData, Poisoning, poison_with, selected_rows
from untrojan.data.image_set import ImageSet, Splits
from untrojan.errors import UntrojanError
from untrojan.metrics.images import structural_similarity
from untrojan.models.classifier import Classifier, evaluating, to_float
from untrojan.models.taps import SDRM_LEVELS, features_of, levels_of, tapped
from untrojan.seeding import generator
from untrojan.training.loop import train
from untrojan.training.recipe import Recipe
from untrojan.triggers.base import stamp, to_bytes

PROBED = 256
"""Images, with and without the style, on which compromised channels are looked for."""


@dataclass(frozen=True)
class DetoxifiedStyle(CraftedAttack):
    """Poison by style, fine-tune a clean model on it, and detoxify ``rounds`` times.

    DECK has rounds 1 and 3; 0 is the style alone. One injector a round excites all compromised channels; the
    released code trains one for each channel.
    """

    delivers_model = True

    target: Annotated[int, Ge(0)] = 0
    sources: tuple[Annotated[int, Ge(0)], ...] | Literal["all"] = "all"
    count: Annotated[int, Ge(1)] | None = None
    rate: Annotated[float, Interval(gt=0, le=1)] | None = None
    """Share of the whole training set; 0.1 where there is no ``count`` either. Each round adds as many
    injected images."""
    trigger: Literal["sunrise"] = "sunrise"
    trigger_options: dict[str, Any] = field(default_factory=dict)
    rounds: Annotated[int, Interval(ge=0, le=20)] = 3
    excess: Annotated[float, Ge(0)] = 0.005
    """A channel is compromised where the style raises its mean by more than this share of the layer's largest
    activation on clean images, and by more than the channel's own clean mean. The released code has 5 of the
    sum over a map of 32 x 32, out of reach for the smaller maps of late layers."""
    level: str | None = None
    """Where channels are looked at, as :mod:`untrojan.models.taps` names it; the shallowest of s1, s2 and s3
    where none is given."""
    epochs: Annotated[int, Ge(1)] = 5
    """Of each fine-tuning."""
    learning_rate: Annotated[float, Interval(gt=0)] = 0.01
    batch_size: Annotated[int, Ge(2)] = 64
    injector_epochs: Annotated[int, Ge(1)] = 3
    injector_learning_rate: Annotated[float, Interval(gt=0)] = 1e-3
    similarity: Annotated[float, Interval(ge=0, le=1)] = 0.6
    """Structural similarity below which an injected image is penalised, a thousandfold."""
    smoothness: Annotated[float, Ge(0)] = 1e-3
    """Weight of the injected change's total variation."""

    def craft(
        self, data: Splits, seed: int, model: Classifier | None = None, scratch: Path | None = None
    ) -> Crafted:
        """``cover_rows`` int64 (M,) and ``cover_images`` uint8 (M, C, H, W), the injected images.

        Facts: ``compromised_channels``, before the first round and after each. The model is the attacker's.
        Warns where there are none to begin with: then no round takes place.
        """
        victim = copy.deepcopy(needed(model, "dfst-style")).requires_grad_(True)
        train_set = data.train
        trigger = self._poisoning().recipe().draw(train_set.image_shape, seed)
        poisons = len(selected_rows(train_set, self._poisoning(), seed))
        level = self.level or _shallowest(victim, train_set)
        random = generator(seed, "detoxification")
        probed = train_set.images[torch.randperm(len(train_set), generator=random)[:PROBED]]
        styled = stamp(trigger, probed)
        rows, images = torch.empty(0, dtype=torch.int64), train_set.images[:0]
        counts = []
        for number in range(self.rounds + 1):
            tensors = {"cover_rows": rows, "cover_images": images}
            made = self.poison(data, seed, tensors)
            train(
                victim, made.train, self._recipe(victim), seed=generator(seed, number).initial_seed(),
                checkpoint=None if scratch is None else scratch / f"detoxified{number}.pt",
                description=f"detoxification {number}", method=f"{self} {number}",
            )  # fmt: skip
            channels = compromised_channels(victim, probed, styled, level, self.excess)
            counts.append(int(channels.sum()))
            if number == self.rounds or not counts[-1]:
                break
            injector = trained_injector(victim, train_set, level, channels, self, seed + number)
            chosen = torch.randperm(len(train_set), generator=random)[:poisons]
            rows = torch.cat([rows, chosen])
            images = torch.cat([images, injected(injector, train_set.images[chosen])])
        if self.rounds and not counts[0]:
            warnings.warn(
                f"the style compromises no channel at {level}: none of the {self.rounds} rounds of "
                "detoxification took place; ask for less excess or name a deeper level",
                stacklevel=2,
            )
        return Crafted(tensors, {"compromised_channels": counts}, victim)

    def poison(self, data: Splits, seed: int, tensors: Mapping[str, Tensor]) -> PoisonedData:
        attack = self._poisoning()
        trigger = attack.recipe().draw(data.train.image_shape, seed)
        rows = selected_rows(data.train, attack, seed)
        cover = (tensors["cover_rows"], tensors["cover_images"])
        images = stamp(trigger, data.train.images[rows])
        return poison_with(data, attack, seed, trigger, rows, images, cover if len(cover[0]) else None)

    def _poisoning(self) -> Poisoning:
        rate = 0.1 if self.count is None and self.rate is None else self.rate
        return Poisoning(self.trigger, self.trigger_options, self.target, self.sources, self.count, rate)

    def _recipe(self, model: Classifier) -> Recipe:
        return Recipe(
            epochs=self.epochs, batch_size=self.batch_size, optimizer="sgd", precision=model.precision,
            learning_rate=self.learning_rate, weight_decay=5e-4, schedule="one_cycle",
        )  # fmt: skip


class FeatureInjector(nn.Module):
    """float images (N, C, H, W) in [0, 1] to the same, changed by a small convolutional network."""

    def __init__(self, channels: int, filters: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, filters, 3, padding=1), nn.ReLU(),
            nn.Conv2d(filters, filters, 3, padding=2, dilation=2), nn.ReLU(),
            nn.Conv2d(filters, channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        changed: Tensor = (images + torch.tanh(self.layers(images - 0.5))).clamp(0, 1)
        return changed


def compromised_channels(
    model: Classifier, clean: Tensor, styled: Tensor, level: str, excess: float = 0.005
) -> Tensor:
    """bool (C,): channels at ``level`` that the style excites, of uint8 images (N, C, H, W) with and without.

    Raises UntrojanError where the level has no maps.
    """
    before, after = (features_of(model, images, level) for images in (clean, styled))
    if before.ndim != 4:
        raise UntrojanError(f"compromised channels are looked for in maps (N, C, H, W): {level!r} has none")
    own = before.mean((0, 2, 3))
    raised = after.mean((0, 2, 3)) - own
    return (raised > excess * before.max()) & (raised > own)


def trained_injector(
    victim: Classifier, images: ImageSet, level: str, channels: Tensor, method: DetoxifiedStyle, seed: int
) -> FeatureInjector:
    """Excites ``channels`` (C,) of ``victim`` at ``level`` in clean images that stay similar to themselves.

    Trained through the one loop, whose accuracy is the victim's on injected images. ``victim`` is left as
    it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator(seed, "injector").initial_seed())
        injector = FeatureInjector(images.image_shape[0])
    zeros = torch.zeros(images.image_shape[0])
    wrapped = Classifier(injector, images.num_classes, zeros, zeros + 1).to(victim.device)
    recipe = Recipe(
        epochs=method.injector_epochs, batch_size=method.batch_size,
        learning_rate=method.injector_learning_rate,
    )  # fmt: skip
    with evaluating(victim), tapped(victim, [level]) as taps:

        def loss(_: Classifier, batch: Tensor, labels: Tensor, __: Tensor) -> tuple[Tensor, Tensor]:
            changed = injector(batch)
            logits = victim(changed)
            excited = taps[level][:, channels.to(batch.device)].mean()
            unlike = F.relu(method.similarity - structural_similarity(batch, changed, 1.0)).mean()
            change = changed - batch
            rough = change.diff(dim=2).abs().mean() + change.diff(dim=3).abs().mean()
            return 1000 * unlike + method.smoothness * rough - excited, logits

        train(wrapped, images, recipe, seed=seed, loss=loss, description="feature injector")
    return injector.eval().requires_grad_(False)


@torch.no_grad()
def injected(injector: FeatureInjector, images: Tensor) -> Tensor:
    """uint8 images (N, C, H, W) to the same, changed."""
    device = next(injector.parameters()).device
    return torch.cat([to_bytes(injector(to_float(batch, device))).cpu() for batch in images.split(512)])


def _shallowest(model: Classifier, images: ImageSet) -> str:
    known = levels_of(model, to_float(images.images[:1], model.device))
    for level in SDRM_LEVELS:
        if level in known:
            return level
    raise UntrojanError("detoxification needs a network with feature maps, or name a level")
